"""The alignment losses as a dozen torch operations on the statistics of all layers, for comparison with the op.

Statistics of all layers side by side, [.., D] with D = sum of the layers' channels, and a weight per column that
expresses the reduction over channels and layers. Equations: ClusterQ, arXiv 2205.00179v1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clusterq import ops
from clusterq.config import Reduction, Spread
from clusterq.synthesis.losses import ClassStatistics, class_slots, to_spread


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
