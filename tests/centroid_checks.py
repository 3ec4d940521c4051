"""Nearest-centroid ops against the distances of all pairs in float64; x [N, D] or [B, N, D], centroids alike."""

from __future__ import annotations

import os
import sys

import torch

sys.path.insert(0, os.path.dirname(__file__))
from centroid_formulas import all_distances, bound, nearest, without_copies
from kernel_cases import NAN, wide
from kernel_cases import fq as ops


def batched(t):
    return t if t.dim() == 3 else t[None]


def assert_distances(got, wanted, dim):
    """One rounding of a sum of squares in float64, whatever its order."""
    dtype = got.dtype
    rtol, atol = ((dim + 4) * 2.0**-53, 0.0) if dtype == torch.float64 else (1.01 * 2.0**-24, 2.0**-149)
    torch.testing.assert_close(got.double(), wanted.to(dtype).double(), rtol=2 * rtol, atol=atol, equal_nan=True)


def check_exact(x, centroids):
    x, centroids = batched(x), batched(centroids)
    distances = all_distances(x, centroids)
    index, distance = ops.nearest_centroid(x, centroids, "exact")
    wanted_index, wanted = nearest(distances, 2)
    assert index.dtype == torch.int64 and distance.dtype == wide(x.dtype)
    assert torch.equal(index, wanted_index[..., 0])
    assert_distances(distance, wanted[..., 0], x.shape[2])
    two_index, two_distances = ops.two_nearest_centroids(x, centroids, "exact")
    assert two_index.dtype == torch.int64 and two_distances.dtype == wide(x.dtype)
    assert torch.equal(two_index, wanted_index)
    assert_distances(two_distances, wanted, x.shape[2])
    return index, distance


def check_fast(x, centroids):
    """Labels that a search in 16-bit parts may find, and which of them it admits not to be sure of."""
    x, centroids = batched(x), batched(centroids)
    distances = all_distances(x, centroids)
    wanted_index, wanted = nearest(distances, 1)
    error, measured = bound(x, centroids)
    index, distance = ops.nearest_centroid(x, centroids, "fast")
    undecided = ops.undecided_rows(x, centroids)
    assert undecided.dtype == torch.bool and undecided.shape == index.shape
    wrong = index != wanted_index[..., 0]
    assert not (wrong & ~undecided).any(), "a label is wrong and the row counts as decided"
    assert not (wrong & measured).any(), "a row that float64 has to decide"
    assert torch.equal(index < 0, wanted_index[..., 0] < 0)
    own = distances.gather(2, index.clamp_min(0)[..., None])[..., 0]
    own = own.masked_fill(index < 0, NAN)
    assert_distances(distance, own, x.shape[2])
    # a score is half of a distance, and the two scores that are compared carry an error each
    excess = torch.where(wrong, (own - wanted[..., 0]) / 2, 0.0)
    assert (excess <= 2 * error).all(), (excess, error)
    first = without_copies(centroids)
    chosen = index.clamp_min(0)
    assert torch.equal(first.gather(1, chosen), chosen), "a copy was chosen before the first of its kind"
    if x.dtype == torch.float64:
        assert not undecided.any() and not wrong.any()
    return index, undecided


def check_fast_pair(x, centroids):
    x, centroids = batched(x), batched(centroids)
    index, _ = ops.nearest_centroid(x, centroids, "fast")
    two, two_distance = ops.two_nearest_centroids(x, centroids, "fast")
    assert torch.equal(two[..., 0], index)
    assert not ((two[..., 0] == two[..., 1]) & (index >= 0)).any()
    distances = all_distances(x, centroids)
    assert torch.equal(two < 0, nearest(distances, 2)[0] < 0)
    own = distances.gather(2, two.clamp_min(0)).masked_fill(two < 0, NAN)
    assert_distances(two_distance, own, x.shape[2])
    error, _ = bound(x, centroids)
    excess = (own[..., 1] - nearest(distances, 2)[1][..., 1]).nan_to_num(0, 0, 0) / 2
    assert (excess <= 2 * error).all(), (excess, error)


def check_both(x, centroids):
    check_fast(x, centroids)
    return check_exact(x, centroids)
