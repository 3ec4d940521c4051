"""From the captured graph of a quantized twin to ONNX: weights and activations as codes, the rest one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from clusterq.deploy import _onnx_aten, _onnx_integer
from clusterq.deploy._grids import Grid
from clusterq.deploy._onnx_aten import arguments, aten
from clusterq.deploy._onnx_codes import StoredWeight, folded, refined, stored_weight
from clusterq.deploy._onnx_graph import GraphWriter
from clusterq.errors import ModelError
from clusterq.nn.folding import NORM_PARTS

_FAKE_QUANTIZE = torch.ops.clusterq.fake_quantize.default
_CONVOLUTIONS = {aten.conv1d.default, aten.conv2d.default, aten.conv2d.padding, aten.conv3d.default}
_BATCH_NORM = {aten._native_batch_norm_legit_no_training.default, aten.batch_norm.default}
_LAZY = (aten.sym_size.int, *_onnx_aten._ARITHMETIC)


@dataclass(frozen=True)
class ExportedLayer:
    """One quantized weight in the file.

    Attributes:
        name: of the layer in the twin.
        kind: `"Conv"` or `"Linear"`.
        bits: width of its codes.
        container: ONNX type that stores them, `"INT8"`, `"UINT8"` (integer operators) or `"INT4"`.
        multiplier: power of two that the stored codes and the inverse of the scale were multiplied by.
        integer: whether the graph computes the layer in integers itself, by ConvInteger or MatMulInteger.
        batch_norm_folded: whether the scale and bias include the BatchNorm behind the layer.
        stored_bytes: codes, scales and zero points in the file.
        float_bytes: the weight in float32.
        codes: name of the initializer with the codes.
    """

    name: str
    kind: str
    bits: int
    container: str
    multiplier: int
    integer: bool
    batch_norm_folded: bool
    stored_bytes: int
    float_bytes: int
    codes: str


class Converter:
    """Walks the graph of a `torch.export.ExportedProgram` in order.

    Args:
        graph: what to write to.
        tensors: parameters, buffers and constants by the name of their placeholder.
        names: and their names in the module.
        grids: grids of weight and activation quantizers by the name of the module that holds them.
        packed: INT4 for weights of up to four bits.
        fold: fold BatchNorm into scales and biases.
        integer: ConvInteger and MatMulInteger for layers whose input has codes.
    """

    def __init__(
        self,
        graph: GraphWriter,
        tensors: Mapping[str, Tensor],
        names: Mapping[str, str],
        grids: Mapping[str, Grid],
        *,
        packed: bool,
        fold: bool,
        integer: bool,
    ) -> None:
        self.graph = graph
        self.tensors = tensors
        self.names = names
        self.grids = grids
        self.packed = packed
        self.fold = fold
        self.integer = integer
        self.values: dict[Any, Any] = {}
        self.layers: list[ExportedLayer] = []
        # Names of the codes of every activation quantizer, one per call, and grid and codes of each such call.
        self.codes: dict[str, list[str]] = {}
        self.coded: dict[fx.Node, tuple[Grid, str]] = {}

    def run(self, nodes: Sequence[fx.Node]) -> None:
        """Converts all calls; sizes and quantized weights only when something reads them."""
        for node in nodes:
            if node.op == "call_function" and node not in self.values and not self._waits(node):
                self.values[node] = self._convert(node)

    def read(self, value: Any) -> str:
        """Name of the tensor that a node or an earlier name stands for."""
        if isinstance(value, str):
            return value
        if value not in self.values:
            if value.op == "placeholder":
                self.values[value] = self.graph.tensor(self.tensors[value.name], self.names[value.name])
            else:
                self.values[value] = self._convert(value)
        found: str = self.values[value]
        return found

    def node(self, op: str, inputs: Sequence[Any], node: fx.Node, **attributes: Any) -> str:
        """Adds an ONNX node for a call."""
        return self.graph.node(op, [self.read(v) for v in inputs], self.label(node, op.lower()), **attributes)

    def constant(self, value: float, node: fx.Node) -> str:
        """A float32 scalar."""
        return self.graph.tensor(np.array(value, dtype=np.float32), self.label(node, "constant"))

    def sizes(self, values: Sequence[Any], node: fx.Node) -> str:
        """An int64 [len(values)] of numbers and of sizes that vary."""
        if all(isinstance(v, int) for v in values):
            return self.graph.integers(values, self.label(node, "shape"))
        parts = [self.graph.integers([v], self.label(node, "size")) if isinstance(v, int) else v for v in values]
        return parts[0] if len(parts) == 1 and isinstance(parts[0], str) else self.node("Concat", parts, node, axis=0)

    def label(self, node: fx.Node, suffix: str = "") -> str:
        """A readable name: module path and what it is."""
        stack = list(node.meta.get("nn_module_stack", {}).values())
        owner = stack[-1][0].removeprefix("L['self']").lstrip(".") if stack else ""
        return "/".join(part for part in (owner, suffix or node.name) if part)

    def error(self, node: fx.Node, what: str) -> ModelError:
        place = self.label(node).rpartition("/")[0]
        return ModelError(f"{place or 'the network'}: {what} has no ONNX form here")

    def _waits(self, node: fx.Node) -> bool:
        return node.target in _LAZY or (node.target is _FAKE_QUANTIZE and node.args[5] is not None)

    def _convert(self, node: fx.Node) -> Any:
        if node.target is _FAKE_QUANTIZE:
            return self._weight(node) if node.args[5] is not None else self._activation(node)
        if node.target in _CONVOLUTIONS:
            return self._convolution(node)
        if node.target is aten.linear.default:
            return self._linear(node)
        if node.target in _BATCH_NORM:
            return self._batch_norm(node)
        return _onnx_aten.convert(self, node)

    def _grid(self, node: Any) -> Grid | None:
        """Grid of a node that is a quantizer's output."""
        if not isinstance(node, fx.Node) or node.target is not _FAKE_QUANTIZE:
            return None
        scale: Any = node.args[1]
        return self.grids[self.names[scale.name].rpartition(".")[0]]

    def _activation(self, node: fx.Node) -> str:
        grid = self._grid(node)
        assert grid is not None
        x: Any = node.args[0]
        top = grid.quant_max
        if node.args[6] == "relu6":
            # Rounding is monotonic: limiting x at 6 limits its code at that of 6.
            six = (6.0 * grid.scale.reciprocal()).round() + grid.zero_point
            top = min(top, int(six))
        codes, step = self._codes(grid, self.read(x), top, relu=node.args[6] in ("relu", "relu6"))
        self.codes.setdefault(grid.name, []).append(codes)
        self.coded[node] = grid, codes
        return self.graph.node("DequantizeLinear", [codes, *step], grid.name)

    def _codes(self, grid: Grid, x: str, top: int, *, relu: bool) -> tuple[str, list[str]]:
        """Codes of a tensor up to `top`, after a ReLU where there is one, and the names of its `_step`."""
        if relu:
            x = self.graph.node("Relu", [x], f"{grid.name}/relu")
        step = self._step(grid, grid.name)
        codes = self.graph.node("QuantizeLinear", [x, *step], f"{grid.name}/quantized")
        offset, integer = self.offset(grid), self._code_type(grid)
        info, bounds = np.iinfo(integer), (grid.quant_min + offset, top + offset)
        if bounds == (info.min, info.max):
            return codes, step
        names = [
            "" if bound == limit else self.graph.tensor(np.array(bound, dtype=integer), f"{grid.name}/{name}")
            for name, bound, limit in zip(("low", "high"), bounds, (info.min, info.max), strict=True)
        ]
        return self.graph.node("Clip", [codes, *names], f"{grid.name}/codes"), step

    def _step(self, grid: Grid, name: str) -> list[str]:
        """Adds the scale and zero point of an activation; the latter has the type of the codes."""
        zero = np.array(grid.zero_point.item() + self.offset(grid), dtype=self._code_type(grid))
        scale = self.graph.tensor(np.array(grid.scale.item(), dtype=np.float32), f"{name}/scale")
        return [scale, self.graph.tensor(zero, f"{name}/zero_point")]

    def _code_type(self, grid: Grid) -> Any:
        return np.int8 if grid.quant_min + self.offset(grid) < 0 else np.uint8

    def offset(self, grid: Grid) -> int:
        """What is added to codes of an activation: onnxruntime's integer operators take unsigned ones."""
        return 128 if self.integer and grid.quant_min < 0 else 0

    def _stored(self, node: fx.Node) -> StoredWeight:
        grid, weight = self._grid(node), node.args[0]
        assert grid is not None and isinstance(weight, fx.Node)
        return stored_weight(self.tensors[weight.name], grid, packed=self.packed)

    def _weight(self, node: fx.Node) -> str:
        """A quantized weight that something other than its own layer reads."""
        return self._store(node, self._stored(node), "Weight")

    def _store(
        self, node: fx.Node, weight: StoredWeight, kind: str, *, is_folded: bool = False, turned: bool = False
    ) -> str:
        grid = self._grid(node)
        assert grid is not None
        values, name = (weight.codes.t() if turned else weight.codes), f"{grid.name}/weight_codes"
        codes = self.graph.packed(values, name) if weight.container == "INT4" else self.graph.tensor(values, name)
        stored = [codes, self.graph.tensor(weight.scale, f"{grid.name}/weight_scale")]
        if weight.zero_point is not None and weight.container == "INT4":
            stored.append(self.graph.packed(weight.zero_point, f"{grid.name}/weight_zero_point"))
        elif weight.zero_point is not None:
            stored.append(self.graph.tensor(weight.zero_point, f"{grid.name}/weight_zero_point"))
        self._note(grid, weight, kind, stored, is_folded=is_folded)
        return self.graph.node("DequantizeLinear", stored, f"{grid.name}/weight", axis=int(turned))

    def _note(
        self,
        grid: Grid,
        weight: StoredWeight,
        kind: str,
        stored: Sequence[str],
        *,
        integer: bool = False,
        is_folded: bool = False,
    ) -> None:
        self.layers.append(
            ExportedLayer(
                grid.name,
                kind,
                grid.bits,
                "UINT8" if integer else weight.container,
                weight.multiplier,
                integer,
                is_folded,
                self.graph.stored_bytes(*stored),
                4 * weight.codes.numel(),
                stored[0],
            )
        )

    def _tensor(self, node: fx.Node | None) -> Tensor | None:
        return None if node is None else self.tensors[node.name]

    def _following_batch_norm(self, node: fx.Node) -> fx.Node | None:
        users = list(node.users)
        if len(users) != 1 or users[0].target not in _BATCH_NORM:
            return None
        norm = arguments(users[0])
        constant = all(norm[k] is None or norm[k].name in self.tensors for k in NORM_PARTS)
        return users[0] if constant and not norm.get("training") else None

    def _convolution(self, node: fx.Node) -> str:
        a = arguments(node)
        weight, geometry = a["weight"], _geometry(a, self._shape(a["weight"]))
        if self._grid(weight) is None:
            inputs = [a["input"], weight] + ([a["bias"]] if a["bias"] is not None else [])
            return self.node("Conv", inputs, node, **geometry)
        stored, bias, source = self._stored(weight), self._tensor(a["bias"]), self._grid(a["input"])
        norm = self._following_batch_norm(node) if self.fold or self.integer else None
        if self.integer and (codes := self._integer_input(stored, a["input"])) is not None:
            return self._integer_convolution(node, codes, stored, bias, norm, geometry)
        gain, offset = (None, None) if norm is None or not self.fold else self._affine(norm, bias)
        inside = None if gain is None or offset is None else folded(stored, offset, gain, source)
        if inside is None or norm is None:
            name = self._layer_weight(weight, stored, "Conv", source, has_bias=bias is not None)
            if self._kept_apart(node, stored, bias):
                shape = [-1] + [1] * len(geometry["kernel_shape"])
                column = (torch.zeros(len(stored.scale)) if bias is None else bias).reshape(shape)
                y = self.node("Conv", [a["input"], name], node, **geometry)
                return self.node("Add", [y, self.graph.tensor(column, self.label(node, "bias"))], node)
            inputs = [a["input"], name] + ([a["bias"]] if bias is not None else [])
            return self.node("Conv", inputs, node, **geometry)
        name = self._store(weight, inside[0], "Conv", is_folded=True)
        bias_name = self.graph.tensor(inside[1], self.label(node, "bias"))
        return self._replacing(norm, self.node("Conv", [a["input"], name, bias_name], node, **geometry))

    def _integer_input(self, weight: StoredWeight, node: Any) -> tuple[Grid, str] | None:
        return None if weight.zero_point is not None else _onnx_integer.codes_of(self, node)

    def _integer_convolution(
        self,
        node: fx.Node,
        codes: tuple[Grid, str],
        weight: StoredWeight,
        bias: Tensor | None,
        norm: fx.Node | None,
        geometry: dict[str, Any],
    ) -> str:
        grid = self._grid(arguments(node)["weight"])
        assert grid is not None
        gain, offset = (None, bias) if norm is None else self._affine(norm, bias)
        y, names = _onnx_integer.product(self, node, "ConvInteger", grid.name, codes, weight, gain, offset, **geometry)
        self._note(grid, weight, "Conv", names, integer=True, is_folded=norm is not None)
        return y if norm is None else self._replacing(norm, y)

    def _replacing(self, norm: fx.Node, y: str) -> str:
        """y also stands for the BatchNorm that it includes; of several results the first is the output."""
        self.values[norm] = y if isinstance(norm.meta["val"], Tensor) else [y]
        return y

    def _shape(self, node: fx.Node) -> list[int]:
        return [int(s) for s in node.meta["val"].shape]

    def _affine(self, batch_norm: fx.Node, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Gain and offset, float64 [C], of a BatchNorm behind a convolution with or without a bias."""
        norm = arguments(batch_norm)
        mean, var = (self._tensor(norm[k]) for k in ("running_mean", "running_var"))
        assert mean is not None and var is not None
        gamma, beta = (self._tensor(norm[k]) for k in ("weight", "bias"))
        gain = (var.double() + norm["eps"]).rsqrt()
        if gamma is not None:
            gain = gain * gamma.double()
        shift = -mean.double() if bias is None else bias.double() - mean.double()
        return gain, shift * gain + (0.0 if beta is None else beta.double())

    def _kept_apart(self, node: fx.Node, weight: StoredWeight, bias: Tensor | None) -> bool:
        """Whether a sum is to keep a convolution from the quantizer behind it.

        onnxruntime would round the bias of one with INT4 weights and compute in floating point all the same; before
        1.29 it takes zero points per channel into an integer kernel that refuses them.
        """
        if weight.container == "INT4":
            return bias is not None
        return weight.zero_point is not None and self._following_batch_norm(node) is None

    def _layer_weight(
        self, node: fx.Node, stored: StoredWeight, kind: str, source: Grid | None, *, has_bias: bool
    ) -> str:
        """The weight of a layer; the same name again for one that several layers share."""
        if node not in self.values:
            self.values[node] = self._store(node, refined(stored, source) if has_bias else stored, kind)
        found: str = self.values[node]
        return found

    def _linear(self, node: fx.Node) -> str:
        a = arguments(node)
        weight: Any = a["weight"]
        flat = node.meta["val"].dim() == 2
        if self._grid(weight) is not None:
            stored, source = self._stored(weight), self._grid(a["input"])
            if self.integer and (codes := self._integer_input(stored, a["input"])) is not None:
                grid, bias = self._grid(weight), self._tensor(a["bias"])
                assert grid is not None
                y, names = _onnx_integer.product(self, node, "MatMulInteger", grid.name, codes, stored, None, bias)
                self._note(grid, stored, "Linear", names, integer=True)
                return y
            if not flat:
                # Stored as MatMul wants it: onnxruntime moves DequantizeLinear across a Transpose, not always rightly.
                weight = self._store(weight, stored, "Linear", turned=True)
            else:
                weight = self._layer_weight(weight, stored, "Linear", source, has_bias=a["bias"] is not None)
        elif not flat:
            weight = self.node("Transpose", [weight], node, perm=[1, 0])
        bias = a["bias"]
        if not flat:
            y = self.node("MatMul", [a["input"], weight], node)
            return y if bias is None else self.node("Add", [y, bias], node)
        if bias is not None and self.packed:
            # As of a convolution.
            return self.node("Add", [self.node("Gemm", [a["input"], weight], node, transB=1), bias], node)
        return self.node("Gemm", [a["input"], weight, *([] if bias is None else [bias])], node, transB=1)

    def _batch_norm(self, node: fx.Node) -> Any:
        a = arguments(node)
        if a.get("training"):
            raise self.error(node, "BatchNorm in training mode")
        mean = self._tensor(a["running_mean"])
        if mean is None:
            raise self.error(node, "BatchNorm without running statistics")
        weight = a["weight"] or self.graph.tensor(torch.ones_like(mean), self.label(node, "weight"))
        bias = a["bias"] or self.graph.tensor(torch.zeros_like(mean), self.label(node, "bias"))
        inputs = [a["input"], weight, bias, a["running_mean"], a["running_var"]]
        y = self.node("BatchNormalization", inputs, node, epsilon=float(a["eps"]))
        return y if isinstance(node.meta["val"], Tensor) else [y]


def _geometry(a: dict[str, Any], weight: list[int]) -> dict[str, Any]:
    """Attributes of Conv from the arguments of a convolution and the shape of its weight."""
    kernel = weight[2:]
    rank = len(kernel)
    stride, dilation = (list(a[k]) * (rank if len(a[k]) == 1 else 1) for k in ("stride", "dilation"))
    padding = a["padding"]
    if padding == "valid":
        begin = end = [0] * rank
    elif padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        begin = [t // 2 for t in total]
        end = [t - b for t, b in zip(total, begin, strict=True)]
    else:
        begin = end = list(padding) * (rank if len(padding) == 1 else 1)
    return {
        "kernel_shape": kernel,
        "strides": stride,
        "pads": begin + end,
        "dilations": dilation,
        "group": a["groups"],
    }
