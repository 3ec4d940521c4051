"""Numbers of the quantized twin as ONNX stores them: integer codes, scales, zero points. Exact, or an error.

DequantizeLinear computes `(code - zero_point) * scale` in float32 as the twin does. Another code may stand for the same
value, which this module uses twice, without changing a bit of any weight:

- up to 7 bits the zero point is subtracted beforehand: kernels of onnxruntime and TensorRT want it to be 0;
- codes are multiplied by a power of two and the scale is divided by it. onnxruntime rounds the bias of an integer
  convolution to multiples of `input scale * weight scale`, which is coarse when both have few bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clusterq.deploy._grids import TINY, Grid

# Integer kernels for processors without VNNI add two products of 8 bits in 16 bits, saturating.
_PAIR_LIMIT = 32767
_BIAS_LIMIT = 2.0**30


@dataclass(frozen=True)
class StoredWeight:
    """A weight as the file holds it.

    Attributes:
        codes: int8 [C, ...]; value = (codes - zero_point) * scale.
        scale: float32 [C].
        zero_point: int8 [C], or None for 0.
        container: `"INT8"`, or `"INT4"`: two codes to the byte.
        multiplier: power of two by which codes were multiplied and the scale divided.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    container: str
    multiplier: int = 1

    @property
    def magnitude(self) -> int:
        """Largest absolute code."""
        return int(self.codes.to(torch.int32).abs().max()) if self.codes.numel() else 0

    def multiplied(self, factor: int) -> StoredWeight:
        """The same values by codes `factor` times as large; for a power of two that int8 and float32 have room for."""
        codes = self.codes * factor
        return replace(self, codes=codes, scale=self.scale / factor, multiplier=self.multiplier * factor)

    def scaled(self, gain: Tensor) -> StoredWeight:
        """Channels times `gain` float64 [C], of any sign: into scales, signs into codes (zero point None only)."""
        assert self.zero_point is None
        scale = (self.scale.double() * gain.abs()).float()
        shape = [-1] + [1] * (self.codes.dim() - 1)
        sign = torch.where(scale >= TINY, torch.sign(gain), 0.0).to(torch.int8).reshape(shape)
        return replace(self, codes=self.codes * sign, scale=torch.where(scale >= TINY, scale, 1.0))


def stored_weight(weight: Tensor, grid: Grid, *, packed: bool) -> StoredWeight:
    """Codes of a weight [C, ...] on its grid; `packed` takes INT4 for up to four bits."""
    codes = grid.codes(weight)
    zero_point: Tensor | None = grid.zero_point.to(torch.int8)
    if not bool(grid.zero_point.any()):
        zero_point = None
    if packed and grid.bits <= 4:
        return StoredWeight(codes, grid.scale, zero_point, "INT4")
    if zero_point is not None and grid.bits < 8:
        codes, zero_point = codes - grid.column(codes).to(torch.int8), None
    return StoredWeight(codes, grid.scale, zero_point, "INT8")


def largest_operand(grid: Grid | None) -> int:
    """The largest value by which an integer kernel multiplies weights; it shifts signed codes to 0..255."""
    if grid is None:
        return 255
    return grid.quant_max if grid.quant_min >= 0 else grid.quant_max + 128


def refined(weight: StoredWeight, source: Grid | None) -> StoredWeight:
    """Codes as large as int8 and an integer kernel can take, for a layer with a bias behind `source`."""
    if weight.container != "INT8" or weight.zero_point is not None or weight.magnitude == 0:
        return weight
    factor = 1
    while (
        weight.magnitude * factor * 2 <= 127
        and 2 * largest_operand(source) * weight.magnitude * factor * 2 <= _PAIR_LIMIT
        and float(weight.scale.min()) / (factor * 2) >= TINY
    ):
        factor *= 2
    return weight.multiplied(factor)


def folded(weight: StoredWeight, bias: Tensor, gain: Tensor, source: Grid | None) -> tuple[StoredWeight, Tensor] | None:
    """Weight times `gain` and a bias, float64 [C] each, for an integer kernel; None where its int32 cannot hold them.

    Returns the weight and the bias in float32 [C].
    """
    if weight.container != "INT8" or weight.zero_point is not None:
        return None
    if bool((weight.codes[gain < 0] == -128).any()):
        # There is no +128.
        return None
    scaled = refined(weight.scaled(gain), source)
    bias = bias.float()
    if not bool(torch.isfinite(bias).all()):
        return None
    if source is not None:
        unit = source.scale.double() * scaled.scale.double()
        if bool((bias.double().abs() / unit > _BIAS_LIMIT).any()):
            return None
    return scaled, bias
