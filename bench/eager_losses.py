"""The alignment losses as a dozen torch operations on the statistics of all layers, for comparison with the op.

Statistics of all layers side by side, [.., D] with D = sum of the layers' channels, and a weight per column that
expresses the mean over channels and layers. Equations: ClusterQ, arXiv 2205.00179v1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clusterq import ops
from clusterq.synthesis.losses import ClassStatistics, class_slots, to_spread


def channel_weights(channels: Sequence[int]) -> Tensor:
    """1 / (layers * channels of the layer), float32 [D]: every layer counts alike, whatever its width."""
    return torch.cat([torch.full((c,), 1.0 / (len(channels) * c)) for c in channels])


def bns_loss(mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor) -> Tensor:
    """Alignment of the batch (9), standard deviations compared. mean, var: [N, D] of single images."""
    # With the biased variance the merge does not depend on the number of pixels, so layers of all sizes merge at once.
    batch_mean, batch_var = ops.merge_instance_statistics(mean, var, 1)
    spread = to_spread(batch_var, "std") - to_spread(running_var, "std")
    return (batch_mean - running_mean).square() @ weight + spread.square() @ weight


def class_statistics(mean: Tensor, var: Tensor, labels: Tensor, num_classes: int) -> ClassStatistics:
    """Statistics of each class present (4), over the pixels of all its images. mean, var: [N, D]; labels: [N]."""
    slot, classes = class_slots(labels, num_classes)
    count, class_mean, class_var = ops.merge_class_statistics(mean, var, slot, classes.shape[0])
    return ClassStatistics(classes, count, class_mean, to_spread(class_var, "std"))


def class_alignment_loss(
    statistics: ClassStatistics, target_mean: Tensor, target_spread: Tensor, weight: Tensor
) -> Tensor:
    """Class alignment (4), the mean over the classes present. Targets: [S, D]."""
    present = statistics.samples > 0
    per_class = (statistics.mean - target_mean).square() @ weight + (
        statistics.spread - target_spread
    ).square() @ weight
    return torch.where(present, per_class, 0.0).sum() / present.sum().clamp(min=1)
