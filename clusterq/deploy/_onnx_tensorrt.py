"""Networks of scheme deploy as TensorRT takes them: INT8 with zero point 0 everywhere, its explicit quantization.

Its parser refuses zero points other than 0 and int32 in DequantizeLinear, and reads UINT8 as INT8 (`QuantDequantLinear
Helper` in onnx-tensorrt); quantized layers are those with DequantizeLinear in front of every input ("Working with
Quantized Types" in NVIDIA's documentation). Hence, with the numbers of `run_integer` all the same:

- Codes are less their zero points: value = code * step. They fit up to 7 bits, and at 8 bits where -128 to 127 mean
  both signs around 0.
- Limits of codes that an INT8 does not have by itself are a Clip of the tensor in front of QuantizeLinear, at limit *
  step. Rounding is monotonic, and a limit * step is rounded to the limit: codes are those of a Clip behind it.
- Weights are INT8 constants and DequantizeLinear per channel, biases float32: `int32 bias * (input step * step)`.
- Max pooling, slices, padding and their like read values, and their result is quantized again by the same step, which
  gives the codes they were made of.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import fx

from clusterq.deploy import _onnx_aten
from clusterq.deploy._grids import Grid
from clusterq.deploy._onnx_deploy import DeployConverter, IntegerLayer
from clusterq.errors import ModelError

_LOW, _HIGH = -128, 127
_NAMED = 3


def check_fits(activations: Iterable[Grid]) -> None:
    """Raises ModelError, which names tensors and the setting, where codes have no place in an INT8 with zero point 0.

    Those of weights of scheme deploy always have one, see `clusterq.deploy._onnx_deploy`.
    """
    ends = [(grid.name, *_around_zero(grid)) for grid in activations]
    wide = [f"{name} ({low} to {high})" for name, low, high in ends if low < _LOW or high > _HIGH]
    if wide:
        named = ", ".join(wide[:_NAMED])
        more = f" and {len(wide) - _NAMED} more" if len(wide) > _NAMED else ""
        raise ModelError(
            f"TensorRT has codes from {_LOW} to {_HIGH} around a zero point of 0, which leaves no room for those of "
            f"{named}{more}: quantize with --set quantization.int8_symmetric=true"
        )


def _around_zero(grid: Grid) -> tuple[int, int]:
    """Smallest and largest code less the zero point."""
    zero = int(grid.zero_point)
    return grid.quant_min - zero, grid.quant_max - zero


class TensorRTConverter(DeployConverter):
    """The converter for files of TensorRT; arguments as `DeployConverter`, grids that `check_fits`."""

    def _codes(self, grid: Grid, x: str, top: int, *, relu: bool) -> tuple[str, list[str]]:
        low, _ = _around_zero(grid)
        top -= int(grid.zero_point)
        if top < _HIGH or (low > _LOW and not grid.non_negative):
            scale = grid.scale.double().item()
            ends = [
                self.graph.tensor(np.array(end * scale, dtype=np.float32), f"{grid.name}/{name}")
                for name, end in (("low", low), ("high", top))
            ]
            x = self.graph.node("Clip", [x, *ends], f"{grid.name}/clip")
        elif relu:
            x = self.graph.node("Relu", [x], f"{grid.name}/relu")
        step = self._step(grid, grid.name)
        return self.graph.node("QuantizeLinear", [x, *step], f"{grid.name}/quantized"), step

    def _step(self, grid: Grid, name: str) -> list[str]:
        scale = self.graph.tensor(np.array(grid.scale.item(), dtype=np.float32), f"{name}/scale")
        return [scale, self.graph.tensor(np.array(0, dtype=np.int8), f"{name}/zero_point")]

    def _moved(self, node: fx.Node, source: fx.Node) -> Any:
        """The operator on values; of several results each is quantized where it is taken."""
        grid, _ = self.coded[source]
        moved = _onnx_aten.convert(self, node)
        if isinstance(moved, list) or moved == self.values[source]:
            self.coded[node] = self.coded[source]
            return moved
        return self._again(node, grid, moved, self.label(node, node.name))

    def _squeeze(self, node: fx.Node, value: str, axes: str) -> str:
        grid, _ = self.coded[node]
        squeezed = self.graph.node("Squeeze", [value, axes], f"{grid.name}/squeezed")
        result = self._again(node, grid, squeezed, f"{grid.name}/mean")
        self.codes[grid.name][-1] = self.coded[node][1]
        return result

    def _again(self, node: fx.Node, grid: Grid, x: str, name: str) -> str:
        """Values that lie on a grid quantized and dequantized on it."""
        step = self._step(grid, name)
        codes = self.graph.node("QuantizeLinear", [x, *step], f"{name}/quantized")
        self.coded[node] = grid, codes
        return self.graph.node("DequantizeLinear", [codes, *step], name)

    def _bias(self, node: fx.Node, layer: IntegerLayer) -> str:
        assert layer.bias is not None
        value = (layer.bias.double() * layer.unit.double()).float()
        return self.graph.tensor(value, self.label(node, "bias"))
