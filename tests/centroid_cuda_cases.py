"""Centroid ops where the CUDA kernels take another way: shared memory, shares of the codebook, alignment, rounding.

Run as `centroid_kernel_cases.py` is, on CUDA or on emulated threads; against the same float64 definitions.
"""

from __future__ import annotations

import os
import sys

import pytest
import torch

sys.path.insert(0, os.path.dirname(__file__))
from centroid_formulas import parts_of_sums
from centroid_kernel_cases import check_both, check_exact
from kernel_cases import DTYPES, INF, NAN, wide
from kernel_cases import fq as ops

HALF = (torch.bfloat16, torch.float16)


def at_offset(values, offset):
    """The same values `offset` elements into their memory."""
    room = values.new_empty(values.numel() + offset)
    return room[offset:].view(values.shape).copy_(values)


# All of x stays in shared memory, or chunks of it come and go; 16-bit values are multiplied as they are where their
# centre is near 0, in parts where it is not.
@pytest.mark.parametrize("offset", [0.0, 20.0])
@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("dim", [16, 32, 33, 64, 65, 128, 129, 160])
def test_chunks_of_d(dim, dtype, offset, poisoned):
    check_both((torch.randn(40, dim) + offset).to(dtype), (torch.randn(150, dim) + offset).to(dtype))


# With more blocks of rows than 264 by the number of tiles each has several of them: two of ten, and of two.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch, rows, clusters, dim", [(1, 3400, 600, 8), (1, 3400, 580, 70), (135, 2, 70, 40)])
def test_blocks_that_pass_by_several_tiles(batch, rows, clusters, dim, dtype, poisoned):
    x, centroids = torch.randn(batch, rows, dim).to(dtype), torch.randn(batch, clusters, dim).to(dtype)
    centroids[:, -1] = centroids[:, 1]
    x[0, 1] = centroids[0, -1]
    index, _ = check_exact(x, centroids)
    assert index[0, 1] == 1
    fast, _ = ops.nearest_centroid(x, centroids, "fast")
    assert not ((fast != index) & ~ops.undecided_rows(x, centroids)).any()


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("clusters", [9, 16, 17, 63, 64, 65])
def test_narrow_codebooks(clusters, dtype, poisoned):
    check_both(torch.randn(150, 40).to(dtype), torch.randn(clusters, 40).to(dtype))


@pytest.mark.parametrize("offset", [0, 1, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_start_anywhere(dtype, offset):
    x, centroids = torch.randn(2, 70, 64).to(dtype), torch.randn(2, 33, 64).to(dtype)
    index, _ = check_exact(at_offset(x, offset), at_offset(centroids, offset))
    spaced = torch.randn(2, 70, 72).to(dtype)[..., :64].copy_(x)
    assert torch.equal(check_exact(spaced, centroids)[0], index)
    # the order of a sum is a matter of sizes, not of where the rows lie
    weights = torch.rand(2, 70, dtype=wide(dtype))
    sums = ops.centroid_sums(x, index, weights, 33, True)
    for moved in (at_offset(x, offset), spaced, x.transpose(0, 1).contiguous().transpose(0, 1)):
        assert torch.equal(ops.centroid_sums(moved, index, weights, 33, True), sums)


@pytest.mark.parametrize("dtype", HALF)
def test_values_of_16_bits_are_multiplied_as_they_are(dtype):
    """Without an error of their parts fewer rows stay undecided; given an offset, a centre costs less than its lack."""
    x, centroids = torch.randn(1, 400, 48).to(dtype), torch.randn(1, 200, 48).to(dtype)
    # every centroid beside another
    centroids[0, 100:] = centroids[0, :100]
    centroids[0, 100:, 0] += 2.0**-5
    raw = ops.undecided_rows(x, centroids)
    parts = ops.undecided_rows(x.float(), centroids.float())
    assert 0 < raw.sum() < parts.sum() < 300
    assert torch.equal(ops.undecided_rows(x, centroids.float()), parts)
    check_both(x, centroids)
    # whole numbers around 100, whose products would leave every row undecided
    corners = torch.cartesian_prod(*[torch.arange(3.0)] * 4)
    centroids = (torch.nn.functional.pad(corners, (0, 20)) + 100).to(dtype)
    assert not ops.undecided_rows(centroids[None], centroids[None]).any()


@pytest.mark.parametrize("clusters, dim, searched", [(16, 8, False), (43, 3, True), (129, 1, True), (1, 128, False)])
def test_small_codebooks_are_measured_directly(clusters, dim, searched):
    x, centroids = torch.randn(1, 40, dim), torch.randn(1, clusters, dim)
    centroids[:] = centroids[:, :1]
    assert bool(ops.undecided_rows(x, centroids).any()) == searched
    check_both(x, centroids)


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_nothing_usable_in_any_part(dtype, poisoned):
    x, centroids = torch.randn(1, 20, 8).to(dtype), torch.full((1, 200, 8), NAN).to(dtype)
    index, distance = check_both(x, centroids)
    assert (index == -1).all() and distance.isnan().all()
    centroids[0, 150] = INF
    index, distance = check_both(x, centroids)
    assert (index == 150).all() and (distance == INF).all()
    centroids[0, 70] = 1
    x[0, 3, 2] = INF
    index, _ = check_both(x, centroids)
    assert (index == 70).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_row_is_open(dtype, poisoned):
    """More than a block searches at once, of several chunks of D and turns of centroids."""
    centroids = torch.randn(1, 75, 70).to(dtype).repeat(1, 4, 1)
    x = torch.cat([centroids[:, :37], torch.randn(1, 20, 70).to(dtype)], 1)
    if dtype != torch.float64:
        assert ops.undecided_rows(x, centroids).all()
    index, _ = check_both(x, centroids)
    assert torch.equal(index[0, :37], torch.arange(37))


def test_a_few_rows_of_a_block_are_open(poisoned):
    for count in range(6):
        centroids = torch.randn(1, 60, 40)
        x, places = centroids[:, torch.randint(60, (48,))] + 0.01 * torch.randn(1, 48, 40), torch.randperm(48)[:count]
        x[0, places] = (centroids[0, :count] + centroids[0, 10 : 10 + count]) / 2
        x[0, places[:1]] = NAN
        undecided = ops.undecided_rows(x, centroids)
        assert undecided[0, places[:1]].all() and undecided.sum() <= count
        check_both(x, centroids)


@pytest.mark.parametrize("clusters, dim", [(1, 200), (2, 100)])
def test_pairs_of_few(clusters, dim):
    check_both(torch.randn(20, dim), torch.randn(clusters, dim))
    check_both(torch.randn(20, dim), torch.randn(1, dim).expand(clusters, dim))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "rows, clusters, dim", [(2500, 1, 5), (2500, 3, 256), (3100, 2, 130), (900, 700, 4), (1025, 257, 8), (2048, 5, 1)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_many_segments(rows, clusters, dim, weighted, dtype, poisoned):
    x, index = torch.randn(2, rows, dim).to(dtype), torch.randint(-1, clusters, (2, rows))
    # one batch entry in runs, one of a single centroid but for a row
    index[0] = index[0].sort().values
    index[1, 1:] = clusters - 1
    weights = torch.rand(2, rows, dtype=wide(dtype)) if weighted else None
    sums = ops.centroid_sums(x, index, weights, clusters, True)
    wanted, size, terms = parts_of_sums(x, index, weights, clusters)
    assert ((sums - wanted).abs() <= (terms + 2) * 2.0**-53 * size).all()
    # blocks come in another order every time
    for _ in range(3):
        assert torch.equal(ops.centroid_sums(x, index, weights, clusters, True), sums)


def test_order_of_rows_decides_the_bits():
    """Rows of a centroid are added in the order they have: large ones that cancel leave what stands between them."""
    x = torch.tensor([1e300, 1.0, -1e300, 3.0], dtype=torch.float64).view(1, 4, 1)
    index = torch.zeros(1, 4, dtype=torch.int64)
    # of four rows of one value all lie in lanes of their own, which are joined pair by pair
    got = ops.centroid_sums(x, index, None, 1, True)
    permuted = ops.centroid_sums(x[:, [0, 2, 1, 3]], index, None, 1, True)
    assert {float(got[0, 0, 0]), float(permuted[0, 0, 0])} <= {0.0, 1.0, 3.0, 4.0}
    assert float(got[0, 0, 1]) == float(permuted[0, 0, 1]) == 4.0
    wide_rows = x.expand(1, 4, 64)
    assert torch.equal(ops.centroid_sums(wide_rows, index, None, 1, True)[0, 0, :64], torch.full((64,), 3.0).double())


@pytest.mark.parametrize("kinds", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), HALF, HALF[::-1]])
def test_gradients_of_two_dtypes(kinds):
    x, centroids = torch.randn(2, 300, 24).to(kinds[0]), torch.randn(2, 9, 24).to(kinds[1])
    index, grad = torch.randint(-1, 9, (2, 300)), torch.randn(2, 300)
    dx, dc = ops.nearest_centroid_backward(grad, x, centroids, index)
    chosen = centroids.double().gather(1, index.clamp_min(0)[..., None].expand(x.shape))
    flow = torch.where(index[..., None] >= 0, 2 * grad[..., None].double() * (x.double() - chosen), 0.0)
    wanted, size, terms = parts_of_sums(-flow, index, None, 9)
    assert dx.dtype == kinds[0] and dc.dtype == kinds[1]
    for got, true, slack in ((dx, flow, 0.0), (dc, wanted[..., :-1], (terms + 4) * 2.0**-53 * size[..., :-1])):
        # one rounding: half of a spacing
        info = torch.finfo(got.dtype)
        assert (
            (got.double() - true).abs() <= 0.5 * info.eps * true.abs() + slack + info.smallest_normal * info.eps
        ).all()


@pytest.mark.parametrize("dtype, bits", [(torch.bfloat16, 8), (torch.float16, 11)])
def test_one_rounding_from_float64(dtype, bits):
    """Beside the middle between two neighbours float32 would lie on it, and round to the even one of them."""
    tie, step = 1 + 2.0**-bits, 2.0**-40
    top = float(torch.finfo(dtype).max)
    values = [tie + step, tie - step, tie, -tie - step, -tie + step, 3 * 2.0**-bits + 1 - step, 0.0, top, 1e39, 5e-46]
    wanted = [1 + 2.0 ** (1 - bits), 1, 1, -1 - 2.0 ** (1 - bits), -1, 1 + 2.0 ** (1 - bits), 0.0, top, INF, 0.0]
    sums = torch.tensor([*values, 1.0], dtype=torch.float64).view(1, 1, -1)
    centroids, size = torch.zeros(1, 1, len(values)).to(dtype), torch.zeros(1, 1)
    ops.move_centroids_(centroids, size, None, sums, 0.0, "mean", 0.0)
    assert centroids.flatten().tolist() == wanted and float(size) == 1
