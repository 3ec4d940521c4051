"""What the drop-in fake-quantize modules of torch.ao and torchao share: ranges, scales and zero points without a sync.

Two rules turn a range [low, high] into scale and zero point; both are torch's own, kept bit for bit on finite ranges.
`low' = min(low, 0)`, `high' = max(high, 0)`, `steps = quant_max - quant_min`:

    observer  (torch.ao's observers, float32) symmetric: scale = max(-low', high') / (steps / 2), zero point a constant
              of the dtype; affine: scale = (high' - low') / steps, zero point clamp(quant_min - round(low' / scale)).
              Scales below the observer's eps become eps.
    kernel    (torch's fused CPU kernel, quotients in float64) a symmetric range with low < 0 < high is widened to
              [-(steps // 2 + 1), steps // 2] times the larger of low / -(steps // 2 + 1) and high / (steps // 2).
              scale = (high' - low') / steps; 0, and what has no finite reciprocal, becomes 0.1; anything below 6.1e-5
              becomes 6.1e-5 and stretches the range in proportion. The zero point is quant_min - low' / scale where
              |quant_min| + |low' / scale| < |quant_max| + |high' / scale|, else quant_max - high' / scale, clamped,
              then rounded; of a symmetric range with low < 0 < high it is the middle code.

Where torch goes wrong these modules do not follow: a tensor (or channel) that holds a NaN or an infinity does not move
its range, where torch's range is lost for good.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clusterq import ops

# Observers whose range and scale are computed here, from their buffers; others are called as they are.
_KNOWN = {
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "MovingAveragePerChannelMinMaxObserver",
    "PerChannelMinMaxObserver",
}
_HOMES = ("torch.ao.quantization.observer", "torchao.quantization.pt2e.observer")
# Of torch's CPU kernel.
_SMALLEST_KERNEL_SCALE = 6.1e-5
_KERNEL_SCALE_OF_NOTHING = 0.1

QParams = tuple[Tensor, Tensor]


def is_known(observer: Any) -> bool:
    """Whether the observer's class, not a subclass, is one whose rule this module follows."""
    kind = type(observer)
    if kind.__name__ not in _KNOWN or kind.__module__ not in _HOMES:
        return False
    return bool(observer.qscheme != torch.per_channel_affine_float_qparams)


def range_of(x: Tensor, axis: int | None) -> Tensor:
    """[2] or [2, C]: minimum and maximum of x, per channel of `axis`; float32, NaN where x holds one."""
    if axis is None:
        low, high = x.aminmax()
        return torch.stack((low.float(), high.float()))
    rest = [d for d in range(x.dim()) if d != axis % x.dim()]
    low, high = (x.amin(rest), x.amax(rest)) if rest else (x, x)
    return torch.stack((low.float(), high.float()))


def moved_range(running: Tensor, now: Tensor, averaging: float | None) -> Tensor:
    """The running range [2] or [2, C] after one observation; `averaging` None widens it, infinite is taken as unset."""
    if averaging is None:
        moved = torch.stack((torch.minimum(running[0], now[0]), torch.maximum(running[1], now[1])))
    else:
        moved = torch.where(running.isinf(), now, running + averaging * (now - running))
    # An end that is not finite spoils the difference of both.
    return torch.where((now[1] - now[0]).isfinite(), moved, running)


def observer_qparams(
    ends: Tensor, quant_min: int, quant_max: int, eps: Tensor, symmetric_zero_point: int | None
) -> QParams:
    """Scale float32 and zero point int32, [1] or [C], under the observers' rule; module docstring."""
    low, high = ends[0].clamp(max=0), ends[1].clamp(min=0)
    if symmetric_zero_point is not None:
        scale = torch.maximum(torch.maximum(-low, high) / (float(quant_max - quant_min) / 2), eps)
        return scale, torch.full_like(scale, symmetric_zero_point, dtype=torch.int32)
    scale = torch.maximum((high - low) / float(quant_max - quant_min), eps)
    return scale, (quant_min - (low / scale).round().int()).clamp(quant_min, quant_max)


def kernel_qparams(ends: Tensor, quant_min: int, quant_max: int, symmetric: bool) -> QParams:
    """Scale float32 and zero point int32, [1] or [C], under the fused kernel's rule; module docstring."""
    steps = quant_max - quant_min
    ends = ends.reshape(2, -1)
    around_zero = (ends[0] < 0) & (ends[1] > 0)
    if symmetric:
        # Made on the device: a tensor of numbers would be copied there.
        codes = torch.stack((ends.new_full((1,), -(steps // 2 + 1)), ends.new_full((1,), steps // 2)))
        widened = (ends / codes).amax(0, keepdim=True).double() * codes
        ends = torch.where(around_zero, widened.float(), ends)
    low, high = ends[0].clamp(max=0), ends[1].clamp(min=0)
    exact = ((high.double() - low.double()) / steps).float()
    exact = torch.where(exact.reciprocal().isinf(), _KERNEL_SCALE_OF_NOTHING, exact)
    scale = exact.clamp(min=_SMALLEST_KERNEL_SCALE)
    # A floored scale stretches the range with it.
    stretch = scale / exact
    below, above = ((end * stretch).double() / scale.double() for end in (low, high))
    from_low, from_high = quant_min - below, quant_max - above
    low_is_nearer = abs(quant_min) + below.abs() < abs(quant_max) + above.abs()
    zero_point = torch.where(low_is_nearer, from_low, from_high)
    if symmetric:
        zero_point = torch.where(around_zero, (quant_min + quant_max) / 2, zero_point)
    return scale, zero_point.clamp(quant_min, quant_max).round().int()


class Observed:
    """Mixin: the host's copy of the flags, the observer's range, and the forward of `FakeQuantize`.

    Mixed in before a fake-quantize class of torch.ao or torchao's PT2E flow, whose constructor, buffers and state_dict
    it keeps. `observer_enabled` and `fake_quant_enabled` are read by no forward: `enable_observer`, `disable_observer`,
    `enable_fake_quant`, `disable_fake_quant` and `load_state_dict` keep host flags in step; after writing into these
    buffers by other means call `read_flags`.
    """

    # torch.jit, which traces modules that hold these, reads annotations of classes.
    if TYPE_CHECKING:
        _observing: bool
        _quantizing: bool
        _known: bool
        _symmetric_zero_point: int | None
        # What is used of the wrapped class.
        activation_post_process: Any
        observer_enabled: Tensor
        fake_quant_enabled: Tensor
        scale: Tensor
        zero_point: Tensor
        qscheme: torch.qscheme
        ch_axis: int
        quant_min: int
        quant_max: int
    _OBSERVER_FLAG = "observer_enabled"

    def _watch(self) -> None:
        """Called at the end of the constructor."""
        observer = self.activation_post_process
        self._known = is_known(observer)
        self._symmetric_zero_point = _symmetric_zero_point(observer) if self._known else None
        # As every constructor leaves them; buffers on the meta device cannot be read.
        self._observing = self._quantizing = True

    def read_flags(self) -> None:
        """Read the flag buffers; waits for the device."""
        self._observing = bool(getattr(self, self._OBSERVER_FLAG)[0] == 1)
        self._quantizing = bool(self.fake_quant_enabled[0] == 1)

    # As in torch.ao, and in words that torch.jit knows: tracing a module compiles these.
    def enable_observer(self, enabled: bool = True) -> None:
        self.observer_enabled[0] = 1 if enabled else 0
        self._observing = bool(enabled)

    def enable_fake_quant(self, enabled: bool = True) -> None:
        self.fake_quant_enabled[0] = 1 if enabled else 0
        self._quantizing = bool(enabled)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[misc]
        self.read_flags()

    @property
    def _axis(self) -> int | None:
        per_tensor = self.qscheme in (torch.per_tensor_affine, torch.per_tensor_symmetric)
        return None if per_tensor else self.ch_axis

    def _range(self, x: Tensor) -> Tensor:
        """The observer's range as it is, [2] or [2, C], for as many channels as x has."""
        observer = self.activation_post_process
        axis = self._axis
        if axis is not None and observer.min_val.numel() == 0:
            # Per-channel buffers are born empty; resized they stay the buffers they are.
            channels = x.size(axis)
            observer.min_val.resize_(channels).fill_(float("inf"))
            observer.max_val.resize_(channels).fill_(-float("inf"))
        return torch.stack((observer.min_val, observer.max_val))

    def _move_range(self, x: Tensor) -> Tensor:
        """Update the observer's buffers by x and return them, [2] or [2, C]."""
        observer, axis, running = self.activation_post_process, self._axis, self._range(x)
        if x.numel() == 0:
            return running
        ends = moved_range(running, range_of(x.detach(), axis), getattr(observer, "averaging_constant", None))
        observer.min_val.copy_(ends[0])
        observer.max_val.copy_(ends[1])
        return ends

    def _keep(self, scale: Tensor, zero_point: Tensor) -> QParams:
        """Copy scale and zero point into the buffers and return what backward may keep."""
        if self.scale.shape != scale.shape:
            self.scale.resize_(scale.shape)
            self.zero_point.resize_(zero_point.shape)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
        return scale, zero_point

    @torch.no_grad()
    def _observe(self, x: Tensor) -> QParams:
        """Range, scale and zero point after seeing x, under the observers' rule."""
        observer = self.activation_post_process
        if not self._known:
            observer(x.detach())
            scale, zero_point = observer.calculate_qparams()
            return self._keep(scale.to(self.scale.device).clone(), zero_point.to(self.zero_point.device))
        ends = self._move_range(x)
        limits = (observer.quant_min, observer.quant_max)
        scale, zero_point = observer_qparams(ends, *limits, observer.eps, self._symmetric_zero_point)
        # While nothing was seen the observers give scale 1 and zero point 0.
        is_set = (ends[0] <= ends[1]).reshape(scale.shape)
        return self._keep(torch.where(is_set, scale, 1.0), torch.where(is_set, zero_point, 0))

    def forward(self, x: Tensor) -> Tensor:
        """x moves the range (observer on) and comes back on the grid (fake-quantization on); shape and dtype of x."""
        if self._observing:
            scale, zero_point = self._observe(x)
        elif self._quantizing:
            # A copy: backward must see this scale, whatever happens to the buffer until then.
            scale, zero_point = self.scale.clone(), self.zero_point
        if not self._quantizing:
            return x
        observer = self.activation_post_process
        if self.qscheme == torch.per_channel_affine_float_qparams:
            # Rounds with the zero point inside, which clusterq's op does not.
            y: Tensor = torch.fake_quantize_per_channel_affine(
                x, scale, zero_point, self.ch_axis, observer.quant_min, observer.quant_max
            )
            return y
        return ops.fake_quantize(x, scale, zero_point, observer.quant_min, observer.quant_max, axis=self._axis)


class FusedObserved(Observed):
    """Mixin: the forward and the exported parameters of `FusedMovingAvgObsFakeQuantize`."""

    if TYPE_CHECKING:
        is_symmetric_quant: bool
    export = "trained"

    def forward(self, x: Tensor) -> Tensor:
        """As `Observed.forward`, with the fused kernel's rule; the scale follows the range also with observer off."""
        if not self._known:
            return super().forward(x)
        if x.numel() == 0:
            return x
        with torch.no_grad():
            observer = self.activation_post_process
            ends = self._move_range(x) if self._observing else self._range(x)
            if not self._quantizing:
                return x
            limits = (observer.quant_min, observer.quant_max)
            scale, zero_point = self._keep(*kernel_qparams(ends, *limits, self.is_symmetric_quant))
        return ops.fake_quantize(x, scale, zero_point, *limits, axis=self._axis)

    def calculate_qparams(self) -> QParams:
        """Scale and zero point, [1] or [C], that the last training step quantized with: the kernel's rule.

        torch's class trains with the kernel's rule and exports with the observer's, which differ (a range of -1 to 2 in
        8 bits: scale 0.015748 and 0.015686). `export="observer"` in the constructor does as torch does.
        """
        observer = self.activation_post_process
        # Of a range that is not set the observer says so.
        is_set = self._known and observer.min_val.numel() > 0 and bool((observer.min_val <= observer.max_val).all())
        if self.export == "observer" or not is_set:
            qparams: QParams = observer.calculate_qparams()
            return qparams
        ends = torch.stack((observer.min_val, observer.max_val))
        return kernel_qparams(ends, observer.quant_min, observer.quant_max, self.is_symmetric_quant)


def checked_export(export: str) -> str:
    if export not in ("trained", "observer"):
        raise ValueError(f"export is {export!r}; wanted trained or observer")
    return export


def _symmetric_zero_point(observer: Any) -> int | None:
    """The constant zero point of a symmetric scheme, which the observer itself is asked for; None if affine."""
    if observer.qscheme not in (torch.per_tensor_symmetric, torch.per_channel_symmetric):
        return None
    probe = copy.deepcopy(observer)
    # On the CPU whatever the default device; eps, which may have no value yet, has no part in the zero point.
    with torch.device("cpu"):
        probe.min_val, probe.max_val, probe.eps = torch.tensor([-1.0]), torch.tensor([1.0]), torch.tensor([1e-7])
        return int(probe.calculate_qparams()[1])
