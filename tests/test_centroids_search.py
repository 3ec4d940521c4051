"""Runner-up, precision and undecided rows of the nearest-centroid search; data that its shortcuts could get wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import clusterq
from clusterq import ops
from clusterq.testing import cpu_levels

INF, NAN = float("inf"), float("nan")
NARROW = (torch.float32, torch.bfloat16, torch.float16)


def distances(x, centroids):
    """Float64, squares added in the order of d."""
    x, centroids = x.double(), centroids.double()
    total = torch.zeros(x.shape[0], centroids.shape[0], dtype=torch.float64)
    for d in range(x.shape[1]):
        total += (x[:, d, None] - centroids[None, :, d]).square()
    return total


def two_nearest(x, centroids):
    """The two smallest distances by (distance, index), NaN ones left out; -1 and NaN for none."""
    index = torch.full((len(x), 2), -1)
    best = torch.full((len(x), 2), NAN, dtype=torch.float64)
    for n, row in enumerate(distances(x, centroids).tolist()):
        order = sorted((d, k) for k, d in enumerate(row) if d == d)[:2]
        for place, (d, k) in enumerate(order):
            index[n, place], best[n, place] = k, d
    return index, best


def check_two(x, centroids):
    index, distance = ops.two_nearest_centroids(x, centroids)
    wanted_index, wanted = two_nearest(x, centroids)
    assert torch.equal(index, wanted_index)
    torch.testing.assert_close(distance, wanted.to(distance.dtype), rtol=2.4e-7, atol=0, equal_nan=True)
    first, nearest = ops.nearest_centroid(x, centroids)
    assert torch.equal(first, index[:, 0]) and torch.equal(nearest.nan_to_num(-1), distance[:, 0].nan_to_num(-1))


@pytest.mark.parametrize("dtype", [*NARROW, torch.float64])
@pytest.mark.parametrize(
    "rows, clusters, dim", [(7, 1, 3), (9, 2, 1), (50, 10, 3), (61, 17, 8), (40, 65, 96), (21, 130, 192), (9, 300, 33)]
)
def test_two_nearest(dtype, rows, clusters, dim):
    check_two(torch.randn(rows, dim).to(dtype), torch.randn(clusters, dim).to(dtype))


@pytest.mark.parametrize("dtype", [*NARROW, torch.float64])
def test_two_nearest_of_copies_and_special_values(dtype):
    x, centroids = torch.randn(40, 12).to(dtype), torch.randn(37, 12).to(dtype)
    centroids[30], centroids[17], centroids[5] = centroids[2], centroids[2], centroids[4]
    check_two(torch.cat([x, centroids]), centroids)
    x[3, 0], x[4, 11], x[6] = NAN, INF, NAN
    centroids[0, 3], centroids[9], centroids[10, 2] = NAN, NAN, INF
    check_two(x, centroids)
    check_two(x, torch.cat([torch.full((3, 12), NAN).to(dtype), centroids[1:2]]))
    check_two(x, torch.cat([torch.full((2, 12), INF).to(dtype), centroids[1:2]]))


def test_second_of_equal_distances_has_the_lower_index():
    """Centroids 0, 8 and 16 share a lane of the float64 search; the first two are equally far from the origin."""
    for dtype in (torch.float32, torch.float64):
        centroids = torch.full((24, 64), 9.0, dtype=dtype)
        centroids[[0, 8, 16]] = 0
        centroids[0, 0], centroids[8, 0], centroids[16, 0] = 5, -5, 3
        index, _ = ops.two_nearest_centroids(torch.zeros(40, 64, dtype=dtype), centroids)
        assert torch.equal(index, torch.tensor([16, 0]).expand(40, 2))
    grid = torch.cartesian_prod(*[torch.arange(3.0)] * 4).double()
    check_two(grid + 0.5, grid[torch.randperm(len(grid))])


def test_fast_over_many_panels_of_ties():
    """More equal scores than are kept, and a better one in panels that come later."""
    for dim, clusters, place in ((16, 8192, 6000), (4, 9000, 8999)):
        signs = 2.0 * torch.randint(0, 2, (clusters, dim)) - 1
        signs[place] *= 0.25
        index, distance = ops.nearest_centroid(torch.zeros(30, dim), signs, precision="fast")
        assert torch.equal(index, torch.full((30,), place))
        torch.testing.assert_close(distance, torch.full((30,), dim / 16.0))


def test_two_nearest_batched_and_empty():
    x, centroids = torch.randn(4, 9, 5), torch.randn(4, 6, 5)
    index, distance = ops.two_nearest_centroids(x, centroids)
    for b in range(4):
        wanted, squares = two_nearest(x[b], centroids[b])
        assert torch.equal(index[b], wanted)
        torch.testing.assert_close(distance[b], squares.float(), rtol=2.4e-7, atol=0)
    index, distance = ops.two_nearest_centroids(torch.randn(0, 5), torch.randn(3, 5))
    assert index.shape == (0, 2) and distance.shape == (0, 2)


def test_gradients_of_both_distances():
    x = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    centroids = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: ops.two_nearest_centroids(a, b)[1], (x, centroids))
    assert torch.autograd.gradgradcheck(lambda a, b: ops.nearest_centroid(a, b)[1], (x, centroids))
    assert torch.autograd.gradgradcheck(lambda a, b: ops.two_nearest_centroids(a, b)[1], (x, centroids))


@pytest.mark.parametrize("dtype", NARROW)
def test_fast_differs_only_where_rows_are_undecided(dtype):
    x, centroids = torch.randn(3000, 40).to(dtype), torch.randn(200, 40).to(dtype)
    exact, near = ops.nearest_centroid(x, centroids)
    fast, distance = ops.nearest_centroid(x, centroids, precision="fast")
    undecided = ops.undecided_rows(x, centroids)
    assert undecided.dtype == torch.bool and undecided.shape == (3000,)
    assert bool(((fast == exact) | undecided).all())
    assert bool((distance <= near * (1 + 1e-4)).all())


def test_fast_keeps_the_rules():
    x, centroids = torch.randn(40, 12), torch.randn(37, 12)
    centroids[20], centroids[36] = centroids[3], centroids[3]
    x[0], x[1, 2], x[2, 3], x[4] = centroids[3], NAN, INF, 1e30
    centroids[5, 1], centroids[6, 1] = NAN, INF
    index, distance = ops.nearest_centroid(x, centroids, precision="fast")
    wanted = ops.nearest_centroid(x, centroids)[0]
    assert index[0] == 3 and index[1] == -1 and distance[1].isnan()
    assert torch.equal(index[:5], wanted[:5])


def test_clustered_rows_are_decided():
    centroids = 100 * torch.randn(50, 16)
    rows = torch.randint(0, 50, (1000,))
    x = centroids[rows] + 0.01 * torch.randn(1000, 16)
    assert not bool(ops.undecided_rows(x, centroids).any())
    assert torch.equal(ops.nearest_centroid(x, centroids)[0], rows)
    assert not bool(ops.undecided_rows(x.double(), centroids.double()).any())


def test_bad_precision():
    x, centroids = torch.randn(3, 2), torch.randn(4, 2)
    for function in (ops.nearest_centroid, ops.two_nearest_centroids):
        with pytest.raises(ValueError, match="precision is 'high'; wanted exact or fast"):
            function(x, centroids, precision="high")
    with pytest.raises(ValueError, match="precision is 'high'"):
        ops.assign_and_update_(centroids, torch.zeros(4), x, 0.5, precision="high")


def check_exact(x, centroids):
    wanted = torch.cat([distances(part, centroids).argmin(1) for part in x.split(512)])
    assert torch.equal(ops.nearest_centroid(x, centroids)[0], wanted)


def crowded(rows, clusters, dim):
    """Groups of centroids far apart and tight in themselves: scores in 16 bits tell hardly one from another."""
    heads = 50 * torch.randn(4, dim)
    centroids = heads[torch.arange(clusters) % 4] + 0.05 * torch.randn(clusters, dim)
    return heads[torch.arange(rows) % 4] + 0.05 * torch.randn(rows, dim), centroids


def check_shortcuts():
    """What `test_every_level` runs in a process of its own."""
    torch.manual_seed(0)
    # fewer rows than the search samples, and more
    for rows in (100, 2500):
        check_exact(*crowded(rows, 300, 24))
    # centroids far out are searched apart; rows near them, too, and more of them than are set apart
    x, centroids = torch.randn(300, 16), torch.randn(70, 16)
    for far in (1, 4, 6):
        centroids[:far] = 1e4 * torch.randn(far, 16)
        check_exact(torch.cat([x, centroids + 0.1]), centroids)
    centroids[2] = 3e38
    check_exact(x, centroids)
    # norms whose square overflows float32: few centroids, several of them, more than are set apart; rows near them
    for clusters, far in ((4, 1), (8, 3), (40, 5), (40, 20)):
        for size in (2e19, 2.65e19, 3.4e38):
            x, centroids = torch.randn(200, 9), torch.randn(clusters, 9)
            centroids[:far, 3] = size * torch.linspace(0.9, 1, far)
            check_exact(x, centroids)
            near = torch.cat([x[:60], centroids * 0.7])
            check_exact(near, centroids)
            check_two(near, centroids)
            # enough rows and numbers for the search proper
            check_exact(torch.cat([x] * 12), centroids)
    # panels that come from beyond the cache, packed again for every block of rows
    x, centroids = torch.randn(2100, 256), torch.randn(1100, 256)
    check_exact(x, centroids)
    check_two(x[:20], centroids)
    # more candidates than are kept, equal distances among them
    grid = torch.cartesian_prod(*[torch.arange(3.0)] * 5)
    check_exact(grid[::3] + 0.5, grid)
    check_exact(torch.ones(50, 5), grid)
    for dtype in NARROW:
        for dim in (1, 2, 5, 15, 31, 100):
            check_exact(torch.randn(200, dim).to(dtype), torch.randn(90, dim).to(dtype))
        wide = torch.randn(50, 2 * 21).to(dtype)
        check_exact(wide[:, ::2], torch.randn(40, 21).to(dtype))
        check_exact(wide[:, 1:22], torch.randn(40, 21).to(dtype))
    for dtype in NARROW:
        test_fast_differs_only_where_rows_are_undecided(dtype)
    test_fast_keeps_the_rules()
    test_fast_over_many_panels_of_ties()
    test_clustered_rows_are_decided()
    test_second_of_equal_distances_has_the_lower_index()
    x, centroids = torch.randn(500, 20), torch.randn(40, 20)
    print(ops.nearest_centroid(x, centroids)[1].view(torch.int32).tolist())


def compiled():
    return any(b.op == "nearest_centroid" and b.device == "cpu" and b.kernel == "cpp" for b in ops.backends())


@pytest.mark.skipif(not compiled(), reason="no compiled kernels here")
def test_every_level():
    root = str(Path(clusterq.__file__).resolve().parent.parent)
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
    outputs = set()
    for level in cpu_levels():
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CLUSTERQ_CPU_CAPABILITY": level}
        child = subprocess.run([sys.executable, __file__], env=env, cwd=root, capture_output=True, text=True)
        assert child.returncode == 0, f"{level}: {child.stderr[-3000:]}"
        outputs.add(child.stdout)
    assert len(outputs) == 1 and len(outputs.pop()) > 1000


if __name__ == "__main__":
    check_shortcuts()
