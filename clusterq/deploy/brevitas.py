"""clusterq's ops as the tensor quantizer of Brevitas layers; Brevitas 0.13 is what it is tested with.

In an injector, so that every layer made of it has it:

    class Weight(Int8WeightPerChannelFloat):
        bit_width = 4
        int_quant = clusterq.deploy.brevitas.IntQuant

or in a model that exists:

    replace_int_quant(model)

Scales, zero points and bit widths stay Brevitas's. So are outputs and gradients, to rounding, but for values within
rounding of a tie between two codes: Brevitas divides by the scale and adds the zero point before it rounds, here x is
multiplied by the scale's reciprocal and the zero point added after (`semantics="aten"`). With a power-of-two scale and
an even zero point outputs are equal bit for bit.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

try:
    from brevitas import config
    from brevitas.core.function_wrapper import InplaceTensorClampSte, RoundSte, TensorClamp, TensorClampSte
    from brevitas.core.quant.delay import _NoDelay
    from brevitas.core.quant.int_base import IntQuant as _IntQuant
except ImportError as error:
    raise ImportError(
        "clusterq.deploy.brevitas needs Brevitas (pip install 'clusterq[peers]'); tested with Brevitas 0.13"
    ) from error

from clusterq import ops
from clusterq.ops._autograd import apply, wants_gradient
from clusterq.ops._fake_quant_checks import LARGEST_CODE

__all__ = ["IntQuant", "replace_int_quant"]

_ROUND, _CLAMP = RoundSte(), TensorClamp()


class IntQuant(_IntQuant):  # type: ignore[misc]
    """`brevitas.core.quant.IntQuant` on clusterq's kernels; same arguments.

    Takes scale, zero_point, bit_width and x. The scale is one number, one per channel of any axis, or one per group of
    a groupwise view; the zero point has the scale's shape or one element, and whole numbers within the codes. A bit
    width on the GPU is read once, and again when it has been written to. Codes beyond +-2^23, such as those of a 32-bit
    bias, are left to Brevitas's own forward.

    Raises:
        NotImplementedError: another rounding than to nearest even, another clamp than Brevitas's two, a delay, a bit
            width that is learned or not whole, or scales that vary in a way not named above.
        RuntimeError: BREVITAS_JIT is on.
    """

    # Brevitas's injector finds what to pass by these names.
    def __init__(
        self,
        narrow_range: bool,
        signed: bool,
        input_view_impl: nn.Module,
        float_to_int_impl: nn.Module = _ROUND,
        tensor_clamp_impl: nn.Module = _CLAMP,
        quant_delay_steps: int = 0,
    ) -> None:
        super().__init__(narrow_range, signed, input_view_impl, float_to_int_impl, tensor_clamp_impl, quant_delay_steps)
        reason = _unsupported(self)
        if reason is not None:
            raise NotImplementedError(f"IntQuant of clusterq does not do {reason}; Brevitas's own does")
        if config.JIT_ENABLED:
            raise RuntimeError("IntQuant of clusterq is not a ScriptModule; wanted BREVITAS_JIT=0")
        self._passes = not isinstance(self.tensor_clamp_impl, TensorClamp)
        self._seen: tuple[Tensor, int, tuple[int, int]] | None = None

    def forward(self, scale: Tensor, zero_point: Tensor, bit_width: Tensor, x: Tensor) -> Tensor:
        """x, seen through the input view, on its grid."""
        limits = self._limits(bit_width)
        if not -LARGEST_CODE <= limits[0] < limits[1] <= LARGEST_CODE:
            y: Tensor = super().forward(scale, zero_point, bit_width, x)
            return y
        x = self.input_view_impl(x)
        scale, zero_point, rows, axis = _laid_out(scale, zero_point, x)
        if not self._passes:
            y = ops.fake_quantize(rows, scale, zero_point, *limits, axis=axis, gradient="learned")
        elif wants_gradient(scale):
            y = apply(_StraightThrough, rows, scale, zero_point.detach(), *limits, axis)
        else:
            y = ops.fake_quantize(rows, scale, zero_point.detach(), *limits, axis=axis, gradient="pass_through")
        return y.reshape(x.shape)

    def _limits(self, bit_width: Tensor) -> tuple[int, int]:
        """Smallest and largest code."""
        if bit_width.requires_grad:
            raise NotImplementedError("IntQuant of clusterq does not learn bit_width; Brevitas's own does")
        # The kept tensor keeps its memory, so that nothing else can come to lie at the same address.
        if self._seen is not None and bit_width.is_cuda and not bit_width.is_inference():
            seen, version, limits = self._seen
            if seen.data_ptr() == bit_width.data_ptr() and version == bit_width._version:
                return limits
        bits = bit_width.item()
        if not (math.isfinite(bits) and bits == int(bits)):
            raise NotImplementedError(f"bit_width is {bits}; IntQuant of clusterq wants a whole number")
        count = 2 ** int(bits)
        low = -count // 2 + int(self.narrow_range) if self.signed else 0
        high = count // 2 - 1 if self.signed else count - 1 - int(self.narrow_range)
        if bit_width.is_cuda and not bit_width.is_inference():
            self._seen = (bit_width.detach(), bit_width._version, (low, high))
        return low, high


def replace_int_quant(model: nn.Module) -> nn.Module:
    """Put `IntQuant` in the place of Brevitas's in all quantizers of a model; in place.

    Brevitas builds a layer's quantizer anew when its parameters are replaced, for instance by `load_state_dict` or an
    initialisation; call this again then, or name `IntQuant` in the injector.

    Returns:
        The model.

    Raises:
        ValueError: there is no IntQuant in it.
        NotImplementedError: names the first one that is not replaceable; the model is left as it was.
    """
    # Two layers may share a quantizer; they go on sharing it.
    replacements: dict[nn.Module, nn.Module] = {}
    places: list[tuple[nn.Module, str]] = []
    found = False
    for path, module in model.named_modules(remove_duplicate=False):
        old = module._modules.get("int_quant")
        found = found or isinstance(old, _IntQuant)
        if not isinstance(old, _IntQuant) or isinstance(old, IntQuant):
            continue
        if old not in replacements:
            reason = _unsupported(old) if type(old) is _IntQuant else type(old).__name__
            if reason is not None:
                raise NotImplementedError(
                    f"{path}.int_quant: clusterq does not do {reason}; leave this one to Brevitas"
                )
            new = IntQuant(
                old.narrow_range, old.signed, old.input_view_impl, old.float_to_int_impl, old.tensor_clamp_impl
            )
            replacements[old] = new.train(old.training)
        places.append((module, "int_quant"))
    if not found:
        raise ValueError(f"{type(model).__name__} has no IntQuant; wanted a model of Brevitas layers")
    for module, name in places:
        setattr(module, name, replacements[getattr(module, name)])
    return model


class _StraightThrough(Function):
    """Brevitas's TensorClampSte: x's gradient passes everywhere, the step's is that of `y = x + (y - x)` everywhere.

    y = (code - zero_point) * scale with d code / d (x / scale) = 1, so dy / d scale = (y - x) / scale.
    """

    @staticmethod
    def forward(
        x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int | None
    ) -> Tensor:
        return ops.fake_quantize(x, scale, zero_point, quant_min, quant_max, axis=axis)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, scale, *_, ctx.axis = inputs
        ctx.save_for_backward(x, scale, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("the gradient of a scale cannot be differentiated a second time")
        x, scale, y = ctx.saved_tensors
        channels = 0 if ctx.axis is None else ctx.axis
        rows = (y - x).mul_(grad).movedim(channels, 0).reshape(scale.numel(), -1)
        to_scale = rows.sum(1, dtype=torch.promote_types(x.dtype, torch.float32)) / scale
        return grad, to_scale.to(scale.dtype), *[None] * 4


def _laid_out(scale: Tensor, zero_point: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor, int | None]:
    """Scale [C], zero point [C], a view of x and its channel axis; axis None for a single scale."""
    if scale.numel() == 1:
        if zero_point.numel() != 1:
            raise NotImplementedError(f"zero_point has shape {tuple(zero_point.shape)}, scale one element")
        return scale.reshape(1), zero_point.reshape(1), x, None
    if zero_point.numel() == 1:
        zero_point = zero_point.expand(scale.shape)
    # Broadcasting aligns the last dimensions.
    shape = (1,) * (x.dim() - scale.dim()) + tuple(scale.shape)
    varying = [dim for dim, size in enumerate(shape) if size > 1]
    last = varying[-1]
    if len(varying) == 1 and shape[last] == x.size(last):
        return scale.reshape(-1), zero_point.reshape(-1), x, last
    if shape[: last + 1] == tuple(x.shape[: last + 1]):
        return scale.reshape(-1), zero_point.reshape(-1), x.reshape(scale.numel(), -1), 0
    raise NotImplementedError(f"scale has shape {tuple(scale.shape)} for x {tuple(x.shape)}; wanted one per channel")


def _unsupported(quantizer: Any) -> str | None:
    """What of one of Brevitas's IntQuant clusterq's ops do not express; None if they do."""
    # Exact classes: what is derived from them may mean something else.
    if type(quantizer.float_to_int_impl) is not RoundSte:
        return f"float_to_int_impl {type(quantizer.float_to_int_impl).__name__}"
    if type(quantizer.tensor_clamp_impl) not in (TensorClamp, TensorClampSte, InplaceTensorClampSte):
        return f"tensor_clamp_impl {type(quantizer.tensor_clamp_impl).__name__}"
    if type(quantizer.delay_wrapper.delay_impl) is not _NoDelay:
        return "quant_delay_steps"
    return None
