"""What every accelerated kernel of the centroid ops must do, on the device CLUSTERQ_TEST_DEVICE.

Run as `kernel_cases.py` is. Expected values: distances of all pairs in float64, squares added in the order of d; sums,
gradients and the moving average by their definitions in float64.
"""

from __future__ import annotations

import os
import sys

import pytest
import torch

import clusterq.ops

sys.path.insert(0, os.path.dirname(__file__))
from centroid_checks import check_both, check_exact, check_fast, check_fast_pair
from centroid_formulas import moved, parts_of_sums
from kernel_cases import (
    DEVICE,
    DTYPES,
    INF,
    NAN,
    quiet_numpy,  # noqa: F401 (a fixture that every case uses)
    wide,
)
from kernel_cases import fq as ops

# Rows, clusters, dim: D of one instruction and less, of several chunks, never padded to a power of two; K = 1, K beyond
# a tile and not a multiple of anything, K > N; rows beyond a tile.
SHAPES = [
    (1, 1, 1), (7, 3, 1), (130, 10, 3), (61, 17, 8), (40, 165, 96), (21, 130, 192), (9, 70, 320), (5, 64, 513),
    (3, 300, 16), (140, 129, 32), (33, 33, 65), (12, 48, 5),
]  # fmt: skip
OPS = (
    "nearest_centroid", "two_nearest_centroids", "undecided_rows", "nearest_centroid_backward", "centroid_sums",
    "assign_and_sum", "move_centroids_",
)  # fmt: skip


def test_a_kernel_serves_every_op():
    kernels = {row.op: row.kernel for row in clusterq.ops.backends() if row.device == DEVICE}
    wanted = {"triton"} if os.environ.get("CLUSTERQ_BACKEND") == "triton" else {"cuda", "triton"}
    for name in OPS:
        assert kernels[name] in wanted, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, clusters, dim", SHAPES)
def test_labels_equal_a_float64_search(rows, clusters, dim, dtype, poisoned):
    check_both(torch.randn(rows, dim).to(dtype), torch.randn(clusters, dim).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset, spread", [(8.0, 0.1), (100.0, 1.0), (1e4, 1.0)])
def test_offset_data(offset, spread, dtype, poisoned):
    x = (torch.randn(70, 24) * spread + offset).to(dtype)
    check_both(x, (torch.randn(70, 24) * spread + offset).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_beyond_float16(dtype):
    x, centroids = (torch.randn(40, 64) * 500).to(dtype), (torch.randn(140, 64) * 500).to(dtype)
    assert float(x.double().square().sum(1).min()) > 65504
    check_both(x, centroids)


def test_mixed_dtypes(poisoned):
    x, centroids = torch.randn(50, 33).bfloat16(), torch.randn(40, 33)
    check_both(x, centroids)
    check_both(x.half(), centroids.bfloat16())
    check_both(centroids, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clusters", [20, 300])
def test_lowest_index_among_copies_across_tiles(clusters, dtype):
    centroids = torch.randn(clusters, 19).to(dtype)
    # copies on both sides of a tile boundary, and a -0.0 next to a +0.0
    centroids[3, 5] = 0.0
    for first, copy in ((0, 15), (0, 16), (1, clusters - 1), (2, clusters // 2), (3, clusters - 2)):
        centroids[copy] = centroids[first]
    centroids[clusters - 2, 5] = -0.0
    rows = torch.tensor([*range(18), clusters // 2, clusters - 2, clusters - 1])
    index, distance = check_both(centroids[rows], centroids)
    assert index[0, 16] == 0 and index[0, -1] == 1 and index[0, -2] == 3 and index[0, -3] == 2
    check_fast_pair(centroids[rows], centroids)
    assert torch.equal(distance, torch.zeros_like(distance))


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_centroids_equal(dtype):
    x, centroids = torch.randn(50, 6).to(dtype), torch.randn(1, 6).to(dtype).expand(200, 6)
    index, _ = check_both(x, centroids)
    assert torch.equal(index, torch.zeros(1, 50, dtype=torch.int64))


def test_near_ties_are_decided_in_float64():
    # two centroids a float32 spacing apart around each row
    base = torch.randn(40, 32) * 3
    other = torch.nextafter(base, torch.full_like(base, INF))
    centroids = torch.cat([other, base])
    check_both(base, centroids)
    check_both(other, centroids)
    check_both((base.double() * 0.5 + other.double() * 0.5).float(), centroids)


@pytest.mark.parametrize("dtype", DTYPES)
def test_integer_grid_with_exact_ties(dtype):
    grid = torch.cartesian_prod(*[torch.arange(4.0)] * 3).to(dtype)
    rows = (torch.randint(-2, 10, (60, 3)) / 2).to(dtype)
    check_both(rows, grid)
    check_fast_pair(rows, grid)
    shift = 128 if dtype == torch.bfloat16 else 1024
    check_both(rows + shift, grid + shift)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity(dtype, poisoned):
    x, centroids = torch.randn(20, 12).to(dtype), torch.randn(37, 12).to(dtype)
    x[3, 0], x[4, 11], x[5, 2], x[6] = NAN, INF, -INF, NAN
    x[7, 0], x[7, 1] = INF, NAN
    centroids[0, 3], centroids[9], centroids[10, 2], centroids[36, 4] = NAN, NAN, INF, -INF
    check_fast_pair(x, centroids)
    index, distance = check_both(x, centroids)
    assert index[0, 3] == -1 and index[0, 6] == -1 and index[0, 7] == -1 and distance[0, 3].isnan()
    assert index[0, 4] == 1 and distance[0, 4] == INF
    if dtype != torch.float64:
        assert ops.undecided_rows(x[None], centroids[None])[0, 3:8].all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_usable_centroid(dtype):
    x = torch.randn(5, 3).to(dtype)
    index, distance = check_both(x, torch.full((4, 3), NAN).to(dtype))
    assert torch.equal(index, torch.full((1, 5), -1)) and bool(distance.isnan().all())
    index, distance = check_both(x, torch.tensor([[NAN, 0, 0], [INF, 0, 0], [INF, 0, 0]]).to(dtype))
    assert torch.equal(index, torch.ones(1, 5, dtype=torch.int64)) and bool((distance == INF).all())


@pytest.mark.parametrize("scale", [1e-42, 1e-38, 1e-30, 1e-20, 1e17, 1e18, 1e19, 1e30])
def test_range_ends_of_float32(scale):
    check_both(torch.randn(20, 9) * scale, torch.randn(50, 9) * scale)
    # Triton's interpreter misreads bfloat16 below 2^-126
    if scale > 1e-38 or os.environ.get("TRITON_INTERPRET") != "1":
        check_both((torch.randn(20, 9) * scale).bfloat16(), (torch.randn(50, 9) * scale).bfloat16())


@pytest.mark.parametrize("scale", [6e-8, 1e-6, 1e-4, 1.5e4])
def test_range_ends_of_float16(scale):
    check_both((torch.randn(20, 9) * scale).half(), (torch.randn(50, 9) * scale).half())


@pytest.mark.parametrize("far", [2.0**30, 2.0**45, 2.0**60])
def test_rows_far_beyond_the_centroids(far):
    """There float64 itself cannot tell the distances apart, and the lowest index of its search is the answer."""
    centroids = torch.randn(20, 6)
    x = torch.randn(10, 6) * far
    for dtype in (torch.float32, torch.bfloat16):
        check_exact(x.to(dtype), centroids.to(dtype))


def test_one_far_centroid_does_not_spoil_the_others():
    centroids = torch.randn(70, 16)
    for far in (1e6, 3e38):
        centroids[20] = far
        check_both(torch.randn(50, 16), centroids)
    half = centroids.bfloat16()
    check_both(torch.randn(50, 16).bfloat16(), half)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype, poisoned):
    x, centroids = torch.randn(30, 20).to(dtype), torch.randn(11, 20).to(dtype)
    for a, b in ((x.t().contiguous().t(), centroids), (torch.cat([x, x], 1)[:, :20], centroids.t().contiguous().t())):
        assert not a.is_contiguous()
        check_both(a, b)
    check_both(x.repeat(2, 1)[::2], centroids)
    room = torch.randn(601).to(dtype)
    check_both(room[1:].view(30, 20), room[1:221].view(11, 20))
    check_both(x[:1].expand(30, 20), centroids[:1].expand(11, 20))
    many = torch.randn(20, 3, 30).to(dtype).permute(1, 2, 0)
    check_both(many, torch.randn(9, 3, 20).to(dtype).transpose(0, 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_batched(dtype, poisoned):
    x, centroids = torch.randn(3, 31, 6).to(dtype), torch.randn(3, 9, 6).to(dtype)
    check_both(x, centroids)
    check_fast_pair(x, centroids)


def test_entries_of_a_batch_do_not_touch_each_other():
    """Of one the data is far from 0, of one nothing is usable, of one every row is undecided."""
    x, centroids = torch.randn(4, 3, 8), torch.randn(4, 12, 8)
    x[0] += 1000
    centroids[0] += 1000
    centroids[1] = NAN
    centroids[2] = centroids[2, :1]
    for dtype in (torch.float32, torch.bfloat16):
        check_both(x.to(dtype), centroids.to(dtype))


def test_more_batch_entries_than_a_grid_dimension():
    batch = 70000 if DEVICE == "cuda" and torch.cuda.is_available() else 30
    x, centroids = torch.randn(batch, 2, 2), torch.randn(batch, 3, 2)
    index, distance = check_exact(x, centroids)
    sums = ops.centroid_sums(x, index, None, 3, True)
    wanted, size, terms = parts_of_sums(x, index, None, 3)
    assert ((sums - wanted).abs() <= (terms + 2) * 2.0**-53 * size).all()
    grad = torch.randn(distance.shape)
    dx, _ = ops.nearest_centroid_backward(grad, x, centroids, index)
    chosen = centroids.double().gather(1, index[..., None].expand(x.shape))
    torch.testing.assert_close(dx, (2 * grad[..., None].double() * (x.double() - chosen)).float())


def test_empty(poisoned):
    for batch, rows in ((1, 0), (0, 3), (0, 0)):
        x, centroids = torch.randn(batch, rows, 4), torch.randn(batch, 5, 4)
        for precision in ("exact", "fast"):
            index, distance = ops.nearest_centroid(x, centroids, precision)
            assert index.shape == (batch, rows) and distance.shape == (batch, rows)
            assert ops.two_nearest_centroids(x, centroids, precision)[0].shape == (batch, rows, 2)
        assert ops.undecided_rows(x, centroids).shape == (batch, rows)
        for deterministic in (True, False):
            assert torch.equal(ops.centroid_sums(x, index, None, 5, deterministic), torch.zeros(batch, 5, 5).double())
        dx, dc = ops.nearest_centroid_backward(torch.zeros(batch, rows), x, centroids, index)
        assert dx.shape == x.shape and torch.equal(dc, torch.zeros(batch, 5, 4))
        assert torch.equal(ops.assign_and_sum(x, centroids, None, "exact", True)[2], torch.zeros(batch, 5, 5).double())
        before, size = centroids.clone(), torch.ones(batch, 5)
        ops.move_centroids_(centroids, size, None, torch.zeros(batch, 5, 5).double(), 0.5, "mean", 0.0)
        assert torch.equal(before, centroids) and torch.equal(size, torch.full((batch, 5), 0.5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_well_separated_rows_are_decided(dtype):
    """Clusters of spread 0.01 around centroids that lie 1 or more apart: nothing is left to float64."""
    for offset in (0.0, 4.0):
        corners = torch.cartesian_prod(*[torch.arange(3.0)] * 4)
        centroids = torch.nn.functional.pad(corners, (0, 20)) + offset
        label = torch.randint(0, 81, (200,))
        x = centroids[label] + 0.01 * torch.randn(200, 24)
        index, undecided = check_fast(x.to(dtype), centroids.to(dtype))
        assert not undecided.any() and torch.equal(index[0], label)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_beyond_the_reach_of_the_search_are_undecided(dtype):
    """Halfway between two centroids; and copies, whose lead is nothing."""
    centroids = torch.randn(40, 16).to(dtype)
    centroids[1] = -centroids[0]
    centroids[0] *= 0.25
    centroids[1] *= 0.25
    x = torch.cat([torch.zeros(3, 16).to(dtype), centroids[:1]])
    undecided = ops.undecided_rows(x[None], centroids[None])
    assert undecided[0, :3].all() == (dtype != torch.float64)
    doubled = torch.cat([centroids, centroids])
    assert ops.undecided_rows(x[None], doubled[None]).all() == (dtype != torch.float64)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "rows, clusters, dim, dtype",
    [
        *((200, 9, 7, dtype) for dtype in DTYPES), (300, 2, 3, torch.bfloat16), (5, 40, 1, torch.float32),
        (40, 3, 513, torch.float16), (150, 50, 33, torch.float32), (32, 1, 2, torch.float32), (64, 2, 2, torch.float64),
    ],
)  # fmt: skip
def test_sums(rows, clusters, dim, dtype, weighted, poisoned):
    x = torch.randn(2, rows, dim).to(dtype)
    index = torch.randint(-1, max(clusters - 1, 1), (2, rows))
    # a GPU leaves out what is out of range
    index[:, ::17] = clusters
    index[0, 0], index[1, 1] = 2**40, -(2**40)
    weights = torch.rand(2, rows).to(wide(dtype)) if weighted else None
    x[0, 2] = NAN
    if weighted:
        weights[:, ::3] = 0
        weights[:, 2] = 0
        x[1, ::3] = INF
    else:
        index[0, 2] = -1
    wanted, size, terms = parts_of_sums(x, index, weights, clusters)
    for given in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
        sums = ops.centroid_sums(given, index, weights, clusters, True)
        assert sums.dtype == torch.float64 and sums.shape == wanted.shape
        assert ((sums - wanted).abs() <= (terms + 2) * 2.0**-53 * size).all()
        assert torch.equal(sums, ops.centroid_sums(given, index, weights, clusters, True))
        if not weighted:
            assert torch.equal(sums[..., -1], wanted[..., -1])
    loose = ops.centroid_sums(x, index, weights, clusters, False)
    assert ((loose - wanted).abs() <= (terms + 2) * 2.0**-53 * size).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_a_bad_row_stay_with_its_centroid(dtype):
    x, index = torch.randn(1, 50, 4).to(dtype), torch.randint(0, 3, (1, 50))
    x[0, 7], index[0, 7] = NAN, 1
    for deterministic in (True, False):
        sums = ops.centroid_sums(x, index, None, 3, deterministic)
        assert sums[0, 1, :4].isnan().all() and sums[0, [0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, clusters, dim", [(300, 7, 10), (9, 40, 3), (40, 2, 130)])
def test_gradient(rows, clusters, dim, dtype, poisoned):
    x, centroids = torch.randn(2, rows, dim).to(dtype), torch.randn(2, clusters, dim).to(dtype)
    index = torch.randint(-1, max(clusters - 1, 1), (2, rows))
    x[0, 5, 2], index[0, 5] = NAN, -1
    centroids[0, clusters - 1] = NAN
    index[0, index[0] == clusters - 1] = 0
    room = torch.randn(2, 2 * rows, dtype=wide(dtype))
    grad = room[:, ::2]
    dx, dc = ops.nearest_centroid_backward(grad, x, centroids, index)
    chosen = centroids.double().gather(1, index.clamp_min(0)[..., None].expand(x.shape))
    flow = torch.where(index[..., None] >= 0, 2 * grad.double()[..., None] * (x.double() - chosen), 0.0)
    wanted, size, terms = parts_of_sums(-flow, index, None, clusters)
    assert dx.dtype == dtype and dc.dtype == dtype and dx.shape == x.shape and dc.shape == centroids.shape
    spacing = torch.finfo(dtype).eps
    torch.testing.assert_close(dx, flow.to(dtype), rtol=spacing, atol=torch.finfo(dtype).smallest_normal * spacing)
    tolerance = (terms + 4) * 2.0**-53 * size + spacing * wanted.abs() + torch.finfo(dtype).smallest_normal * spacing
    assert ((dc.double() - wanted[..., :-1]).abs() <= tolerance[..., :-1]).all()
    again = ops.nearest_centroid_backward(grad, x, centroids, index)
    assert torch.equal(dx.nan_to_num(7), again[0].nan_to_num(7)) and torch.equal(dc, again[1])


def moving(batch, clusters, dim, dtype):
    sums = torch.randn(batch, clusters, dim + 1).double()
    sums[..., -1] = torch.randint(0, 4, (batch, clusters)).double()
    sums[:, 0] = 0
    centroids, size = torch.randn(batch, clusters, dim).to(dtype), torch.rand(batch, clusters) * 9
    return centroids, size, torch.randn(batch, clusters, dim).to(wide(dtype)), sums


def assert_moved(got, wanted):
    """One rounding of a float64 result, itself a sum that may cancel; a rounding may end on either side of a tie."""
    info = torch.finfo(got.dtype)
    largest = wanted.abs().nan_to_num(0, 0, 0).max().item() if wanted.numel() else 0.0
    rtol, atol = info.eps, 8 * 2.0**-53 * largest + info.smallest_normal * info.eps
    rtol = 8 * 2.0**-53 if got.dtype == torch.float64 else rtol
    torch.testing.assert_close(got.double(), wanted.to(got.dtype).double(), rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize("smoothing", [0.0, 1e-2])
@pytest.mark.parametrize("mode, running", [("mean", False), ("codebook", False), ("codebook", True)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_moving_average(dtype, mode, running, smoothing):
    smoothing = smoothing if running else 0.0
    sizes = ((2, 9, 7), (1, 1, 1), (1, 100, 5), (3, 5, 130)) if dtype == torch.float32 else ((2, 9, 7),)
    for batch, clusters, dim in sizes:
        for decay in (0.8, 0.0, 1.0) if dim == 7 else (0.8,):
            centroids, size, total, sums = moving(batch, clusters, dim, dtype)
            size[:, -1] = 0
            before = centroids.clone()
            own = total if running else None
            wanted = moved(centroids, size, own, sums, decay, mode, smoothing)
            ops.move_centroids_(centroids, size, own, sums, decay, mode, smoothing)
            assert_moved(centroids, wanted[0])
            assert_moved(size, wanted[1])
            if running:
                assert_moved(total, wanted[2])
            else:
                assert torch.equal(centroids[:, 0], before[:, 0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_moving_average_through_any_layout(dtype):
    centroids, size, total, sums = moving(2, 9, 7, dtype)
    strided = centroids.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    strided_total = torch.cat([total, total], 2)[:, :, 3:10].copy_(total)
    neighbours = torch.stack([size, size], 2)
    strided_size = neighbours[:, :, 0]
    strided_sums = sums.transpose(1, 2).contiguous().transpose(1, 2)
    ops.move_centroids_(centroids, size, total, sums, 0.7, "codebook", 0.1)
    untouched = neighbours[:, :, 1].clone()
    ops.move_centroids_(strided, strided_size, strided_total, strided_sums, 0.7, "codebook", 0.1)
    assert torch.equal(strided, centroids) and torch.equal(strided_size, size) and torch.equal(strided_total, total)
    assert torch.equal(neighbours[:, :, 1], untouched)


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_assign_and_sum_is_the_two_in_turn(dtype, precision, poisoned):
    x, centroids = torch.randn(3, 40, 6).to(dtype), torch.randn(3, 9, 6).to(dtype)
    x[1, 4] = NAN
    weights = torch.rand(3, 40, dtype=wide(dtype)).where(torch.rand(3, 40) < 0.7, 0.0)
    for given in (weights, None) if precision == "exact" else (None,):
        index, distance = ops.nearest_centroid(x, centroids, precision)
        sums = ops.centroid_sums(x, index, given, 9, True)
        fused = ops.assign_and_sum(x, centroids, given, precision, True)
        assert torch.equal(fused[0], index) and torch.equal(fused[1].nan_to_num(7), distance.nan_to_num(7))
        assert torch.equal(fused[2], sums)
        torch.testing.assert_close(ops.assign_and_sum(x, centroids, given, precision, False)[2], sums)


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_sizes_on_every_call(dtype):
    """Sizes are run-time numbers of one compiled kernel, whatever divides them."""
    for rows in (1, 16, 17, 128, 131):
        check_exact(torch.randn(rows, 20).to(dtype), torch.randn(rows, 20).to(dtype))
