"""Parts of the losses on feature statistics; equation numbers refer to ClusterQ, arXiv 2205.00179v1.

The losses themselves, (4), (6) and (9), are one op over the statistics of all layers side by side:
`ops.AlignmentTargets`, called by `SynthesisObjective`. Nothing here loops over layers, classes or samples, or waits
for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from clusterq.config import Spread
from clusterq.ops.alignment import VARIANCE_FLOOR


def to_spread(var: Tensor, spread: Spread) -> Tensor:
    """Variances in the form that is compared: `sqrt(var + 1e-10)` for `"std"`, unchanged for `"var"`."""
    return torch.sqrt(var + VARIANCE_FLOOR) if spread == "std" else var


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


def diversity_targets(
    centroid_mean: Tensor,
    centroid_spread: Tensor,
    noise_mean: float | Tensor,
    noise_spread: float | Tensor,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Fresh draws from N(mu, noise_mean^2) and N(sigma, noise_spread^2), the targets of diversity enhancement (6).

    The targets carry no gradient: in expectation the gradient is that of class alignment, and around it the noise lets
    the images of a class spread.

    Args:
        centroid_mean, centroid_spread: [S, D].
        noise_mean, noise_spread: standard deviations, a number or [D].
        generator: of the centroids' device.
    """
    noise = torch.randn(2, *centroid_mean.shape, generator=generator, device=centroid_mean.device)
    return centroid_mean + noise_mean * noise[0], centroid_spread + noise_spread * noise[1]


def correct_mask(logits: Tensor, labels: Tensor) -> Tensor:
    """[N] bool: the teacher's best class is the label."""
    return logits.argmax(1) == labels
