"""Batch and class statistics from instance statistics, by Chan's rule: plain PyTorch, differentiable everywhere."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clusterq.ops._checks import (
    FLOATING,
    check_device,
    check_integer,
    check_shape,
    check_tensor,
    compute_dtype,
    ordered_sum,
)


def reciprocal(count: int) -> float:
    return 1.0 / count if count > 0 else math.nan


def check_vector(name: str, vector: Tensor, size: int, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> None:
    check_tensor(name, vector, dtypes)
    check_shape(name, vector, (size,))
    check_device(name, vector, device, "x")


def check_labels(labels: Tensor, num_classes: int, mask: Tensor | None, images: int, device: torch.device) -> None:
    check_vector("labels", labels, images, device, (torch.int64,))
    check_integer("num_classes", num_classes, 1)
    if mask is not None:
        check_vector("mask", mask, images, device, (torch.bool,))


def image_weights(mask: Tensor | None, weights: Tensor | None, x: Tensor) -> Tensor | None:
    """[N] weights in the statistics' dtype from a mask and weights, checked; None where neither is given."""
    dtype = compute_dtype(x.dtype)
    if weights is not None:
        check_vector("weights", weights, x.shape[0], x.device, FLOATING)
        weights = weights.detach().to(dtype)
    if mask is None:
        return weights
    check_vector("mask", mask, x.shape[0], x.device, (torch.bool,))
    return mask.to(dtype) if weights is None else torch.where(mask, weights, 0)


def _check_instances(mean: Tensor, var: Tensor) -> None:
    check_tensor("mean", mean, FLOATING)
    check_tensor("var", var, FLOATING)
    if mean.dim() != 2:
        raise ValueError(f"mean has shape {tuple(mean.shape)}; wanted [N, C]")
    check_shape("var", var, mean.shape)
    check_device("var", var, mean.device, "mean")


def membership(labels: Tensor, num_classes: int, mask: Tensor | None) -> Tensor:
    """Bool [N, K]: image n belongs to class k. Labels outside the classes belong to none."""
    member = labels[:, None] == torch.arange(num_classes, device=labels.device)
    return member if mask is None else member & mask[:, None]


def merge_instance_statistics(mean: Tensor, var: Tensor, spatial: int, correction: int = 0) -> tuple[Tensor, Tensor]:
    """Batch statistics from instance statistics (Chan's rule with equal counts); differentiable.

    Float32 means are off by 6e-8 of themselves: with a mean of 10^4 spreads the variance is off by about 1e-5. Where
    the spread is smaller still, read x itself (`batch_norm_statistics`), or merge instance statistics of x in float64.

    Args:
        mean, var: [N, C], biased.
        spatial: values per image and channel, prod(x.shape[2:]).
        correction: as for `batch_norm_statistics`.

    Returns:
        mean [C] and var [C] in the dtype of mean; NaN as for `batch_norm_statistics`.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape or device; `spatial` or `correction` is negative.
    """
    _check_instances(mean, var)
    check_integer("spatial", spatial, 0)
    check_integer("correction", correction, 0)
    wide, images = mean.double(), mean.shape[0]
    values = images * spatial
    center = ordered_sum(wide, [0]) / images
    merged = ordered_sum(var.double() + (wide - center).square(), [0]) / images
    merged = merged * (values * reciprocal(values - correction))
    return center.to(mean.dtype), merged.to(mean.dtype)


def merge_class_statistics(
    mean: Tensor, var: Tensor, labels: Tensor, num_classes: int, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Class statistics from instance statistics (Chan's rule with equal counts); differentiable, no host sync.

    Sums are products with the one-hot labels in float64: repeatable, and out of reach of autocast and TF32. They run in
    the BLAS of torch, so independence of the number of threads, which every op promises, is not promised here. A
    non-finite instance of any class makes its channel non-finite in all classes; an image without a class never does.

    Args:
        mean, var: [N, C], biased, of images with the same spatial extent.
        labels, num_classes, mask: as for `class_statistics`.

    Returns:
        count [K] int64, mean [K, C], var [K, C] in the dtype of mean; 0 for a class without images.
    """
    _check_instances(mean, var)
    check_labels(labels, num_classes, mask, mean.shape[0], mean.device)
    member = membership(labels, num_classes, mask)
    count = member.sum(0)
    inside = member.any(1)[:, None]
    share = member.double()
    average = share.t() / count.clamp(min=1)[:, None]
    wide = torch.where(inside, mean, 0).double()
    center = average @ wide
    merged = average @ (torch.where(inside, var, 0).double() + (wide - share @ center).square())
    return count, center.to(mean.dtype), merged.to(mean.dtype)
