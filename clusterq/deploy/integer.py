"""A network of scheme deploy in integers: slow, exact, and the yardstick of what is exported.

Every tensor between layers is codes `q` of 2 to 8 bits with a step `s` and a zero point `z`, for values `(q - z) * s`.
`fl` rounds to float32 (half to even), `rint` to a whole number (half to even). A code is made by

    q = clamp(rint(fl(t * m)) + z, low, high)           requantization

with a whole number t and a multiplier m that depend on what is in front of the quantizer:

    layer       t = fl(sum of (q_x - z_x) * (q_w - z_w) + b)       m = fl(fl(s_x * s_w) / s), one per channel
    sum         see below
    product     t = (q_a - z_a) * (q_b - z_b)                      m = fl(fl(s_a * s_b) / s)
    average     t = sum of (q_x - z_x) over the n values of a window   m = fl(s_x / fl(s * n))

The sum of a layer is an int32, b its int32 bias; `s_w` and the signs of `q_w - z_w` include BatchNorm
(`clusterq.nn.folding`). ReLU sets `low` to z, ReLU6 `high` to `rint(fl(6 * fl(1 / s))) + z` besides. A sum of two
tensors takes `rint(fl(fl((q_a - z_a) * fl(s_a / s)) + fl((q_b - z_b) * fl(s_b / s))))`. The input image, concatenations
and activation functions other than ReLU are functions of one value (a table of 256 entries except for the image),
computed as the twin computes them: `rint(fl(f(x) * fl(1 / s)))`. Max pooling, flatten, padding and their like move
codes. Logits are `fl(t * fl(s_x * s_w))`.

onnxruntime's QLinearConv, QGemm and QLinearGlobalAveragePool follow the same rule bit for bit. The twin computes the
same from products and sums in float32: with equal codes in front, its codes differ only where the exact quotient of a
layer, sum or average lies within `(n + 16) * 2^-24 * a` of a rounding boundary k + 1/2. There n is the number of terms
and a the sum of their magnitudes, bias included, divided by s: the bound of a float32 sum in any order (Higham 2002,
section 4.2) and of the roundings around it. The same holds for onnxruntime's QLinearAdd, whose order of roundings
depends on the processor.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from clusterq.deploy._grids import weight_grid
from clusterq.errors import ModelError
from clusterq.nn.folding import integer_norm_of, offset_of, source_of
from clusterq.nn.layers import QuantizedConv2d, QuantizedLinear
from clusterq.nn.quantizers import ActivationQuantizer
from clusterq.ops._fake_quant_reference import code_dtype
from clusterq.qat.places import Places, call_name, operands
from clusterq.qat.prepare import prepared_with
from clusterq.qat.trace import trace

_LARGEST_SUM = 2**31


@dataclass
class Codes:
    """Codes less their zero point, int64, and the step, float32 [1]."""

    centered: Tensor
    scale: Tensor

    def value(self) -> Tensor:
        return self.centered.float() * self.scale

    def moved(self, function: Any) -> Any:
        """The result of something that moves values about: Codes, or a list of them."""
        # `contiguous` is a call that only passes values on; views want it all the same.
        result = function(self.centered.double().contiguous())
        if isinstance(result, Tensor):
            return Codes(result.long(), self.scale)
        return [Codes(part.long(), self.scale) for part in result]


@dataclass
class Wide:
    """Whole numbers that await requantization.

    Attributes:
        total: int64.
        unit: value of 1, float32, broadcasts against `total`.
        count: values that an average is taken of.
        size: sum of the magnitudes of all terms, float64, where it is wanted.
        terms: their number.
    """

    total: Tensor
    unit: Tensor
    count: int = 1
    size: Tensor | None = None
    terms: int = 1

    def multiplier(self, scale: Tensor) -> Tensor:
        return self.unit / (scale * self.count)

    def value(self) -> Tensor:
        return self.total.float() * (self.unit / self.count)


@dataclass
class Sum:
    """Two tensors of codes to be added."""

    first: Codes
    second: Codes

    def value(self) -> Tensor:
        return self.first.value() + self.second.value()


@overload
def run_integer(student: nn.Module, images: Tensor) -> Tensor: ...
@overload
def run_integer(
    student: nn.Module, images: Tensor, *, return_codes: bool
) -> tuple[Tensor, dict[str, list[Tensor]]]: ...
@torch.no_grad()
def run_integer(student: nn.Module, images: Tensor, *, return_codes: bool = False) -> Any:
    """Logits of a network prepared with scheme deploy, computed in integers by the rules above.

    Args:
        student: from `clusterq.prepare`, with ranges; on the CPU, float32.
        images: [N, C, H, W], as the network wants them.
        return_codes: return (logits, codes) with the codes of every activation quantizer, uint8 or int8, one tensor per
            call, by name in execution order.

    Raises ModelError for a network of scheme paper, one with a part that has no form in integers (named), and one
    whose sums do not fit an int32.
    """
    if prepared_with(student).scheme != "deploy":
        raise ModelError("the network was prepared with scheme paper; run_integer wants scheme deploy")
    run = IntegerRun(student)
    result = run(images)
    return (result, run.codes) if return_codes else result


class IntegerRun:
    """One network in integers. Calling it runs it; the rest is for tests layer by layer.

    Args:
        student: see `run_integer`.
        sizes: note magnitudes of sums.

    Attributes:
        codes: of every activation quantizer, one tensor per call.
        wide: what each of them rounds.
        forced: codes less zero points by name of the quantizer, which what follows reads instead of `codes`.
    """

    def __init__(self, student: nn.Module, *, sizes: bool = False) -> None:
        self.sizes = sizes
        try:
            self.graph = trace(student)
        except ValueError as error:
            raise ModelError(str(error)) from error
        self.modules = dict(student.named_modules())
        self.places = Places(self.graph, self.modules)
        self.codes: dict[str, list[Tensor]] = {}
        self.wide: dict[str, list[Any]] = {}
        self.forced: dict[str, list[Tensor]] = {}

    def __call__(self, images: Tensor) -> Tensor:
        self.codes, self.wide = {}, {}
        values: dict[fx.Node, Any] = {}
        for node in self.graph.nodes:
            if self.places[node] == "result":
                result: Tensor = _mapped(node.args[0], lambda n: _value(values[n]))
                return result
            values[node] = self._run(node, values, images)
        raise AssertionError("a graph without a result")

    def _run(self, node: fx.Node, values: dict[fx.Node, Any], images: Tensor) -> Any:
        place = self.places[node]
        if place == "source":
            return images
        if place == "other":
            raise ModelError(f"{call_name(node)} has no form in integers")
        read = [values[operand] for operand in operands(node, place)]
        module: Any = self.modules.get(str(node.target)) if node.op == "call_module" else None
        if place == "layer":
            return self._layer(node, module, read[0])
        if place == "norm" or place == "passing":
            # The layer in front has computed it.
            return read[0]
        if place == "quantizer":
            return self._quantizer(str(node.target), module, read[0])
        if place == "size":
            return _call(node, {n: _shaped(values[n]) for n in node.all_input_nodes}, module)
        if place == "cat":
            value = {n: _value(values[n]) for n in node.all_input_nodes}
            return _call(node, value, module)
        if place == "moving":
            if node.target is operator.getitem and isinstance(read[0], (list, tuple)):
                index: Any = node.args[1]
                return read[0][index]
            rest = {n: values[n] for n in node.all_input_nodes[1:]}
            first = node.all_input_nodes[0]
            if not isinstance(read[0], Codes):
                return _call(node, {first: _value(read[0]).contiguous(), **rest}, module)
            return read[0].moved(lambda x: _call(node, {first: x, **rest}, module))
        codes = self._checked(node, read)
        if place == "add":
            return Sum(*codes)
        if place == "mul":
            a, b = codes
            total = a.centered * b.centered
            return Wide(total, a.scale * b.scale, size=total.abs().double())
        if place == "average":
            return _average(node, module, codes[0])
        if place == "function":
            return _call(node, {node.all_input_nodes[0]: codes[0].value(), **_parameters(node, values)}, module)
        raise AssertionError(place)

    def _checked(self, node: fx.Node, read: list[Any]) -> list[Codes]:
        if not all(isinstance(value, Codes) for value in read):
            raise ModelError(f"{call_name(node)} reads a tensor in floating point")
        return read

    def _layer(self, node: fx.Node, layer: QuantizedConv2d | QuantizedLinear, x: Any) -> Wide:
        if source_of(layer) is None or not isinstance(x, Codes):
            raise ModelError(f"{node.target}: reads a tensor in floating point, or several of different ranges")
        user = next(iter(node.users), None)
        norm = self.modules.get(str(user.target)) if user is not None and user.op == "call_module" else None
        norm = norm if norm is not None and integer_norm_of(norm) is layer else None
        grid = weight_grid(str(node.target), layer)
        offset, zeros = offset_of(layer, norm, grid.scale), grid.column(layer.weight)
        # Sums of whole numbers below 2^53 are exact in float64, in any order.
        weight = ((grid.codes(layer.weight).long() - zeros) * offset.gain.sign().reshape(zeros.shape)).double()
        inputs, bias = x.centered.double(), offset.code.double()
        total = _product(layer, inputs, weight, bias)
        if total.numel() and float(total.abs().max()) >= _LARGEST_SUM:
            raise ModelError(f"{node.target}: a sum does not fit an int32")
        size = _product(layer, inputs.abs(), weight.abs(), bias.abs()) if self.sizes else None
        column = [-1] + [1] * (total.dim() - 2) if isinstance(layer, QuantizedConv2d) else [-1]
        return Wide(total.long(), (x.scale * offset.scale).reshape(column), size=size, terms=weight[0].numel() + 1)

    def _quantizer(self, name: str, quantizer: ActivationQuantizer, x: Any) -> Codes:
        scale, zero_point, low, high = quantizer.qparams()
        scale, zero = scale.float(), zero_point.long()
        if quantizer.activation == "relu6":
            six = (6.0 * scale.reciprocal()).round().long() + zero
            high = min(high, int(six))
        if quantizer.activation != "none":
            low = max(low, int(zero))
        if isinstance(x, Wide):
            rounded = (x.total.float() * x.multiplier(scale)).round()
        elif isinstance(x, Sum):
            a, b = (c.centered.float() * (c.scale / scale) for c in (x.first, x.second))
            rounded = (a + b).round()
        else:
            value = _value(x)
            if quantizer.function is not None:
                value = quantizer.function(value)
            rounded = (value * scale.reciprocal()).round()
        self.wide.setdefault(name, []).append(x)
        codes = (rounded.double().clamp(-(2.0**31), 2.0**31).long() + zero).clamp(low, high)
        self.codes.setdefault(name, []).append(codes.to(code_dtype(quantizer.quant_min, quantizer.quant_max)))
        if name in self.forced:
            return Codes(self.forced[name][len(self.codes[name]) - 1], scale)
        return Codes(codes - zero, scale)


def _product(layer: QuantizedConv2d | QuantizedLinear, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if isinstance(layer, QuantizedConv2d):
        y: Tensor = layer._conv_forward(x, weight, bias)
        return y
    return functional.linear(x, weight, bias)


def _average(node: fx.Node, module: Any, x: Codes) -> Wide:
    """Sums over the windows of an average pooling, all of the same size."""
    values, source = x.centered.double(), node.all_input_nodes[0]
    average = _call(node, {source: values}, module)
    count = _window(node, module, values.shape, average.shape)
    if count == 0:
        raise ModelError(f"{call_name(node)} averages windows of different sizes")
    size = _call(node, {source: values.abs()}, module) * count
    return Wide((average * count).round().long(), x.scale, count, size=size, terms=count)


_POOL = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
_POOL_DEFAULTS = {"padding": 0, "ceil_mode": False, "count_include_pad": True, "divisor_override": None}


def _window(node: fx.Node, module: Any, shape: torch.Size, result: torch.Size) -> int:
    """Number of values that every average is taken of; 0 where it differs."""
    if not isinstance(module, nn.AvgPool2d) and node.target is not functional.avg_pool2d:
        # Adaptive pooling, or a mean over some dimensions; none of them the first.
        even = len(result) < len(shape) or all(n % max(m, 1) == 0 for n, m in zip(shape, result, strict=True))
        return math.prod(shape[1:]) // math.prod(result[1:]) if even else 0
    given: dict[str, Any] = {**dict(zip(_POOL, node.args[1:], strict=False)), **node.kwargs}
    settings: dict[str, Any] = _POOL_DEFAULTS | (
        given if module is None else {name: getattr(module, name) for name in _POOL}
    )
    kernel, padding = settings["kernel_size"], settings["padding"]
    cut = padding not in (0, (0, 0)) and not settings["count_include_pad"]
    if settings["ceil_mode"] or cut or settings["divisor_override"] is not None:
        return 0
    return int(kernel * kernel) if isinstance(kernel, int) else int(kernel[0] * kernel[1])


def _parameters(node: fx.Node, values: dict[fx.Node, Any]) -> dict[fx.Node, Any]:
    return {n: values[n] for n in node.all_input_nodes[1:]}


def _value(x: Any) -> Any:
    return x if isinstance(x, Tensor) else x.value()


def _shaped(x: Any) -> Any:
    """Something of the same shape, for calls that ask only for that."""
    if isinstance(x, Codes):
        return x.centered
    return x.total if isinstance(x, Wide) else x.first.centered if isinstance(x, Sum) else x


def _mapped(arguments: Any, function: Callable[[fx.Node], Any]) -> Any:
    return fx.map_arg(arguments, function)


def _call(node: fx.Node, values: dict[fx.Node, Any], module: Any) -> Any:
    args, kwargs = (_mapped(part, lambda n: values[n]) for part in (node.args, node.kwargs))
    if module is not None:
        return module(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    target: Any = node.target
    return target(*args, **kwargs)
