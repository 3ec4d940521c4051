"""Networks of scheme deploy in ONNX: between DequantizeLinear and QuantizeLinear stands what kernels do in integers.

Weights are int8 codes with their zero points taken off (`--packed`: INT4 with zero points) and steps that include
BatchNorm, biases int32 with steps `input step * weight step`, all of them the numbers that `run_integer` computes with.
Max pooling, slices, padding and their like are operators on codes.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from clusterq.deploy import _onnx_aten
from clusterq.deploy._grids import Grid
from clusterq.deploy._onnx_aten import arguments, aten
from clusterq.deploy._onnx_codes import StoredWeight
from clusterq.deploy._onnx_convert import _BATCH_NORM, _CONVOLUTIONS, Converter, _geometry
from clusterq.nn.folding import integer_norm_of, offset_of, source_of
from clusterq.nn.layers import QuantizedConv2d, QuantizedLinear

# Operators that give the same codes as the tensor they take, in another order, fewer of them, or zeros beside them.
_MOVING = {
    *(aten.max_pool2d.default, aten.max_pool2d_with_indices.default, aten.slice.Tensor, aten.select.int),
    *(aten.flatten.using_ints, aten.view.default, aten.reshape.default, aten._unsafe_view.default),
    *(aten.permute.default, aten.transpose.int, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims),
    *(aten.pad.default, aten.constant_pad_nd.default, aten.clone.default, aten.dropout.default),
    *(aten.feature_dropout.default, aten.contiguous.default, aten.alias.default, aten.detach.default),
    *(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, operator.getitem),
}


def _keeps_codes(node: fx.Node) -> bool:
    """Whether a moving operator puts nothing but zeros beside the codes: padding takes any number."""
    if node.target not in (aten.pad.default, aten.constant_pad_nd.default):
        return True
    a = arguments(node)
    return a.get("mode", "constant") != "constant" or not a["value"]


@dataclass(frozen=True)
class IntegerLayer:
    """A layer with the BatchNorm behind it.

    Attributes:
        weight: int8 codes [C, ...] less their zero points, with the sign of BatchNorm's gain; 0 where that is 0.
        stored: codes on the quantizer's own grid and their zero points, such that `codes - zero_point` is `weight`.
        scale: float32 [C].
        bias: int32 [C], None where there is nothing to add.
        unit: float32 [C], `input step * scale`.
        norm: name of the BatchNorm, None without.
    """

    weight: Tensor
    stored: tuple[Tensor, Tensor]
    scale: Tensor
    bias: Tensor | None
    unit: Tensor
    norm: str | None


def integer_layers(student: nn.Module, grids: Mapping[str, Grid]) -> dict[str, IntegerLayer]:
    """Every layer of a network of scheme deploy that reads codes, by name.

    Args:
        student: on the CPU, float32.
        grids: of its weights, by the names of their quantizers.
    """
    norms = {integer_norm_of(m): (name, m) for name, m in student.named_modules() if integer_norm_of(m) is not None}
    found: dict[str, IntegerLayer] = {}
    for name, layer in student.named_modules():
        if isinstance(layer, (QuantizedConv2d, QuantizedLinear)) and source_of(layer) is not None:
            grid = grids[f"{name}.weight_quantizer"]
            norm_name, norm = norms.get(layer, (None, None))
            numbers = offset_of(layer, norm, grid.scale)
            sign = numbers.gain.sign().long()
            codes, zeros = _signed(grid.codes(layer.weight).long(), grid.column(layer.weight), sign)
            has_bias = norm is not None or layer.bias is not None
            found[name] = IntegerLayer(
                (codes - zeros).to(torch.int8),
                (codes.to(torch.int8), zeros.reshape(-1).to(torch.int8)),
                numbers.scale.float(),
                numbers.code.to(torch.int32) if has_bias else None,
                numbers.unit.float(),
                norm_name,
            )
    return found


def _signed(codes: Tensor, zero_point: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and zero points, which broadcast against them, of a weight times signs [C] (1, -1, or 0)."""
    sign = sign.reshape(zero_point.shape)
    # -(c - z) = (-1 - c) - (-1 - z), where -1 - c is a code like c itself.
    zeros = torch.where(sign < 0, -1 - zero_point, zero_point)
    return torch.where(sign == 0, zeros, torch.where(sign < 0, -1 - codes, codes)), zeros


class DeployConverter(Converter):
    """The converter for networks of scheme deploy; other arguments as `Converter`.

    Args:
        integers: from `integer_layers`.
    """

    def __init__(self, *args: Any, integers: Mapping[str, IntegerLayer], **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.integers = integers
        self._padding: Grid | None = None
        # Means over height and width, which keep both as 1 until they are codes: kernels average so.
        self._squeezed: dict[Any, list[int]] = {}

    def constant(self, value: float, node: fx.Node) -> str:
        if self._padding is None:
            return super().constant(value, node)
        zero = np.array(self._padding.zero_point.item(), dtype=self._code_type(self._padding))
        return self.graph.tensor(zero, self.label(node, "zero_point"))

    def _convert(self, node: fx.Node) -> Any:
        source: Any = node.args[0] if node.args else None
        if node.target in _MOVING and source in self.coded and _keeps_codes(node):
            return self._moved(node, source)
        if node.target is aten.mean.dim and self._is_global(node):
            self._squeezed[node] = [] if arguments(node)["keepdim"] else [2, 3]
            return self.node("GlobalAveragePool", [source], node)
        if node.target is aten.linear.default or node.target in _CONVOLUTIONS:
            grid = self._grid(arguments(node)["weight"])
            if grid is not None and grid.name in self.integers:
                return self._layer(node, grid, self.integers[grid.name])
        return super()._convert(node)

    def _is_global(self, node: fx.Node) -> bool:
        a = arguments(node)
        rank = a["self"].meta["val"].dim()
        only_codes = all(self._grid(user) is not None for user in node.users)
        return rank == 4 and sorted(d % 4 for d in a["dim"] or ()) == [2, 3] and only_codes

    def _moved(self, node: fx.Node, source: fx.Node) -> Any:
        """The operator on codes."""
        grid, codes = self.coded[source]
        if isinstance(codes, list):
            assert node.target is operator.getitem
            index: Any = node.args[1]
            moved: Any = codes[index]
        else:
            value, self.values[source], self._padding = self.values[source], codes, grid
            try:
                moved = _onnx_aten.convert(self, node)
            finally:
                self.values[source], self._padding = value, None
            if moved == codes:
                self.coded[node] = grid, codes
                return value
        self.coded[node] = grid, moved
        if isinstance(moved, list):
            return moved
        return self._dequantized(grid, moved, self.label(node, f"{node.name}_dequantized"))

    def _dequantized(self, grid: Grid, codes: str, name: str) -> str:
        return self.graph.node("DequantizeLinear", [codes, *self._step(grid, name)], name)

    def _activation(self, node: fx.Node) -> str:
        value, source = super()._activation(node), node.args[0]
        axes = self._squeezed.get(source)
        return self._squeeze(node, value, self.graph.integers(axes, self.label(node, "axes"))) if axes else value

    def _squeeze(self, node: fx.Node, value: str, axes: str) -> str:
        """A quantized mean without dimensions of size 1; `value`: dequantized, with them."""
        grid, codes = self.coded[node]
        squeezed = self.graph.node("Squeeze", [codes, axes], f"{grid.name}/squeezed")
        self.codes[grid.name][-1] = squeezed
        self.coded[node] = grid, squeezed
        return self._dequantized(grid, squeezed, f"{grid.name}/mean")

    def _layer(self, node: fx.Node, grid: Grid, layer: IntegerLayer) -> str:
        a = arguments(node)
        convolution = node.target in _CONVOLUTIONS
        flat = convolution or node.meta["val"].dim() == 2
        kind = "Conv" if convolution else "Linear"
        packed = self.packed and grid.bits <= 4
        # onnxruntime's integer Gemm wants to see that zero points are 0.
        zeros = None if convolution else torch.zeros(len(layer.scale), dtype=torch.int8)
        weight = StoredWeight(layer.weight, layer.scale, zeros, "INT8")
        if packed:
            codes, zero_point = layer.stored
            weight = StoredWeight(codes, layer.scale, zero_point if bool(zero_point.any()) else None, "INT4")
        if a["weight"] not in self.values:
            is_folded = layer.norm is not None
            self.values[a["weight"]] = self._store(a["weight"], weight, kind, is_folded=is_folded, turned=not flat)
        inputs = [a["input"], self.values[a["weight"]]]
        bias = None if layer.bias is None else self._bias(node, layer)
        if not flat:
            y = self.node("MatMul", inputs, node)
            y = y if bias is None else self.node("Add", [y, bias], node)
        else:
            inputs += [] if bias is None else [bias]
            geometry = _geometry(a, self._shape(a["weight"])) if convolution else {"transB": 1}
            y = self.node("Conv" if convolution else "Gemm", inputs, node, **geometry)
        norm = next((user for user in node.users if user.target in _BATCH_NORM), None)
        return y if layer.norm is None or norm is None else self._replacing(norm, y)

    def _bias(self, node: fx.Node, layer: IntegerLayer) -> str:
        assert layer.bias is not None
        codes = self.graph.tensor(layer.bias, self.label(node, "bias_codes"))
        scale = self.graph.tensor(layer.unit, self.label(node, "bias_scale"))
        return self.graph.node("DequantizeLinear", [codes, scale], self.label(node, "bias"), axis=0)
