"""The alignment loss in plain PyTorch: default kernel of the op in `_alignment_op.py`, which explains its arguments."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from clusterq.ops._checks import ordered_sum
from clusterq.ops.merge_statistics import membership

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def merge_moments(
    mean: Tensor, var: Tensor, labels: Tensor | None, mask: Tensor | None, slots: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Counts [1 + S], means and biased variances [1 + S, D] of the batch (row 0) and of its S classes, float64.

    Rows of a group without images are 0. An image outside every class enters row 0 only.
    """
    member = torch.ones(mean.shape[0], 1, dtype=torch.bool, device=mean.device)
    if labels is not None:
        member = torch.cat([member, membership(labels, slots, mask)], 1)
    count = member.sum(0)
    divisor = count.clamp(min=1).double()[:, None]
    centers, variances = [], []
    for inside, images in zip(member.unbind(1), divisor, strict=True):
        chosen = inside[:, None]
        center = ordered_sum(torch.where(chosen, mean, 0).double(), [0]) / images
        spread = var.double() + (mean.double() - center).square()
        centers.append(center)
        variances.append(ordered_sum(torch.where(chosen, spread, 0), [0]) / images)
    return count.double(), torch.stack(centers), torch.stack(variances)


def _spread(var: Tensor, floor: float | None) -> tuple[Tensor, Tensor]:
    """The form of a variance that is compared, and its derivative."""
    if floor is None:
        return var, torch.ones_like(var)
    root = torch.sqrt(var + floor)
    return root, 0.5 / root


def _norms(difference: Tensor, starts: list[int], weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted sum of the layers' Euclidean norms, and its derivative (0 where a norm is 0)."""
    total, gradient = difference.new_zeros(()), torch.zeros_like(difference)
    for begin, end in pairwise(starts):
        part = difference[begin:end]
        norm = ordered_sum(part.square(), [0]).sqrt()
        total = total + weight[begin] * norm
        gradient[begin:end] = torch.where(norm > 0, weight[begin] * part / norm, 0)
    return total, gradient


def alignment_loss(
    mean: Tensor,
    var: Tensor,
    target_mean: Tensor,
    target_spread: Tensor,
    columns: Tensor,
    starts: Tensor,
    weight: float,
    squared: bool,
    floor: float | None,
    labels: Tensor | None,
    mask: Tensor | None,
    slots: int,
    first: int,
    class_mean: Tensor | None,
    class_spread: Tensor | None,
    known: Tensor | None,
    class_weights: list[float],
    class_average: bool,
    merged_count: Tensor | None,
    merged_mean: Tensor | None,
    merged_var: Tensor | None,
) -> Outputs:
    if merged_count is None or merged_mean is None or merged_var is None:
        merged_count, merged_mean, merged_var = merge_moments(mean, var, labels, mask, slots)
    column_weight, factor, class_weight = columns.double()
    wide, images = mean.double(), merged_count[0]

    center, corrected = merged_mean[0], merged_var[0] * factor
    spread, slope = _spread(corrected, floor)
    offset, excess = center - target_mean.double(), spread - target_spread.double()
    if squared:
        batch = ordered_sum(column_weight * (offset.square() + excess.square()), [0])
        by_mean, by_spread = 2 * column_weight * offset, 2 * column_weight * excess
    else:
        layers = starts.tolist()
        first_norm, by_mean = _norms(offset, layers, column_weight)
        second_norm, by_spread = _norms(excess, layers, column_weight)
        batch = first_norm + second_norm
    by_var = weight * by_spread * slope * factor
    grad_mean = (weight * by_mean + 2 * by_var * (wide - center)) / images
    grad_var = (by_var / images).expand_as(wide).clone()

    terms = [batch]
    total = weight * batch
    own_mean, (own_spread, own_slope) = merged_mean[1:, first:], _spread(merged_var[1:, first:], floor)
    if labels is not None and class_mean is not None and class_spread is not None:
        present = merged_count[1:] > 0
        if known is not None:
            present = present & known
        share = 1 / present.sum().clamp(min=1).double() if class_average else present.new_ones((), dtype=torch.float64)
        row_weight = torch.where(present, share, 0)[:, None] * class_weight[first:]
        by_mean, by_var = torch.zeros_like(own_mean), torch.zeros_like(own_mean)
        for tau, goal_mean, goal_spread in zip(class_weights, class_mean.double(), class_spread.double(), strict=True):
            # A select: a class without a target may hold anything there.
            offset = torch.where(present[:, None], own_mean - goal_mean, 0)
            excess = torch.where(present[:, None], own_spread - goal_spread, 0)
            term = ordered_sum(row_weight * (offset.square() + excess.square()), [0, 1])
            terms.append(term)
            total = total + tau * term
            by_mean += 2 * tau * row_weight * offset
            by_var += 2 * tau * row_weight * excess * own_slope
        inside = membership(labels, slots, mask)
        index = labels.clamp(0, slots - 1)
        size = merged_count[1:].clamp(min=1)[index][:, None]
        own = by_mean[index] + 2 * by_var[index] * (wide[:, first:] - own_mean[index])
        chosen = inside.any(1)[:, None] & present[index][:, None]
        grad_mean[:, first:] += torch.where(chosen, own / size, 0)
        grad_var[:, first:] += torch.where(chosen, by_var[index] / size, 0)
    dtype = mean.dtype
    return (
        total.to(dtype),
        torch.stack(terms).to(dtype),
        grad_mean.to(dtype).contiguous(),
        grad_var.to(dtype).contiguous(),
        merged_count[1:].long(),
        # Parts of larger tensors, maybe of arguments.
        own_mean.to(dtype).clone(memory_format=torch.contiguous_format),
        own_spread.to(dtype).clone(memory_format=torch.contiguous_format),
    )
