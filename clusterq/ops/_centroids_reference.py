"""The centroid ops in plain PyTorch, float64 throughout; arguments as in `_centroids_ops`."""

from __future__ import annotations

import torch
from torch import Tensor

from clusterq.ops._checks import compute_dtype


def _distances(points: Tensor, means: Tensor) -> Tensor:
    """[B, n, K], squares added in the order of d."""
    total = points.new_zeros((*points.shape[:2], means.shape[1]))
    for d in range(points.shape[2]):
        total += (points[:, :, None, d] - means[:, None, :, d]).square_()
    return total


def _take_lowest(score: Tensor) -> tuple[Tensor, Tensor]:
    """Index and value [B, n] of the lowest of score [B, n, K], the first of several; -1 and NaN where all are NaN."""
    excluded = score.isnan()
    best, label = score.masked_fill(excluded, float("inf")).min(-1)
    # +inf may be a true distance as well as an excluded one: only a true one may win
    first = (~excluded).to(torch.int32).argmax(-1)
    label = torch.where(best.isinf(), first, label)
    nowhere = excluded.all(-1)
    return label.masked_fill(nowhere, -1), best.masked_fill(nowhere, float("nan"))


def _search(x: Tensor, centroids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` nearest of each row, [B, N, count], by a direct search, a block of rows at a time."""
    batch, rows, _ = x.shape
    clusters = centroids.shape[1]
    points, means = x.double(), centroids.double()
    index = x.new_empty((batch, rows, count), dtype=torch.int64)
    distance = x.new_empty((batch, rows, count), dtype=compute_dtype(x.dtype))
    # float64 scores of one block: 2 MiB stay in a CPU cache, 128 MiB fill a GPU
    budget = 1 << (18 if x.device.type == "cpu" else 24)
    step = max(1, budget // max(1, batch * clusters))
    for start in range(0, rows, step):
        score = _distances(points[:, start : start + step], means)
        for n in range(count):
            label, best = _take_lowest(score)
            index[:, start : start + step, n] = label
            distance[:, start : start + step, n] = best
            if n + 1 < count:
                score.scatter_(-1, label.clamp_min(0)[..., None], float("nan"))
    return index, distance


def nearest_centroid(x: Tensor, centroids: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    index, distance = _search(x, centroids, 1)
    return index[..., 0], distance[..., 0]


def two_nearest_centroids(x: Tensor, centroids: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    return _search(x, centroids, 2)


def undecided_rows(x: Tensor, centroids: Tensor) -> Tensor:
    # This search is in float64 from the start.
    return x.new_zeros(x.shape[:2], dtype=torch.bool)


def _segment_sums(rows: Tensor, index: Tensor, clusters: int) -> Tensor:
    """Sums of `rows [B, N, C]` by `index [B, N]` in row order, [B, K, C] float64; negative indices are left out."""
    batch, count, width = rows.shape
    if rows.device.type == "cpu":
        if index.numel() > 0:
            low, high = int(index.min()), int(index.max())
            if low < -1 or high >= clusters:
                raise RuntimeError(f"index has values {low} to {high}; wanted -1 to {clusters - 1}")
    else:
        index = torch.where(index < clusters, index, -1)
    offset = torch.arange(batch, device=rows.device)[:, None] * clusters
    slot = torch.where(index < 0, batch * clusters, index + offset).reshape(-1)
    sums = rows.new_zeros((batch * clusters + 1, width), dtype=torch.float64)
    values = rows.reshape(batch * count, width).double()
    if rows.device.type == "cpu":
        sums = sums.index_add(0, slot, values)
    else:
        # sorts by slot, where index_add would add by atomics in any order
        sums = sums.index_put((slot,), values, accumulate=True)
    return sums[:-1].view(batch, clusters, width)


def nearest_centroid_backward(grad: Tensor, x: Tensor, centroids: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    gather = index.clamp_min(0)[:, :, None].expand(x.shape)
    difference = x.double() - centroids.double().gather(1, gather)
    flow = (2 * grad.double()[:, :, None] * difference).masked_fill((index < 0)[:, :, None], 0)
    grad_centroids = -_segment_sums(flow, index, centroids.shape[1])
    return flow.to(x.dtype).contiguous(), grad_centroids.to(centroids.dtype)


def centroid_sums(x: Tensor, index: Tensor, weights: Tensor | None, clusters: int, deterministic: bool) -> Tensor:
    weight = torch.ones_like(index, dtype=torch.float64) if weights is None else weights.double()
    used = torch.where(weight == 0, -1, index)
    rows = torch.cat([x.double() * weight[:, :, None], weight[:, :, None]], dim=-1)
    return _segment_sums(rows, used, clusters)


def assign_and_sum(
    x: Tensor, centroids: Tensor, weights: Tensor | None, precision: str, deterministic: bool
) -> tuple[Tensor, Tensor, Tensor]:
    index, distance = nearest_centroid(x, centroids, precision)
    return index, distance, centroid_sums(x, index, weights, centroids.shape[1], deterministic)


def move_centroids_(
    centroids: Tensor,
    cluster_size: Tensor,
    running_sum: Tensor | None,
    sums: Tensor,
    decay: float,
    update_mode: str,
    smoothing: float,
) -> None:
    total, count = sums[..., :-1], sums[..., -1]
    old, old_size = centroids.double(), cluster_size.double()
    size = decay * old_size + (1 - decay) * count
    if running_sum is not None:
        moved_sum = decay * running_sum.double() + (1 - decay) * total
        whole = size.sum(-1, keepdim=True)
        divisor = size
        if smoothing > 0:
            divisor = (size + smoothing) / (whole + size.shape[-1] * smoothing) * whole
        moved, used = moved_sum / divisor[..., None], divisor != 0
        running_sum.copy_(moved_sum)
    elif update_mode == "mean":
        moved, used = decay * old + (1 - decay) * (total / count[..., None]), count != 0
    else:
        # a codebook entry of size 0 stays 0 / 0 under decay 1
        moved = (decay * old_size[..., None] * old + (1 - decay) * total) / size[..., None]
        used = (count != 0) & (size != 0)
    centroids.copy_(torch.where(used[..., None], moved, old))
    cluster_size.copy_(size)
