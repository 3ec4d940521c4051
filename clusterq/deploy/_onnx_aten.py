"""Operators of an exported PyTorch graph in ONNX, quantization and weighted layers excepted."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

if TYPE_CHECKING:
    from clusterq.deploy._onnx_convert import Converter

aten: Any = torch.ops.aten
Arguments = dict[str, Any]
Rule = Callable[["Converter", fx.Node, Arguments], Any]
RULES: dict[Any, Rule] = {}
_MAX = 2**63 - 1


def arguments(node: fx.Node) -> Arguments:
    """Arguments of a call by their names in the operator's schema, defaults filled in."""
    target: Any = node.target
    found: Arguments = {}
    for index, argument in enumerate(target._schema.arguments):
        if index < len(node.args):
            found[argument.name] = node.args[index]
        else:
            found[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return found


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for target in targets:
            RULES[target] = function
        return function

    return register


def _unary(op: str, **attributes: Any) -> Rule:
    return lambda c, node, a: c.node(op, [a["self"]], node, **attributes)


for _target, _op in {
    aten.relu.default: "Relu",
    aten.sigmoid.default: "Sigmoid",
    aten.tanh.default: "Tanh",
    aten.exp.default: "Exp",
    aten.sqrt.default: "Sqrt",
    aten.abs.default: "Abs",
    aten.neg.default: "Neg",
}.items():
    RULES[_target] = _unary(_op)
RULES[aten.hardswish.default] = _unary("HardSwish")
RULES[aten.hardsigmoid.default] = _unary("HardSigmoid", alpha=1 / 6, beta=0.5)
for _target in (
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.contiguous.default,
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.lift_fresh_copy.default,
):
    RULES[_target] = lambda c, node, a: c.read(next(iter(a.values())))


@rule(aten._to_copy.default, aten.to.dtype)
def _cast(c: Converter, node: fx.Node, a: Arguments) -> Any:
    if node.meta["val"].dtype != a["self"].meta["val"].dtype:
        raise c.error(node, f"a cast to {node.meta['val'].dtype}")
    return c.read(a["self"])


@rule(aten._assert_tensor_metadata.default, aten._assert_scalar.default, aten.sym_constrain_range_for_size.default)
def _nothing(c: Converter, node: fx.Node, a: Arguments) -> Any:
    return None


@rule(aten.silu.default)
def _silu(c: Converter, node: fx.Node, a: Arguments) -> Any:
    return c.node("Mul", [a["self"], c.node("Sigmoid", [a["self"]], node)], node)


@rule(aten.elu.default, aten.leaky_relu.default)
def _elu(c: Converter, node: fx.Node, a: Arguments) -> Any:
    if node.target is aten.leaky_relu.default:
        return c.node("LeakyRelu", [a["self"]], node, alpha=float(a["negative_slope"]))
    if (a["scale"], a["input_scale"]) != (1, 1):
        raise c.error(node, "elu with a scale")
    return c.node("Elu", [a["self"]], node, alpha=float(a["alpha"]))


@rule(aten.hardtanh.default, aten.clamp.default, aten.clamp_min.default, aten.relu6.default)
def _clamp(c: Converter, node: fx.Node, a: Arguments) -> Any:
    bounds = (0.0, 6.0) if node.target is aten.relu6.default else (a.get("min", a.get("min_val")), a.get("max_val"))
    low, high = bounds[0], a.get("max", bounds[1])
    limits = ["" if v is None else c.constant(v, node) for v in (low, high)]
    return c.node("Clip", [a["self"], *limits], node)


@rule(aten.gelu.default)
def _gelu(c: Converter, node: fx.Node, a: Arguments) -> Any:
    if a["approximate"] != "none":
        raise c.error(node, "gelu by tanh")
    inner = c.node("Erf", [c.node("Mul", [a["self"], c.constant(math.sqrt(0.5), node)], node)], node)
    half = c.node("Mul", [a["self"], c.constant(0.5, node)], node)
    return c.node("Mul", [half, c.node("Add", [inner, c.constant(1.0, node)], node)], node)


@rule(aten.prelu.default)
def _prelu(c: Converter, node: fx.Node, a: Arguments) -> Any:
    rank = node.meta["val"].dim()
    shape = c.graph.integers([-1] + [1] * (rank - 2), c.label(node, "shape"))
    return c.node("PRelu", [a["self"], c.node("Reshape", [a["weight"], shape], node)], node)


@rule(aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default)
def _softmax(c: Converter, node: fx.Node, a: Arguments) -> Any:
    op = "LogSoftmax" if "log" in str(node.target) else "Softmax"
    return c.node(op, [a["self"]], node, axis=a["dim"])


def _binary(op: str) -> Rule:
    def convert(c: Converter, node: fx.Node, a: Arguments) -> Any:
        other = a["other"]
        if not isinstance(other, fx.Node):
            other = c.constant(other, node)
        if a.get("alpha", 1) != 1:
            other = c.node("Mul", [other, c.constant(a["alpha"], node)], node)
        if a.get("rounding_mode") is not None:
            raise c.error(node, "a division that rounds")
        return c.node(op, [a["self"], other], node)

    return convert


for _name, _op in {"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "maximum": "Max", "minimum": "Min"}.items():
    _packet = getattr(aten, _name)
    for _overload in ("Tensor", "Scalar", "default"):
        if _overload in _packet.overloads():
            RULES[getattr(_packet, _overload)] = _binary(_op)


@rule(aten.matmul.default, aten.bmm.default, aten.mm.default)
def _matmul(c: Converter, node: fx.Node, a: Arguments) -> Any:
    return c.node("MatMul", [a["self"], a.get("other", a.get("mat2"))], node)


@rule(aten.cat.default)
def _cat(c: Converter, node: fx.Node, a: Arguments) -> Any:
    return c.node("Concat", a["tensors"], node, axis=a["dim"])


@rule(aten.flatten.using_ints, aten.view.default, aten.reshape.default, aten._unsafe_view.default)
def _reshape(c: Converter, node: fx.Node, a: Arguments) -> Any:
    shape: list[Any] = list(a["size"] if "size" in a else a.get("shape") or ())
    if node.target is aten.flatten.using_ints:
        rank = a["self"].meta["val"].dim()
        start, end = a["start_dim"] % max(rank, 1), a["end_dim"] % max(rank, 1)
        if (start, end) == (1, rank - 1):
            return c.node("Flatten", [a["self"]], node, axis=1)
        known = [s if isinstance(s, int) else -1 for s in node.meta["val"].shape]
        if known.count(-1) > 1:
            raise c.error(node, "a shape with several sizes that vary")
        shape = known
    varying = [i for i, size in enumerate(shape) if not isinstance(size, int)]
    if len(varying) == 1 and -1 not in shape:
        # The one size that is left follows from the others.
        shape[varying[0]] = -1
        varying = []
    return c.node("Reshape", [a["self"], c.sizes(shape, node)], node)


@rule(aten.permute.default)
def _permute(c: Converter, node: fx.Node, a: Arguments) -> Any:
    rank = len(a["dims"])
    return c.node("Transpose", [a["self"]], node, perm=[d % rank for d in a["dims"]])


@rule(aten.transpose.int)
def _transpose(c: Converter, node: fx.Node, a: Arguments) -> Any:
    order = list(range(node.meta["val"].dim()))
    first, second = a["dim0"] % len(order), a["dim1"] % len(order)
    order[first], order[second] = order[second], order[first]
    return c.node("Transpose", [a["self"]], node, perm=order)


@rule(aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims)
def _squeeze(c: Converter, node: fx.Node, a: Arguments) -> Any:
    dims = [a["dim"]] if isinstance(a["dim"], int) else list(a["dim"])
    op = "Unsqueeze" if node.target is aten.unsqueeze.default else "Squeeze"
    return c.node(op, [a["self"], c.graph.integers(dims, c.label(node, "axes"))], node)


@rule(aten.slice.Tensor)
def _slice(c: Converter, node: fx.Node, a: Arguments) -> Any:
    start, end, step = a["start"] or 0, _MAX if a["end"] is None else a["end"], a["step"]
    if (start, end, step) == (0, _MAX, 1):
        return c.read(a["self"])
    bounds = [c.sizes([value], node) for value in (start, end)]
    axes, steps = (c.graph.integers([v], c.label(node, "axis")) for v in (a["dim"], step))
    return c.node("Slice", [a["self"], *bounds, axes, steps], node)


@rule(aten.select.int)
def _select(c: Converter, node: fx.Node, a: Arguments) -> Any:
    index = c.graph.tensor(np.array(a["index"], dtype=np.int64), c.label(node, "index"))
    return c.node("Gather", [a["self"], index], node, axis=a["dim"])


@rule(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
def _split(c: Converter, node: fx.Node, a: Arguments) -> Any:
    parts = [int(part.shape[a["dim"]]) for part in node.meta["val"]]
    sizes = c.graph.integers(parts, c.label(node, "sizes"))
    outputs = [c.label(node) for _ in parts]
    return c.graph.node_with("Split", [c.read(a["self"]), sizes], outputs, axis=a["dim"])


@rule(aten.pad.default, aten.constant_pad_nd.default)
def _pad(c: Converter, node: fx.Node, a: Arguments) -> Any:
    mode = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}.get(a.get("mode", "constant"))
    if mode is None:
        raise c.error(node, f"padding by {a['mode']}")
    # PyTorch counts from the last dimension, begin and end of each; ONNX has all begins, then all ends.
    rank, pad = node.meta["val"].dim(), list(a["pad"])
    begins, ends = [0] * rank, [0] * rank
    for i in range(len(pad) // 2):
        begins[rank - 1 - i], ends[rank - 1 - i] = pad[2 * i], pad[2 * i + 1]
    inputs = [a["self"], c.graph.integers(begins + ends, c.label(node, "pads"))]
    if mode == "constant":
        inputs.append(c.constant(a["value"] or 0.0, node))
    return c.node("Pad", inputs, node, mode=mode)


@rule(aten.mean.dim, aten.sum.dim_IntList)
def _reduce(c: Converter, node: fx.Node, a: Arguments) -> Any:
    op = "ReduceMean" if node.target is aten.mean.dim else "ReduceSum"
    dims = list(a["dim"]) if a["dim"] else list(range(a["self"].meta["val"].dim()))
    if op == "ReduceMean" and c.graph.opset < 18:
        return c.node(op, [a["self"]], node, axes=dims, keepdims=int(a["keepdim"]))
    return c.node(op, [a["self"], c.graph.integers(dims, c.label(node, "axes"))], node, keepdims=int(a["keepdim"]))


@rule(aten.adaptive_avg_pool2d.default)
def _adaptive_average(c: Converter, node: fx.Node, a: Arguments) -> Any:
    size = list(a["self"].meta["val"].shape[2:])
    wanted = list(a["output_size"])
    if not all(isinstance(s, int) for s in size + wanted) or any(s % w for s, w in zip(size, wanted, strict=True)):
        raise c.error(node, f"adaptive pooling from {size} to {wanted}")
    if wanted == [1, 1]:
        return c.node("GlobalAveragePool", [a["self"]], node)
    if size == wanted:
        return c.read(a["self"])
    kernel = [s // w for s, w in zip(size, wanted, strict=True)]
    return c.node("AveragePool", [a["self"]], node, kernel_shape=kernel, strides=kernel)


def _pair(value: Sequence[int], default: Sequence[int] = ()) -> list[int]:
    values = list(value) or list(default)
    return values * 2 if len(values) == 1 else values


@rule(aten.max_pool2d.default, aten.max_pool2d_with_indices.default)
def _max_pool(c: Converter, node: fx.Node, a: Arguments) -> Any:
    kernel, dilation = _pair(a["kernel_size"]), _pair(a["dilation"])
    strides, begin = _pair(a["stride"], kernel), _pair(a["padding"])
    value = node.meta["val"]
    result = value if isinstance(value, torch.Tensor) else value[0]
    end = list(begin)
    if a["ceil_mode"]:
        # The last window may reach beyond the border: as much padding, which no maximum notices.
        for i, (size, out) in enumerate(zip(a["self"].meta["val"].shape[2:], result.shape[2:], strict=True)):
            reach = (int(out) - 1) * strides[i] + dilation[i] * (kernel[i] - 1) + 1
            end[i] = max(begin[i], reach - int(size) - begin[i])
    settings = {"kernel_shape": kernel, "strides": strides, "pads": begin + end, "dilations": dilation}
    y = c.node("MaxPool", [a["self"]], node, **settings)
    return y if isinstance(value, torch.Tensor) else [y]


@rule(aten.avg_pool2d.default)
def _avg_pool(c: Converter, node: fx.Node, a: Arguments) -> Any:
    if a["ceil_mode"] or a["divisor_override"] is not None:
        raise c.error(node, "average pooling with ceil_mode or divisor_override")
    kernel, pads = _pair(a["kernel_size"]), _pair(a["padding"])
    return c.node(
        "AveragePool",
        [a["self"]],
        node,
        kernel_shape=kernel,
        strides=_pair(a["stride"], kernel),
        pads=pads * 2,
        count_include_pad=int(a["count_include_pad"]),
    )


def _parts(c: Converter, node: fx.Node) -> Any:
    values = c.values[node.args[0]]
    index: Any = node.args[1]
    if not isinstance(values, list) or index >= len(values):
        raise c.error(node, "a second result of this operator")
    return values[index]


def size_arithmetic(c: Converter, node: fx.Node) -> Any:
    """Sums, differences, products and quotients of sizes that vary: int64 [1]."""
    op = _ARITHMETIC[node.target]
    return c.node(op, [c.sizes([value], node) for value in node.args], node)


@rule(aten.sym_size.int)
def _size(c: Converter, node: fx.Node, a: Arguments) -> Any:
    shape = c.node("Shape", [a["self"]], node)
    return c.node("Gather", [shape, c.graph.integers([a["dim"]], c.label(node, "dim"))], node, axis=0)


_ARITHMETIC: dict[Any, str] = {operator.add: "Add", operator.sub: "Sub", operator.mul: "Mul", operator.floordiv: "Div"}


def convert(c: Converter, node: fx.Node) -> Any:
    """Name of the tensor, or list of names, that a call gives; ModelError for an operator without a rule."""
    if node.target is operator.getitem:
        return _parts(c, node)
    if node.target in _ARITHMETIC:
        return size_arithmetic(c, node)
    found = RULES.get(node.target)
    if found is None:
        raise c.error(node, f"the operator {node.target}")
    return found(c, node, arguments(node))
