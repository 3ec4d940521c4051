"""Fake-quantize ops against torch's own and against the eager composition, on the CPU.

    python bench/bench_fake_quant.py [--threads 2] [--repeats 11] [--json FILE]
    pytest bench/bench_fake_quant.py --benchmark-only

Ours and the peers take turns within one process; a figure is the median time, the ratio the median over the rounds of
peer / ours (above 1: ours is faster). `clone` is the floor of a forward: one read and one write of as many bytes.
Results are compared before anything is timed. On a machine that does other work, a figure of 2 threads is the wait for
the slower one: use `--threads 1`, whose ratios suffer less.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clusterq import ops

Call = Callable[[], Any]
OP = torch.ops.clusterq


@dataclass
class Case:
    """One row of the table. `bars` holds the least ratio to a peer that the project promises."""

    name: str
    ours: Call
    peers: dict[str, Call]
    bars: dict[str, float] = field(default_factory=dict)


def compose(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """The usual eager form; parameters broadcast against x."""
    return (torch.clamp(torch.round(x / scale) + zero_point, low, high) - zero_point) * scale


def check(ours: Any, theirs: Any) -> None:
    a, b = (t[0] if isinstance(t, tuple) else t for t in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def forward_case(name: str, x: Tensor, axis: int, bars: dict[str, float]) -> Case:
    scale, zero_point = torch.rand(x.size(axis)) * 0.1 + 0.2, torch.randint(-8, 8, (x.size(axis),))
    offset, whole = zero_point.float(), zero_point.int()
    shape = [1] * x.dim()
    shape[axis] = -1
    s, z = scale.reshape(shape), offset.reshape(shape)
    case = Case(
        name,
        lambda: OP.fake_quantize(x, scale, offset, -8, 7, axis, "none"),
        {
            "torch": lambda: torch.fake_quantize_per_channel_affine(x, scale, whole, axis, -8, 7),
            "eager": lambda: compose(x, s, z, -8, 7),
            "clone": lambda: x.clone(),
        },
        bars,
    )
    check(case.ours(), case.peers["torch"]())
    return case


def per_tensor_case(x: Tensor) -> Case:
    scale, offset = torch.tensor([0.25]), torch.tensor([3.0])
    case = Case(
        "forward [64,64,56,56] per tensor",
        lambda: OP.fake_quantize(x, scale, offset, -8, 7, None, "none"),
        {
            "torch": lambda: torch.fake_quantize_per_tensor_affine(x, 0.25, 3, -8, 7),
            "eager": lambda: compose(x, scale, offset, -8, 7),
            "clone": lambda: x.clone(),
        },
    )
    check(case.ours(), case.peers["torch"]())
    return case


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
    case = Case(
        f"backward [64,64,56,56] per channel{', learned' if learned else ''}",
        lambda: kernel(grad, x, scale, offset, -8, 7, 1, "none"),
        {"torch": lambda: torch.autograd.grad(y, wanted, grad, retain_graph=True)},
    )
    check(case.ours(), case.peers["torch"]()[0])
    if learned:
        # torch adds in float32.
        torch.testing.assert_close(case.ours()[1], case.peers["torch"]()[1], rtol=1e-2, atol=1.0)
    return case


def weight_case(w: Tensor) -> Case:
    def theirs() -> Tensor:
        low, high = w.flatten(1).aminmax(dim=1)
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high - low) / 15
        zero_point = (-8 - (low / scale).round()).clamp(-8, 7)
        return torch.fake_quantize_per_channel_affine(w, scale, zero_point.int(), 0, -8, 7)

    case = Case(
        "weight min/max [512,512,3,3] axis 0", lambda: OP.fake_quantize_weight(w, -8, 7, 0, False), {"torch": theirs}
    )
    check(case.ours(), case.peers["torch"]())
    return case


def observe_case(x: Tensor) -> Case:
    ours_low, ours_high = torch.tensor([-1.0]), torch.tensor([1.0])
    theirs = (
        torch.ones(1),
        torch.ones(1),
        torch.tensor([-1.0]),
        torch.tensor([1.0]),
        torch.ones(1),
        torch.zeros(1).int(),
    )
    on, enabled, low, high, scale, zero_point = theirs
    eager_low, eager_high = torch.tensor([-1.0]), torch.tensor([1.0])

    def eager() -> Tensor:
        smallest, largest = x.aminmax()
        eager_low.mul_(0.9).add_(0.1 * smallest)
        eager_high.mul_(0.9).add_(0.1 * largest)
        step = (eager_high.clamp(min=0) - eager_low.clamp(max=0)) / 255
        return compose(x, step, -(eager_low.clamp(max=0) / step).round(), 0, 255)

    case = Case(
        "observe + fake-quantize [64,64,56,56] per tensor",
        lambda: OP.observe_fake_quantize(x, ours_low, ours_high, 0, 255, 0.9, True, False, None, "none"),
        {
            "torch": lambda: torch.fused_moving_avg_obs_fake_quant(
                x, on, enabled, low, high, scale, zero_point, 0.1, 0, 255, 0
            ),
            "eager": eager,
        },
    )
    case.ours()
    case.peers["torch"]()
    check(ours_low, low)
    check(ours_high, high)
    return case


def search_case(x: Tensor) -> Case:
    """80 candidates at once; the eager peer tries 4 of them only."""
    scales, offsets = (torch.arange(1, 81) / 80 * 0.3)[:, None], torch.full((80, 1), 8.0)

    def eager() -> Tensor:
        return torch.stack([(compose(x, scales[m], offsets[m], 0, 15) - x).square().sum() for m in range(0, 80, 20)])

    case = Case(
        "squared error, 80 candidates (eager: 4) [16,64,56,56]",
        lambda: OP.quantization_error(x, scales, offsets, 0, 15, None),
        {"eager": eager},
    )
    torch.testing.assert_close(case.ours()[::20, 0].float(), case.peers["eager"](), rtol=1e-3, atol=1e-3)
    return case


def build_cases() -> list[Case]:
    torch.manual_seed(0)
    x = torch.randn(64, 64, 56, 56)
    w = torch.randn(512, 512, 3, 3)
    return [
        forward_case("forward [64,64,56,56] per channel", x, 1, {"torch": 2.0}),
        forward_case(
            "forward [64,64,56,56] per channel, channels_last", x.contiguous(memory_format=torch.channels_last), 1, {}
        ),
        per_tensor_case(x),
        forward_case("forward weights [512,512,3,3] axis 0", w, 0, {"torch": 20.0}),
        weight_case(w),
        backward_case(x, learned=False),
        backward_case(x, learned=True),
        observe_case(x),
        search_case(x[:16]),
    ]


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """Median milliseconds of each, and the median ratio peer / ours within a round."""
    calls = {"ours": case.ours, **case.peers}
    for call in calls.values():
        call()
    rounds = []
    for _ in range(repeats):
        times = {}
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name] = time.perf_counter() - start
        rounds.append(times)
    return {
        "case": case.name,
        "milliseconds": {name: statistics.median(r[name] for r in rounds) * 1e3 for name in calls},
        "ratio": {name: statistics.median(r[name] / r["ours"] for r in rounds) for name in case.peers},
        "bars": case.bars,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Fake-quantize ops against torch's own, on the CPU.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    kernel = next(row.kernel for row in ops.backends() if (row.op, row.device) == ("fake_quantize", "cpu"))
    print(f"threads {arguments.threads}, float32, torch {torch.__version__}, kernel {kernel}, interleaved medians")
    print(f"{'':55}{'ours ms':>9}  peer: ms (times ours)")
    rows = []
    for case in build_cases():
        row = measure(case, arguments.repeats)
        rows.append(row)
        peers = "  ".join(f"{p}: {row['milliseconds'][p]:.2f} ({r:.1f}x)" for p, r in row["ratio"].items())
        bars = "".join(
            f"  [bar {bar:g}x of {p}: {'met' if row['ratio'][p] >= bar else 'MISSED'}]" for p, bar in case.bars.items()
        )
        print(f"{case.name:55}{row['milliseconds']['ours']:9.2f}  {peers}{bars}", flush=True)
    if arguments.json:
        facts = {
            "threads": arguments.threads,
            "torch": torch.__version__,
            "machine": platform.processor(),
            "kernel": kernel,
        }
        arguments.json.write_text(json.dumps({**facts, "rows": rows}, indent=2))


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    torch.set_num_threads(2)
    return {case.name: case for case in build_cases()}


@pytest.mark.parametrize("peer", ["ours", "torch"])
@pytest.mark.parametrize(
    "name",
    [
        "forward [64,64,56,56] per channel",
        "forward weights [512,512,3,3] axis 0",
        "weight min/max [512,512,3,3] axis 0",
    ],
)
def test_speed(benchmark: Any, cases: dict[str, Case], name: str, peer: str) -> None:
    benchmark.group = name
    benchmark.pedantic(cases[name].ours if peer == "ours" else cases[name].peers[peer], rounds=5, warmup_rounds=1)


if __name__ == "__main__":
    main()
