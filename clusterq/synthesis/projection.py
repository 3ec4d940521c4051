"""How well classes separate in the deep BatchNorm statistics, as points in the plane."""

from __future__ import annotations

import torch
from torch import Tensor

from clusterq.synthesis.losses import to_spread
from clusterq.synthesis.teacher import Teacher, semantic_start


@torch.no_grad()
def project_statistics(
    teacher: Teacher, images: Tensor, *, layers: tuple[int, int] | None = None, batch_size: int = 256
) -> Tensor:
    """Principal components of the per-image statistics of a range of BatchNorm layers.

    Mean and standard deviation of every channel, standardised over the images; the sign of a component is chosen so
    that its largest coordinate is positive, which makes the plot reproducible.

    Args:
        teacher: the frozen network.
        images: [N, C, H, W], N >= 2.
        layers: (first, last + 1) in execution order; None: the layers that carry centroids by default.
        batch_size: images per forward pass.

    Returns:
        [N, 2] float32 on the CPU.
    """
    if images.shape[0] < 2:
        raise ValueError(f"images holds {images.shape[0]} images; wanted at least 2")
    first, stop = layers or (semantic_start(teacher.num_layers), teacher.num_layers)
    if not 0 <= first < stop <= teacher.num_layers:
        raise ValueError(f"layers is {layers}; wanted 0 <= first < stop <= {teacher.num_layers}")
    begin, end = sum(teacher.channels[:first]), sum(teacher.channels[:stop])
    rows = []
    for part in torch.split(images, batch_size):
        output = teacher(part.to(teacher.device))
        rows.append(torch.cat([output.mean[:, begin:end], to_spread(output.var[:, begin:end], "std")], 1))
    features = torch.cat(rows).double().cpu()
    deviation = features.std(0)
    features = (features - features.mean(0)) / torch.where(deviation > 1e-6, deviation, 1.0)
    _, _, components = torch.linalg.svd(features, full_matrices=False)
    points = features @ components[:2].T
    points = torch.cat([points, points.new_zeros(len(points), 2 - points.shape[1])], 1)
    largest = points.gather(0, points.abs().argmax(0, keepdim=True))
    return (points * torch.where(largest < 0, -1.0, 1.0)).float()
