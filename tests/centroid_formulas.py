"""Definitions behind the centroid ops in float64, for the cases of their kernels; x [B, N, D], centroids [B, K, D]."""

from __future__ import annotations

import torch

NAN = float("nan")


def all_distances(x, centroids):
    """[B, N, K], squares added in the order of d."""
    x, centroids = x.double(), centroids.double()
    total = x.new_zeros((*x.shape[:2], centroids.shape[1]))
    for d in range(x.shape[2]):
        total += (x[:, :, None, d] - centroids[:, None, :, d]).square()
    return total


def nearest(distances, count):
    """Indices and distances [B, N, count] in rising order, the lowest index first among equals; -1 and NaN for none."""
    known = ~distances.isnan()
    # a stable sort keeps the order of the indices; what is NaN goes behind a true infinity
    order = torch.argsort(distances.masked_fill(~known, float("inf")), dim=-1, stable=True)
    order = order.gather(-1, torch.argsort((~known).gather(-1, order).to(torch.int8), dim=-1, stable=True))
    if order.shape[-1] < count:
        order = torch.cat([order, order[..., :1].expand(*order.shape[:-1], count - order.shape[-1])], -1)
    order = order[..., :count]
    have = known.sum(-1, keepdim=True) > torch.arange(count)
    value = distances.gather(-1, order)
    return order.masked_fill(~have, -1), value.masked_fill(~have, NAN)


def bound(x, centroids):
    """Error [B, N] of the scores of a search in parts of 16 bits, and the rows that are out of its range.

    Three products of bfloat16 parts lose 2^-15 of |x'||c'|, a sum of D products whose bits below 2^-23 of the largest
    are dropped (4 D + 64) 2^-23. The centre is the kernel's choice within the spread of the centroids: a factor of 4.
    """
    x, centroids = x.double(), centroids.double()
    usable = centroids.isfinite().all(-1, keepdim=True)
    inside = torch.where(usable, centroids, 0.0)
    centre = inside.sum(1, keepdim=True) / usable.sum(1, keepdim=True).clamp_min(1)
    norm = torch.where(usable, (centroids - centre).square().sum(-1, keepdim=True), 0.0).sqrt().amax((1, 2))[:, None]
    magnitude = (x - centre).square().sum(-1).sqrt() * norm + norm.square() / 2
    relative = 2.0**-15 + (4 * x.shape[2] + 64) * 2.0**-23
    measured = ~x.isfinite().all(-1) | ~(magnitude < 1e38) | ~usable.any(1)
    floor = x.shape[2] * 2.0**-110 * (1 + magnitude.nan_to_num(0).sqrt())
    return 4 * relative * magnitude.nan_to_num(0, 0, 0) + floor, measured


def without_copies(centroids):
    """[B, K]: for every centroid the lowest index whose centroid is equal to it; its own where there is a NaN."""
    equal = (centroids[:, :, None] == centroids[:, None]).all(-1)
    equal |= torch.eye(centroids.shape[1], dtype=torch.bool)
    return equal.to(torch.int8).argmax(-1)


def parts_of_sums(x, index, weights, clusters):
    """Sums [B, K, D + 1], sums of the absolute values, and the number of rows in each [B, K, 1]."""
    weight = torch.ones(index.shape).double() if weights is None else weights.double()
    used = (index >= 0) & (index < clusters) & (weight != 0)
    rows = torch.cat([x.double() * weight[..., None], weight[..., None]], -1)
    sums, sizes, terms = [], [], []
    for k in range(clusters):
        own = (used & (index == k))[..., None]
        sums.append(torch.where(own, rows, 0.0).sum(1))
        sizes.append(torch.where(own, rows.abs(), 0.0).sum(1))
        terms.append(own.sum(1))
    empty = x.new_zeros((x.shape[0], 0, x.shape[2] + 1)).double()
    return (torch.stack(part, 1) if part else empty for part in (sums, sizes, terms))


def moved(centroids, size, running_sum, sums, decay, mode, smoothing):
    """Centroids, sizes and running sums after one step, in float64, centroid by centroid."""
    old, old_size = centroids.double(), size.double()
    centroids, size = old.clone(), old_size.clone()
    running = None if running_sum is None else running_sum.double().clone()
    clusters = old.shape[1]
    for b in range(old.shape[0]):
        for k in range(clusters):
            size[b, k] = decay * old_size[b, k] + (1 - decay) * sums[b, k, -1]
        for k in range(clusters):
            total, count = sums[b, k, :-1], float(sums[b, k, -1])
            if running is not None:
                running[b, k] = decay * running[b, k] + (1 - decay) * total
                divisor = float(size[b, k])
                if smoothing > 0:
                    whole = float(size[b].sum())
                    divisor = (divisor + smoothing) / (whole + clusters * smoothing) * whole
                if divisor != 0:
                    centroids[b, k] = running[b, k] / divisor
            elif count != 0 and mode == "mean":
                centroids[b, k] = decay * old[b, k] + (1 - decay) * total / count
            elif count != 0 and float(size[b, k]) != 0:
                centroids[b, k] = (decay * old_size[b, k] * old[b, k] + (1 - decay) * total) / size[b, k]
    return centroids, size, running
