"""Fake-quantize ops against torch's own and against the eager composition, on the CPU, float32.

    python bench/bench_fake_quant.py [--threads 2] [--repeats 11] [--quick] [--json FILE]
    pytest bench/bench_fake_quant.py --benchmark-only

`eager` is the usual composition of torch's round and clamp; `clone` is the floor of a forward: one read and one write
of as many bytes. Results are compared before anything is timed. On a machine that does other work, a figure of 2
threads is the wait for the slower one: use `--threads 1`, whose ratios suffer less.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness import Bar, Case, main
from torch import Tensor

OP = torch.ops.clusterq


def compose(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """The usual eager form; parameters broadcast against x."""
    return (torch.clamp(torch.round(x / scale) + zero_point, low, high) - zero_point) * scale


def checked(case: Case, *peers: str) -> Case:
    """The case, once the first result of ours has agreed with that of each peer named."""
    ours = first(case.contestants["clusterq"]())
    for peer in peers:
        torch.testing.assert_close(ours, first(case.contestants[peer]()), rtol=1e-5, atol=1e-6)
    return case


def first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def forward_case(x: Tensor, axis: int, name: str = "forward per channel", bar: Bar | None = None) -> Case:
    scale, zero_point = torch.rand(x.size(axis)) * 0.1 + 0.2, torch.randint(-8, 8, (x.size(axis),))
    offset, whole = zero_point.float(), zero_point.int()
    shape = [1] * x.dim()
    shape[axis] = -1
    s, z = scale.reshape(shape), offset.reshape(shape)
    contestants = {
        "clusterq": lambda: OP.fake_quantize(x, scale, offset, -8, 7, axis, "none"),
        "torch": lambda: torch.fake_quantize_per_channel_affine(x, scale, whole, axis, -8, 7),
        "eager": lambda: compose(x, s, z, -8, 7),
        "clone": lambda: x.clone(),
    }
    return checked(Case(name, str(list(x.shape)), contestants, bar), "torch")


def per_tensor_case(x: Tensor) -> Case:
    scale, offset = torch.tensor([0.25]), torch.tensor([3.0])
    contestants = {
        "clusterq": lambda: OP.fake_quantize(x, scale, offset, -8, 7, None, "none"),
        "torch": lambda: torch.fake_quantize_per_tensor_affine(x, 0.25, 3, -8, 7),
        "eager": lambda: compose(x, scale, offset, -8, 7),
        "clone": lambda: x.clone(),
    }
    return checked(Case("forward per tensor", str(list(x.shape)), contestants), "torch", "eager")


def backward_case(x: Tensor, learned: bool) -> Case:
    """Backward alone: the forward of the peer is outside the clock."""
    scale, offset = torch.rand(x.size(1)) * 0.1 + 0.2, torch.zeros(x.size(1))
    grad = torch.randn_like(x)
    leaves = [x.clone().requires_grad_(), scale.clone().requires_grad_(learned), offset.clone().requires_grad_(learned)]
    if learned:
        y = torch._fake_quantize_learnable_per_channel_affine(*leaves, 1, -8, 7, 1.0)
        kernel = OP.fake_quantize_learned_backward
    else:
        y = torch.fake_quantize_per_channel_affine(leaves[0], scale, offset.int(), 1, -8, 7)
        kernel = OP.fake_quantize_backward
    wanted = leaves if learned else leaves[:1]
    contestants = {
        "clusterq": lambda: kernel(grad, x, scale, offset, -8, 7, 1, "none"),
        "torch": lambda: torch.autograd.grad(y, wanted, grad, retain_graph=True),
    }
    name = f"backward per channel{', learned' if learned else ''}"
    case = checked(Case(name, str(list(x.shape)), contestants), "torch")
    if learned:
        # torch adds in float32.
        torch.testing.assert_close(contestants["clusterq"]()[1], contestants["torch"]()[1], rtol=1e-2, atol=1.0)
    return case


def weight_case(w: Tensor) -> Case:
    def theirs() -> Tensor:
        low, high = w.flatten(1).aminmax(dim=1)
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high - low) / 15
        zero_point = (-8 - (low / scale).round()).clamp(-8, 7)
        return torch.fake_quantize_per_channel_affine(w, scale, zero_point.int(), 0, -8, 7)

    contestants = {"clusterq": lambda: OP.fake_quantize_weight(w, -8, 7, 0, False), "torch": theirs}
    return checked(Case("weights, min/max and forward", str(list(w.shape)), contestants), "torch")


def observe_case(x: Tensor) -> Case:
    ours_low, ours_high = torch.tensor([-1.0]), torch.tensor([1.0])
    eager_low, eager_high = torch.tensor([-1.0]), torch.tensor([1.0])
    low, high, scale = torch.tensor([-1.0]), torch.tensor([1.0]), torch.ones(1)
    on, enabled, zero_point = torch.ones(1), torch.ones(1), torch.zeros(1).int()

    def eager() -> Tensor:
        smallest, largest = x.aminmax()
        eager_low.mul_(0.9).add_(0.1 * smallest)
        eager_high.mul_(0.9).add_(0.1 * largest)
        step = (eager_high.clamp(min=0) - eager_low.clamp(max=0)) / 255
        return compose(x, step, -(eager_low.clamp(max=0) / step).round(), 0, 255)

    contestants = {
        "clusterq": lambda: OP.observe_fake_quantize(x, ours_low, ours_high, 0, 255, 0.9, True, False, None, "none"),
        "torch": lambda: torch.fused_moving_avg_obs_fake_quant(
            x, on, enabled, low, high, scale, zero_point, 0.1, 0, 255, 0
        ),
        "eager": eager,
    }
    for call in contestants.values():
        call()
    for ours, theirs in ((ours_low, low), (ours_high, high), (ours_low, eager_low), (ours_high, eager_high)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    return Case("observe and forward per tensor", str(list(x.shape)), contestants)


def search_case(x: Tensor) -> Case:
    """80 candidates at once; the eager peer tries 4 of them only."""
    scales, offsets = (torch.arange(1, 81) / 80 * 0.3)[:, None], torch.full((80, 1), 8.0)

    def eager() -> Tensor:
        return torch.stack([(compose(x, scales[m], offsets[m], 0, 15) - x).square().sum() for m in range(0, 80, 20)])

    contestants = {
        "clusterq": lambda: OP.quantization_error(x, scales, offsets, 0, 15, None),
        "eager, 4 of them": eager,
    }
    torch.testing.assert_close(contestants["clusterq"]()[::20, 0].float(), eager(), rtol=1e-3, atol=1e-3)
    return Case("squared error, 80 candidates", str(list(x.shape)), contestants)


def cases(quick: bool) -> Iterator[Case]:
    x = torch.randn((8, 16, 14, 14) if quick else (64, 64, 56, 56))
    w = torch.randn((64, 32, 3, 3) if quick else (512, 512, 3, 3))
    last = x.contiguous(memory_format=torch.channels_last)
    yield forward_case(x, 1, bar=Bar("torch", 2.0))
    yield forward_case(last, 1, name="forward per channel, channels_last")
    yield per_tensor_case(x)
    yield forward_case(w, 0, name="forward of weights", bar=Bar("torch", 20.0))
    yield weight_case(w)
    yield backward_case(x, learned=False)
    yield backward_case(x, learned=True)
    yield observe_case(x)
    yield search_case(x[: len(x) // 4])


@pytest.mark.parametrize("contestant", ["clusterq", "torch"])
@pytest.mark.parametrize("name", ["forward", "weights", "learned backward"])
def test_fake_quantize(benchmark: Any, name: str, contestant: str) -> None:
    torch.manual_seed(0)
    build = {
        "forward": lambda: forward_case(torch.randn(64, 64, 56, 56), 1),
        "weights": lambda: weight_case(torch.randn(512, 512, 3, 3)),
        "learned backward": lambda: backward_case(torch.randn(64, 64, 56, 56), learned=True),
    }
    build[name]().benchmark(benchmark, contestant)


if __name__ == "__main__":
    main("fake_quant", __doc__, cases, ops=("fake_quantize", "fake_quantize_weight"))
