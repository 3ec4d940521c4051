"""Modules that fake-quantize activations (per tensor) and weights (per output channel).

Learned steps follow LSQ (Esser et al. 2020, arXiv 1902.08153): the gradient of a step is multiplied by
`1 / sqrt(n * quant_max)` (section 2.2), n the number of values that share it: a channel's weights, a sample's features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from clusterq import ops
from clusterq.config import ActivationRange, Gradient, WeightRange
from clusterq.ops._checks import check_integer, check_number, compute_dtype
from clusterq.ops._fake_quant_checks import check_choice, code_range
from clusterq.ops.fake_quant import fake_quantize_by_magnitude, magnitude

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ActivationMode = Literal["learned", "fixed", "ema"]
WeightMode = Literal["learned", "live"]
Fused = Literal["none", "relu", "relu6"]
QuantizationParameters = tuple[Tensor, Tensor, int, int]


def _sharing(x: Tensor) -> int:
    """Elements of one entry of axis 0; 0 of none."""
    return x.numel() // max(x.size(0), 1) if x.dim() > 0 else 1


def _lsq_factor(sharing: int, quant_max: int) -> float:
    return 1.0 / math.sqrt(max(sharing, 1) * quant_max)


class ActivationQuantizer(nn.Module):
    """Fake-quantizes a whole tensor, after an activation function of its own where one is given.

    Args:
        bits: 2 to 8.
        mode: `"learned"` trains the step, `"fixed"` keeps the calibrated range, `"ema"` moves the range with the
            training batches: the first batch sets it, later ones enter with weight `1 - momentum`, and after
            `range_steps` forwards, calibration counting as the first, it stands still. No forward waits for the device,
            calibration excepted.
        non_negative: the values are never negative: codes [0, 2^bits - 1], zero point 0. Implied by `activation`.
        symmetric: for values of both signs, codes [-2^(bits-1), 2^(bits-1) - 1] and zero point 0 instead of codes
            [0, 2^bits - 1] and a zero point from the range.
        gradient: of the straight-through estimator in the modes `"fixed"` and `"ema"`.
        activation: `"relu"` or `"relu6"` fused with the quantization.
        function: any other activation function, run before it; holds no parameters.
        method: how `clusterq.qat.calibrate` chooses the range, see `calibrating`.

    Input and output: any shape, float32, bfloat16, float16 or float64. A quantizer that was not calibrated calibrates
    itself on the first training batch it sees (min/max); forward raises RuntimeError where there is no range to use.

    `process_group` (None): processes of `torch.distributed` over whose batches a moving range is taken together.

    State: `observations` (int64 []) counts range updates, 0 meaning none. Modes learned and fixed hold `scale` (float32
    [1]) and `zero_point` (int32 [1]), mode ema `running_min` and `running_max` (float32 [1]).
    """

    observations: Tensor
    zero_point: Tensor
    running_min: Tensor
    running_max: Tensor

    def __init__(
        self,
        bits: int,
        *,
        mode: ActivationMode = "learned",
        non_negative: bool = False,
        symmetric: bool = False,
        gradient: Gradient = "clipped",
        activation: Fused = "none",
        function: nn.Module | None = None,
        method: ActivationRange = "mse",
        momentum: float = 0.9,
        range_steps: int = 800,
    ) -> None:
        super().__init__()
        check_integer("bits", bits, 2, 8)
        check_choice(mode, get_args(ActivationMode), "mode")
        check_choice(gradient, get_args(Gradient), "gradient")
        check_choice(activation, get_args(Fused), "activation")
        check_choice(method, get_args(ActivationRange), "method")
        check_number("momentum", momentum, 0, below=1)
        check_integer("range_steps", range_steps, 0)
        if activation != "none" and function is not None:
            raise ValueError("activation and function are both given; wanted at most one of them")
        self.bits = bits
        self.mode = mode
        self.non_negative = non_negative or activation != "none"
        self.symmetric = symmetric and not self.non_negative
        self.gradient: Gradient = gradient
        self.activation: Fused = activation
        self.function = function
        self.method: ActivationRange = method
        self.momentum = momentum
        self.range_steps = range_steps
        self.quant_min, self.quant_max = code_range(bits, signed=self.symmetric)
        self.enabled = True
        self.process_group: ProcessGroup | None = None
        self.calibration: ActivationRange | None = None
        # Lower end, upper end and number of forwards of the calibration under way.
        self._spans: tuple[Tensor, Tensor, int] | None = None
        # `observations` on the host, where it may be read freely, and what it means to forward; `_unread`: the buffer
        # has gone on alone.
        self._observed, self._unread = 0, False
        self._has_range, self._moves = False, range_steps > 0
        self.register_buffer("observations", torch.zeros((), dtype=torch.int64))
        if mode == "ema":
            self.register_buffer("running_min", torch.full((1,), float("inf")))
            self.register_buffer("running_max", torch.full((1,), -float("inf")))
        else:
            self.scale = nn.Parameter(torch.ones(1), requires_grad=mode == "learned")
            self.register_buffer("zero_point", torch.zeros(1, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        if self.function is not None:
            x = self.function(x)
        if not self.enabled:
            return _activate(x, self.activation)
        if self.calibration is not None:
            self._calibrate(x, self.calibration)
            return _activate(x, self.activation)
        if self.mode == "ema":
            return self._moving(x)
        if not self._has_range:
            self._start(x)
        grid = (self.scale, self.zero_point, self.quant_min, self.quant_max)
        if self.mode == "fixed":
            return ops.fake_quantize(x, *grid, gradient=self.gradient, activation=self.activation)
        factor = _lsq_factor(_sharing(x), self.quant_max)
        return fake_quantize_by_magnitude(x, *grid, activation=self.activation, grad_factor=factor)

    def _moving(self, x: Tensor) -> Tensor:
        """On the running range, which x moves while it is to be moved."""
        observe = self.training and self._moves
        if observe:
            self._count()
        else:
            self._check_range()
        # Buffers of another dtype than the op's, as after `double()`, are copied forth and back.
        dtype = compute_dtype(x.dtype)
        low, high = self.running_min.to(dtype), self.running_max.to(dtype)
        y, _, _ = ops.observe_fake_quantize(
            x,
            low,
            high,
            self.bits,
            momentum=self.momentum,
            observe=observe,
            symmetric=self.symmetric,
            signed=self.symmetric,
            gradient=self.gradient,
            activation=self.activation,
            process_group=self.process_group if observe else None,
        )
        if self.running_min.dtype != dtype:
            self.running_min.copy_(low)
            self.running_max.copy_(high)
        return y

    def _start(self, x: Tensor) -> None:
        """The range of the first training batch; raises where there is no range and none is to be had."""
        self._read()
        if self._has_range:
            return
        if not self.training:
            raise RuntimeError(_NO_RANGE)
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and torch.distributed.get_world_size() > 1:
            # Each process would start from its own batch, and nothing would bring their ranges together again.
            raise RuntimeError(_NOT_CALIBRATED)
        self._calibrate(x, "minmax")

    def _check_range(self) -> None:
        if not self._has_range:
            self._read()
        if not self._has_range:
            raise RuntimeError(_NO_RANGE)

    def _read(self) -> None:
        """Take over what `observations` says; waits for the device."""
        self._note(int(self.observations))

    def _note(self, observations: int) -> None:
        self._observed, self._unread = observations, False
        self._has_range, self._moves = observations > 0, observations < self.range_steps

    def train(self, mode: bool = True) -> ActivationQuantizer:
        if self._unread:
            self._read()
        super().train(mode)
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> ActivationQuantizer:
        ends = {name: getattr(self, name) for name in ("running_min", "running_max") if hasattr(self, name)}
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        for name, end in ends.items():
            moved = getattr(self, name)
            if moved.dtype not in (torch.float32, torch.float64):
                # A moving average in 16 bits would stand still.
                setattr(self, name, end.to(moved.device))
        return self

    def qparams(self) -> QuantizationParameters:
        """Scale [1], zero point [1] (whole numbers), quant_min, quant_max in use; RuntimeError if it has no range."""
        self._check_range()
        if self.mode == "ema":
            scale, zero_point = ops.range_to_qparams(
                self.running_min, self.running_max, self.quant_min, self.quant_max, symmetric=self.symmetric
            )
            return scale, zero_point, self.quant_min, self.quant_max
        scale = magnitude(self.scale) if self.mode == "learned" else self.scale.detach()
        return scale, self.zero_point, self.quant_min, self.quant_max

    @contextmanager
    def calibrating(self, method: ActivationRange | None = None) -> Iterator[None]:
        """Within this context each forward sets the range from its input and passes it on in floating point.

        `method` None means the quantizer's own. `"mse"` takes the range of least squared error, averaged over the
        forwards; `"minmax"` (and `"ema"`, the same here) the extreme values over all of them. Mode ema always takes
        extreme values. A forward raises ValueError for values that are NaN or infinite.
        """
        self.calibration, self._spans = method or self.method, None
        try:
            yield
        finally:
            self.calibration, self._spans = None, None

    @torch.no_grad()
    def _calibrate(self, x: Tensor, method: ActivationRange) -> None:
        span = self._span(_activate(x.detach(), self.activation), method)
        if self._spans is not None:
            low, high, count = self._spans
            if method == "mse" and self.mode != "ema":
                span = low.lerp(span[0], 1 / (count + 1)), high.lerp(span[1], 1 / (count + 1))
            else:
                span = torch.minimum(low, span[0]), torch.maximum(high, span[1])
        low, high = span
        if not bool(torch.isfinite(high - low)):
            raise ValueError("the values to calibrate an activation quantizer on hold NaN or infinity")
        if self.calibration is not None:
            self._spans = low, high, 1 if self._spans is None else self._spans[2] + 1
        if self.mode == "ema":
            self.running_min.copy_(low)
            self.running_max.copy_(high)
        else:
            scale, zero_point = ops.range_to_qparams(
                low, high, self.quant_min, self.quant_max, symmetric=self.symmetric
            )
            self.scale.copy_(scale)
            self.zero_point.copy_(zero_point)
        self._note(1)
        self.observations.fill_(1)

    def _span(self, x: Tensor, method: ActivationRange) -> tuple[Tensor, Tensor]:
        """Lower and upper end, [1] each, from which `range_to_qparams` makes the step that fits x."""
        x = x if x.dtype == torch.float64 else x.float()
        if x.numel() == 0:
            raise ValueError("the values to calibrate an activation quantizer on are none")
        low, high = (v.reshape(1) for v in x.aminmax())
        if self.non_negative:
            low = torch.zeros_like(low)
        # All zeros: any step fits, and none should enter an average.
        if self.mode == "ema" or method != "mse" or not bool((high > low).any()):
            return low, high
        scale, zero_point = ops.mse_range(x, self.quant_min, self.quant_max, symmetric=self.symmetric)
        if self.symmetric:
            half = scale * ((self.quant_max - self.quant_min) / 2)
            return -half, half
        return (self.quant_min - zero_point) * scale, (self.quant_max - zero_point) * scale

    def _count(self) -> None:
        self.observations.add_(1)
        if torch.compiler.is_compiling():
            # A number that compiled code reads compiles it anew whenever it changes; `train` and `eval` read it.
            self._has_range = self._unread = True
        else:
            self._note(self._observed + 1)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._read()

    def extra_repr(self) -> str:
        name = f", activation={self.activation}" if self.activation != "none" else ""
        return f"bits={self.bits}, mode={self.mode}, codes=[{self.quant_min}, {self.quant_max}]{name}"


class WeightQuantizer(nn.Module):
    """Fake-quantizes a weight per channel of axis 0.

    Args:
        bits: 2 to 8; codes [-2^(bits-1), 2^(bits-1) - 1].
        channels: size of axis 0.
        mode: `"learned"` trains the steps, which `initialise` or else the first forward sets; `"live"` ranges the
            weight anew in every forward.
        method: `"mse"`, the range of least squared error, or `"minmax"`.
        symmetric: zero point 0; otherwise a zero point per channel from its range.
        gradient: of the straight-through estimator in mode `"live"`.
        narrow: leave out the lowest code, so that every code has its negative.

    State in mode learned: `scale` (float32 [channels], zeros until it is set) and `zero_point` (int32 [channels]).
    """

    zero_point: Tensor

    def __init__(
        self,
        bits: int,
        channels: int,
        *,
        mode: WeightMode = "learned",
        method: WeightRange = "mse",
        symmetric: bool = True,
        gradient: Gradient = "clipped",
        narrow: bool = False,
    ) -> None:
        super().__init__()
        check_integer("bits", bits, 2, 8)
        if mode not in ("learned", "live"):
            raise ValueError(f"mode is {mode!r}; wanted learned or live")
        if method not in ("mse", "minmax"):
            raise ValueError(f"method is {method!r}; wanted mse or minmax")
        check_choice(gradient, get_args(Gradient), "gradient")
        self.bits = bits
        self.channels = channels
        self.mode = mode
        self.method = method
        self.symmetric = symmetric
        self.gradient: Gradient = gradient
        self.quant_min, self.quant_max = code_range(bits, signed=True)
        self.quant_min += narrow
        self.narrow = narrow
        self.enabled = True
        # Whether `scale` is set, on the host, where forward may read it freely.
        self._initialised = False
        if mode == "learned":
            self.scale = nn.Parameter(torch.zeros(channels))
            self.register_buffer("zero_point", torch.zeros(channels, dtype=torch.int32))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight on its grid, same shape and dtype."""
        if not self.enabled:
            return weight
        return self._live(weight)[0] if self.mode == "live" else self._learned(weight)

    def with_steps(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """What forward gives where the quantizer is on, and the steps [channels] of that grid, detached.

        One search for the range in mode live, where `qparams` beside forward would be a second one.
        """
        if self.mode == "live":
            return self._live(weight)
        return self._learned(weight), magnitude(self.scale).detach()

    def _live(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        if self.method == "minmax" and not self.narrow:
            value, scale, _ = ops.fake_quantize_weight(
                weight, self.bits, axis=0, symmetric=self.symmetric, gradient=self.gradient, return_qparams=True
            )
            return value, scale
        scale, zero_point = self._range(weight)
        value = ops.fake_quantize(
            weight, scale, zero_point, self.quant_min, self.quant_max, axis=0, gradient=self.gradient
        )
        return value, scale

    def _learned(self, weight: Tensor) -> Tensor:
        if not self._initialised:
            self._start(weight)
        return fake_quantize_by_magnitude(
            weight,
            self.scale,
            self.zero_point,
            self.quant_min,
            self.quant_max,
            axis=0,
            grad_factor=_lsq_factor(_sharing(weight), self.quant_max),
        )

    def _start(self, weight: Tensor) -> None:
        # Steps may have come by other ways than `initialise`, such as a copy into the parameter.
        self._initialised = bool((self.scale != 0).any())
        if not self._initialised:
            self.initialise(weight)

    @torch.no_grad()
    def initialise(self, weight: Tensor) -> None:
        """Sets learned steps and zero points from a weight [channels, ...]; nothing to do in mode live."""
        if self.mode == "learned":
            if weight.dim() == 0 or weight.size(0) != self.channels:
                raise ValueError(f"weight has shape {tuple(weight.shape)}; wanted [{self.channels}, ...]")
            scale, zero_point = self._range(weight)
            self.scale.copy_(scale)
            self.zero_point.copy_(zero_point)
            self._initialised = True

    @torch.no_grad()
    def qparams(self, weight: Tensor) -> QuantizationParameters:
        """Scale [channels], zero point [channels] (whole numbers), quant_min and quant_max in use for this weight."""
        if self.mode == "learned":
            if not self._initialised:
                self._start(weight)
            scale, zero_point = magnitude(self.scale), self.zero_point
        else:
            scale, zero_point = self._range(weight)
        return scale, zero_point, self.quant_min, self.quant_max

    def _range(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        weight = weight.detach()
        if self.method == "mse":
            return ops.mse_range(weight, self.quant_min, self.quant_max, axis=0, symmetric=self.symmetric)
        return ops.fake_quantize_weight(weight, self.bits, axis=0, symmetric=self.symmetric, return_qparams=True)[1:]

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._initialised = self.mode == "learned" and bool((self.scale != 0).any())

    def extra_repr(self) -> str:
        return f"bits={self.bits}, mode={self.mode}, method={self.method}, symmetric={self.symmetric}"


def set_quantization(model: nn.Module, *, weights: bool = True, activations: bool = True) -> None:
    """Switches all weight and activation quantizers of a network on or off; off, it computes in floating point."""
    for module in model.modules():
        if isinstance(module, WeightQuantizer):
            module.enabled = weights
        elif isinstance(module, ActivationQuantizer):
            module.enabled = activations


_NO_RANGE = "an activation quantizer has no range yet: calibrate the network (clusterq.qat.calibrate) or train it first"
_NOT_CALIBRATED = (
    "an activation quantizer has no range yet, and the first batches of several processes differ: calibrate the network"
    " (clusterq.qat.calibrate) before it is distributed"
)


def _activate(x: Tensor, activation: Fused) -> Tensor:
    if activation == "none":
        return x
    return functional.relu(x) if activation == "relu" else functional.relu6(x)
