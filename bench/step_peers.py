"""The quantizers that others put into a network: eager compositions, torch.ao's, Brevitas' layers."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from fake_quant_peers import Round
from torch import Tensor, nn
from torch.nn import functional

from clusterq.nn.layers import QuantizedConv2d, QuantizedLinear
from clusterq.nn.quantizers import ActivationQuantizer, WeightQuantizer

QUANTIZERS = (ActivationQuantizer, WeightQuantizer)


def activation_of(quantizer: nn.Module) -> Callable[[Tensor], Tensor]:
    """The activation function that a quantizer of ours has fused; weights have none."""
    fused = quantizer.activation if isinstance(quantizer, ActivationQuantizer) else "none"
    return {"none": lambda x: x, "relu": functional.relu, "relu6": functional.relu6}[fused]


class EagerQuantizer(nn.Module):
    """LSQ in torch's own ops, per channel for weights, per tensor behind ReLU: counterpart of a learned quantizer."""

    def __init__(self, quantizer: ActivationQuantizer | WeightQuantizer) -> None:
        super().__init__()
        self.activation = activation_of(quantizer)
        self.scale, self.quant_max = quantizer.scale, quantizer.quant_max
        # Values that round to an outermost code still pass the gradient, so the clamp sits just inside the next tie.
        low, high = (code - quantizer.zero_point.float() for code in (quantizer.quant_min, quantizer.quant_max))
        self.register_buffer("low", torch.nextafter(low - 0.5, high))
        self.register_buffer("high", torch.nextafter(high + 0.5, low))

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(x)
        scale, low, high = (t.view(-1, *[1] * (x.dim() - 1)) for t in (self.scale, self.low, self.high))
        factor = 1.0 / math.sqrt(x[:1].numel() * self.quant_max)
        step = (scale - scale * factor).detach() + scale * factor
        return Round.apply((x / step).clamp(low, high)) * step


class EagerRange(nn.Module):
    """Live min/max of a weight's rows, or the range an activation quantizer has; gradient 1 but at ReLU."""

    def __init__(self, quantizer: ActivationQuantizer | WeightQuantizer) -> None:
        super().__init__()
        self.activation, self.fixed = activation_of(quantizer), isinstance(quantizer, ActivationQuantizer)
        self.quant_min, self.quant_max = quantizer.quant_min, quantizer.quant_max
        if self.fixed:
            self.register_buffer("low", quantizer.running_min.clone())
            self.register_buffer("high", quantizer.running_max.clone())

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(x)
        if self.fixed:
            low, high = self.low, self.high
        else:
            low, high = (v.view(-1, *[1] * (x.dim() - 1)) for v in x.detach().flatten(1).aminmax(dim=1))
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high - low) / (self.quant_max - self.quant_min)
        zero_point = (self.quant_min - low / scale).round()
        code = (Round.apply(x / scale) + zero_point).detach().clamp(self.quant_min, self.quant_max)
        return x + ((code - zero_point) * scale - x).detach()


class AoActivation(nn.Module):
    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        self.activation = activation_of(quantizer)
        from torch.ao.quantization import FusedMovingAvgObsFakeQuantize, MovingAverageMinMaxObserver

        self.fake_quantize = FusedMovingAvgObsFakeQuantize(
            observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=15, dtype=torch.quint8
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.fake_quantize(self.activation(x))


def _ao_weight() -> nn.Module:
    from torch.ao.quantization import FusedMovingAvgObsFakeQuantize, MovingAveragePerChannelMinMaxObserver

    return FusedMovingAvgObsFakeQuantize(
        observer=MovingAveragePerChannelMinMaxObserver,
        quant_min=-8,
        quant_max=7,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
    )


def replaced(student: nn.Module, make: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """A copy of a prepared network with other modules in the places for which `make` has one."""
    student = copy.deepcopy(student)
    for parent in list(student.modules()):
        for name, child in list(parent.named_children()):
            other = make(child)
            if other is not None:
                setattr(parent, name, other)
    return student.train()


def eager_learned(student: nn.Module) -> nn.Module:
    return replaced(student, lambda m: EagerQuantizer(m) if isinstance(m, QUANTIZERS) else None)


def eager_ranges(student: nn.Module) -> nn.Module:
    return replaced(student, lambda m: EagerRange(m) if isinstance(m, QUANTIZERS) else None)


def torch_ao(student: nn.Module) -> nn.Module:
    def make(module: nn.Module) -> nn.Module | None:
        if isinstance(module, ActivationQuantizer):
            return AoActivation(module)
        return _ao_weight() if isinstance(module, WeightQuantizer) else None

    with warnings.catch_warnings():
        # torch.ao announces its own retirement on each construction.
        warnings.simplefilter("ignore", DeprecationWarning)
        return replaced(student, make)


def brevitas(student: nn.Module, images: Tensor, *, learned: bool) -> nn.Module:
    """Brevitas' layers with its default quantizers, at our bits and with a scale for each output channel.

    Args:
        learned: its activation steps are learned already. By default they follow a percentile of each batch for the
            first 300 steps, and the scale is learned from then on.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from brevitas import nn as qnn
    collect = {"collect_stats_steps": 1} if learned else {}

    def make(module: nn.Module) -> nn.Module | None:
        if isinstance(module, ActivationQuantizer):
            # It clips at a learned value, as ReLU6 does at a fixed one.
            return qnn.QuantReLU(bit_width=module.bits, **collect)
        if not isinstance(module, (QuantizedConv2d, QuantizedLinear)):
            return None
        settings: dict[str, Any] = {
            "bias": module.bias is not None,
            "weight_bit_width": module.weight_quantizer.bits,
            "weight_scaling_per_output_channel": True,
        }
        if isinstance(module, QuantizedLinear):
            layer = qnn.QuantLinear(module.in_features, module.out_features, **settings)
        else:
            layer = qnn.QuantConv2d(
                module.in_channels,
                module.out_channels,
                module.kernel_size,
                module.stride,
                module.padding,
                module.dilation,
                module.groups,
                **settings,
            )
        layer.weight, layer.bias = module.weight, module.bias
        return layer

    network = replaced(student, make)
    with torch.no_grad():
        for _ in range(3 if learned else 1):
            network(images)
    return network
