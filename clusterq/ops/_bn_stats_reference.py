"""Statistics of BatchNorm inputs in plain PyTorch: default kernels of the ops in `_bn_stats_ops.py`, yardstick of the
rest.

Formulas and layouts: `bn_stats.py`. Results do not depend on the number of threads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clusterq.ops._checks import check_shape, compute_dtype, ordered_sum, several_outputs
from clusterq.ops.merge_statistics import membership, reciprocal

# Largest [N, classes, C] intermediate of the segment sum, in elements.
_SEGMENT_CHUNK = 1 << 22


def empty_output(x: Tensor) -> Tensor:
    dense = x.is_contiguous() or (x.dim() > 2 and x.movedim(1, -1).is_contiguous())
    return torch.empty_like(x) if dense else x.new_empty(x.shape)


def empty_pair(x: Tensor, *shape: int) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(x.dtype)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


def _like(values: Tensor, x: Tensor) -> Tensor:
    """values in x's dtype and in the layout of outputs shaped like x; never an alias of an input."""
    return empty_output(x).copy_(values)


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """values [C], [1, C] or [N, C] shaped to broadcast against x [N, C, *spatial]."""
    rows = values.shape[0] if values.dim() == 2 else 1
    return values.reshape(rows, x.shape[1], *(1,) * (x.dim() - 2))


def _moments(x: Tensor, dims: list[int], correction: int) -> tuple[Tensor, Tensor]:
    wide = x.to(compute_dtype(x.dtype))
    kept = [size for axis, size in enumerate(x.shape) if axis not in dims]
    count = math.prod(x.shape[axis] for axis in dims)
    if count > max(correction, 0) and 0 not in kept:
        var, mean = torch.var_mean(several_outputs(wide, dims), [d + 1 for d in dims], correction=correction)
        return mean[0], var[0]
    mean = wide.mean(dims) if count > 0 else wide.new_full(kept, math.nan)
    return mean, wide.new_full(kept, math.nan)


def instance_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.dim() == 2:
        mean = _like(x, x).to(compute_dtype(x.dtype))
        # mean - mean rather than zeros: NaN and infinity stay visible.
        return mean, mean - mean
    return _moments(x, list(range(2, x.dim())), 0)


def instance_statistics_list(xs: list[Tensor]) -> tuple[Tensor, Tensor]:
    mean, var = zip(*map(instance_statistics, xs), strict=True)
    return torch.cat(mean, 1), torch.cat(var, 1)


def batch_norm_statistics(x: Tensor, correction: int, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    if weights is None:
        return _moments(x, [0, *range(2, x.dim())], correction)
    dtype, spatial = compute_dtype(x.dtype), math.prod(x.shape[2:])
    # In float64 until the end: an instance mean rounded to float32 may be off by more than the spread.
    mean, var = instance_statistics(x.double())
    share, total = weights.double()[:, None], ordered_sum(weights.double(), [0])
    inside = share != 0
    center = ordered_sum(torch.where(inside, share * mean, 0), [0]) / total
    squares = ordered_sum(torch.where(inside, share * (var + (mean - center).square()), 0), [0]) * spatial
    values = spatial * total - correction
    return center.to(dtype), torch.where(values > 0, squares / values, math.nan).to(dtype)


def _segment_sum(values: Tensor, member: Tensor) -> Tensor:
    """Sum of values [N, C] over the images of each class, member [N, K]; NaN stays in its own class."""
    step = max(1, _SEGMENT_CHUNK // max(1, values.numel()))
    zero = values.new_zeros(())
    return torch.cat(
        [
            ordered_sum(torch.where(part[:, :, None], values[:, None], zero), [0])
            for part in torch.split(member, step, 1)
        ]
    )


def class_statistics(
    x: Tensor, labels: Tensor, num_classes: int, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(x.dtype)
    member = membership(labels, num_classes, None if weights is None else weights != 0)
    count = member.sum(0)
    share = torch.ones_like(labels, dtype=torch.float64) if weights is None else weights.double()
    total = ordered_sum(torch.where(member, share[:, None], 0), [0])
    divisor = torch.where(count > 0, total, 1)[:, None]
    mean, var = instance_statistics(x.double())
    class_mean = _segment_sum(share[:, None] * mean, member) / divisor
    offset = mean - class_mean[labels.clamp(0, num_classes - 1)]
    class_var = _segment_sum(share[:, None] * (var + offset * offset), member) / divisor
    return count, total.to(dtype), class_mean.to(dtype), class_var.to(dtype)


def _inv_std(running_var: Tensor, eps: float) -> Tensor:
    return 1 / torch.sqrt(running_var + eps)


def _scale(weight: Tensor | None, running_var: Tensor, eps: float) -> Tensor:
    inverse = _inv_std(running_var, eps)
    return inverse if weight is None else weight * inverse


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor, eps: float
) -> Tensor:
    wide = x.to(compute_dtype(x.dtype)) - _per_channel(running_mean, x)
    y = wide * _per_channel(_scale(weight, running_var, eps), x)
    return _like(y if bias is None else y + _per_channel(bias, x), x)


def batch_norm_instance_statistics(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return batch_norm(x, weight, bias, running_mean, running_var, eps), *instance_statistics(x)


def batch_norm_batch_statistics(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return batch_norm(x, weight, bias, running_mean, running_var, eps), *batch_norm_statistics(x, 0, None)


def _own_gradient(
    x: Tensor,
    center: Tensor,
    grad_mean: Tensor | None,
    grad_var: Tensor | None,
    mean_factor: float,
    var_factor: float,
) -> Tensor:
    """`a * (x - center) + b`, where a is 0 without a look at x."""
    wide = x.to(compute_dtype(x.dtype))
    own = torch.zeros_like(wide)
    if grad_var is not None:
        a = _per_channel(grad_var * var_factor, x)
        own = torch.where(a == 0, 0, a * (wide - _per_channel(center, x)))
    return own if grad_mean is None else own + _per_channel(grad_mean * mean_factor, x)


def statistics_backward(
    x: Tensor,
    center: Tensor,
    grad_mean: Tensor | None,
    grad_var: Tensor | None,
    mean_factor: float,
    var_factor: float,
) -> Tensor:
    return _like(_own_gradient(x, center, grad_mean, grad_var, mean_factor, var_factor), x)


def statistics_backward_list(
    xs: list[Tensor], center: Tensor, grad_mean: Tensor | None, grad_var: Tensor | None
) -> list[Tensor]:
    results, start = [], 0
    for x in xs:
        end, factor = start + x.shape[1], reciprocal(math.prod(x.shape[2:]))
        own_mean, own_var = (None if t is None else t[:, start:end] for t in (grad_mean, grad_var))
        results.append(statistics_backward(x, center[:, start:end], own_mean, own_var, factor, 2 * factor))
        start = end
    return results


def batch_norm_statistics_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    running_var: Tensor,
    eps: float,
    center: Tensor,
    grad_mean: Tensor | None,
    grad_var: Tensor | None,
    mean_factor: float,
    var_factor: float,
) -> Tensor:
    check_shape("grad", grad, x.shape)
    own = _own_gradient(x, center, grad_mean, grad_var, mean_factor, var_factor)
    return _like(grad.to(own.dtype) * _per_channel(_scale(weight, running_var, eps), x) + own, x)


def batch_norm_parameter_backward(
    grad: Tensor, x: Tensor, running_mean: Tensor, running_var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    check_shape("grad", grad, x.shape)
    dims = [0, *range(2, x.dim())]
    wide, incoming = x.to(compute_dtype(x.dtype)), grad.to(compute_dtype(x.dtype))
    dweight = ordered_sum(incoming * (wide - _per_channel(running_mean, x)), dims) * _inv_std(running_var, eps)
    return dweight, ordered_sum(incoming, dims)
