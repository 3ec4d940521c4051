"""Conv2d and Linear whose weight is quantized in every forward; parameter names stay those of the float layers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from clusterq.nn.quantizers import WeightQuantizer

_Layer = TypeVar("_Layer", bound="_QuantizedWeight")


class _QuantizedWeight(nn.Module):
    """What the quantized layers share: `weight_quantizer` and the weight it makes."""

    weight: Tensor
    weight_quantizer: WeightQuantizer
    _kept_weight: Tensor | None = None

    def quantized_weight(self) -> Tensor:
        """The weight as the layer uses it: same shape and dtype, at most 2^bits values per output channel."""
        if self._kept_weight is not None and not torch.is_grad_enabled():
            return self._kept_weight
        output: Tensor = self.weight_quantizer(self.weight)
        return output


class QuantizedConv2d(_QuantizedWeight, nn.Conv2d):
    """`nn.Conv2d` with a per-channel quantized weight; made by `from_float`.

    State: `weight` and `bias` as in the float layer, and those of `weight_quantizer`.
    """

    @classmethod
    def from_float(cls, layer: nn.Conv2d, quantizer: WeightQuantizer) -> QuantizedConv2d:
        """Takes over the float layer's parameters themselves, not copies."""
        return _take_over(cls.__new__(cls), layer, quantizer)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self._conv_forward(x, self.quantized_weight(), self.bias)
        return y


class QuantizedLinear(_QuantizedWeight, nn.Linear):
    """`nn.Linear` with a weight quantized per output feature; made by `from_float`.

    State: `weight` and `bias` as in the float layer, and those of `weight_quantizer`.
    """

    @classmethod
    def from_float(cls, layer: nn.Linear, quantizer: WeightQuantizer) -> QuantizedLinear:
        """Takes over the float layer's parameters themselves, not copies."""
        return _take_over(cls.__new__(cls), layer, quantizer)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.quantized_weight(), self.bias)


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
                layer._kept_weight = layer.quantized_weight()
        yield
    finally:
        for layer in layers:
            layer._kept_weight = None
