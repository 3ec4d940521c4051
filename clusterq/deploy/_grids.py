"""Quantizers of a twin as fixed numbers, checked once for every form that it is written in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from clusterq import ops
from clusterq.errors import ModelError
from clusterq.nn.layers import QuantizedConv2d, QuantizedLinear
from clusterq.nn.quantizers import ActivationQuantizer

TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Grid:
    """Quantization parameters of one weight (axis 0) or activation (axis None): float32 and int64 [C] or [1].

    `non_negative`: what is quantized is never below 0.
    """

    name: str
    scale: Tensor
    zero_point: Tensor
    quant_min: int
    quant_max: int
    axis: int | None
    non_negative: bool = False

    @property
    def bits(self) -> int:
        return (self.quant_max - self.quant_min).bit_length()

    def codes(self, weight: Tensor) -> Tensor:
        """int8 [C, ...]: the codes of a weight on its grid, on the CPU."""
        weight = weight.detach().cpu().float()
        codes = ops.quantize(weight, self.scale, self.zero_point, self.quant_min, self.quant_max, axis=0)
        return codes.to(torch.int8).contiguous()

    def column(self, weight: Tensor) -> Tensor:
        """Zero points, int64, in a shape that broadcasts against a weight [C, ...]."""
        return self.zero_point.reshape([-1] + [1] * (weight.dim() - 1))


def checked_grid(
    name: str, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int | None
) -> Grid:
    """A `Grid` on the CPU; ModelError, which names the layer, for parameters that integers and float32 cannot hold."""
    scale, zero_point = scale.detach().cpu(), zero_point.detach().cpu()
    if scale.dtype != torch.float32 and not torch.equal(scale, scale.float().to(scale.dtype)):
        raise ModelError(f"{name}: its scale is {scale.dtype} and not exact in float32")
    scale = scale.float()
    if not bool((torch.isfinite(scale) & (scale >= TINY)).all()):
        raise ModelError(f"{name}: a scale is not a positive normal number")
    whole = zero_point.double().round()
    if not torch.equal(whole, zero_point.double()):
        raise ModelError(f"{name}: a zero point is not a whole number")
    if bool(((whole < quant_min) | (whole > quant_max)).any()):
        raise ModelError(f"{name}: a zero point lies outside the codes {quant_min} to {quant_max}")
    return Grid(name, scale, whole.to(torch.int64), quant_min, quant_max, axis)


def weight_grid(name: str, layer: QuantizedConv2d | QuantizedLinear) -> Grid:
    """The grid of a layer's weight; ModelError as `checked_grid`, and where its quantization is switched off."""
    if not layer.weight_quantizer.enabled:
        raise ModelError(f"{name}: quantization of its weight is switched off")
    return checked_grid(name, *layer.weight_quantizer.qparams(layer.weight), 0)


def activation_grid(name: str, quantizer: ActivationQuantizer) -> Grid:
    """The grid of a quantizer; ModelError as `checked_grid`, and where it is switched off or has no range."""
    if not quantizer.enabled:
        raise ModelError(f"{name}: quantization is switched off")
    if int(quantizer.observations) == 0:
        raise ModelError(f"{name}: has no range yet; calibrate the network (clusterq.qat.calibrate) first")
    return replace(checked_grid(name, *quantizer.qparams(), None), non_negative=quantizer.non_negative)


def replace_modules(model: nn.Module, replaced: Mapping[nn.Module, nn.Module]) -> None:
    """Puts other modules in the place of some, wherever they are held, in place."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replaced:
                parent._modules[name] = replaced[child]
