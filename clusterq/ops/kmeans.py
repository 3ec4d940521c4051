"""k-means by Lloyd's iterations on the centroid ops, with scikit-learn's conventions.

Start: greedy k-means++ (Arthur and Vassilvitskii 2007): the first centre is a row drawn with probability proportional
to its weight w; each further one is, of `2 + floor(ln k)` rows drawn with probability proportional to `w d^2` (d is the
distance to the nearest centre so far), the row that leaves the smallest `sum w d^2`.

Iteration: assign every row to the nearest centre; give each empty cluster one of the rows that lie farthest from their
centre; move the centres to the weighted means of their rows.

Stop: no label changed; or the centres moved by `sum |c' - c|^2 <= tol * mean variance of the features`; or `max_iter`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from clusterq.ops import _centroids_ops as op
from clusterq.ops._checks import (
    FLOATING,
    check_device,
    check_integer,
    check_number,
    check_precision,
    check_row_weights,
    check_shape,
    check_tensor,
    compute_dtype,
    ordered_sum,
)
from clusterq.ops.bn_stats import class_statistics
from clusterq.ops.centroids import Precision

__all__ = ["KMeansResult", "kmeans"]

# What the host learns from the one number it reads per iteration.
_FINISHED, _EMPTY, _NO_ROWS, _BAD_WEIGHTS, _BAD_START = 1, 2, 4, 8, 16


class KMeansResult(NamedTuple):
    """A clustering; with x [B, N, D] every field has a leading dimension B.

    Attributes:
        cluster_centers: [K, D] float32 (float64 for float64 rows).
        labels: int64 [N], the nearest of these centres; -1 for a row with a NaN or an infinity.
        inertia: float64 [], weighted sum of the squared distances of the rows to their centres.
        n_iter: int64 [], iterations run.
    """

    cluster_centers: Tensor
    labels: Tensor
    inertia: Tensor
    n_iter: Tensor


def kmeans(
    x: Tensor,
    k: int,
    *,
    init: str | Tensor = "k-means++",
    sample_weight: Tensor | None = None,
    max_iter: int = 300,
    tol: float = 1e-4,
    precision: Precision = "exact",
    generator: torch.Generator | None = None,
) -> KMeansResult:
    """Clusters the rows of x, as `sklearn.cluster.KMeans(algorithm="lloyd", n_init=1)` does from the same start.

    Sums run in float64 in a fixed order, so a repetition gives the same bits for any number of threads. Memory beyond
    the result is a few numbers per row (`ln k` of them while k-means++ chooses), never N * k. The host waits for the
    device once per assignment: `n_iter` or `n_iter + 1` times.

    Where it differs from scikit-learn: rows that are not finite are left out instead of refused; an empty cluster takes
    no row of weight 0 and none that lies on its centre already, the lowest row goes first among equally far ones, and
    a cluster that loses its last row by this keeps its centre.

    Args:
        x: rows, [N, D], or [B, N, D] for B clusterings at a time, each of which stops by itself; float32, bfloat16,
            float16 or float64, any strides.
        k: number of clusters, 1 to N.
        init: `"k-means++"`, or the initial centres, [K, D] or [B, K, D], in any floating dtype.
        sample_weight: [N] or [B, N] weights of the rows, finite and 0 or more; None weighs all rows 1. A row of weight
            0 gets a label and nothing else.
        max_iter: most iterations, 1 or more.
        tol: 0 or more, relative to the mean of the variances of the features (unweighted); 0 stops only when nothing
            moves any more.
        precision: as in `nearest_centroid`.
        generator: source of the random numbers of k-means++, on any device; None takes torch's own on the CPU.

    Returns:
        `KMeansResult`. No gradient flows.

    Raises:
        TypeError: an argument is no tensor, no number, or has an unsupported dtype.
        ValueError: shapes, devices or numbers that do not fit; weights that are negative or not finite; no finite row
            of positive weight.
    """
    _check(x, k, init, sample_weight, max_iter, tol, precision)
    batched = x.dim() == 3
    with torch.no_grad():
        rows = x if batched else x.unsqueeze(0)
        given = None if sample_weight is None else sample_weight.reshape(rows.shape[:2])
        valid = torch.isfinite(rows).all(-1)
        weights = valid.to(compute_dtype(x.dtype)) if given is None else torch.where(valid, given, 0)
        weights = weights.to(compute_dtype(x.dtype))
        if isinstance(init, Tensor):
            centers = init.reshape(rows.shape[0], k, x.shape[-1]).to(compute_dtype(x.dtype), copy=True)
        else:
            centers = plus_plus_start(rows, weights, k, generator).to(compute_dtype(x.dtype))
        allowed = tol * _mean_variance(rows, valid) if tol > 0 else valid.new_zeros(rows.shape[0], dtype=torch.float64)
        wrong = valid.new_zeros((), dtype=torch.int64)
        if given is not None:
            wrong = wrong + ((given < 0) | ~torch.isfinite(given)).any() * _BAD_WEIGHTS
        if isinstance(init, Tensor):
            wrong = wrong + (~torch.isfinite(centers)).any() * _BAD_START
        result = _lloyd(rows, weights, centers, valid, allowed, wrong, max_iter, precision)
    return result if batched else KMeansResult(*(field.squeeze(0) for field in result))


def _check(
    x: Tensor, k: int, init: str | Tensor, weights: Tensor | None, max_iter: int, tol: float, precision: str
) -> None:
    check_tensor("x", x, FLOATING)
    if x.dim() not in (2, 3) or x.shape[-1] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}; wanted [N, D] or [B, N, D] with D >= 1")
    check_integer("k", k, 1)
    if k > x.shape[-2]:
        raise ValueError(f"k is {k}; wanted at most N = {x.shape[-2]}, the number of rows")
    if isinstance(init, Tensor):
        check_tensor("init", init, FLOATING)
        check_shape("init", init, (*x.shape[:-2], k, x.shape[-1]))
        check_device("init", init, x.device, "x")
    elif init != "k-means++":
        raise ValueError(f"init is {init!r}; wanted k-means++ or a Tensor of initial centres")
    if weights is not None:
        check_row_weights("sample_weight", weights, x)
    check_integer("max_iter", max_iter, 1)
    check_number("tol", tol, 0)
    check_precision(precision)


def _mean_variance(x: Tensor, valid: Tensor) -> Tensor:
    """[B] float64: mean over the features of their variance over the valid rows of x [B, N, D]."""
    batch, count, features = x.shape
    problem = torch.arange(batch, device=x.device)[:, None].expand(batch, count).reshape(-1)
    _, _, var = class_statistics(x.reshape(-1, features), problem, batch, mask=valid.reshape(-1))
    return var.double().mean(-1)


def _lloyd(
    x: Tensor,
    weights: Tensor,
    centers: Tensor,
    valid: Tensor,
    allowed: Tensor,
    wrong: Tensor,
    max_iter: int,
    precision: str,
) -> KMeansResult:
    """Iterations on x [B, N, D] from centers [B, K, D].

    Each pass assigns first and learns then whether the move before it was the last one, so that the labels of the
    result always belong to its centres, and all questions to the device are asked at one time. Problems that have
    stopped keep their centres while others go on.
    """
    done = x.new_zeros(x.shape[0], dtype=torch.bool)
    small = torch.zeros_like(done)
    n_iter = x.new_full(done.shape, max_iter, dtype=torch.int64)
    previous = None
    for i in range(max_iter + 1):
        index, distance, sums = op.assign_and_sum(x, centers, weights, precision, True)
        count = sums[..., -1:]
        if previous is not None:
            same = (index == previous).all(-1)
            stopped = torch.where(small, i, min(i + 1, max_iter))
            n_iter = torch.where((small | same) & ~done, stopped, n_iter)
            done = done | small | same
        if i == max_iter:
            break
        empty = ((count[..., 0] <= 0) & ~done[:, None]).any()
        state = done.all() * _FINISHED + empty * _EMPTY
        if i == 0:
            state = state + (weights <= 0).all(-1).any() * _NO_ROWS + wrong
        seen = int(state)
        if seen & _BAD_WEIGHTS:
            raise ValueError("sample_weight has values that are negative or not finite; wanted 0 or more")
        if seen & _BAD_START:
            raise ValueError("init has values that are not finite; wanted finite centres")
        if seen & _NO_ROWS:
            raise ValueError("x has no row to cluster: all have a NaN, an infinity or weight 0")
        if seen & _FINISHED:
            break
        if seen & _EMPTY:
            sums = _with_empty_filled(x, index, distance, weights, sums)
            count = sums[..., -1:]
        moved = torch.where((count > 0) & ~done[:, None, None], sums[..., :-1] / count, centers.double())
        moved = moved.to(centers.dtype)
        shift = ordered_sum((moved.double() - centers.double()).square(), [1, 2])
        centers, small, previous = moved, shift <= allowed, index
    loss = torch.where(weights > 0, weights.double() * distance.double(), 0)
    # An infinite row may have found a centre, at an infinite distance.
    return KMeansResult(centers, torch.where(valid, index, -1), ordered_sum(loss, [1]), n_iter)


def _with_empty_filled(x: Tensor, index: Tensor, distance: Tensor, weights: Tensor, sums: Tensor) -> Tensor:
    """Sums [B, K, D + 1] after the r-th empty cluster was given the r-th farthest row."""
    batch, count = index.shape
    clusters = sums.shape[1]
    empty = sums[..., -1] <= 0
    far = torch.where(weights > 0, distance, 0)
    order = far.sort(dim=-1, descending=True, stable=True).indices
    rank = empty.cumsum(-1) - 1
    row = order.gather(-1, rank.clamp(0, count - 1))
    usable = empty & (rank < count) & (far.gather(-1, row) > 0)
    # One slot more than rows takes what is not to be written.
    slots = torch.cat([index, index.new_full((batch, 1), -1)], -1)
    names = torch.arange(clusters, device=x.device).expand(batch, clusters)
    slots.scatter_(-1, torch.where(usable, row, count), names)
    filled: Tensor = op.centroid_sums(x, slots[:, :-1], weights, clusters, True)
    return filled


def plus_plus_start(x: Tensor, weights: Tensor, k: int, generator: torch.Generator | None) -> Tensor:
    """Greedy k-means++: k rows of x [B, N, D] chosen as the module docstring says, [B, K, D] in the dtype of x.

    Args:
        weights: [B, N] in the compute dtype of x, 0 for rows that are not finite; where all are 0 (or N is 0) the
            result is NaN.
    """
    batch, count, features = x.shape
    if count == 0:
        return x.new_full((batch, k, features), math.nan)
    trials = 2 + int(math.log(k))
    source = torch.device("cpu") if generator is None else generator.device
    numbers = torch.rand((k, batch, trials), dtype=torch.float64, device=source, generator=generator).to(x.device)
    batches = torch.arange(batch, device=x.device)
    weight = weights.double()
    first = _draw(weight, weight, numbers[0, :, :1])[:, 0]
    centers = [torch.where(weight.any(-1, keepdim=True), x[batches, first], math.nan)]
    # Distances to the nearest centre so far, [B, N].
    nearest = _distances(x, weight, centers[0], centers[0][:, None], None)[:, 0]
    squares = nearest
    for c in range(1, k):
        rows = _draw(weight * nearest, weight, numbers[c])
        candidates = x[batches[:, None], rows]
        distances = torch.minimum(_distances(x, weight, centers[0], candidates, squares), nearest[:, None])
        best = ordered_sum(distances * weight[:, None], [2]).argmin(-1)
        nearest = distances[batches, best]
        centers.append(candidates[batches, best])
    return torch.stack(centers, 1)


def _distances(x: Tensor, weight: Tensor, origin: Tensor, points: Tensor, squares: Tensor | None) -> Tensor:
    """Squared distances [B, T, N] of the rows to points [B, T, D], float64; 0 for rows of weight 0.

    By products, one read of x for all points, about an origin [B, D] among the rows; a block of rows at a time, so that
    x as a whole is never held in float64. A BLAS may round the last bit differently with another number of threads,
    which changes what is drawn only where a random number lies that close to a boundary.
    squares: the distances to the origin, None where the origin is the only point.
    """
    batch, count, features = x.shape
    origin = origin.double()[:, None]
    shifted = points.double() - origin
    out = x.new_empty((batch, points.shape[1], count), dtype=torch.float64)
    step = max(1, (1 << (18 if x.device.type == "cpu" else 24)) // (batch * features))
    for start in range(0, count, step):
        block = slice(start, start + step)
        rows = x[:, block] - origin
        if squares is None:
            out[:, 0, block] = rows.square().sum(-1)
        else:
            out[:, :, block] = torch.bmm(shifted, rows.mT)
    if squares is not None:
        out.mul_(-2).add_(shifted.square().sum(-1, keepdim=True)).add_(squares[:, None]).clamp_(min=0)
    return out.masked_fill_(weight[:, None] <= 0, 0)


def _draw(mass: Tensor, otherwise: Tensor, numbers: Tensor) -> Tensor:
    """Rows [B, T] with probability proportional to mass [B, N], or to `otherwise` where that is 0 for all rows.

    By whole numbers: their running sum is the same in any order of addition, which a GPU does not fix for floats.
    numbers: [B, T] float64 in [0, 1).
    """
    total = ordered_sum(mass, [1])[:, None]
    mass = torch.where(total > 0, mass, otherwise)
    total = torch.where(total > 0, total, ordered_sum(otherwise, [1])[:, None])
    shares = torch.where(total > 0, mass / total * 2.0**61, 0).to(torch.int64)
    ends = shares.cumsum(-1)
    last = ends[:, -1:]
    picks = torch.minimum((numbers * last.double()).to(torch.int64), last - 1)
    return torch.searchsorted(ends, picks, right=True).clamp(max=mass.shape[-1] - 1)
