"""Statistics of a BatchNorm input: per channel, per image and channel, per class, and fused with eval-mode BatchNorm.

With x [N, C, *spatial], S values per image and channel and M = N * S values per channel:

    instance   mean[n, c] = sum_s x / S        var[n, c] = sum_s (x - mean[n, c])^2 / S
    batch      mean[c]    = sum_ns x / M       var[c]    = sum_ns (x - mean[c])^2 / (M - correction)
    class k    the biased batch statistics over the images labelled k

Groups merge by Chan's rule, M2 = sum_n M2_n + sum_n S * (mean_n - mean)^2; E[x^2] - E[x]^2 appears nowhere, because it
loses every digit once the mean is large against the spread. With incoming gradients gm and gv every backward is one
affine pass,

    dx = a * (x - center) + b,   a = 2 * gv / (M - correction),   b = gm / M,   center = mean,

whose coefficients are per channel for batch statistics and per image and channel for the other two. They stay in the
statistics' dtype and the result is rounded once, so half-precision inputs do not lose gradients of size 1/M.

Statistics are float32, float64 for float64 input. Outputs shaped like x keep x's layout when its channels are innermost
and dense (channels_last, channels_last_3d) and are contiguous otherwise.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clusterq.ops import _bn_stats_reference as reference
from clusterq.ops._autograd import apply
from clusterq.ops._bn_stats_reference import empty_output, empty_pair
from clusterq.ops._checks import FLOATING, check_integer, check_number, check_tensor, compute_dtype
from clusterq.ops._library import register_op
from clusterq.ops.merge_statistics import (
    check_labels,
    check_vector,
    merge_class_statistics,
    merge_instance_statistics,
    reciprocal,
)

__all__ = [
    "batch_norm_statistics",
    "batch_norm_with_instance_statistics",
    "batch_norm_with_statistics",
    "class_statistics",
    "instance_statistics",
    "merge_class_statistics",
    "merge_instance_statistics",
]


def _spatial(x: Tensor) -> int:
    return math.prod(x.shape[2:])


def _check_input(x: Tensor) -> None:
    check_tensor("x", x, FLOATING)
    if not 2 <= x.dim() <= 5:
        raise ValueError(f"x has shape {tuple(x.shape)}; wanted [N, C], [N, C, L], [N, C, H, W] or [N, C, D, H, W]")


_instance_statistics = register_op(
    "instance_statistics(Tensor x) -> (Tensor, Tensor)",
    reference=reference.instance_statistics,
    fake=lambda x: empty_pair(x, x.shape[0], x.shape[1]),
)
_batch_norm_statistics = register_op(
    "batch_norm_statistics(Tensor x, int correction) -> (Tensor, Tensor)",
    reference=reference.batch_norm_statistics,
    fake=lambda x, correction: empty_pair(x, x.shape[1]),
)
_class_statistics = register_op(
    "class_statistics(Tensor x, Tensor labels, int num_classes, Tensor? mask) -> (Tensor, Tensor, Tensor)",
    reference=reference.class_statistics,
    fake=lambda x, labels, num_classes, mask: (labels.new_empty(num_classes), *empty_pair(x, num_classes, x.shape[1])),
)
_batch_norm_instance_statistics = register_op(
    "batch_norm_instance_statistics(Tensor x, Tensor center, Tensor scale, Tensor shift) -> (Tensor, Tensor, Tensor)",
    reference=reference.batch_norm_instance_statistics,
    fake=lambda x, center, scale, shift: (empty_output(x), *empty_pair(x, x.shape[0], x.shape[1])),
)
_batch_norm_batch_statistics = register_op(
    "batch_norm_batch_statistics(Tensor x, Tensor center, Tensor scale, Tensor shift) -> (Tensor, Tensor, Tensor)",
    reference=reference.batch_norm_batch_statistics,
    fake=lambda x, center, scale, shift: (empty_output(x), *empty_pair(x, x.shape[1])),
)
_statistics_backward = register_op(
    "statistics_backward(Tensor x, Tensor center, Tensor a, Tensor b) -> Tensor",
    reference=reference.statistics_backward,
    fake=lambda x, center, a, b: empty_output(x),
)
_batch_norm_statistics_backward = register_op(
    "batch_norm_statistics_backward(Tensor grad, Tensor x, Tensor scale, Tensor center, Tensor a, Tensor b) -> Tensor",
    reference=reference.batch_norm_statistics_backward,
    fake=lambda grad, x, scale, center, a, b: empty_output(x),
)
_batch_norm_parameter_backward = register_op(
    "batch_norm_parameter_backward(Tensor grad, Tensor x, Tensor center, Tensor inv_std) -> (Tensor, Tensor)",
    reference=reference.batch_norm_parameter_backward,
    fake=lambda grad, x, center, inv_std: empty_pair(x, x.shape[1]),
)


def _affine(
    mean: Tensor, grad_mean: Tensor | None, grad_var: Tensor | None, mean_factor: Any, var_factor: Any
) -> tuple[Tensor, Tensor]:
    """a and b of `dx = a * (x - center) + b`, in the shape of mean."""
    a = torch.zeros_like(mean) if grad_var is None else grad_var * var_factor
    b = torch.zeros_like(mean) if grad_mean is None else grad_mean * mean_factor
    return a, b


class _InstanceStatistics(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Any:
        return _instance_statistics(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0], output[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mean: Tensor | None, grad_var: Tensor | None) -> Any:
        if grad_mean is None and grad_var is None:
            return None
        x, mean = ctx.saved_tensors
        factor = reciprocal(_spatial(x))
        return _statistics_backward(x, mean, *_affine(mean, grad_mean, grad_var, factor, 2 * factor))


class _BatchNormStatistics(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, correction: int) -> Any:
        return _batch_norm_statistics(x, correction)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0], output[0])
        ctx.correction = inputs[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mean: Tensor | None, grad_var: Tensor | None) -> Any:
        if grad_mean is None and grad_var is None:
            return None, None
        x, mean = ctx.saved_tensors
        values = x.shape[0] * _spatial(x)
        factors = reciprocal(values), 2 * reciprocal(values - ctx.correction)
        a, b = _affine(mean, grad_mean, grad_var, *factors)
        return _statistics_backward(x, mean[None], a[None], b[None]), None


class _ClassStatistics(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, labels: Tensor, num_classes: int, mask: Tensor | None) -> Any:
        return _class_statistics(x, labels, num_classes, mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, labels, _, mask = inputs
        count, mean, _ = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(count)
        ctx.save_for_backward(x, count, mean, labels, mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor | None, grad_mean: Tensor | None, grad_var: Tensor | None) -> Any:
        if grad_mean is None and grad_var is None:
            return None, None, None, None
        x, count, mean, labels, mask = ctx.saved_tensors
        classes = mean.shape[0]
        factor = (reciprocal(_spatial(x)) / count.clamp(min=1).to(mean.dtype))[:, None]
        index = labels.clamp(0, classes - 1)
        outside = ((labels < 0) | (labels >= classes))[:, None]
        if mask is not None:
            outside = outside | ~mask[:, None]
        a, b = _affine(mean, grad_mean, grad_var, factor, 2 * factor)
        # An image outside every class reads a foreign class's mean through its clamped index: clear its center too.
        center, a, b = (t[index].masked_fill(outside, 0) for t in (mean, a, b))
        return _statistics_backward(x, center, a, b), None, None, None


class _BatchNormWithStatistics(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, inv_std: Tensor, per_image: bool) -> Any:
        op = _batch_norm_instance_statistics if per_image else _batch_norm_batch_statistics
        return op(x, running_mean, weight * inv_std, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, _, running_mean, inv_std, ctx.per_image = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, running_mean, inv_std, output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_mean: Tensor | None, grad_var: Tensor | None) -> Any:
        x, weight, running_mean, inv_std, mean = ctx.saved_tensors
        x_needed, weight_needed, bias_needed = ctx.needs_input_grad[:3]
        dx = dweight = dbias = None
        scale = weight * inv_std
        if x_needed and (grad_mean is not None or grad_var is not None):
            factor = reciprocal(_spatial(x) if ctx.per_image else x.shape[0] * _spatial(x))
            mean = mean if ctx.per_image else mean[None]
            a, b = (t.view_as(mean) for t in _affine(mean, grad_mean, grad_var, factor, 2 * factor))
            if grad is None:
                dx = _statistics_backward(x, mean, a, b)
            else:
                dx = _batch_norm_statistics_backward(grad, x, scale, mean, a, b)
        elif x_needed and grad is not None:
            zero = torch.zeros_like(scale)[None]
            dx = _statistics_backward(grad, zero, scale[None], zero)
        if grad is not None and (weight_needed or bias_needed):
            dweight, dbias = _batch_norm_parameter_backward(grad, x, running_mean, inv_std)
        return dx, dweight if weight_needed else None, dbias if bias_needed else None, None, None, None


def instance_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every image and channel, in one read of x.

    Args:
        x: [N, C], [N, C, L], [N, C, H, W] or [N, C, D, H, W]; float32, bfloat16, float16 or float64, any layout.

    Returns:
        mean [N, C] and var [N, C], float32 (float64 for float64 x). var is 0 for [N, C] input; both are NaN where the
        spatial extent is 0. NaN or infinity in x makes its own image and channel non-finite and no other.

    Raises:
        TypeError, ValueError: x is no tensor of these dtypes and ranks.
    """
    _check_input(x)
    mean, var = (_InstanceStatistics.apply if torch.is_grad_enabled() and x.requires_grad else _instance_statistics)(x)
    return mean, var


def batch_norm_statistics(x: Tensor, *, correction: int = 0) -> tuple[Tensor, Tensor]:
    """Mean and variance of every channel over images and positions, in one read of x.

    Args:
        x: [N, C, *spatial] as for `instance_statistics`.
        correction: 0 for the biased variance that BatchNorm normalises with, 1 for the unbiased one that its running
            variance follows. Compare like with like: at 49 values per channel the two differ by 2 %.

    Returns:
        mean [C] and var [C], float32 (float64 for float64 x). With M = N * prod(spatial) values per channel, mean is
        NaN for M = 0 and var, with its gradient, is NaN for M <= correction.

    Raises:
        TypeError, ValueError: x is no tensor of these dtypes and ranks; correction is negative.
    """
    _check_input(x)
    check_integer("correction", correction, 0)
    differentiable = torch.is_grad_enabled() and x.requires_grad
    mean, var = (_BatchNormStatistics.apply if differentiable else _batch_norm_statistics)(x, correction)
    return mean, var


def class_statistics(
    x: Tensor, labels: Tensor, num_classes: int, *, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance of every class and channel, in one read of x (ClusterQ eq. 4 and 5 use them).

    Args:
        x: [N, C, *spatial] as for `instance_statistics`.
        labels: [N] int64, any order. An image whose label is outside [0, num_classes) belongs to no class.
        num_classes: K.
        mask: [N] bool, False leaves an image out (for instance one that the network misclassifies).

    Returns:
        count [K] int64, the images of each class; mean [K, C] and var [K, C], float32 (float64 for float64 x), 0 for a
        class without images.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape or device; num_classes < 1.
    """
    _check_input(x)
    check_labels(labels, num_classes, mask, x.shape[0], x.device)
    differentiable = torch.is_grad_enabled() and x.requires_grad
    count, mean, var = (_ClassStatistics.apply if differentiable else _class_statistics)(x, labels, num_classes, mask)
    return count, mean, var


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    per_image: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_input(x)
    vectors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    for name, vector in vectors.items():
        if vector is not None:
            check_vector(name, vector, x.shape[1], x.device, FLOATING)
        elif name.startswith("running"):
            raise TypeError(f"{name} is None; BatchNorm in eval mode wants its running statistics")
    check_number("eps", eps, 0)
    dtype = compute_dtype(x.dtype)
    scale = torch.ones(x.shape[1], dtype=dtype, device=x.device) if weight is None else weight.to(dtype)
    shift = torch.zeros_like(scale) if bias is None else bias.to(dtype)
    center, inv_std = running_mean.detach().to(dtype), torch.rsqrt(running_var.detach().to(dtype) + eps)
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad or shift.requires_grad):
        y, mean, var = apply(_BatchNormWithStatistics, x, scale, shift, center, inv_std, per_image)
    else:
        op = _batch_norm_instance_statistics if per_image else _batch_norm_batch_statistics
        y, mean, var = op(x, center, scale * inv_std, shift)
    return y, mean, var


def batch_norm_with_instance_statistics(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """BatchNorm in eval mode and the instance statistics of its input: one read, one write.

    Batch and class statistics follow through `merge_instance_statistics` and `merge_class_statistics`. The backward
    adds the gradients of y and of the statistics in one pass. A result that nothing depends on costs nothing, and
    weight and bias are reduced only where they require gradients.

    Args:
        x: [N, C, *spatial] as for `instance_statistics`.
        weight, bias: [C] or None for 1 and 0.
        running_mean, running_var: [C], constants: no gradient flows into them.
        eps: added to running_var, 0 or more.

    Returns:
        y like x, `(x - running_mean) / sqrt(running_var + eps) * weight + bias` rounded once from float32; mean [N, C]
        and biased var [N, C] of x, float32 (float64 for float64 x).

    Raises:
        TypeError, ValueError: an argument has another dtype, shape or device.
    """
    return _batch_norm(x, weight, bias, running_mean, running_var, eps, per_image=True)


def batch_norm_with_statistics(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """BatchNorm in eval mode and the biased batch statistics of its input: one read, one write.

    Arguments, y and errors as for `batch_norm_with_instance_statistics`; mean [C] and var [C] as for
    `batch_norm_statistics(x)`.
    """
    return _batch_norm(x, weight, bias, running_mean, running_var, eps, per_image=False)
