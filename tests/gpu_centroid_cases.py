"""What only a GPU can show of the centroid ops; run by `bench/gpu_check.sh`, not collected by itself."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from torch import Tensor

from clusterq import ops
from clusterq.testing import capture

sys.path.insert(0, os.path.dirname(__file__))
from gpu_cases import CUDA, call_without_waiting, on_a_late_stream

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def inputs(seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 700, 40, generator=generator)
    centroids, weights = torch.randn(2, 90, 40, generator=generator), torch.rand(2, 700, generator=generator)
    x[0, 3], centroids[1, 80], weights[1, ::7] = torch.nan, centroids[1, 5], 0
    return tuple(t.to(CUDA) for t in (x, centroids, weights))


def step(x: Tensor, centroids: Tensor, weights: Tensor) -> list[Tensor]:
    """Every function, forward and backward; the tensors given stay as they are."""
    results: list[Tensor] = []
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (t.detach().to(dtype).requires_grad_() for t in (x, centroids))
        for precision in ("exact", "fast"):
            index, distance = ops.nearest_centroid(a, b, precision=precision)
            both, distances = ops.two_nearest_centroids(a, b, precision=precision)
            loss = distance.nan_to_num().sum() + distances.nan_to_num().square().sum()
            results += [index, both, distance.detach(), distances.detach(), *torch.autograd.grad(loss, (a, b))]
        results.append(ops.undecided_rows(a, b))
    for mode, smoothing in (("mean", 0.0), ("codebook", 0.0), ("codebook", 1e-3)):
        means, size, running = centroids.clone(), centroids.new_ones(2, 90), centroids.clone()
        own = {"mode": mode, "smoothing": smoothing, "running_sum": running if smoothing else None}
        ops.assign_and_update_(means, size, x, 0.9, weights=weights, **own)
        ops.update_centroids_(means, size, x, index, 0.9, dead_below=1.0, **own)
        results += [means, size, running]
    return results


def test_no_call_waits_for_the_device() -> None:
    arguments = inputs(0)
    call_without_waiting(lambda: step(*arguments))


def test_captured_and_replayed_with_other_input() -> None:
    fixed = inputs(0)
    graph, captured = capture(lambda: step(*fixed))
    for seed in (1, 2):
        for target, source in zip(fixed, inputs(seed), strict=True):
            target.copy_(source)
        graph.replay()
        for ours, theirs in zip(captured, step(*inputs(seed)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_the_current_stream_is_used() -> None:
    wanted = step(*inputs(3))
    for ours, theirs in zip(on_a_late_stream(step, lambda: inputs(3)), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_the_same_bits_every_time() -> None:
    first = step(*inputs(4))
    for _ in range(100):
        for ours, theirs in zip(step(*inputs(4)), first, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0.0, 8.0])
def test_labels_of_many_rows(dtype: torch.dtype, offset: float) -> None:
    x, centroids = (torch.randn(n, 64, device=CUDA) * (0.1 if offset else 1) + offset for n in (40000, 1000))
    x, centroids = x.to(dtype), centroids.to(dtype)
    exact = "donot_use_mm_for_euclid_dist"
    wanted = torch.cat(
        [torch.cdist(p.double(), centroids.double(), compute_mode=exact).argmin(1) for p in x.split(4096)]
    )
    assert torch.equal(ops.nearest_centroid(x, centroids)[0], wanted)


def test_more_than_two_to_the_31_elements() -> None:
    """Offsets beyond 2^31; the last rows differ."""
    x = torch.zeros((1 << 25) + 100, 64, dtype=torch.bfloat16, device=CUDA)
    assert x.numel() > 1 << 31
    x[-50:] = 1
    centroids = torch.zeros(3, 64, dtype=torch.bfloat16, device=CUDA)
    centroids[1], centroids[2] = 0.75, -1
    index, distance = ops.nearest_centroid(x, centroids)
    assert int(index.sum()) == 50 and int(index[-50:].sum()) == 50
    assert float(distance[0]) == 0 and float(distance[-1]) == 4
    means, size = centroids.float(), torch.zeros(3, device=CUDA)
    ops.update_centroids_(means, size, x, index, 0.0)
    assert size.tolist() == [len(x) - 50, 50, 0]
    assert means[:, 0].tolist() == [0, 1, -1]
