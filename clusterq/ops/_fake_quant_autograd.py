"""The fake-quantize ops, defined, and the autograd Functions on top of them; public functions: `fake_quant.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from clusterq.ops import _fake_quant_reference as reference
from clusterq.ops._checks import compute_dtype
from clusterq.ops._fake_quant_checks import LARGEST_CODE
from clusterq.ops._library import register_op

fake_quantize_op = register_op(
    "fake_quantize(Tensor x, Tensor scale, Tensor zero_point, int quant_min, int quant_max, int? axis, str activation)"
    " -> Tensor",
    reference=reference.fake_quantize,
    fake=reference.fake_like,
    triton="fake_quant:fake_quantize",
)
backward_op = register_op(
    "fake_quantize_backward(Tensor grad, Tensor x, Tensor scale, Tensor zero_point, int quant_min, int quant_max,"
    " int? axis, str activation) -> Tensor",
    reference=reference.fake_quantize_backward,
    fake=reference.fake_backward,
    triton="fake_quant:fake_quantize_backward",
)
learned_backward_op = register_op(
    "fake_quantize_learned_backward(Tensor grad, Tensor x, Tensor scale, Tensor zero_point, int quant_min,"
    " int quant_max, int? axis, str activation) -> (Tensor, Tensor, Tensor)",
    reference=reference.fake_quantize_learned_backward,
    fake=reference.fake_learned_backward,
    triton="fake_quant:fake_quantize_learned_backward",
)
quantize_op = register_op(
    "quantize(Tensor x, Tensor scale, Tensor zero_point, int quant_min, int quant_max, int? axis) -> Tensor",
    reference=reference.quantize,
    fake=reference.fake_codes,
    triton="fake_quant:quantize",
)
dequantize_op = register_op(
    "dequantize(Tensor codes, Tensor scale, Tensor zero_point, int? axis, ScalarType dtype) -> Tensor",
    reference=reference.dequantize,
    fake=reference.fake_dequantize,
    triton="fake_quant:dequantize",
)
weight_op = register_op(
    "fake_quantize_weight(Tensor w, int quant_min, int quant_max, int axis, bool symmetric)"
    " -> (Tensor, Tensor, Tensor)",
    reference=reference.fake_quantize_weight,
    fake=reference.fake_weight,
    triton="fake_quant:fake_quantize_weight",
)
observe_op = register_op(
    "observe_fake_quantize(Tensor x, Tensor(a!) running_min, Tensor(b!) running_max, int quant_min, int quant_max,"
    " float momentum, bool observe, bool symmetric, int? axis, str activation) -> (Tensor, Tensor, Tensor)",
    reference=reference.observe_fake_quantize,
    fake=reference.fake_observe,
    triton="fake_quant:observe_fake_quantize",
)
error_op = register_op(
    "quantization_error(Tensor x, Tensor scales, Tensor zero_points, int quant_min, int quant_max, int? axis)"
    " -> Tensor",
    reference=reference.quantization_error,
    fake=reference.fake_error,
)


def _pass_through(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    """Gradient of the activation alone, in one pass; 0 where x is NaN or infinite.

    The clipped gradient on a step so large (the largest number is 2^16 of them) that no finite x leaves the code range.
    """
    dtype = compute_dtype(x.dtype)
    scale = x.new_full((1,), torch.finfo(dtype).max / (1 << 16), dtype=dtype)
    masked: Tensor = backward_op(grad, x, scale, torch.zeros_like(scale), -LARGEST_CODE, LARGEST_CODE, None, activation)
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
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        if ctx.gradient == "clipped":
            grad = backward_op(grad, *ctx.saved_tensors, *ctx.settings)
        elif ctx.saved_tensors:
            grad = _pass_through(grad, ctx.saved_tensors[0], ctx.settings[3])
        return (grad, *[None] * 7)


class FakeQuantizeLearned(Function):
    """Gradients to x, scale and zero_point, which is rounded and clamped here with a straight-through gradient."""

    @staticmethod
    def forward(
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        quant_min: int,
        quant_max: int,
        axis: int | None,
        activation: str,
    ) -> Tensor:
        whole = zero_point.round().clamp(quant_min, quant_max)
        y: Tensor = fake_quantize_op(x, scale, whole, quant_min, quant_max, axis, activation)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, scale, zero_point, *ctx.settings = inputs
        ctx.save_for_backward(x, scale, zero_point)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, scale, zero_point = ctx.saved_tensors
        whole = zero_point.round().clamp(ctx.settings[0], ctx.settings[1])
        return (*learned_backward_op(grad, x, scale, whole, *ctx.settings), *[None] * 4)


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
        if ctx.gradient == "clipped":
            ctx.save_for_backward(w, output[1], output[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Any, ...]:
        if ctx.gradient == "clipped":
            grad = backward_op(grad, *ctx.saved_tensors, *ctx.settings)
        return (grad, *[None] * 5)


class ObserveFakeQuantize(Function):
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
    ) -> tuple[Tensor, Tensor, Tensor]:
        output: tuple[Tensor, Tensor, Tensor] = observe_op(
            x, running_min, running_max, quant_min, quant_max, momentum, observe, symmetric, axis, activation
        )
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, _, _, quant_min, quant_max, *_, axis, activation, ctx.gradient = inputs
        ctx.settings = (quant_min, quant_max, axis, activation)
        ctx.mark_non_differentiable(output[1], output[2])
        if ctx.gradient == "clipped":
            ctx.save_for_backward(x, output[1], output[2])
        elif activation != "none":
            ctx.save_for_backward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Any, ...]:
        if ctx.gradient == "clipped":
            grad = backward_op(grad, *ctx.saved_tensors, *ctx.settings)
        elif ctx.saved_tensors:
            grad = _pass_through(grad, ctx.saved_tensors[0], ctx.settings[3])
        return (grad, *[None] * 10)
