"""The quantizers of a network's activations and weights, and the switch for all of them."""

from __future__ import annotations

from torch import nn

from clusterq.nn.activation_quantizer import ActivationMode, ActivationQuantizer, Fused
from clusterq.nn.weight_quantizer import WeightQuantizer

__all__ = ["ActivationMode", "ActivationQuantizer", "Fused", "WeightQuantizer", "set_quantization"]


def set_quantization(model: nn.Module, *, weights: bool = True, activations: bool = True) -> None:
    """Switches all weight and activation quantizers of a network on or off; off, it computes in floating point."""
    for module in model.modules():
        if isinstance(module, WeightQuantizer):
            module.enabled = weights
        elif isinstance(module, ActivationQuantizer):
            module.enabled = activations
