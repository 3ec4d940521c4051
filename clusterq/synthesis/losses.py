"""Losses on feature statistics; equation numbers refer to ClusterQ, arXiv 2205.00179v1.

All functions take statistics of all layers side by side, [.., D] with D = sum of the layers' channels, and a weight
per column that expresses the reduction over channels and layers (`channel_weights`). Class statistics come from one
segmented pass (`ops.merge_class_statistics`); nothing here loops over layers, classes or samples, or waits for the
device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from clusterq import ops
from clusterq.config import Reduction, Spread

# Keeps the derivative of the square root finite for a constant channel; 1e-5 as a standard deviation.
_VARIANCE_FLOOR = 1e-10


def to_spread(var: Tensor, spread: Spread) -> Tensor:
    """Variances in the form that is compared: `sqrt(var + 1e-10)` for `"std"`, unchanged for `"var"`."""
    return torch.sqrt(var + _VARIANCE_FLOOR) if spread == "std" else var


def channel_weights(channels: Sequence[int], reduction: Reduction, *, device: torch.device | None = None) -> Tensor:
    """Weight of every column: 1 for `"sum"`, 1 / (layers * channels of the layer) for `"mean"`. Float32 [D].

    With `"mean"` every layer counts alike, whatever its width.
    """
    if reduction == "sum":
        return torch.ones(sum(channels), device=device)
    return torch.cat([torch.full((c,), 1.0 / (len(channels) * c), device=device) for c in channels])


def _weighted_squares(difference: Tensor, weight: Tensor | None) -> Tensor:
    squares = difference.square()
    return squares.sum(-1) if weight is None else squares @ weight


def bns_loss(
    mean: Tensor,
    var: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    weight: Tensor | None = None,
    spread: Spread = "std",
) -> Tensor:
    """BatchNorm-statistics alignment (9): `sum_l ||mean_l - mu_l||^2 + ||std_l - sigma_l||^2` over the whole batch.

    Args:
        mean, var: [N, D] per image and channel (biased variance over pixels).
        running_mean, running_var: [D] what BatchNorm remembers.
        weight: [D], see `channel_weights`; None: all ones, the sum of the paper.
        spread: compare `"std"` (paper) or `"var"`.

    Returns:
        Scalar, float32.
    """
    # With the biased variance the merge does not depend on the number of pixels, so layers of all sizes merge at once.
    batch_mean, batch_var = ops.merge_instance_statistics(mean, var, 1)
    distance = _weighted_squares(batch_mean - running_mean, weight)
    return distance + _weighted_squares(to_spread(batch_var, spread) - to_spread(running_var, spread), weight)


class ClassStatistics(NamedTuple):
    """Statistics per class slot. With no more classes than images, slot k is class k; see `class_slots`.

    Attributes:
        classes: [S] int64 class of every slot, -1 for an unused one.
        samples: [S] images that form the class; 0: the row holds nothing.
        mean, spread: [S, D].
    """

    classes: Tensor
    samples: Tensor
    mean: Tensor
    spread: Tensor


def class_slots(labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Number the classes of a batch so that 1000 classes cost no more than the batch holds.

    Args:
        labels: [N] int64 in [0, num_classes).
        num_classes: K.

    Returns:
        slot [N] of every sample, and classes [S] of every slot with S = min(K, N), -1 where no class took the slot.
        The sizes depend on shapes alone, so nothing waits for the device.
    """
    samples = labels.shape[0]
    if num_classes <= samples:
        return labels, torch.arange(num_classes, device=labels.device)
    ordered, order = labels.sort(stable=True)
    is_new = torch.ones_like(ordered)
    is_new[1:] = ordered[1:] != ordered[:-1]
    rank = is_new.cumsum(0) - 1
    slot = torch.empty_like(labels).scatter_(0, order, rank)
    # Samples of one class write the same number to the same place.
    return slot, torch.full_like(labels, -1).scatter_(0, rank, ordered)


def class_statistics(
    mean: Tensor,
    var: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    mask: Tensor | None = None,
    spread: Spread = "std",
) -> ClassStatistics:
    """Statistics of each class present: `muhat^C`, `sigmahat^C` of (4), over the pixels of all its images.

    Args:
        mean, var: [N, D] per image (biased variance over pixels).
        labels: [N] int64.
        num_classes: K.
        mask: [N] bool; images that are False belong to no class (the paper drops those the teacher misclassifies).
        spread: `"std"` or `"var"`.
    """
    slot, classes = class_slots(labels, num_classes)
    count, class_mean, class_var = ops.merge_class_statistics(mean, var, slot, classes.shape[0], mask=mask)
    return ClassStatistics(classes, count, class_mean, to_spread(class_var, spread))


def class_alignment_loss(
    statistics: ClassStatistics,
    target_mean: Tensor,
    target_spread: Tensor,
    *,
    weight: Tensor | None = None,
    reduction: Reduction = "sum",
) -> Tensor:
    """Class alignment (4): `sum_C sum_l ||mean_l^C - mu_l^C||^2 + ||std_l^C - sigma_l^C||^2`.

    The sum runs over the classes that have samples in the batch; an absent class contributes nothing to value or
    gradient, and is not counted by `reduction="mean"`.

    Args:
        statistics: of the batch, S slots.
        target_mean, target_spread: [S, D] centroids of the slots' classes; no gradient flows to them.
        weight: [D] reduction over channels and layers, see `channel_weights`.
        reduction: over classes: `"sum"` (paper) or `"mean"` over those present.

    Returns:
        Scalar, float32; 0 for a batch without any valid sample.
    """
    present = statistics.samples > 0
    per_class = _weighted_squares(statistics.mean - target_mean.detach(), weight)
    per_class = per_class + _weighted_squares(statistics.spread - target_spread.detach(), weight)
    total = torch.where(present, per_class, 0.0).sum()
    return total / present.sum().clamp(min=1) if reduction == "mean" else total


def diversity_targets(
    centroid_mean: Tensor,
    centroid_spread: Tensor,
    noise_mean: float | Tensor,
    noise_spread: float | Tensor,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Fresh draws from N(mu, noise_mean^2) and N(sigma, noise_spread^2), the targets of (6).

    Args:
        centroid_mean, centroid_spread: [S, D].
        noise_mean, noise_spread: standard deviations, a number or [D].
        generator: of the centroids' device.
    """
    noise = torch.randn(2, *centroid_mean.shape, generator=generator, device=centroid_mean.device)
    return centroid_mean + noise_mean * noise[0], centroid_spread + noise_spread * noise[1]


def diversity_loss(
    statistics: ClassStatistics,
    target_mean: Tensor,
    target_spread: Tensor,
    *,
    weight: Tensor | None = None,
    reduction: Reduction = "sum",
) -> Tensor:
    """Diversity enhancement (6), called intra-class variance in v1: (4) with targets from `diversity_targets`.

    The targets carry no gradient: in expectation the gradient is that of class alignment, and around it the noise lets
    the images of a class spread.
    """
    return class_alignment_loss(statistics, target_mean, target_spread, weight=weight, reduction=reduction)


def correct_mask(logits: Tensor, labels: Tensor) -> Tensor:
    """[N] bool: the teacher's best class is the label."""
    return logits.argmax(1) == labels
