"""Fake-quantize on a GPU: what the project promises there, every kernel against a copy, torch's own ops and ModelOpt.

    python bench/gpu_fake_quant.py --json FILE [--repeats 15] [--quick] [--device cpu]
    python bench/gpu_fake_quant.py --plan

Times are those of so many calls in a row that they take 10 ms, between two waits for the device: on large tensors
that is the kernel, on small ones what a call costs the host. Rows that end in "L2 cold" time each call alone after
the L2 was overwritten, those in "CUDA graph" calls shorter than 0.1 ms captured as a graph, without the host
(`gpu_timers.py`); the bars are those of calls in a row. The JSON has the copy bandwidth and the matmul rates of the
card as ceilings. `clone` moves as many bytes as a forward; `copy` is a clone of half as many elements again, which
moves as many as a backward. `clusterq` is the kernel that serves the op, `clusterq triton` the Triton launcher called
directly: their rows decide which of them should serve it. Results are compared before anything is timed; a case whose
results differ is printed as WRONG and the run ends with status 1.

`--device cpu` runs the script itself where there is no GPU, without Triton, to see that it works; with `--quick`
only.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import bench_fake_quant as cpu
import torch
from fake_quant_peers import Grid, able, installed
from gpu_harness import launchers, run
from harness import OURS, Bar, Call, Case
from torch import Tensor

from clusterq import ops
from clusterq.ops import _fake_quant_mask_reference as mask_reference
from clusterq.ops import _fake_quant_reference as reference

MODULES = ("fake_quant", "fake_quant_mask")
# 205 MB in float32 and 103 MB in bfloat16; and the shape of FlagGems' published figure.
LARGE, MATRIX = (256, 64, 56, 56), (4096, 4096)
SIZES = (1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24)
# torch / FlagGems on MATRIX, learned backward per channel: 0.309 ms and 0.219 ms on an H20 (FlagGems #5543).
FLAGGEMS = 0.309 / 0.219
OPS = ("fake_quantize", "fake_quantize_backward", "fake_quantize_masked", "fake_quantize_masked_backward",
       "fake_quantize_learned_backward", "fake_quantize_weight", "observe_fake_quantize", "finite_range")  # fmt: skip


def check(case: str, ours: Any, wanted: Any) -> None:
    """Elementwise results to the bit; sums to 1e-5 of their terms' size or so."""
    pairs = list(zip(*(t if isinstance(t, tuple) else (t,) for t in (ours, wanted)), strict=True))
    for position, (a, b) in enumerate(pairs):
        exact = position == 0 or a.dtype == torch.uint8
        try:
            torch.testing.assert_close(a, b, rtol=0 if exact else 1e-4, atol=0 if exact else 1e-2)
        except AssertionError as error:
            raise AssertionError(f"{case}: result {position}: {error}") from error


def op_case(
    title: str, x: Tensor, name: str, arguments: tuple[Any, ...], floor: str, bar: Bar | None = None, **peers: Call
) -> Case:
    """One op by every kernel there is, checked against the reference on the same data; the bar is for each of them."""
    kernels = launchers(x.device.type, MODULES)
    module = reference if hasattr(reference, name) else mask_reference
    for kernel, call in kernels.items():
        check(f"{title} {kernel}", call(name, *arguments), getattr(module, name)(*arguments))
    moved = x if floor == "clone" else torch.empty(3 * x.numel() // 2, dtype=x.dtype)
    calls: dict[str, Call] = {kernel: functools.partial(call, name, *arguments) for kernel, call in kernels.items()}
    kept, note = able({**calls, floor: moved.clone, **peers}, title)
    bars = {kernel: bar for kernel in kernels} if bar is not None and bar.peer in kept else None
    return Case(title, cpu.detail(x), kept, bars, note, ours=tuple(kernels))


def large(shape: tuple[int, ...]) -> Iterator[Tensor]:
    for dtype in cpu.DTYPES:
        x = torch.randn(shape).to(dtype)
        yield x
        if x.dim() == 4:
            yield x.contiguous(memory_format=torch.channels_last)


def bandwidth(quick: bool) -> Iterator[Callable[[], Case]]:
    """Forward at 92 %, learned backward at 90 % of a copy; the rest for the dispatch table."""
    for x in large((4, 8, 16, 16) if quick else LARGE):
        for axis in (None, 1):
            grid = cpu.grid_for(x, axis)
            settings = (grid.scale, grid.zero_point, grid.low, grid.high, axis, "none")
            where = "per tensor" if axis is None else "per channel"
            grad = torch.randn_like(x)
            yield lambda x=x, s=settings, w=where: op_case(
                f"forward {w}", x, "fake_quantize", (x, *s), "clone", Bar("clone", 0.92)
            )
            yield lambda x=x, g=grad, s=settings, w=where: op_case(
                f"learned backward {w}", x, "fake_quantize_learned_backward", (g, x, *s), "copy", Bar("copy", 0.90)
            )
            yield lambda x=x, g=grad, s=settings, w=where: op_case(
                f"clipped backward {w}", x, "fake_quantize_backward", (g, x, *s), "copy"
            )
            yield lambda x=x, s=settings, w=where: op_case(
                f"masked forward {w}", x, "fake_quantize_masked", (x, *s, "codes"), "clone"
            )
        yield lambda x=x: op_case("range", x, "finite_range", (x, None, "none"), "clone")


def against_torch(quick: bool) -> Iterator[Callable[[], Case]]:
    """Learned forward and backward at 2.3 times torch; torch's own backward per channel, FlagGems' figure, at 3.5."""
    for x in large((8, 64) if quick else MATRIX):
        grid = cpu.grid_for(x, 0, centred=True)
        settings = (grid.scale, grid.zero_point, grid.low, grid.high, 0, "none")
        grad = torch.randn_like(x)
        theirs = functools.partial(
            torch.ops.aten._fake_quantize_learnable_per_channel_affine_backward,
            *(grad, x, grid.scale, grid.zero_point, 0, grid.low, grid.high, 1.0),
        )
        yield lambda x=x, g=grad, s=settings, t=theirs: op_case(
            "learned backward per channel, FlagGems' shape", x, "fake_quantize_learned_backward", (g, x, *s), "copy",
            Bar("torch", 2.5 * FLAGGEMS), torch=t,
        )  # fmt: skip
    for x in large((4, 8, 16, 16) if quick else cpu.ACTIVATIONS[0]):
        for axis in (None, 1):
            grid = cpu.grid_for(x, axis, centred=True)
            name = f"forward+backward per {'tensor' if axis is None else 'channel'}, learned"
            yield lambda x=x, g=grid, n=name: cpu.gradient_case(
                x, g, n, Bar("torch", 2.3), learned=True, compiled=False
            )


def sizes(quick: bool) -> Iterator[Callable[[], Case]]:
    """The public functions, not slower than torch's at any size, forward alone and with backward."""
    bar = Bar("torch", 1.0)
    for count in SIZES[:2] if quick else SIZES:
        for dtype in cpu.DTYPES:
            x = torch.randn(count).to(dtype)
            grid = cpu.grid_for(x, None, centred=True)
            yield lambda x=x, g=grid: with_modelopt(cpu.forward_case(x, g, "forward by size", bar), x, g)
            for kind in ("clipped", "learned"):
                yield lambda x=x, g=grid, k=kind: cpu.gradient_case(
                    x, g, f"forward+backward by size, {k}", bar, learned=k == "learned", compiled=False
                )


def with_modelopt(case: Case, x: Tensor, grid: Grid) -> Case:
    """ModelOpt's op on the same symmetric grid, where it is installed and its extension loads."""
    if x.device.type != "cuda" or not installed("modelopt"):
        return case
    from modelopt.torch.quantization.tensor_quant import fake_tensor_quant

    largest = grid.scale * grid.high
    calls = {
        OURS: case.contestants[OURS],
        "ModelOpt": lambda: fake_tensor_quant(x, largest, None, 4, False, False, None, True),
    }
    kept, note = able(calls, f"{case.name} {case.detail}")
    return replace(case, contestants={**case.contestants, **kept}, note=note or case.note)


def whole(quick: bool) -> Iterator[Callable[[], Case]]:
    """The forms with a range of their own, by the builders of the CPU suite and without its bars."""
    for x in large((4, 8, 16, 16) if quick else cpu.ACTIVATIONS[0]):
        yield lambda x=x: replace(cpu.observe_case(x, compiled=False), bar=None)
    shapes = [(64, 64, 3, 3)] * 2 if quick else [(64, 3, 7, 7)] + [(256, 256, 3, 3)] * 24 + [(512, 512, 3, 3)] * 8
    weights = [torch.randn(shape) for shape in shapes]

    def listed() -> Case:
        calls: dict[str, Call] = {
            OURS: lambda: ops.fake_quantize_weights(weights, 4)[0],
            "one by one": lambda: [ops.fake_quantize_weight(w, 4) for w in weights],
            "eager": lambda: [eager_weight(w) for w in weights],
        }
        for mine, single in zip(calls[OURS](), calls["one by one"](), strict=True):
            check("weights", mine, single)
        return Case("weights of a network, min/max and forward", f"{len(weights)} weights", calls)

    yield listed


def eager_weight(w: Tensor) -> Tensor:
    low, high = w.flatten(1).aminmax(dim=1)
    scale = (high.clamp(min=0) - low.clamp(max=0)) / 15
    zero_point = (-8 - (low.clamp(max=0) / scale).round()).clamp(-8, 7)
    return torch.fake_quantize_per_channel_affine(w, scale, zero_point.int(), 0, -8, 7)


GROUPS = (bandwidth, against_torch, sizes, whole)


if __name__ == "__main__":
    sys.exit(run("fake_quant", __doc__, GROUPS, OPS))
