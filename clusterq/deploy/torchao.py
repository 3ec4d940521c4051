"""clusterq's ops inside torchao's quantization-aware training; torchao 0.18 is what it is tested with.

PT2E: `FakeQuantize` and `FusedMovingAvgObsFakeQuantize` are subclasses of torchao's own classes of these names (which
are not torch.ao's), for a `QuantizationSpec`:

    spec = QuantizationSpec(..., observer_or_fake_quant_ctr=FusedMovingAvgObsFakeQuantize.with_args(eps=2**-12))

`quantize_`: prepare as always, then replace the fake-quantizers of the prepared model:

    quantize_(model, QATConfig(activation_config=..., weight_config=..., step="prepare"))
    replace_fake_quantizers(model)

Outputs and ranges are torchao's bit for bit on finite float32 inputs; `clusterq.nn.fake_quantize` lists what differs on
purpose in the PT2E classes. So are gradients in `quantize_`, but for rounding: torchao multiplies them by 1/scale and
by scale, here they are passed on. Its clamp is torch's, whose gradient at the bounds themselves depends on the version
of torch; where it is 0, values on the outermost codes get none, and none here.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import Function

try:
    from torchao.quantization.granularity import PerAxis, PerGroup, PerToken
    from torchao.quantization.pt2e import fake_quantize as _pt2e
    from torchao.quantization.qat import FakeQuantizerBase, IntxFakeQuantizeConfig
    from torchao.quantization.qat import IntxFakeQuantizer as _IntxFakeQuantizer
    from torchao.quantization.quant_primitives import ZeroPointDomain
except ImportError as error:
    raise ImportError(
        "clusterq.deploy.torchao needs torchao (pip install 'clusterq[peers]'); tested with torchao 0.18"
    ) from error

from clusterq.nn._observed import FusedObserved, Observed, checked_export
from clusterq.ops._autograd import apply, wants_gradient
from clusterq.ops._fake_quant_autograd import _clipped_gradient
from clusterq.ops._fake_quant_checks import as_parameter, as_scale
from clusterq.ops._fake_quant_ops import fake_quantize_op

__all__ = [
    "FakeQuantize",
    "FusedMovingAvgObsFakeQuantize",
    "IntxFakeQuantizer",
    "replace_fake_quantizers",
]


class FakeQuantize(Observed, _pt2e.FakeQuantize):  # type: ignore[misc]
    """`torchao.quantization.pt2e.FakeQuantize`: see `clusterq.nn.FakeQuantize`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._watch()


class FusedMovingAvgObsFakeQuantize(FusedObserved, _pt2e.FusedMovingAvgObsFakeQuantize):  # type: ignore[misc]
    """`torchao.quantization.pt2e.FusedMovingAvgObsFakeQuantize`: see `clusterq.nn.FusedMovingAvgObsFakeQuantize`."""

    def __init__(self, *args: Any, export: Literal["trained", "observer"] = "trained", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.export = checked_export(export)
        self._watch()


class IntxFakeQuantizer(_IntxFakeQuantizer):  # type: ignore[misc]
    """`torchao.quantization.qat.IntxFakeQuantizer`: live ranges per token, per channel (axis 0) or per group.

    Scales and zero points are torchao's own, which it computes here from the smallest and largest value of each row;
    rows are quantized by clusterq's op. Input any shape per token, [channels, features] otherwise; float32, bfloat16
    or float16. After a forward `scale` and `zero_point` hold what torchao's module would.

    Args:
        config: of torchao. NotImplementedError for range learning, another axis or granularity, zero points that are
            not integers, and scales in less than float32.
    """

    def __init__(self, config: IntxFakeQuantizeConfig) -> None:
        super().__init__(config)
        reason = _unsupported(config)
        if reason is not None:
            raise NotImplementedError(f"IntxFakeQuantizer of clusterq does not do {reason}; torchao's own does")
        self._limits = _code_range(config.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x on its grid, same shape and dtype; the gradient is that of torchao's clamp."""
        if not self.enabled:
            return x
        granularity = self.config.granularity
        if not isinstance(granularity, PerToken) and x.dim() != 2:
            raise ValueError(f"x has {x.dim()} dimensions; wanted 2, [channels, features], for {granularity}")
        width = granularity.group_size if isinstance(granularity, PerGroup) else x.size(-1)
        if x.size(-1) % width:
            raise ValueError(f"x has {x.size(-1)} features; wanted a multiple of the group size {width}")
        if x.numel() == 0:
            return x
        rows = x.reshape(-1, width)
        if self.scale is None or self.config.is_dynamic:
            self._choose(rows.detach(), x)
        scale = as_scale(self.scale.reshape(-1), rows, 0, torch.float32)
        zero_point = as_parameter(self.zero_point.reshape(-1), rows, 0, torch.float32, "zero_point")
        if wants_gradient(rows):
            y: Tensor = apply(_Clamped, rows, scale, zero_point, *self._limits)
        else:
            y = fake_quantize_op(rows, scale, zero_point, *self._limits, 0, "none")
        return y.reshape(x.shape)

    @torch.no_grad()
    def _choose(self, rows: Tensor, x: Tensor) -> None:
        """Set `scale` and `zero_point` from rows [R, width] of x, by torchao's rule applied to their two ends."""
        ends = torch.stack((rows.amin(1), rows.amax(1)), 1)
        config = self.config
        if isinstance(config.granularity, PerGroup):
            config = dataclasses.replace(config, granularity=PerGroup(2))
            ends = ends.reshape(x.size(0), -1)
        elif isinstance(config.granularity, PerToken):
            ends = ends.reshape(*x.shape[:-1], 2)
        rule = _IntxFakeQuantizer(config)
        rule(ends)
        self.scale, self.zero_point = rule.scale, rule.zero_point


def _passes_at_bounds() -> bool:
    """Whether torch.clamp has a gradient at its own bounds."""
    with torch.enable_grad(), torch.device("cpu"):
        x = torch.ones(1, requires_grad=True)
        return bool(torch.autograd.grad(torch.clamp(x, 0, 1), x)[0] == 1)


# How many codes at each end of the range have no gradient.
_MARGIN = 0 if _passes_at_bounds() else 1


class _Clamped(Function):
    """Fake-quantization of rows, one scale each, with the gradient of `torch.clamp` on rounded codes."""

    @staticmethod
    def forward(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
        y: Tensor = fake_quantize_op(x, scale, zero_point, quant_min, quant_max, 0, "none")
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *saved, quant_min, quant_max = inputs
        ctx.inner = (quant_min + _MARGIN, quant_max - _MARGIN)
        ctx.save_for_backward(*saved)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        if ctx.inner[0] > ctx.inner[1]:
            # One bit: both codes are outermost.
            return (torch.zeros_like(grad), *[None] * 4)
        return (_clipped_gradient(grad, *ctx.saved_tensors, *ctx.inner, 0, "none"), *[None] * 4)


def replace_fake_quantizers(model: nn.Module) -> nn.Module:
    """Put `IntxFakeQuantizer` in the place of torchao's in a model that `quantize_` has prepared; in place.

    Returns:
        The model.

    Raises:
        ValueError: there is no fake-quantizer of torchao in it.
        NotImplementedError: names the first one that is not replaceable; the model is left as it was.
    """
    found = [
        (module, name, f"{path}.{name}".lstrip("."))
        for path, module in model.named_modules()
        for name, child in module.named_children()
        if isinstance(child, FakeQuantizerBase)
    ]
    if not found:
        name = type(model).__name__
        raise ValueError(f'{name} has no fake-quantizer; wanted a model after quantize_(step="prepare")')
    replacements: list[tuple[nn.Module, str, nn.Module]] = []
    for parent, name, path in found:
        old = getattr(parent, name)
        if isinstance(old, IntxFakeQuantizer):
            continue
        reason = _unsupported(old.config) if type(old) is _IntxFakeQuantizer else type(old).__name__
        if reason is not None:
            raise NotImplementedError(f"{path}: clusterq does not do {reason}; leave this one to torchao")
        new = IntxFakeQuantizer(old.config)
        new.enabled, new.scale, new.zero_point = old.enabled, old.scale, old.zero_point
        replacements.append((parent, name, new.train(old.training)))
    for parent, name, replacement in replacements:
        setattr(parent, name, replacement)
    return model


def _unsupported(config: IntxFakeQuantizeConfig) -> str | None:
    """What of a configuration clusterq's op does not express; None if it does."""
    if config.range_learning:
        return "range_learning"
    if config.zero_point_domain != ZeroPointDomain.INT:
        return f"zero_point_domain {config.zero_point_domain}"
    if config.scale_precision != torch.float32:
        # torchao divides by a rounded reciprocal then.
        return f"scale_precision {config.scale_precision}"
    granularity = config.granularity
    if isinstance(granularity, PerAxis) and granularity.axis != 0:
        return f"granularity {granularity}"
    # Exact classes: what is derived from them may mean something else.
    if type(granularity) not in (PerAxis, PerGroup, PerToken):
        return f"granularity {granularity}"
    return None


def _code_range(dtype: Any) -> tuple[int, int]:
    """Smallest and largest code of an integer dtype such as torch.int4; also torchao's enumeration of them."""
    name = str(dtype).rsplit(".", 1)[-1].lower()
    bits = int(name.removeprefix("u").removeprefix("int"))
    return (0, 2**bits - 1) if name.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
