"""Conv2d and Linear whose weight is quantized in every forward; parameter names stay those of the float layers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from clusterq.nn.folding import integer_offset, on_grid
from clusterq.nn.quantizers import ActivationQuantizer, WeightQuantizer
from clusterq.nn.same_padding import SamePadConv2d

_Layer = TypeVar("_Layer", bound="_QuantizedWeight")


class _QuantizedWeight(nn.Module):
    """What the quantized layers share: `weight_quantizer`, its weight, and in scheme deploy the integer bias."""

    weight: Tensor
    weight_quantizer: WeightQuantizer
    _kept_weight: Tensor | None = None
    _kept_scale: Tensor | None = None
    # The quantizer of the input, in a tuple so that it is not a submodule here as well; empty in scheme paper.
    _source: tuple[ActivationQuantizer, ...] = ()
    # Whether BatchNorm behind the layer is folded, and the steps of the weight on the way to it within a forward.
    _has_norm = False
    _step: Tensor | None = None

    def quantized_weight(self) -> Tensor:
        """The weight as the layer uses it: same shape and dtype, at most 2^bits values per output channel."""
        if self._kept_weight is not None and not torch.is_grad_enabled():
            return self._kept_weight
        output: Tensor = self.weight_quantizer(self.weight)
        return output

    def in_integers(self) -> bool:
        """Whether the layer stands for one in integers now: scheme deploy, quantizers on, none being calibrated."""
        if not self._source or not self.weight_quantizer.enabled:
            return False
        return self._source[0].enabled and self._source[0].calibration is None

    def scales(self, step: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Steps of the input [1] and of the weight [C] in use, detached; for a layer of scheme deploy.

        `step`: of the weight, where it is known already.
        """
        step = self._weight_step() if step is None else step.to(self.weight.device)
        return self._source[0].qparams()[0].detach(), step.detach()

    def _weight_step(self) -> Tensor:
        kept = None if torch.is_grad_enabled() else self._kept_scale
        return self.weight_quantizer.qparams(self.weight)[0] if kept is None else kept

    def taken_step(self) -> Tensor | None:
        """Steps of the weight in the forward of the layer just now, once; for the BatchNorm behind it."""
        step, self._step = self._step, None
        return step

    def weight_and_bias(self, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weight as the layer uses it, and its bias, which in scheme deploy lies on the grid of the sums."""
        if not self.in_integers():
            return self.quantized_weight(), bias
        if self._kept_weight is None or self._kept_scale is None or torch.is_grad_enabled():
            weight, step = self.weight_quantizer.with_steps(self.weight)
        else:
            weight, step = self._kept_weight, self._kept_scale
        if self._has_norm:
            self._step = step
        if bias is None:
            return weight, None
        numbers = integer_offset(None, bias.detach(), *self.scales(step))
        alive = (numbers.gain != 0).reshape([-1] + [1] * (weight.dim() - 1))
        return torch.where(alive, weight, 0.0), on_grid(bias, numbers)


class QuantizedConv2d(_QuantizedWeight, nn.Conv2d):
    """`nn.Conv2d` with a per-channel quantized weight; made by `from_float`.

    State: `weight` and `bias` as in the float layer, and those of `weight_quantizer`.
    """

    @classmethod
    def from_float(cls, layer: nn.Conv2d, quantizer: WeightQuantizer) -> QuantizedConv2d:
        """Takes over the float layer's parameters themselves, not copies."""
        made: type[QuantizedConv2d] = QuantizedSamePadConv2d if isinstance(layer, SamePadConv2d) else cls
        return _take_over(made.__new__(made), layer, quantizer)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self._conv_forward(x, *self.weight_and_bias(self.bias))
        return y


class QuantizedSamePadConv2d(QuantizedConv2d, SamePadConv2d):
    """`QuantizedConv2d` with the padding "same" of TensorFlow."""


class QuantizedLinear(_QuantizedWeight, nn.Linear):
    """`nn.Linear` with a weight quantized per output feature; made by `from_float`.

    State: `weight` and `bias` as in the float layer, and those of `weight_quantizer`.
    """

    @classmethod
    def from_float(cls, layer: nn.Linear, quantizer: WeightQuantizer) -> QuantizedLinear:
        """Takes over the float layer's parameters themselves, not copies."""
        return _take_over(cls.__new__(cls), layer, quantizer)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, *self.weight_and_bias(self.bias))


def _take_over(quantized: _Layer, layer: nn.Module, quantizer: WeightQuantizer) -> _Layer:
    weight = layer.weight
    if not isinstance(weight, nn.Parameter):
        raise TypeError(f"weight of the layer is a {type(weight).__name__}; wanted a torch.nn.Parameter")
    # Settings, parameters, hooks and mode of the float layer; a constructor would draw weights only to throw them away.
    quantized.__dict__ = {k: copy.copy(v) if isinstance(v, dict) else v for k, v in layer.__dict__.items()}
    quantized.weight_quantizer = quantizer.to(weight.device).train(layer.training)
    return quantized


@contextmanager
def quantized_weights_kept(model: nn.Module) -> Iterator[None]:
    """Computes every quantized weight once for all forwards without gradients inside this context, as in an evaluation.

    Weights must not change inside; forwards with gradients are not affected.
    """
    layers = [m for m in model.modules() if isinstance(m, _QuantizedWeight)]
    try:
        with torch.no_grad():
            for layer in layers:
                if layer._source and layer.weight_quantizer.enabled:
                    layer._kept_weight, layer._kept_scale = layer.weight_quantizer.with_steps(layer.weight)
                else:
                    layer._kept_weight = layer.quantized_weight()
        yield
    finally:
        for layer in layers:
            layer._kept_weight = layer._kept_scale = None
