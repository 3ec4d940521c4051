"""Autograd Functions of the fake-quantize ops (`_fake_quant_ops.py`); public functions: `fake_quant.py`.

First derivatives throughout. The gradients for x are linear in the incoming gradient, so their own derivatives are
again such gradients; that of the learned gradients raises RuntimeError. No Function has forward-mode derivatives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from clusterq.ops._autograd import apply
from clusterq.ops._checks import compute_dtype
from clusterq.ops._fake_quant_checks import LARGEST_CODE
from clusterq.ops._fake_quant_ops import (
    backward_op,
    delayed_op,
    fake_quantize_op,
    learned_backward_op,
    masked_backward_op,
    masked_op,
    observe_masked_op,
    observe_op,
    weight_op,
    weights_op,
)


class _ClippedGradient(Function):
    """`fake_quantize_backward`, linear in the incoming gradient and its own adjoint."""

    @staticmethod
    def forward(grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, *settings: Any) -> Tensor:
        result: Tensor = backward_op(grad, x, scale, zero_point, *settings)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, *saved, ctx.quant_min, ctx.quant_max, ctx.axis, ctx.activation = inputs
        ctx.save_for_backward(*saved)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        settings = (ctx.quant_min, ctx.quant_max, ctx.axis, ctx.activation)
        return (_clipped_gradient(grad, *ctx.saved_tensors, *settings), *[None] * 7)


class _MaskedGradient(Function):
    """`fake_quantize_masked_backward`, linear in the incoming gradient and its own adjoint."""

    @staticmethod
    def forward(grad: Tensor, mask: Tensor, stride: tuple[int, ...]) -> Tensor:
        result: Tensor = masked_backward_op(grad, mask, stride)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, mask, ctx.stride = inputs
        ctx.save_for_backward(mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _masked_gradient(grad, ctx.saved_tensors[0], ctx.stride), None, None


class _LearnedGradient(Function):
    """`fake_quantize_learned_backward`, of which there is no derivative here."""

    @staticmethod
    def forward(
        grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, *settings: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        result: tuple[Tensor, Tensor, Tensor] = learned_backward_op(grad, x, scale, zero_point, *settings)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        raise RuntimeError("the learned gradients of fake_quantize cannot be differentiated a second time")


def _gradient(op: Any, function: type[Function], *args: Any) -> Any:
    """The op itself, unless its result is to be differentiated in its turn."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return apply(function, *args)
    return op(*args)


def _clipped_gradient(*args: Any) -> Any:
    return _gradient(backward_op, _ClippedGradient, *args)


def _masked_gradient(*args: Any) -> Any:
    return _gradient(masked_backward_op, _MaskedGradient, *args)


def _learned_gradient(*args: Any) -> Any:
    return _gradient(learned_backward_op, _LearnedGradient, *args)


def _without_zeros(ctx: Any) -> None:
    """None instead of a tensor of zeros as the gradient of an output that has none: those of masks and scales."""
    ctx.set_materialize_grads(False)


def _pass_through(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    """Gradient of the activation alone, in one pass; 0 where x is NaN or infinite.

    The clipped gradient on a step so large (the largest number is 2^16 of them) that no finite x leaves the code range.
    """
    dtype = compute_dtype(x.dtype)
    scale = x.new_full((1,), torch.finfo(dtype).max / (1 << 16), dtype=dtype)
    settings = (-LARGEST_CODE, LARGEST_CODE, None, activation)
    masked: Tensor = _clipped_gradient(grad, x, scale, torch.zeros_like(scale), *settings)
    return masked


class FakeQuantize(Function):
    """Gradient to x only: masked to the range ("clipped") or by the activation alone ("pass_through").

    With an activation, NaN and infinite x get gradient 0 in both.
    """

    @staticmethod
    def forward(
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        quant_min: int,
        quant_max: int,
        axis: int | None,
        activation: str,
        gradient: str,
    ) -> Tensor:
        y: Tensor = fake_quantize_op(x, scale, zero_point, quant_min, quant_max, axis, activation)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, scale, zero_point, *ctx.settings, ctx.gradient = inputs
        if ctx.gradient == "clipped":
            ctx.save_for_backward(x, scale, zero_point)
        elif ctx.settings[3] != "none":
            ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        if ctx.gradient == "clipped":
            grad = _clipped_gradient(grad, *ctx.saved_tensors, *ctx.settings)
        elif ctx.saved_tensors:
            grad = _pass_through(grad, ctx.saved_tensors[0], ctx.settings[3])
        return (grad, *[None] * 7)


class FakeQuantizeLearned(Function):
    """Gradients to x, scale and zero_point, those of the parameters times `factor`.

    `floor` above 0: the step is `max(|scale|, floor)`, and the gradient's sign turns with that of the scale; below the
    floor the gradient passes as if there were none, so that the scale can leave it again. `whole`: the zero point is a
    code already; else it is rounded and clamped here, with a straight-through gradient.
    """

    @staticmethod
    def forward(
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        quant_min: int,
        quant_max: int,
        axis: int | None,
        activation: str,
        factor: float,
        floor: float,
        whole: bool,
    ) -> Tensor:
        step = scale.abs().clamp_min(floor) if floor > 0 else scale
        code = zero_point if whole else zero_point.round().clamp(quant_min, quant_max)
        y: Tensor = fake_quantize_op(x, step, code, quant_min, quant_max, axis, activation)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, scale, zero_point, *ctx.settings, ctx.factor, ctx.floor, ctx.whole = inputs
        ctx.save_for_backward(x, scale, zero_point)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, scale, zero_point = ctx.saved_tensors
        step = scale.abs().clamp_min(ctx.floor) if ctx.floor > 0 else scale
        code = zero_point if ctx.whole else zero_point.round().clamp(ctx.settings[0], ctx.settings[1])
        to_x, to_scale, to_zero_point = _learned_gradient(grad, x, step, code, *ctx.settings)
        if ctx.floor > 0:
            to_scale = torch.full_like(scale, ctx.factor).copysign_(scale).mul_(to_scale)
        elif ctx.factor != 1:
            to_scale = to_scale * ctx.factor
        if not ctx.needs_input_grad[2]:
            to_zero_point = None
        elif ctx.factor != 1:
            to_zero_point = to_zero_point * ctx.factor
        return (to_x, to_scale, to_zero_point, *[None] * 7)


class FakeQuantizeMasked(Function):
    """Gradient to x where the mask of the forward says so; keeps one bit per element. Returns y and the mask."""

    @staticmethod
    def forward(
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        quant_min: int,
        quant_max: int,
        axis: int | None,
        activation: str,
        rule: str,
    ) -> tuple[Tensor, Tensor]:
        output: tuple[Tensor, Tensor] = masked_op(x, scale, zero_point, quant_min, quant_max, axis, activation, rule)
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        y, mask = output
        ctx.stride = y.stride()
        ctx.mark_non_differentiable(mask)
        _without_zeros(ctx)
        ctx.save_for_backward(mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, unused: None) -> tuple[Any, ...]:
        if grad is not None:
            grad = _masked_gradient(grad, ctx.saved_tensors[0], ctx.stride)
        return (grad, *[None] * 7)


class FakeQuantizeWeights(Function):
    """Of several weights at once: returns the quantized ones, then all scales and all zero points, concatenated."""

    @staticmethod
    def forward(
        quant_min: int, quant_max: int, axis: int, symmetric: bool, gradient: str, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        quantized, scale, zero_point = weights_op(list(weights), quant_min, quant_max, axis, symmetric)
        return (*quantized, scale, zero_point)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        quant_min, quant_max, axis, _, ctx.gradient, *weights = inputs
        ctx.settings = (quant_min, quant_max, axis, "none")
        ctx.mark_non_differentiable(output[-2], output[-1])
        _without_zeros(ctx)
        if ctx.gradient == "clipped":
            ctx.save_for_backward(*weights, output[-2], output[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        to_weights = [grad if n else None for grad, n in zip(grads[:-2], ctx.needs_input_grad[5:], strict=True)]
        if ctx.gradient == "clipped":
            *weights, scale, zero_point = ctx.saved_tensors
            sizes = [w.size(ctx.settings[2]) for w in weights]
            parameters = zip(scale.split(sizes), zero_point.split(sizes), strict=True)
            to_weights = [
                None if grad is None else _clipped_gradient(grad, w, s, z, *ctx.settings)
                for grad, w, (s, z) in zip(to_weights, weights, parameters, strict=True)
            ]
        return (*[None] * 5, *to_weights)


class FakeQuantizeWeight(Function):
    @staticmethod
    def forward(
        w: Tensor, quant_min: int, quant_max: int, axis: int, symmetric: bool, gradient: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        output: tuple[Tensor, Tensor, Tensor] = weight_op(w, quant_min, quant_max, axis, symmetric)
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        w, quant_min, quant_max, axis, _, ctx.gradient = inputs
        ctx.settings = (quant_min, quant_max, axis, "none")
        ctx.mark_non_differentiable(output[1], output[2])
        _without_zeros(ctx)
        if ctx.gradient == "clipped":
            ctx.save_for_backward(w, output[1], output[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Any, ...]:
        if grad is not None and ctx.gradient == "clipped":
            grad = _clipped_gradient(grad, *ctx.saved_tensors, *ctx.settings)
        return (grad, *[None] * 5)


# The rule of a mask that has the gradient of each name.
RULES = {"clipped": "codes", "pass_through": "activation"}


class ObserveFakeQuantize(Function):
    """Gradient to x, none to the range. Returns y, scale, zero point and, with `save` "mask", the mask."""

    @staticmethod
    def forward(
        x: Tensor,
        running_min: Tensor,
        running_max: Tensor,
        quant_min: int,
        quant_max: int,
        momentum: float,
        observe: bool,
        symmetric: bool,
        axis: int | None,
        activation: str,
        gradient: str,
        save: str,
    ) -> tuple[Tensor, ...]:
        arguments = (x, running_min, running_max, quant_min, quant_max, momentum, observe, symmetric, axis, activation)
        output: tuple[Tensor, ...] = (
            observe_masked_op(*arguments, RULES[gradient]) if save == "mask" else observe_op(*arguments)
        )
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, _, _, quant_min, quant_max, *_, axis, activation, ctx.gradient, _ = inputs
        y, scale, zero_point, *mask = output
        ctx.settings = (quant_min, quant_max, axis, activation)
        ctx.mark_non_differentiable(scale, zero_point, *mask)
        _without_zeros(ctx)
        ctx.stride = y.stride() if mask else None
        if mask:
            ctx.save_for_backward(*mask)
        elif ctx.gradient == "clipped":
            ctx.save_for_backward(x, scale, zero_point)
        elif activation != "none":
            ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 12
        if ctx.stride is not None:
            grad = _masked_gradient(grad, ctx.saved_tensors[0], ctx.stride)
        elif ctx.gradient == "clipped":
            grad = _clipped_gradient(grad, *ctx.saved_tensors, *ctx.settings)
        elif ctx.saved_tensors:
            grad = _pass_through(grad, ctx.saved_tensors[0], ctx.settings[3])
        return (grad, *[None] * 11)


class DelayedFakeQuantize(Function):
    """Quantizes with the running range as it was and moves it in the same pass. Returns y, scale, zero point, mask."""

    @staticmethod
    def forward(
        x: Tensor,
        running_min: Tensor,
        running_max: Tensor,
        quant_min: int,
        quant_max: int,
        momentum: float,
        symmetric: bool,
        axis: int | None,
        activation: str,
        rule: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        output: tuple[Tensor, Tensor, Tensor, Tensor] = delayed_op(
            x, running_min, running_max, quant_min, quant_max, momentum, symmetric, axis, activation, rule
        )
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        y, scale, zero_point, mask = output
        ctx.stride = y.stride()
        ctx.mark_non_differentiable(scale, zero_point, mask)
        _without_zeros(ctx)
        ctx.passes = inputs[8:] == ("none", RULES["pass_through"])
        if not ctx.passes:
            ctx.save_for_backward(mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Any, ...]:
        if grad is not None and not ctx.passes:
            grad = _masked_gradient(grad, ctx.saved_tensors[0], ctx.stride)
        return (grad, *[None] * 9)
