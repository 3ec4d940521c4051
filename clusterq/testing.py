"""What tests and benches share: dtypes, memory layouts, the accuracy rule, and the timer for ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

_Result = TypeVar("_Result")

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


CPU_LEVELS = ("default", "avx2", "avx512", "avx512_bf16")


def cpu_levels() -> tuple[str, ...]:
    """Values of `CLUSTERQ_CPU_CAPABILITY` that this processor can run, lowest first."""
    best = torch.backends.cpu.get_cpu_capability().lower()
    if best == "avx512" and torch.cpu._is_avx512_bf16_supported():
        best = "avx512_bf16"
    return CPU_LEVELS[: CPU_LEVELS.index(best) + 1] if best in CPU_LEVELS else CPU_LEVELS[:1]


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The values of `x` in every memory layout an op must accept, by name.

    Four-dimensional tensors also come as channels_last; `permuted` is dense with reversed strides, `sliced` has gaps.
    """
    variants = {"contiguous": x.contiguous()}
    if x.dim() == 4:
        variants["channels_last"] = x.contiguous(memory_format=torch.channels_last)
    if x.dim() > 1:
        order = tuple(reversed(range(x.dim())))
        variants["permuted"] = x.permute(order).contiguous().permute(order)
        wide = x.new_zeros((*x.shape[:-1], 2 * x.shape[-1] + 1))
        wide[..., 1::2] = x
        variants["sliced"] = wide[..., 1::2]
    return variants


def assert_accurate(
    actual: Tensor, truth: Tensor, baseline: Tensor, *, slack: float = 1e-6, name: str = "result"
) -> None:
    """Raise AssertionError unless `actual` is about as close to the truth as plain PyTorch in the same precision.

    The rule: the largest error against the float64 `truth` may be twice that of `baseline` (the eager PyTorch result in
    the dtype under test), plus `slack` relative to the largest magnitude of the truth.
    """
    if actual.shape != truth.shape:
        raise AssertionError(f"{name}: shape {tuple(actual.shape)}, wanted {tuple(truth.shape)}")
    if truth.numel() == 0:
        return
    error = (actual.double() - truth.double()).abs().max().item()
    allowed = 2 * (baseline.double() - truth.double()).abs().max().item() + slack * truth.double().abs().max().item()
    if not error <= allowed:
        raise AssertionError(f"{name}: largest error {error:.3e} against float64, allowed {allowed:.3e}")


@dataclass(frozen=True)
class Timing:
    """Seconds per call over the rounds of `interleave`: median, 20/80 % quantiles, and every round's own."""

    median: float
    low: float
    high: float
    rounds: tuple[float, ...]

    @property
    def milliseconds(self) -> float:
        return 1e3 * self.median

    def ratio_to(self, other: Timing) -> float:
        """Median over the rounds of this time / the other's in the same round; both from one call of `interleave`.

        The one statistic behind every ratio of the benches. Against the ratio of the two medians it has the advantage
        that a machine which is slow for some rounds is slow for both sides of each such ratio.
        """
        return statistics.median(mine / theirs for mine, theirs in zip(self.rounds, other.rounds, strict=True))


def interleave(
    functions: dict[str, Callable[[], object]],
    *,
    rounds: int = 21,
    warmup: int = 3,
    min_time: float = 0.002,
    synchronize: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Time each function, taking turns in one process, so that slow drifts of the machine fall on all alike.

    A turn begins with a call that is not timed, so that no function finds the caches as another one left them. Where
    the shortest call takes less than `min_time` seconds, all are called equally often in a turn, those ten times as
    long as `min_time` once. `synchronize` waits for a device, before and after the timed calls of a turn. Ratios come
    from `Timing.ratio_to`.
    """
    once = {}
    for name, function in functions.items():
        for _ in range(warmup):
            function()
        synchronize()
        start = time.perf_counter()
        function()
        synchronize()
        once[name] = max(time.perf_counter() - start, 1e-9)
    most = max(1, int(min_time / min(once.values())))
    repeats = {name: most if seconds < 10 * min_time else 1 for name, seconds in once.items()}
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            function()
            synchronize()
            start = time.perf_counter()
            for _ in range(repeats[name]):
                function()
            synchronize()
            samples[name].append((time.perf_counter() - start) / repeats[name])
    result = {}
    for name, values in samples.items():
        cuts = statistics.quantiles(values, n=5) if len(values) > 1 else [values[0]] * 4
        result[name] = Timing(statistics.median(values), cuts[0], cuts[3], tuple(values))
    return result


def capture(call: Callable[[], _Result], *, times: int = 1) -> tuple[torch.cuda.CUDAGraph, _Result]:
    """A CUDA graph of a call after three ordinary ones on a side stream, as torch asks for.

    Args:
        call: without arguments.
        times: how often one replay makes it.

    Returns:
        The graph, and the results of the last call, which every replay overwrites.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            result = call()
    return graph, result
