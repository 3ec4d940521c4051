"""Schemas of the centroid ops: search, its gradient, sums by centroid, and the moving average over the sums.

    x [B, N, D]             rows, any strides; float32, bfloat16, float16, or float64 together with float64 centroids.
    centroids [B, K, D]     K, D >= 1.
    precision               "exact": index as a float64 search over the given values finds it, squares added in the
                            order of d; "fast": what the search in float32 (on a GPU: in parts of 16 bits) finds, the
                            lowest index among equal scores. Rows and centroids that are not finite, or so large that a
                            score may overflow, are measured in float64 in both.
    index [B, N] int64      -1 for none.
    weights [B, N]          dtype of statistics, None for 1; a row of weight 0 is left out whatever it holds.
    deterministic           False: sums may be added in any order.
    sums [B, K, D + 1]      float64: sum of w x over the rows of a centroid, then the sum of w.

An index outside [-1, K) is an error on the CPU; on a GPU, which would have to wait for the answer, it counts as -1.
Formulas of the moving average: `clusterq/ops/centroids.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clusterq.ops import _centroids_reference as reference
from clusterq.ops._checks import compute_dtype
from clusterq.ops._library import register_op


def _found(x: Tensor, *more: int) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], x.shape[1], *more)
    return x.new_empty(shape, dtype=torch.int64), x.new_empty(shape, dtype=compute_dtype(x.dtype))


def _sums(x: Tensor, clusters: int) -> Tensor:
    return x.new_empty((x.shape[0], clusters, x.shape[2] + 1), dtype=torch.float64)


def _backward_fake(grad: Tensor, x: Tensor, centroids: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), centroids.new_empty(centroids.shape)


nearest_centroid = register_op(
    "nearest_centroid(Tensor x, Tensor centroids, str precision) -> (Tensor, Tensor)",
    reference=reference.nearest_centroid,
    fake=lambda x, centroids, precision: _found(x),
    triton="centroids:nearest_centroid",
)
# index and distance [B, N, 2]: the nearest, then the nearest of the others; -1 and NaN where there is none
two_nearest_centroids = register_op(
    "two_nearest_centroids(Tensor x, Tensor centroids, str precision) -> (Tensor, Tensor)",
    reference=reference.two_nearest_centroids,
    fake=lambda x, centroids, precision: _found(x, 2),
    triton="centroids:two_nearest_centroids",
)
# [B, N] bool: rows whose two best scores lie too close for the arithmetic of the fast search
undecided_rows = register_op(
    "undecided_rows(Tensor x, Tensor centroids) -> Tensor",
    reference=reference.undecided_rows,
    fake=lambda x, centroids: x.new_empty(x.shape[:2], dtype=torch.bool),
    triton="centroids:undecided_rows",
)
nearest_centroid_backward = register_op(
    "nearest_centroid_backward(Tensor grad, Tensor x, Tensor centroids, Tensor index) -> (Tensor, Tensor)",
    reference=reference.nearest_centroid_backward,
    fake=_backward_fake,
    triton="centroids:nearest_centroid_backward",
)
centroid_sums = register_op(
    "centroid_sums(Tensor x, Tensor index, Tensor? weights, SymInt clusters, bool deterministic) -> Tensor",
    reference=reference.centroid_sums,
    fake=lambda x, index, weights, clusters, deterministic: _sums(x, clusters),
    triton="centroids:centroid_sums",
)


def _assign_and_sum_fake(x: Tensor, centroids: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (*_found(x), _sums(x, centroids.shape[1]))


# nearest_centroid, then centroid_sums
assign_and_sum = register_op(
    "assign_and_sum(Tensor x, Tensor centroids, Tensor? weights, str precision, bool deterministic) -> "
    "(Tensor, Tensor, Tensor)",
    reference=reference.assign_and_sum,
    fake=_assign_and_sum_fake,
    triton="centroids:assign_and_sum",
)
# `update_mode`: torch passes op arguments by keyword next to a `mode` of its own
move_centroids_ = register_op(
    "move_centroids_(Tensor(a!) centroids, Tensor(b!) cluster_size, Tensor(c!)? running_sum, Tensor sums, "
    "float decay, str update_mode, float smoothing) -> ()",
    reference=reference.move_centroids_,
    fake=lambda *arguments: None,
    triton="centroids:move_centroids_",
)
