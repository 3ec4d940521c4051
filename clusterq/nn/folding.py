"""Biases and BatchNorm as an integer kernel has them: an int32 per channel beside the sum of products.

A layer whose input has step `s_x` and whose weight has steps `s_w` [C] sums products of codes in units of `s_x * s_w`.
BatchNorm behind it multiplies by `gain` and adds `offset`: `gain` goes into the weight, sign into its codes and size
into its steps, so that quantizing the weight before or after makes no difference; `offset`, or the bias of a layer
without BatchNorm (gain 1), becomes a whole number of units. In float32, with `rint` half to even:

    scale = s_w * |gain|        unit = s_x * scale        code = rint(offset / unit)

Where a unit is so small that int32 could not hold the code (2^30 is the limit, the rest is left to the products), or
`scale` is below 2^-60, the channel is a constant: gain 0, and `scale` such that the code is 2^20.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from clusterq.errors import ModelError

if TYPE_CHECKING:
    from clusterq.nn.layers import QuantizedConv2d, QuantizedLinear
    from clusterq.nn.quantizers import ActivationQuantizer

# A BatchNorm's tensors in the order in which formulas and files take them.
NORM_PARTS = ("weight", "bias", "running_mean", "running_var")
_LARGEST_CODE = 2.0**30
_SMALLEST_SCALE = 2.0**-60
_CODE_OF_CONSTANT = 2.0**20


class IntegerOffset(NamedTuple):
    """Numbers of a layer in integers, [C] each, in the dtype of `offset`.

    Attributes:
        gain: what the layer's weight is multiplied by, 0 for channels that are constant.
        scale: steps of the weight with the gain in them, above 0.
        unit: value of 1 in the sums.
        code: whole numbers, at most 2^30 in size: the int32 bias.
    """

    gain: Tensor
    scale: Tensor
    unit: Tensor
    code: Tensor


@torch.no_grad()
def integer_offset(gain: Tensor | None, offset: Tensor, input_scale: Tensor, weight_scale: Tensor) -> IntegerOffset:
    """See above; `gain` (None: 1), `offset` and `weight_scale` [C], `input_scale` [1]."""
    gain = torch.ones_like(offset) if gain is None else gain
    input_scale, weight_scale = input_scale.to(offset.dtype), weight_scale.to(offset.dtype)
    scale = weight_scale * gain.abs()
    constant = (scale < _SMALLEST_SCALE) | (offset.abs() > input_scale * scale * _LARGEST_CODE)
    own = (offset.abs() / _CODE_OF_CONSTANT / input_scale).clamp_min(_SMALLEST_SCALE)
    scale = torch.where(constant, torch.where(offset == 0, 1.0, own), scale)
    unit = input_scale * scale
    return IntegerOffset(torch.where(constant, 0.0, gain), scale, unit, (offset / unit).round())


def on_grid(value: Tensor, offset: IntegerOffset) -> Tensor:
    """`value` moved to `code * unit`; its gradient passes unchanged."""
    return value + (offset.code * offset.unit - value).detach()


class _IntegerNorm(_BatchNorm):
    """BatchNorm behind a quantized layer: `gain * x + offset`, the offset a whole number of units.

    As BatchNorm without running statistics in use, it is not for training mode; `prepare` freezes it.
    """

    _layer: tuple[QuantizedConv2d | QuantizedLinear, ...] = ()

    def gain_and_offset(self) -> tuple[Tensor, Tensor]:
        """Gain and offset [C] of `gain * x + offset`, not rounded; differentiable in gamma and beta."""
        mean, var = self.running_mean, self.running_var
        assert mean is not None and var is not None
        gain = (var + self.eps).rsqrt()
        gain = gain if self.weight is None else gain * self.weight
        offset = -mean * gain
        return gain, offset if self.bias is None else offset + self.bias

    def forward(self, x: Tensor) -> Tensor:
        layer = self._layer[0]
        if not layer.in_integers():
            return super().forward(x)
        gain, offset = self.gain_and_offset()
        numbers = integer_offset(gain.detach(), offset.detach(), *layer.scales(layer.taken_step()))
        gain, offset = torch.where(numbers.gain == 0, 0.0, gain), on_grid(offset, numbers)
        zeros, ones = torch.zeros_like(offset), torch.ones_like(offset)
        return functional.batch_norm(x, zeros, ones, gain, offset, False, 0.0, 0.0)


@functools.cache
def _integer_norm(cls: Any) -> Any:
    # Tracers take a module for a layer by the package its class says it is from.
    return type(f"Integer{cls.__name__}", (_IntegerNorm, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def attach_norm(norm: Any, layer: QuantizedConv2d | QuantizedLinear) -> None:
    """Makes a BatchNorm with running statistics the integer one of the layer in front of it, in place.

    A bias of the layer moves into the running mean.
    """
    if norm.running_mean is None or norm.running_var is None:
        raise ModelError("BatchNorm has no running statistics")
    if layer.bias is not None:
        with torch.no_grad():
            norm.running_mean.sub_(layer.bias)
        layer.register_parameter("bias", None)
    cls: Any = type(norm)
    norm.__class__ = _integer_norm(cls)
    norm._layer = (layer,)
    layer._has_norm = True


def integer_norm_of(norm: nn.Module) -> QuantizedConv2d | QuantizedLinear | None:
    """The layer that a BatchNorm is folded into; None where it is not."""
    return norm._layer[0] if isinstance(norm, _IntegerNorm) and norm._layer else None


def offset_of(
    layer: QuantizedConv2d | QuantizedLinear, norm: nn.Module | None = None, step: Tensor | None = None
) -> IntegerOffset:
    """Numbers of a layer with the BatchNorm behind it, as its twin computes with them.

    `step`: of the weight [C], where it is known already.
    """
    scales = layer.scales(step)
    if isinstance(norm, _IntegerNorm):
        gain, offset = norm.gain_and_offset()
        return integer_offset(gain.detach(), offset.detach(), *scales)
    bias = layer.bias
    offset = layer.weight.new_zeros(len(layer.weight)) if bias is None else bias.detach()
    return integer_offset(None, offset, *scales)


def source_of(layer: QuantizedConv2d | QuantizedLinear) -> ActivationQuantizer | None:
    """The quantizer whose codes a layer reads; None where the layer is not in integers."""
    return layer._source[0] if layer._source else None
