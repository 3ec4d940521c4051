"""Options of the centroids' moving average: running sums, smoothing, dead entries, process groups."""

import subprocess
import sys

import pytest
import torch

from clusterq import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def loops(centroids, size, running, x, index, decay, smoothing):
    """Laplace-smoothed codebook by Python loops in float64: new centroids, sizes and running sums."""
    moved, sizes, sums = centroids.double(), decay * size.double(), decay * running.double()
    for n, k in enumerate(index.tolist()):
        if k >= 0:
            sizes[k] += 1 - decay
            sums[k] += (1 - decay) * x[n].double()
    whole = sum(sizes.tolist())
    for k in range(len(moved)):
        divisor = float(sizes[k])
        if smoothing > 0:
            divisor = (divisor + smoothing) / (whole + len(moved) * smoothing) * whole
        if divisor != 0:
            moved[k] = sums[k] / divisor
    return moved, sizes, sums


@pytest.mark.parametrize("smoothing", [0.0, 1e-5, 0.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_running_sum(dtype, smoothing):
    x, centroids, size = torch.randn(60, 5).to(dtype), torch.randn(7, 5).to(dtype), 3 * torch.rand(7)
    size[5] = 0
    running = torch.randn(7, 5, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    index = torch.randint(-1, 5, (60,))
    wanted, sizes, sums = loops(centroids, size, running, x, index, 0.9, smoothing)
    options = {"mode": "codebook", "running_sum": running, "smoothing": smoothing}
    assert ops.update_centroids_(centroids, size, x, index, 0.9, **options) is None
    torch.testing.assert_close(size, sizes.float(), rtol=1.2e-7, atol=0)
    torch.testing.assert_close(running, sums.to(running.dtype), rtol=1.2e-7, atol=1e-7)
    # one rounding, of the same double but for its last bits
    torch.testing.assert_close(centroids, wanted.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-12)


def test_running_sum_batched_strided_and_with_the_search():
    x, centroids, size = torch.randn(2, 40, 5), torch.randn(2, 7, 5), torch.rand(2, 7)
    running, weights = torch.randn(2, 5, 7).mT, torch.rand(2, 40)
    assert not running.is_contiguous()
    both = [t.clone() for t in (centroids, size)], running.clone()
    index, distance = ops.assign_and_update_(
        centroids, size, x, 0.8, weights=weights, mode="codebook", running_sum=running, smoothing=0.1
    )
    (means, counts), sums = both
    wanted, squares = ops.nearest_centroid(x, means)
    ops.update_centroids_(
        means, counts, x, wanted, 0.8, weights=weights, mode="codebook", running_sum=sums, smoothing=0.1
    )
    assert torch.equal(index, wanted) and torch.equal(distance, squares)
    assert torch.equal(centroids, means) and torch.equal(size, counts) and torch.equal(running, sums)


def test_dead_entries_are_reported():
    centroids, size = torch.randn(2, 3, 4), torch.tensor([[1.0, 0.2, 3.0], [0.0, 8.0, 0.5]])
    index = torch.tensor([[0, 0], [0, 0]])
    dead = ops.update_centroids_(centroids, size, torch.randn(2, 2, 4), index, 0.5, dead_below=1.0)
    torch.testing.assert_close(size, torch.tensor([[1.5, 0.1, 1.5], [1.0, 4.0, 0.25]]))
    assert torch.equal(dead, torch.tensor([[False, True, False], [False, False, True]]))
    index, _, dead = ops.assign_and_update_(centroids, size, torch.zeros(2, 0, 4), 0.5, dead_below=1.0)
    assert torch.equal(dead, torch.tensor([[True, True, True], [True, False, True]])) and index.shape == (2, 0)


def test_any_order_gives_the_same_to_rounding():
    x, index = torch.randn(3000, 6), torch.randint(0, 4, (3000,))
    results = []
    for deterministic in (True, False):
        centroids, size = torch.zeros(4, 6), torch.zeros(4)
        ops.update_centroids_(centroids, size, x, index, 0.5, deterministic=deterministic)
        results.append(centroids)
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-8)


def test_options_that_do_not_go_together():
    x, index, centroids, size = torch.randn(6, 3), torch.zeros(6, dtype=torch.int64), torch.randn(4, 3), torch.ones(4)
    for error, name, options in (
        (ValueError, "running_sum is None", {"mode": "codebook", "smoothing": 0.1}),
        (ValueError, "mode is 'mean'; with running_sum wanted codebook", {"running_sum": torch.zeros(4, 3)}),
        (TypeError, "running_sum has dtype", {"mode": "codebook", "running_sum": torch.zeros(4, 3).double()}),
        (ValueError, "running_sum has shape", {"mode": "codebook", "running_sum": torch.zeros(3, 3)}),
        (ValueError, "share memory", {"mode": "codebook", "running_sum": torch.zeros(3).expand(4, 3)}),
        (ValueError, "smoothing is -1", {"smoothing": -1}),
        (ValueError, "dead_below is -1", {"dead_below": -1}),
    ):
        with pytest.raises(error, match=name):
            ops.update_centroids_(centroids, size, x, index, 0.5, **options)


WORKER = """
import sys, torch, torch.distributed as dist
from clusterq import ops
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
calls, all_reduce = [], dist.all_reduce
dist.all_reduce = lambda *args, **options: calls.append(args) or all_reduce(*args, **options)

def start():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(90, 5, generator=generator)
    return x, torch.randn(7, 5, generator=generator), torch.ones(7), torch.randn(7, 5, generator=generator)

for mode in ("mean", "codebook", "running"):
    x, means, size, running = start()
    part = x[:60] if rank == 0 else x[60:]
    alone = [t.clone() for t in (means, size, running)]
    def options(sums):
        if mode == "running":
            return {"mode": "codebook", "running_sum": sums, "smoothing": 0.1}
        return {"mode": mode}
    calls.clear()
    for step in range(5):
        shared = {"process_group": dist.group.WORLD, **options(running)}
        index, _ = ops.assign_and_update_(means, size, part, 0.7, **shared)
        every, _ = ops.assign_and_update_(*alone[:2], x, 0.7, **options(alone[2]))
        assert torch.equal(index, every[:60] if rank == 0 else every[60:])
    ops.update_centroids_(means, size, part, index, 0.7, **shared)
    ops.update_centroids_(*alone[:2], x, every, 0.7, **options(alone[2]))
    assert len(calls) == 6
    # the sums of two parts, added, are those of the whole but for the last bits of a double
    for got, wanted in zip((means, size, running), alone):
        torch.testing.assert_close(got, wanted, rtol=2.4e-7, atol=1e-9)
    everywhere = [None] * 2
    dist.all_gather_object(everywhere, (means, size, running))
    assert all(torch.equal(a, b) for a, b in zip(*everywhere))
print("ok")
"""


def test_processes_move_alike(tmp_path):
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(tmp_path / "meeting")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [worker.communicate(timeout=120) for worker in workers]
    assert all(out.strip() == "ok" for out, _ in outputs), [err[-2000:] for _, err in outputs]
