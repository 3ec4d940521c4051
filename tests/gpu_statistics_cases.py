"""What only a GPU can show of the BatchNorm-statistics ops; run by `bench/gpu_check.sh`, not collected by itself."""

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
CHANNELS = (16, 32)


def inputs(seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(12, 16, 14, 14, generator=generator) * 2 + 3
    other = torch.randn(12, 32, 7, 7, generator=generator)
    vectors = torch.rand(4, 16, generator=generator) + 0.1
    goals = torch.rand(2, 4, 48, generator=generator)
    labels = torch.randint(-1, 4, (12,), generator=generator)
    return tuple(t.to(CUDA) for t in (x, other, vectors, goals, labels))


def targets() -> ops.AlignmentTargets:
    zero = torch.zeros(48, device=CUDA)
    return ops.AlignmentTargets(CHANNELS, zero, zero + 1, first=0)


def step(
    fit: ops.AlignmentTargets, x: Tensor, other: Tensor, vectors: Tensor, goals: Tensor, labels: Tensor
) -> list[Tensor]:
    """Forward and backward of every form."""
    results: list[Tensor] = []

    def both(outputs: tuple[Tensor, ...], *leaves: Tensor) -> None:
        loss = sum(t.float().square().sum() for t in outputs)
        results.extend((*(t.detach() for t in outputs), *torch.autograd.grad(loss, leaves)))

    both(ops.instance_statistics(x), x)
    both(ops.batch_norm_statistics(x, correction=1), x)
    both(ops.batch_norm_statistics(x, mask=labels != 2), x)
    both(ops.class_statistics(x, labels, 4)[1:], x)
    last = x.contiguous(memory_format=torch.channels_last)
    for y in (x, last):
        both(ops.batch_norm_with_statistics(y, *vectors, 1e-5), x, vectors)
        both(ops.batch_norm_with_instance_statistics(y, *vectors, 1e-5), x, vectors)
    moments = ops.instance_statistics_list([x, other])
    both((fit(*moments, ops.ClassTargets(labels, *goals)).total,), x, other)
    return results


def prepared(seed: int) -> tuple[Tensor, ...]:
    x, other, vectors, *rest = inputs(seed)
    return (x.requires_grad_(), other.requires_grad_(), vectors.requires_grad_(), *rest)


def test_no_call_waits_for_the_device() -> None:
    fit, arguments = targets(), prepared(0)
    call_without_waiting(lambda: step(fit, *arguments))


def test_captured_and_replayed_with_other_input() -> None:
    fit, fixed = targets(), prepared(0)
    graph, captured = capture(lambda: step(fit, *fixed))
    for seed in (1, 2):
        with torch.no_grad():
            for target, source in zip(fixed, inputs(seed), strict=True):
                target.copy_(source)
        graph.replay()
        wanted = step(fit, *prepared(seed))
        # While it is captured, a list may take other kernels, which add in another order.
        for i, (ours, theirs) in enumerate(zip(captured, wanted, strict=True)):
            exact = i < len(wanted) - 3
            torch.testing.assert_close(ours, theirs, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6)


def test_the_current_stream_is_used() -> None:
    fit = targets()
    wanted = step(fit, *prepared(3))
    got = on_a_late_stream(lambda *arguments: step(fit, *arguments), lambda: prepared(3))
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_the_same_bits_every_time() -> None:
    fit = targets()
    first = step(fit, *prepared(4))
    for _ in range(100):
        for ours, theirs in zip(step(fit, *prepared(4)), first, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("last", [False, True])
def test_more_than_two_to_the_31_elements(last: bool) -> None:
    """Counts beyond 2^24, offsets beyond 2^31; the last image differs."""
    shape = (65, 8, 2048, 2048)
    x = torch.ones(shape, dtype=torch.bfloat16, device=CUDA)
    assert x.numel() > 1 << 31
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    x[-1] = 66
    mean, var = ops.batch_norm_statistics(x)
    assert mean.tolist() == [2.0] * 8 and var.tolist() == [64.0] * 8
    mean, var = ops.instance_statistics(x)
    assert torch.equal(mean[:, 0], torch.tensor([1.0] * 64 + [66.0], device=CUDA)) and not var.any()
