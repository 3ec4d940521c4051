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
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clusterq.ops import batch_norm_statistics

# Guards of the arithmetic, not settings. A channel's standard deviation is changed by this factor at most: nearly
# constant channels say little about it.
_LARGEST_FACTOR = 4.0
# Added to both variances, relative to the running variance, so that constant channels compare equal.
_SMOOTHING = 1e-3
# Statistics of a corrected layer as they were before.
_MEAN, _VAR = "uncorrected_mean", "uncorrected_var"


class _Moments(NamedTuple):
    """Number of values, mean and variance per channel, [C] float64."""

    values: int
    mean: Tensor
    var: Tensor

    def merge(self, other: _Moments) -> _Moments:
        """Of both together, by Chan's rule."""
        values = self.values + other.values
        share, delta = other.values / values, other.mean - self.mean
        var = self.var * (1 - share) + other.var * share + delta.square() * (share * (1 - share))
        return _Moments(values, self.mean + delta * share, var)


def _moments(x: Tensor) -> _Moments:
    mean, var = batch_norm_statistics(x.detach())
    return _Moments(x.numel() // x.shape[1], mean.double(), var.double())


class _Layer:
    """One BatchNorm layer: its statistics as trained, and what it saw in floating point and quantized."""

    def __init__(self, module: _BatchNorm) -> None:
        self.module = module
        if hasattr(module, _MEAN):
            _buffer(module, "running_mean").copy_(getattr(module, _MEAN))
            _buffer(module, "running_var").copy_(getattr(module, _VAR))
        elif getattr(module, "statistics_corrected", False):
            raise ValueError("BatchNorm of this network was corrected before it was saved; calibrate a fresh one")
        self.mean = _buffer(module, "running_mean").to(torch.float64, copy=True)
        self.variance = _buffer(module, "running_var").to(torch.float64, copy=True) + module.eps
        # Of all calls up to each one: call k of the quantized network is compared with call k in floating point.
        self.reference: list[_Moments] = []
        self.quantized: _Moments | None = None
        self.calls = 0

    def observe(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        now = _moments(inputs[0])
        self.reference.append(self.reference[-1].merge(now) if self.reference else now)

    def correct(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if self.calls == len(self.reference):
            return
        reference, now = self.reference[self.calls], _moments(inputs[0])
        self.calls += 1
        self.quantized = now if self.quantized is None else self.quantized.merge(now)
        small = _SMOOTHING * self.variance
        factor = ((self.quantized.var + small) / (reference.var + small)).sqrt()
        factor = factor.clamp(1 / _LARGEST_FACTOR, _LARGEST_FACTOR)
        running_mean, running_var = _buffer(self.module, "running_mean"), _buffer(self.module, "running_var")
        if not hasattr(self.module, _MEAN):
            self.module.register_buffer(_MEAN, running_mean.clone(), persistent=False)
            self.module.register_buffer(_VAR, running_var.clone(), persistent=False)
        # (mean - running_mean) / sqrt(running_var + eps) of the quantized input shall equal that of the reference, and
        # so shall var / (running_var + eps).
        running_var.copy_((self.variance * factor.square() - self.module.eps).clamp_min(0))
        factor = ((running_var.double() + self.module.eps) / self.variance).sqrt()
        running_mean.copy_(self.quantized.mean - (reference.mean - self.mean) * factor)


def _buffer(module: _BatchNorm, name: str) -> Tensor:
    tensor: Tensor = getattr(module, name)
    return tensor.detach()


class BatchNormCorrection:
    """Correction of all BatchNorm layers of one network with running statistics, on one batch of images.

        correction = BatchNormCorrection(student)
        with correction.observing():
            student(images)  # quantizers off
        with correction.correcting():
            student(images)  # quantizers on

    While correcting, a layer changes its statistics before it normalises, so that those after it are measured on inputs
    that are corrected already: one pass does for all of them. For a layer called several times in one forward, what it
    saw is pooled. Layers that were corrected before start from their statistics before that.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        self._layers = [_Layer(module) for module in modules]

    def observing(self) -> AbstractContextManager[None]:
        """The forward inside this context tells what the layers see in floating point."""
        return self._hooked("observe")

    def correcting(self) -> AbstractContextManager[None]:
        """The forward inside this context changes `running_mean` and `running_var` of every layer that was observed."""
        return self._hooked("correct")

    @contextmanager
    def _hooked(self, method: str) -> Iterator[None]:
        with ExitStack() as stack:
            for layer in self._layers:
                stack.callback(layer.module.register_forward_pre_hook(getattr(layer, method)).remove)
            yield
