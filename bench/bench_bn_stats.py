"""BatchNorm statistics against torch's own kernels, on the CPU.

    python bench/bench_bn_stats.py [--threads 2] [--repeats 11]

Ours and the peers take turns within one process; figures are medians. Every result is compared with float64 before
anything is timed. `statistics` is per channel over batch and positions; `forward` is eval-mode BatchNorm plus instance
statistics against `F.batch_norm` alone; `backward` adds both gradients in one pass, against BatchNorm's own input
gradient alone. On a machine that does other work, 2 threads wait for the slower one: `--threads 1` suffers less.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from clusterq import ops
from clusterq.testing import interleave

OP = torch.ops.clusterq
LAST = torch.channels_last
# Shape, dtype, memory format, least ratio to var_mean that the project promises.
CASES: list[tuple[tuple[int, ...], torch.dtype, torch.memory_format, float | None]] = [
    ((64, 64, 56, 56), torch.float32, torch.contiguous_format, 20.0),
    ((64, 64, 56, 56), torch.float32, LAST, None),
    ((64, 64, 56, 56), torch.bfloat16, torch.contiguous_format, None),
    ((64, 64, 56, 56), torch.bfloat16, LAST, None),
    ((512, 16, 32, 32), torch.float32, torch.contiguous_format, None),
    ((512, 16, 32, 32), torch.float32, LAST, None),
    ((512, 64, 8, 8), torch.float32, torch.contiguous_format, None),
    ((64, 512, 7, 7), torch.float32, torch.contiguous_format, None),
    ((8192, 512), torch.float32, torch.contiguous_format, None),
]


def check_statistics(x: Tensor, dims: list[int]) -> None:
    """Relative error of the variance under 1e-5, and of the mean under 1e-5 spreads."""
    var, mean = torch.var_mean(x.double(), dims, correction=0)
    ours_mean, ours_var = ops.batch_norm_statistics(x)
    assert ((ours_var - var).abs() <= 1e-5 * var).all(), "variance is off"
    assert ((ours_mean - mean).abs() <= 1e-5 * var.sqrt()).all(), "mean is off"


def measure(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, repeats: int) -> dict[str, float]:
    """Median milliseconds of every contestant."""
    x = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
    dims, channels = [0, *range(2, x.dim())], shape[1]
    weight, bias, mean, var = (torch.rand(channels) + 0.1 for _ in range(4))
    grad, unused = torch.randn_like(x), torch.zeros(channels)
    center, a, b = (torch.randn(shape[0], channels) for _ in range(3))
    check_statistics(x, dims)
    y, *_ = ops.batch_norm_with_instance_statistics(x, weight, bias, mean, var, 1e-5)
    exact = F.batch_norm(x.double(), mean.double(), var.double(), weight.double(), bias.double())
    torch.testing.assert_close(y.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    contestants: dict[str, Callable[[], object]] = {
        "ours": lambda: ops.batch_norm_statistics(x),
        "var_mean": lambda: torch.var_mean(x, dims, correction=0),
        "update_stats": lambda: torch.batch_norm_update_stats(x, None, None, 0.1),
        "forward": lambda: ops.batch_norm_with_instance_statistics(x, weight, bias, mean, var, 1e-5),
        "F.batch_norm": lambda: F.batch_norm(x, mean, var, weight, bias),
        "backward": lambda: OP.batch_norm_statistics_backward(grad, x, weight, center, a, b),
        "F.batch_norm backward": lambda: torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, var, unused, unused, False, 1e-5, [True, False, False]
        ),
    }
    return {name: t.milliseconds for name, t in interleave(contestants, rounds=repeats, warmup=1).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="BatchNorm statistics against torch's own kernels, on the CPU.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=11)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    kernel = next(row.kernel for row in ops.backends() if (row.op, row.device) == ("batch_norm_statistics", "cpu"))
    print(f"threads {arguments.threads}, torch {torch.__version__}, kernel {kernel}, interleaved medians in ms")
    for shape, dtype, layout, bar in CASES:
        t = measure(shape, dtype, layout, arguments.repeats)
        ratio = t["var_mean"] / t["ours"]
        verdict = "" if bar is None else f" [bar {bar:g}x: {'met' if ratio >= bar else 'MISSED'}]"
        title = f"{list(shape)} {str(dtype).removeprefix('torch.')}{' channels_last' if layout is LAST else ''}"
        print(
            f"{title:42} statistics {t['ours']:.2f}: {ratio:.1f}x var_mean{verdict}, "
            f"{t['update_stats'] / t['ours']:.1f}x batch_norm_update_stats"
            f" | forward {t['forward']:.2f}, {t['forward'] / t['F.batch_norm']:.2f} of F.batch_norm"
            f" | backward {t['backward']:.2f}, {t['backward'] / t['F.batch_norm backward']:.2f} of its backward",
            flush=True,
        )


if __name__ == "__main__":
    main()
