"""BatchNorm statistics against torch's own kernels, on the CPU.

    python bench/bench_bn_stats.py [--threads 2] [--repeats 11] [--quick] [--json FILE]
    pytest bench/bench_bn_stats.py --benchmark-only

Every result is compared with float64 before anything is timed. `statistics` is per channel over batch and positions,
`sum` the floor of it: one read of x. `forward` is eval-mode BatchNorm plus instance statistics against `F.batch_norm`
alone; `backward` adds both gradients in one pass, against BatchNorm's own input gradient alone. On a machine that does
other work, 2 threads wait for the slower one: `--threads 1` suffers less.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness import Bar, Case, main
from torch import Tensor
from torch.nn import functional as F

from clusterq import ops

OP = torch.ops.clusterq
LAST = torch.channels_last
DENSE = torch.contiguous_format
SHAPES = (
    ((64, 64, 56, 56), torch.float32, DENSE),
    ((64, 64, 56, 56), torch.float32, LAST),
    ((64, 64, 56, 56), torch.bfloat16, DENSE),
    ((64, 64, 56, 56), torch.bfloat16, LAST),
    ((512, 16, 32, 32), torch.float32, DENSE),
    ((512, 16, 32, 32), torch.float32, LAST),
    ((512, 64, 8, 8), torch.float32, DENSE),
    ((64, 512, 7, 7), torch.float32, DENSE),
    ((8192, 512), torch.float32, DENSE),
)
QUICK = (((8, 16, 14, 14), torch.float32, DENSE), ((8, 16, 14, 14), torch.bfloat16, LAST))


def reduced(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """values [C] or [N, C] shaped to broadcast against x [N, C, *spatial]."""
    return values.reshape(*(values.shape if values.dim() == 2 else (1, -1)), *(1,) * (x.dim() - 2))


def detail(x: Tensor) -> str:
    last = " channels_last" if x.dim() == 4 and x.is_contiguous(memory_format=LAST) else ""
    return f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}{last}"


def statistics_case(x: Tensor, bar: Bar | None = None) -> Case:
    """Checked to a relative error of the variance under 1e-5, and of the mean under 1e-5 spreads."""
    dims = reduced(x)
    var, mean = torch.var_mean(x.double(), dims, correction=0)
    ours_mean, ours_var = ops.batch_norm_statistics(x)
    assert ((ours_var - var).abs() <= 1e-5 * var).all(), "variance is off"
    assert ((ours_mean - mean).abs() <= 1e-5 * var.sqrt()).all(), "mean is off"
    contestants = {
        "clusterq": lambda: ops.batch_norm_statistics(x),
        "var_mean": lambda: torch.var_mean(x, dims, correction=0),
        "batch_norm_update_stats": lambda: torch.batch_norm_update_stats(x, None, None, 0.1),
        "sum": lambda: x.sum(),
    }
    return Case("statistics", detail(x), contestants, bar)


def forward_case(x: Tensor) -> Case:
    weight, bias, mean, var = (torch.rand(x.shape[1]) + 0.1 for _ in range(4))
    y, *_ = ops.batch_norm_with_instance_statistics(x, weight, bias, mean, var, 1e-5)
    exact = F.batch_norm(x.double(), mean.double(), var.double(), weight.double(), bias.double())
    torch.testing.assert_close(y.double(), exact, rtol=2 * torch.finfo(x.dtype).eps, atol=1e-5)
    contestants = {
        "clusterq": lambda: ops.batch_norm_with_instance_statistics(x, weight, bias, mean, var, 1e-5),
        "F.batch_norm": lambda: F.batch_norm(x, mean, var, weight, bias),
    }
    return Case("forward", detail(x), contestants)


def backward_case(x: Tensor) -> Case:
    """`grad * weight + a * (x - center) + b` against the first term alone."""
    weight, mean, var = (torch.rand(x.shape[1]) + 0.1 for _ in range(3))
    grad, unused = torch.randn_like(x), torch.zeros(x.shape[1])
    center, a, b = (torch.randn(x.shape[:2]) for _ in range(3))
    ours = OP.batch_norm_statistics_backward(grad, x, weight, center, a, b)
    c, s, t, w = (per_channel(v, x).double() for v in (center, a, b, weight))
    exact = grad.double() * w + s * (x.double() - c) + t
    # Terms reach about 40 and may cancel, where float32 keeps 2e-6 of each.
    torch.testing.assert_close(ours.double(), exact, rtol=2 * torch.finfo(x.dtype).eps, atol=2e-5)
    contestants = {
        "clusterq": lambda: OP.batch_norm_statistics_backward(grad, x, weight, center, a, b),
        "native_batch_norm_backward": lambda: torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, var, unused, unused, False, 1e-5, [True, False, False]
        ),
    }
    return Case("backward", detail(x), contestants)


def cases(quick: bool) -> Iterator[Case]:
    for index, (shape, dtype, layout) in enumerate(QUICK if quick else SHAPES):
        x = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
        yield statistics_case(x, Bar("var_mean", 20.0) if index == 0 else None)
        yield forward_case(x)
        yield backward_case(x)


@pytest.mark.parametrize("contestant", ["clusterq", "var_mean", "batch_norm_update_stats", "sum"])
def test_statistics(benchmark: Any, contestant: str) -> None:
    torch.manual_seed(0)
    statistics_case(torch.randn(64, 64, 56, 56)).benchmark(benchmark, contestant)


if __name__ == "__main__":
    main("bn_stats", __doc__, cases, ops=("batch_norm_statistics", "batch_norm_statistics_backward"))
