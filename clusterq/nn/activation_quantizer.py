"""The module that fake-quantizes activations, per tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from clusterq import ops
from clusterq.config import ActivationRange, Gradient
from clusterq.nn._lsq import QuantizationParameters, gradient_factor
from clusterq.ops._checks import check_integer, check_number, compute_dtype
from clusterq.ops._fake_quant_checks import check_choice, code_range
from clusterq.ops.fake_quant import fake_quantize_by_magnitude, magnitude

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ActivationMode = Literal["learned", "fixed", "ema"]
Fused = Literal["none", "relu", "relu6"]

_NO_RANGE = "an activation quantizer has no range yet: calibrate the network (clusterq.qat.calibrate) or train it first"
_NOT_CALIBRATED = (
    "an activation quantizer has no range yet, and the first batches of several processes differ: calibrate the network"
    " (clusterq.qat.calibrate) before it is distributed"
)


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
        factor = gradient_factor(x, self.quant_max)
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


def _activate(x: Tensor, activation: Fused) -> Tensor:
    if activation == "none":
        return x
    return functional.relu(x) if activation == "relu" else functional.relu6(x)
