"""The module that fake-quantizes weights, per output channel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from clusterq import ops
from clusterq.config import Gradient, WeightRange
from clusterq.nn._lsq import QuantizationParameters, gradient_factor
from clusterq.ops._checks import check_integer
from clusterq.ops._fake_quant_checks import check_choice, code_range
from clusterq.ops.fake_quant import fake_quantize_by_magnitude, magnitude

WeightMode = Literal["learned", "live"]


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
            grad_factor=gradient_factor(weight, self.quant_max),
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
