"""BatchNorm statistics against torch's own kernels, on the CPU.

    python bench/bench_bn_stats.py [--threads 2] [--repeats 11] [--quick] [--json FILE]
    pytest bench/bench_bn_stats.py --benchmark-only

Every result is compared with float64 before anything is timed, and the largest relative errors of the variance stand
beside the times. `statistics` is per channel over batch and positions; `sum` is the floor of it, one read of x.
`forward` is eval-mode BatchNorm plus the statistics of its input against `F.batch_norm` alone; `backward` adds both
gradients in one pass, against BatchNorm's own input gradient alone. `hard data` has values that break the usual
shortcuts. On a machine that does other work, 2 threads wait for the slower one: `--threads 1` suffers less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
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
PLANES = ((512, 16, 32, 32), (512, 64, 8, 8), (64, 64, 56, 56), (64, 512, 7, 7))
DTYPES = (torch.float32, torch.bfloat16)
SHAPES = (
    *((shape, dtype, layout) for shape in PLANES for layout in (DENSE, LAST) for dtype in DTYPES),
    *(((8192, 512), dtype, DENSE) for dtype in DTYPES),
)
OURS = ("clusterq", "clusterq per image")
QUICK = (((8, 16, 14, 14), torch.float32, DENSE), ((8, 16, 14, 14), torch.bfloat16, LAST))


def reduced(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """values [C] or [N, C] shaped to broadcast against x [N, C, *spatial]."""
    return values.reshape(*(values.shape if values.dim() == 2 else (1, -1)), *(1,) * (x.dim() - 2))


def is_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=LAST)


def detail(x: Tensor) -> str:
    return f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}{' channels_last' * is_last(x)}"


def peers_of(x: Tensor) -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    """Name -> mean and biased variance of every channel."""
    dims = reduced(x)

    def update_stats() -> tuple[Tensor, Tensor]:
        return torch.batch_norm_update_stats(x, None, None, 0.1)

    def native() -> tuple[Tensor, Tensor]:
        _, mean, inverse = torch.native_batch_norm(x, None, None, None, None, True, 0.1, 0.0)
        return mean, inverse.double() ** -2

    return {
        "var_mean": lambda: torch.var_mean(x, dims, correction=0)[::-1],
        "mean+var": lambda: (x.mean(dims), x.var(dims, correction=0)),
        "batch_norm_update_stats": update_stats,
        "native_batch_norm": native,
    }


def errors(x: Tensor) -> str:
    """Largest relative error of the variance, ours and the peers'. Raises where ours is over 1e-5."""
    var, mean = torch.var_mean(x.double(), reduced(x), correction=0)
    ours_mean, ours_var = ops.batch_norm_statistics(x)
    assert ((ours_var - var).abs() <= 1e-5 * var).all(), "variance is off"
    rounding = 2 * torch.finfo(ours_mean.dtype).eps * mean.abs()
    assert ((ours_mean - mean).abs() <= 1e-5 * var.sqrt() + rounding).all(), "mean is off"
    found = {"ours": ours_var} | {name: peer()[1] for name, peer in peers_of(x).items()}
    return "variance off by " + ", ".join(
        f"{((v.double() - var).abs() / var).max().item():.0e} ({name})" for name, v in found.items()
    )


def statistics_cases(x: Tensor) -> Iterator[Case]:
    """One for each promise."""
    ours = {"clusterq": lambda: ops.batch_norm_statistics(x)}
    few = is_last(x) and x.shape[1] == 16
    yield Case("statistics", detail(x), ours | peers_of(x), Bar("var_mean", 10.0 if few else 40.0), errors(x))
    yield Case("one read", detail(x), ours | {"sum": lambda: x.sum()}, Bar("sum", 1.25, "at most x of the time"))
    if is_last(x) or (x.dim() == 4 and x.dtype == torch.float32):
        peer = {"batch_norm_update_stats": peers_of(x)["batch_norm_update_stats"]}
        bar = Bar("batch_norm_update_stats", 1.8 if is_last(x) else 8.0)
        yield Case("against BatchNorm's own", detail(x), ours | peer, bar)


def hard_cases() -> Iterator[Case]:
    noise = torch.randn(64, 8, 56, 56, dtype=torch.float64)
    outlier = noise.clone()
    outlier[0, :, 0, 0] = 1e6
    data = {f"N({offset:g}, 1)": noise + offset for offset in (1e3, 1e4, 1e5)} | {
        "1e6 first": outlier,
        "1e4 n in image n": noise + 1e4 * torch.arange(64)[:, None, None, None],
        "N(1e20, 1e18)": noise * 1e18 + 1e20,
    }
    data["float64, N(1e30, 1e28)"] = noise * 1e28 + 1e30
    for name, values in data.items():
        for layout in (DENSE, LAST):
            x = values if name.startswith("float64") else values.float()
            x = x.contiguous(memory_format=layout)
            contestants = {"clusterq": partial(ops.batch_norm_statistics, x)} | peers_of(x)
            yield Case("hard data", f"{name}{' channels_last' * (layout == LAST)}", contestants, note=errors(x))


def promised(x: Tensor, bar: Bar) -> dict[str, Bar]:
    """For statistics of either kind; with one value per image and channel those per image are as large as x."""
    return dict.fromkeys(OURS if x.dim() > 2 else OURS[:1], bar)


def forward_case(x: Tensor) -> Case:
    weight, bias, mean, var = (torch.rand(x.shape[1]) + 0.1 for _ in range(4))
    arguments = (x, weight, bias, mean, var, 1e-5)
    exact = F.batch_norm(x.double(), mean.double(), var.double(), weight.double(), bias.double())
    for function in (ops.batch_norm_with_statistics, ops.batch_norm_with_instance_statistics):
        y, *_ = function(*arguments)
        torch.testing.assert_close(y.double(), exact, rtol=2 * torch.finfo(x.dtype).eps, atol=1e-5)
    contestants = {
        "clusterq": lambda: ops.batch_norm_with_statistics(*arguments),
        "clusterq per image": lambda: ops.batch_norm_with_instance_statistics(*arguments),
        "F.batch_norm": lambda: F.batch_norm(x, mean, var, weight, bias),
    }
    return Case(
        "forward", detail(x), contestants, promised(x, Bar("F.batch_norm", 1.1, "at most x of the time")), ours=OURS
    )


def backward_case(x: Tensor) -> Case:
    """`grad * scale + a * (x - center) + b` against the first term alone; a, b and center per channel, or per image."""
    weight, mean, var = (torch.rand(x.shape[1]) + 0.1 for _ in range(3))
    grad, unused = torch.randn_like(x), torch.zeros(x.shape[1])
    scale = per_channel(weight.double() / torch.sqrt(var.double() + 1e-5), x)
    calls: dict[str, Callable[[], Any]] = {}
    for name, rows in zip(OURS, (1, x.shape[0]), strict=True):
        center, a, b = (torch.randn(rows, x.shape[1]) for _ in range(3))
        calls[name] = partial(OP.batch_norm_statistics_backward, grad, x, weight, var, 1e-5, center, b, a, 0.5, 2.0)
        c, s, t = (per_channel(v, x).double() for v in (center, a, b))
        exact = grad.double() * scale + 2 * s * (x.double() - c) + 0.5 * t
        # Terms reach about 80 and may cancel, where float32 keeps 2e-6 of each.
        torch.testing.assert_close(calls[name]().double(), exact, rtol=2 * torch.finfo(x.dtype).eps, atol=4e-5)
    calls["native_batch_norm_backward"] = lambda: torch.ops.aten.native_batch_norm_backward(
        grad, x, weight, mean, var, unused, unused, False, 1e-5, [True, False, False]
    )
    bar = Bar("native_batch_norm_backward", 1.15, "at most x of the time")
    return Case("backward", detail(x), calls, promised(x, bar), ours=OURS)


def cases(quick: bool) -> Iterator[Case]:
    for shape, dtype, layout in QUICK if quick else SHAPES:
        x = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
        yield from statistics_cases(x)
        yield forward_case(x)
        yield backward_case(x)
    if not quick:
        yield from hard_cases()


@pytest.mark.parametrize(
    "contestant", ["clusterq", "var_mean", "mean+var", "batch_norm_update_stats", "native_batch_norm"]
)
def test_statistics(benchmark: Any, contestant: str) -> None:
    torch.manual_seed(0)
    next(statistics_cases(torch.randn(64, 64, 56, 56))).benchmark(benchmark, contestant)


if __name__ == "__main__":
    main("bn_stats", __doc__, cases, ops=("batch_norm_statistics", "batch_norm_statistics_backward"))
