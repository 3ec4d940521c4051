"""BatchNorm statistics on a GPU: every kernel against one read, one read and one write, and torch's own.

    python bench/gpu_bn_stats.py --json FILE [--repeats 15] [--quick] [--device cpu]
    python bench/gpu_bn_stats.py --plan

Times as in `gpu_fake_quant.py`. `read` is `x.sum()`, one read of x; `copy` a clone, which moves as many bytes as a
forward; `copy 3/2` one of half as many elements again, as a backward moves. `clusterq` is the kernel that serves the
op, `clusterq triton` the Triton launcher called directly. Results are compared with float64 before anything is timed.
cuDNN's BatchNorm in training mode writes y as well and is compared with the fused forward.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import bench_alignment as losses
import bench_bn_stats as cpu
import torch
from fake_quant_peers import able, installed
from gpu_harness import launchers, run
from harness import Bar, Call, Case
from torch import Tensor
from torch.nn import functional as F

MODULES = ("bn_stats", "alignment")
# 103 MB to 411 MB.
LARGE = ((2048, 16, 32, 32), (256, 64, 56, 56), (512, 512, 14, 14), (1024, 2048, 7, 7))
OPS = (
    "instance_statistics",
    "batch_norm_statistics",
    "class_statistics",
    "batch_norm_instance_statistics",
    "batch_norm_batch_statistics",
    "batch_norm_statistics_backward",
    "statistics_backward",
    "alignment_loss",
)


def tensors(quick: bool) -> Iterator[Tensor]:
    for shape in ((4, 8, 6, 6),) if quick else (*LARGE, *cpu.PLANES, (8192, 512)):
        for dtype in cpu.DTYPES:
            x = torch.randn(shape).to(dtype)
            yield x
            if x.dim() == 4:
                yield x.contiguous(memory_format=torch.channels_last)


def op_case(title: str, x: Tensor, name: str, arguments: tuple[Any, ...], wanted: tuple[Tensor, ...],
            bar: Bar | None = None, **peers: Call) -> Case:  # fmt: skip
    """One op by every kernel there is, each checked against float64 results."""
    kernels = launchers(x.device.type, MODULES)
    for kernel, call in kernels.items():
        result = call(name, *arguments)
        for ours, exact in zip(result if isinstance(result, tuple) else (result,), wanted, strict=True):
            half = ours.dtype in (torch.bfloat16, torch.float16)
            torch.testing.assert_close(
                ours.double(), exact, rtol=2 * torch.finfo(ours.dtype).eps if half else 1e-5, atol=1e-4,
                msg=lambda text, k=kernel: f"{title} {cpu.detail(x)} {k}: {text}",
            )  # fmt: skip
    calls: dict[str, Call] = {kernel: functools.partial(call, name, *arguments) for kernel, call in kernels.items()}
    kept, note = able({**calls, **peers}, title)
    bars = {kernel: bar for kernel in kernels} if bar is not None and bar.peer in kept else None
    return Case(title, cpu.detail(x), kept, bars, note, ours=tuple(kernels))


def moments(x: Tensor, dims: list[int]) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x.double(), dims, correction=0)
    return mean, var


def statistics(quick: bool) -> Iterator[Callable[[], Case]]:
    """85 % of one read from 64 MB on; at most a fifth of torch.batch_norm_stats for few channels."""
    for x in tensors(quick):
        large = x.numel() * x.element_size() >= 1 << 26
        own = list(range(2, x.dim())) or [1]
        peers: dict[str, Call] = {"read": functools.partial(torch.sum, x)}
        few = x.is_contiguous() and x.dim() == 4 and x.shape[1] <= 64
        if x.is_cuda:
            peers["batch_norm_stats"] = functools.partial(torch.batch_norm_stats, x, 1e-5)
        # Not within a bar of the other: the one that says more.
        bar = Bar("read", 0.85) if large else Bar("batch_norm_stats", 5.0) if few else None
        wanted = functools.partial(moments, x, cpu.reduced(x))
        yield lambda x=x, w=wanted, b=bar, p=peers: op_case(
            "statistics", x, "batch_norm_statistics", (x, 0, None), w(), b, **p, **gems(x)
        )
        if x.dim() == 4:
            floor = Bar("read", 0.85) if large else None
            yield lambda x=x, d=own, p=peers, b=floor: op_case(
                "per image", x, "instance_statistics", (x,), moments(x, d), b, read=p["read"]
            )


def gems(x: Tensor) -> dict[str, Call]:
    """FlagGems' own reduction, where it is installed."""
    if not x.is_cuda or not installed("flag_gems"):
        return {}
    import flag_gems

    return {"FlagGems": functools.partial(flag_gems.ops.var_mean, x, cpu.reduced(x), correction=0)}


def fused(quick: bool) -> Iterator[Callable[[], Case]]:
    for x in tensors(quick):
        c = x.shape[1]
        weight, bias, mean, var = (torch.rand(c) + 0.1 for _ in range(4))
        arguments = (x, weight, bias, mean, var, 1e-5)

        def forward(x: Tensor = x, arguments: tuple[Any, ...] = arguments) -> Case:
            _, weight, bias, mean, var, eps = arguments
            wide = (t.double() for t in (mean, var, weight, bias))
            exact = (F.batch_norm(x.double(), *wide, eps=eps), *moments(x, cpu.reduced(x)))
            return op_case(
                "BatchNorm and statistics", x, "batch_norm_batch_statistics", arguments, exact,
                copy=x.clone, eval=lambda: F.batch_norm(x, mean, var, weight, bias),
                training=lambda: F.batch_norm(x, None, None, weight, bias, training=True),
            )  # fmt: skip

        def backward(x: Tensor = x, weight: Tensor = weight, var: Tensor = var) -> Case:
            grad = torch.randn_like(x)
            center, a, b = (torch.randn(x.shape[:2]) for _ in range(3))
            scale = weight.double() / torch.sqrt(var.double() + 1e-5)
            q, s, t, w = (cpu.per_channel(v, x).double() for v in (center, a, b, scale))
            exact = grad.double() * w + 2 * s * (x.double() - q) + 0.5 * t
            moved = torch.empty(3 * x.numel() // 2, dtype=x.dtype)
            return op_case(
                "backward of both", x, "batch_norm_statistics_backward",
                (grad, x, weight, var, 1e-5, center, b, a, 0.5, 2.0), (exact,), **{"copy 3/2": moved.clone},
            )  # fmt: skip

        yield forward
        yield backward


def whole(quick: bool) -> Iterator[Callable[[], Case]]:
    """The loss of all layers against torch.compile's."""
    for num_classes in (10, 100):
        yield lambda k=num_classes: losses.loss_case(
            10 if quick else 256, k, compiled=not quick, bar=None if quick else Bar("compiled", 1.5)
        )
    yield lambda: losses.teacher_case(10 if quick else 128)


GROUPS = (statistics, fused, whole)


if __name__ == "__main__":
    sys.exit(run("bn_stats", __doc__, GROUPS, OPS))
