"""Correcting BatchNorm for what quantization did to its input.

Rounded weights and activations move and widen what reaches a BatchNorm layer, and the error grows from layer to layer.
Both are measured on the same images, in floating point and quantized, and the layer's frozen statistics are changed so
that its output has the mean and variance of the floating-point network again. Only the change from one to the other
enters: images whose statistics are not those of the training set do no harm.

This is bias correction (Nagel et al. 2019, arXiv 1906.04721, section 4.2) extended to the variance and stored where
BatchNorm keeps such numbers anyway; re-estimating the statistics themselves (Nagel et al. 2022, arXiv 2203.11086)
would need real images.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clusterq.ops import batch_norm_statistics

# A channel's standard deviation is changed by this factor at most: nearly constant channels say little about it.
_LARGEST_FACTOR = 4.0
# Added to both variances, relative to the running variance, so that constant channels compare equal.
_SMOOTHING = 1e-3


class _Moments:
    """Mean and sum of centered squares per channel, [C] float64, merged by Chan's rule."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = torch.zeros(())

    def add(self, x: Tensor) -> None:
        mean, var = (t.double() for t in batch_norm_statistics(x.detach()))
        count = x.numel() // x.shape[1]
        total = self.count + count
        delta = mean - self.mean
        self.squares = self.squares + var * count + delta.square() * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total

    @property
    def var(self) -> Tensor:
        return self.squares / self.count


class _Layer:
    """One BatchNorm layer: its statistics as trained, and what it saw in floating point and quantized."""

    def __init__(self, module: _BatchNorm) -> None:
        assert module.running_mean is not None and module.running_var is not None
        self.module = module
        self.mean = module.running_mean.detach().double()
        self.width = module.running_var.detach().double() + module.eps
        self.reference, self.quantized = _Moments(), _Moments()

    def observe(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.reference.add(inputs[0])

    def correct(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if self.reference.count == 0:
            return
        self.quantized.add(inputs[0])
        small = _SMOOTHING * self.width
        factor = ((self.quantized.var + small) / (self.reference.var + small)).sqrt()
        factor = factor.clamp(1 / _LARGEST_FACTOR, _LARGEST_FACTOR)
        # (mean - running_mean) / sqrt(running_var + eps) of the quantized input shall equal that of the reference, and
        # so shall var / (running_var + eps).
        running_mean, running_var = self.module.running_mean, self.module.running_var
        assert running_mean is not None and running_var is not None
        running_var.copy_((self.width * factor.square() - self.module.eps).clamp_min(0))
        factor = ((running_var.double() + self.module.eps) / self.width).sqrt()
        running_mean.copy_(self.quantized.mean - (self.reference.mean - self.mean) * factor)


class BatchNormCorrection:
    """Correction of all BatchNorm layers of one network with running statistics; two passes over the same images.

        correction = BatchNormCorrection(student)
        with correction.observing():
            student(images)  # quantizers off
        with correction.correcting():
            student(images)  # quantizers on

    While correcting, a layer changes its statistics before it normalises, so that those after it are measured on inputs
    that are corrected already. With several batches, and for a layer called several times, what it saw is pooled.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = [
            _Layer(module)
            for module in model.modules()
            if isinstance(module, _BatchNorm) and module.running_mean is not None
        ]

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Forwards inside this context tell what the layers see in floating point."""
        with ExitStack() as stack:
            for layer in self._layers:
                stack.callback(layer.module.register_forward_pre_hook(layer.observe).remove)
            yield

    @contextmanager
    def correcting(self) -> Iterator[None]:
        """Forwards inside this context change `running_mean` and `running_var` of every layer that was observed."""
        with ExitStack() as stack:
            for layer in self._layers:
                stack.callback(layer.module.register_forward_pre_hook(layer.correct).remove)
            yield
