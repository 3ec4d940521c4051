"""Statistics of BatchNorm inputs in plain PyTorch: default kernels of the ops in `bn_stats.py`, yardstick of the rest.

Formulas and layouts: `bn_stats.py`. Results do not depend on the number of threads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clusterq.ops._checks import check_shape, compute_dtype, ordered_sum, several_outputs
from clusterq.ops.merge_statistics import membership

# Largest [N, classes, C] intermediate of the segment sum, in elements.
_SEGMENT_CHUNK = 1 << 22


def empty_output(x: Tensor) -> Tensor:
    dense = x.is_contiguous() or (x.dim() > 2 and x.movedim(1, -1).is_contiguous())
    return torch.empty_like(x) if dense else x.new_empty(x.shape)


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


def batch_norm_statistics(x: Tensor, correction: int) -> tuple[Tensor, Tensor]:
    return _moments(x, [0, *range(2, x.dim())], correction)


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


def class_statistics(x: Tensor, labels: Tensor, num_classes: int, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    member = membership(labels, num_classes, mask)
    count = member.sum(0)
    # In float64 until the end: an instance mean rounded to float32 may be off by more than the spread.
    mean, var = instance_statistics(x.double())
    divisor = count.clamp(min=1)[:, None]
    class_mean = _segment_sum(mean, member) / divisor
    offset = mean - class_mean[labels.clamp(0, num_classes - 1)]
    class_var = _segment_sum(var + offset * offset, member) / divisor
    return count, class_mean.to(compute_dtype(x.dtype)), class_var.to(compute_dtype(x.dtype))


def batch_norm(x: Tensor, center: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    wide = x.to(compute_dtype(x.dtype))
    return _like((wide - _per_channel(center, x)) * _per_channel(scale, x) + _per_channel(shift, x), x)


def batch_norm_instance_statistics(
    x: Tensor, center: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return batch_norm(x, center, scale, shift), *instance_statistics(x)


def batch_norm_batch_statistics(
    x: Tensor, center: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return batch_norm(x, center, scale, shift), *batch_norm_statistics(x, 0)


def statistics_backward(x: Tensor, center: Tensor, a: Tensor, b: Tensor) -> Tensor:
    wide = x.to(compute_dtype(x.dtype))
    return _like(_per_channel(a, x) * (wide - _per_channel(center, x)) + _per_channel(b, x), x)


def batch_norm_statistics_backward(
    grad: Tensor, x: Tensor, scale: Tensor, center: Tensor, a: Tensor, b: Tensor
) -> Tensor:
    check_shape("grad", grad, x.shape)
    wide, incoming = x.to(compute_dtype(x.dtype)), grad.to(compute_dtype(x.dtype))
    own = _per_channel(a, x) * (wide - _per_channel(center, x)) + _per_channel(b, x)
    return _like(incoming * _per_channel(scale, x) + own, x)


def batch_norm_parameter_backward(grad: Tensor, x: Tensor, center: Tensor, inv_std: Tensor) -> tuple[Tensor, Tensor]:
    check_shape("grad", grad, x.shape)
    dims = [0, *range(2, x.dim())]
    wide, incoming = x.to(compute_dtype(x.dtype)), grad.to(compute_dtype(x.dtype))
    dweight = ordered_sum(incoming * (wide - _per_channel(center, x)), dims) * inv_std
    return dweight, ordered_sum(incoming, dims)


def empty_pair(x: Tensor, *shape: int) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(x.dtype)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)
