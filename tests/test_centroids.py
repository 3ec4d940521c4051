"""Nearest-centroid search, its gradient, and the moving average of the centroids, against float64 references."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import clusterq
from clusterq import ops
from clusterq.testing import cpu_levels

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INF, NAN = float("inf"), float("nan")


def search(x, centroids):
    """argmin and min of the direct float64 distances: squares added in the order of d, strict `<` in the order of k."""
    x, centroids = x.double(), centroids.double()
    distances = torch.zeros(x.shape[0], centroids.shape[0], dtype=torch.float64)
    for d in range(x.shape[1]):
        distances += (x[:, d, None] - centroids[None, :, d]).square()
    index = torch.full(x.shape[:1], -1)
    best = torch.full(x.shape[:1], NAN, dtype=torch.float64)
    for k, distance in enumerate(distances.unbind(1)):
        better = ~distance.isnan() & ((index < 0) | (distance < best))
        index = torch.where(better, k, index)
        best = torch.where(better, distance, best)
    return index, best


def average(centroids, size, x, index, weights, decay, mode):
    """The update by Python loops over clusters and rows, in float64; returns the new pair."""
    old, rows = centroids.double(), x.double()
    moved, new_size = old.clone(), decay * size.double()
    for k in range(old.shape[0]):
        chosen = [n for n in range(len(rows)) if index[n] == k and weights[n] != 0]
        count = sum(float(weights[n]) for n in chosen)
        new_size[k] += (1 - decay) * count
        if count == 0:
            continue
        total = sum(rows[n] * float(weights[n]) for n in chosen)
        if mode == "mean":
            moved[k] = decay * old[k] + (1 - decay) * total / count
        else:
            moved[k] = (decay * float(size[k]) * old[k] + (1 - decay) * total) / new_size[k]
    return moved, new_size


def check_search(x, centroids):
    index, distance = ops.nearest_centroid(x, centroids)
    wanted_index, wanted = search(x, centroids)
    statistics = torch.float64 if x.dtype == torch.float64 else torch.float32
    assert index.dtype == torch.int64 and distance.dtype == statistics
    assert torch.equal(index, wanted_index)
    # one rounding of a sum of squares, whatever its order
    torch.testing.assert_close(distance, wanted.to(statistics), rtol=2.4e-7, atol=0, equal_nan=True)


SHAPES = [(1, 1, 1), (7, 3, 1), (100, 10, 3), (61, 17, 8), (40, 65, 96), (21, 130, 192), (9, 70, 320), (5, 64, 513)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "clusters", "dim"), [*SHAPES, (3, 300, 16), (50, 128, 4), (37, 33, 7), (12, 48, 5)])
def test_labels_equal_a_float64_search(dtype, rows, clusters, dim):
    x, centroids = torch.randn(rows, dim).to(dtype), torch.randn(clusters, dim).to(dtype)
    check_search(x, centroids)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("offset", "spread"), [(8.0, 0.1), (100.0, 1.0), (1e4, 1.0)])
def test_offset_data(dtype, offset, spread):
    x = (torch.randn(400, 24) * spread + offset).to(dtype)
    centroids = (torch.randn(200, 24) * spread + offset).to(dtype)
    check_search(x, centroids)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_beyond_float16(dtype):
    x, centroids = (torch.randn(300, 64) * 500).to(dtype), (torch.randn(100, 64) * 500).to(dtype)
    assert float(x.double().square().sum(1).min()) > 65504
    check_search(x, centroids)


def test_mixed_dtypes():
    x, centroids = torch.randn(200, 33).bfloat16(), torch.randn(40, 33)
    check_search(x, centroids)
    check_search(x.half(), centroids.bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clusters", [20, 130, 300])
def test_lowest_index_among_duplicates_across_tiles(dtype, clusters):
    centroids = torch.randn(clusters, 19).to(dtype)
    # copies on both sides of every 16- and 64-wide tile boundary, and a -0.0 next to a +0.0
    centroids[3, 5] = 0.0
    for first, copy in ((0, 15), (0, 16), (1, clusters - 1), (2, clusters // 2), (3, clusters - 2)):
        centroids[copy] = centroids[first]
    centroids[clusters - 2, 5] = -0.0
    x = centroids.repeat(3, 1)
    check_search(x, centroids)
    index, distance = ops.nearest_centroid(x, centroids)
    assert index[16] == 0 and index[clusters - 1] == 1 and index[clusters - 2] == 3
    assert torch.equal(distance, torch.zeros_like(distance))


def test_all_centroids_equal():
    x = torch.randn(50, 6)
    index, _ = ops.nearest_centroid(x, torch.randn(1, 6).expand(200, 6))
    assert torch.equal(index, torch.zeros(50, dtype=torch.int64))


def test_near_ties_are_decided_in_float64():
    # two centroids a float32 spacing apart around each row: a float32 expansion of the square cannot tell them apart
    base = torch.randn(64, 32) * 3
    other = torch.nextafter(base, torch.full_like(base, INF))
    centroids = torch.cat([other, base])
    check_search(base, centroids)
    check_search(other, centroids)
    check_search((base.double() * 0.5 + other.double() * 0.5).float(), centroids)


def test_integer_grid_with_exact_ties():
    grid = torch.cartesian_prod(*[torch.arange(4.0)] * 3)
    rows = torch.randint(-2, 10, (500, 3)) / 2
    check_search(rows, grid)
    check_search(rows + 4096, grid + 4096)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity(dtype):
    x, centroids = torch.randn(40, 12).to(dtype), torch.randn(37, 12).to(dtype)
    x[3, 0], x[4, 11], x[5, 2], x[6] = NAN, INF, -INF, NAN
    x[7, 0], x[7, 1] = INF, NAN
    centroids[0, 3], centroids[9], centroids[10, 2], centroids[36, 4] = NAN, NAN, INF, -INF
    check_search(x, centroids)
    index, distance = ops.nearest_centroid(x, centroids)
    assert index[3] == -1 and index[6] == -1 and index[7] == -1 and distance[3].isnan()
    assert index[4] == 1 and distance[4] == INF


def test_no_usable_centroid():
    x = torch.randn(5, 3)
    index, distance = ops.nearest_centroid(x, torch.full((4, 3), NAN))
    assert torch.equal(index, torch.full((5,), -1)) and bool(distance.isnan().all())
    index, distance = ops.nearest_centroid(x, torch.tensor([[NAN, 0, 0], [INF, 0, 0], [INF, 0, 0]]))
    assert torch.equal(index, torch.ones(5, dtype=torch.int64)) and bool((distance == INF).all())


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e18, 1e30])
def test_range_ends_of_float32(scale):
    check_search(torch.randn(60, 9) * scale, torch.randn(50, 9) * scale)


def test_one_far_centroid_does_not_spoil_the_others():
    centroids = torch.randn(70, 16)
    centroids[20] = 1e6
    check_search(torch.randn(200, 16), centroids)
    centroids[20] = 3e38
    check_search(torch.randn(50, 16), centroids)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype):
    x, centroids = torch.randn(30, 20).to(dtype), torch.randn(11, 20).to(dtype)
    for a, b in ((x.t().contiguous().t(), centroids), (torch.cat([x, x], 1)[:, :20], centroids.t().contiguous().t())):
        assert not a.is_contiguous()
        check_search(a, b)
    check_search(x.repeat(2, 1)[::2], centroids)


@pytest.mark.parametrize("dtype", DTYPES)
def test_batched(dtype):
    x, centroids = torch.randn(5, 31, 6).to(dtype), torch.randn(5, 9, 6).to(dtype)
    index, distance = ops.nearest_centroid(x, centroids)
    for b in range(5):
        wanted, squares = search(x[b], centroids[b])
        assert torch.equal(index[b], wanted)
        torch.testing.assert_close(distance[b], squares.to(distance.dtype), rtol=2.4e-7, atol=0)


def test_many_batches():
    x, centroids = torch.randn(70000, 2, 2), torch.randn(70000, 3, 2)
    index, _ = ops.nearest_centroid(x, centroids)
    wanted = (x[:, :, None].double() - centroids[:, None].double()).square().sum(-1).argmin(-1)
    assert torch.equal(index, wanted)


def test_large_book_passes_in_several_blocks():
    x, centroids = torch.randn(50, 256), torch.randn(1500, 256)
    index, _ = ops.nearest_centroid(x, centroids)
    wanted = torch.cdist(x.double(), centroids.double(), compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    assert torch.equal(index, wanted)


def test_empty():
    for shape in ((0, 4), (3, 0, 4), (0, 3, 4)):
        x = torch.randn(shape, requires_grad=True)
        centroids = torch.randn(*shape[:-2], 5, 4, requires_grad=True)
        index, distance = ops.nearest_centroid(x, centroids)
        assert index.shape == shape[:-1] and distance.shape == shape[:-1]
        distance.sum().backward()
        assert torch.equal(centroids.grad, torch.zeros_like(centroids))
    centroids, size = torch.randn(5, 4), torch.ones(5)
    before = centroids.clone()
    ops.assign_and_update_(centroids, size, torch.randn(0, 4), 0.9)
    assert torch.equal(centroids, before)
    torch.testing.assert_close(size, torch.full((5,), 0.9))


def test_gradcheck():
    x = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    centroids = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: ops.nearest_centroid(a, b)[1], (x, centroids))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_against_float64(dtype):
    x, centroids = torch.randn(300, 10).to(dtype), torch.randn(7, 10).to(dtype)
    x[5, 2] = NAN
    centroids[6] = 1000
    x.requires_grad_(), centroids.requires_grad_()
    index, distance = ops.nearest_centroid(x, centroids)
    assert not index.requires_grad
    slope = torch.randn(300, dtype=distance.dtype)
    distance.backward(slope)
    wide_x, wide_c = x.detach().double().requires_grad_(), centroids.detach().double().requires_grad_()
    valid = index >= 0
    squares = (wide_x[valid] - wide_c[index[valid]]).square().sum(1)
    squares.backward(slope[valid].double())
    torch.testing.assert_close(x.grad, wide_x.grad.to(dtype))
    torch.testing.assert_close(centroids.grad, wide_c.grad.to(dtype))
    assert torch.equal(x.grad[5], torch.zeros_like(x.grad[5])) and torch.equal(
        centroids.grad[6], torch.zeros(10).to(dtype)
    )


def test_gradient_only_where_asked():
    x, centroids = torch.randn(20, 3, requires_grad=True), torch.randn(4, 3)
    ops.nearest_centroid(x, centroids)[1].sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        assert not ops.nearest_centroid(x, centroids)[1].requires_grad


@pytest.mark.parametrize("mode", ["mean", "codebook"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_update(dtype, weighted, mode):
    x, centroids, size = torch.randn(200, 7).to(dtype), torch.randn(9, 7).to(dtype), torch.rand(9) * 20
    index = torch.randint(-1, 8, (200,))
    weights = torch.rand(200) if weighted else torch.ones(200)
    if weighted:
        weights[::3] = 0
        x[3] = NAN
        weights[index == 2] = 0
    wanted, wanted_size = average(centroids, size, x, index, weights, 0.8, mode)
    before = centroids.clone()
    result = ops.update_centroids_(centroids, size, x, index, 0.8, weights=weights if weighted else None, mode=mode)
    assert result is None
    # the last cluster has no rows: its centroid stays, its size decays
    assert torch.equal(centroids[8], before[8])
    assert not weighted or torch.equal(centroids[2], before[2])
    torch.testing.assert_close(centroids, wanted.to(dtype), rtol=0 if dtype != torch.float64 else 1e-14, atol=1e-14)
    torch.testing.assert_close(size, wanted_size.float(), rtol=1.2e-7, atol=0)


def test_update_with_more_rows_than_a_segment():
    x = torch.randn(9000, 3) + 1000
    index = torch.randint(0, 2, (9000,))
    centroids, size = torch.zeros(3, 3), torch.zeros(3)
    ops.update_centroids_(centroids, size, x, index, 0.0)
    for k in range(2):
        torch.testing.assert_close(centroids[k], x[index == k].double().mean(0).float(), rtol=1.2e-7, atol=0)
    assert torch.equal(size, torch.stack([(index == k).sum() for k in range(3)]).float())


def test_update_boolean_weights_are_a_mask():
    x, index = torch.randn(50, 4), torch.randint(0, 3, (50,))
    mask = torch.rand(50) < 0.5
    a, b = torch.zeros(3, 4), torch.zeros(3, 4)
    size_a, size_b = torch.zeros(3), torch.zeros(3)
    ops.update_centroids_(a, size_a, x, index, 0.5, weights=mask)
    ops.update_centroids_(b, size_b, x[mask], index[mask], 0.5)
    assert torch.equal(a, b) and torch.equal(size_a, size_b)


def test_update_decay_ends():
    x, index = torch.randn(30, 4), torch.randint(0, 5, (30,))
    for mode in ("mean", "codebook"):
        centroids, size = torch.randn(5, 4), torch.zeros(5)
        before = centroids.clone()
        ops.update_centroids_(centroids, size, x, index, 1.0, mode=mode)
        assert torch.equal(centroids, before) and torch.equal(size, torch.zeros(5))
        ops.update_centroids_(centroids, size, x, index, 0.0, mode=mode)
        wanted = torch.stack([x[index == k].double().mean(0) for k in range(5)]).float()
        torch.testing.assert_close(centroids, wanted, rtol=1.2e-7, atol=1e-9)


def test_update_in_place_through_any_layout():
    x, index = torch.randn(60, 4), torch.randint(0, 5, (60,))
    dense, size = torch.randn(5, 4), torch.rand(5)
    strided, strided_size = dense.t().contiguous().t(), torch.zeros(10)[::2]
    strided_size.copy_(size)
    ops.update_centroids_(dense, size, x, index, 0.5)
    ops.update_centroids_(strided, strided_size, x.t().contiguous().t(), index, 0.5)
    assert torch.equal(dense, strided) and torch.equal(size, strided_size)


@pytest.mark.parametrize("mode", ["mean", "codebook"])
def test_thousand_steps_stay_with_float64(mode):
    generator = torch.Generator().manual_seed(1)
    centroids, size = torch.randn(6, 5, generator=generator) + 30, torch.zeros(6)
    wide, wide_size = centroids.double(), size.double()
    for _ in range(1000):
        x = torch.randn(24, 5, generator=generator) + 30
        index = torch.randint(0, 6, (24,), generator=generator)
        ops.update_centroids_(centroids, size, x, index, 0.99, mode=mode)
        for k in range(6):
            rows = x[index == k].double()
            new_size = 0.99 * wide_size[k] + 0.01 * len(rows)
            if len(rows) and mode == "mean":
                wide[k] = 0.99 * wide[k] + 0.01 * rows.mean(0)
            elif len(rows):
                wide[k] = (0.99 * wide_size[k] * wide[k] + 0.01 * rows.sum(0)) / new_size
            wide_size[k] = new_size
    # each step rounds once (half a spacing of 2^-19 near 30) and forgets 1 % of what came before
    torch.testing.assert_close(centroids.double(), wide, rtol=0, atol=100 * 2.0**-20)
    torch.testing.assert_close(size.double(), wide_size, rtol=100 * 2.0**-24, atol=0)


@pytest.mark.parametrize("mode", ["mean", "codebook"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_assign_and_update_is_the_two_in_turn(dtype, mode):
    x, centroids = torch.randn(3, 80, 6).to(dtype), torch.randn(3, 9, 6).to(dtype)
    weights, size = torch.rand(3, 80), torch.rand(3, 9)
    fused, fused_size = centroids.clone(), size.clone()
    index, distance = ops.nearest_centroid(x, centroids)
    ops.update_centroids_(centroids, size, x, index, 0.7, weights=weights, mode=mode)
    fused_index, fused_distance = ops.assign_and_update_(fused, fused_size, x, 0.7, weights=weights, mode=mode)
    assert torch.equal(index, fused_index) and torch.equal(distance, fused_distance)
    assert torch.equal(centroids, fused) and torch.equal(size, fused_size)


def test_writes_every_element(poisoned):
    x, centroids = torch.randn(101, 5), torch.randn(18, 5)
    x[7] = NAN
    check_search(x, centroids)
    x.requires_grad_(), centroids.requires_grad_()
    ops.nearest_centroid(x, centroids)[1].nan_to_num().sum().backward()
    assert bool(x.grad.isfinite().all()) and bool(centroids.grad.isfinite().all())


def run_elsewhere(*args, **environment):
    root = str(Path(clusterq.__file__).resolve().parent.parent)
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *args], env=env, cwd=root, capture_output=True, text=True, timeout=240)


def compiled():
    return any(b.op == "nearest_centroid" and b.device == "cpu" and b.kernel == "cpp" for b in ops.backends())


def check_this_level():
    """What `test_every_level` runs in a process of its own: every code path of the search, every dtype."""
    torch.manual_seed(0)
    for dtype in DTYPES:
        for rows, clusters, dim in SHAPES[:6]:
            test_labels_equal_a_float64_search(dtype, rows, clusters, dim)
        test_offset_data(dtype, 1e4, 1.0)
        test_lowest_index_among_duplicates_across_tiles(dtype, 130)
        test_nan_and_infinity(dtype)
        test_update(dtype, True, "codebook")
        test_gradient_against_float64(dtype)
    test_near_ties_are_decided_in_float64()
    test_no_usable_centroid()
    test_large_book_passes_in_several_blocks()
    for scale in (1e-30, 1e30):
        test_range_ends_of_float32(scale)
    x, centroids = torch.randn(500, 20), torch.randn(40, 20)
    index, distance = ops.nearest_centroid(x, centroids)
    print(index.tolist(), distance.view(torch.int32).tolist())


@pytest.mark.skipif(not compiled(), reason="no compiled kernels here")
def test_every_level():
    """Each instruction set passes the checks above and gives the same bits; the reference passes them too."""
    settings = [{"CLUSTERQ_CPU_CAPABILITY": level} for level in cpu_levels()]
    outputs = []
    for setting in (*settings, {"CLUSTERQ_BACKEND": "reference"}):
        result = run_elsewhere(__file__, **setting)
        assert result.returncode == 0, f"{setting}: {result.stderr[-3000:]}"
        outputs.append(result.stdout)
    assert len(outputs[0]) > 1000 and len(set(outputs[:-1])) == 1


@pytest.mark.skipif(not compiled(), reason="no compiled kernels here")
def test_unknown_level_is_an_error():
    code = "import torch, clusterq.ops as o; o.nearest_centroid(torch.ones(2, 2), torch.ones(2, 2))"
    result = run_elsewhere("-c", code, CLUSTERQ_CPU_CAPABILITY="sse9")
    assert result.returncode != 0 and "CLUSTERQ_CPU_CAPABILITY is sse9" in result.stderr


if __name__ == "__main__":
    check_this_level()
