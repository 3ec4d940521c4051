"""Times on a GPU beside those of calls in a row: with a cold L2, and without the host; what the card itself reaches.

`interleave` of `clusterq.testing` times calls in a row between two waits: small tensors are then in the L2, and calls
of a few microseconds are the host's. `cold` times each call alone, after as much was written as fills the L2 several
times, by events of the device. `graphed` replays a captured row of calls, so that no call costs the host anything;
the tensors are hot. All take turns, so that `Timing.ratio_to` compares what ran in the same round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from clusterq.testing import Timing, capture, interleave

Call = Callable[[], object]
# Calls in one graph: a replay itself costs about as much as a small kernel.
CAPTURED = 20
# Cycles that the device idles before a cold call, about 0.2 ms, in which the host issues all of it.
HEAD_START = 400_000
# Writing this many times the L2 leaves nothing of what was there.
FLUSHES = 4
COPIED = 1 << 30
MATRIX = 8192


def timing(seconds: list[float]) -> Timing:
    cuts = statistics.quantiles(seconds, n=5) if len(seconds) > 1 else [seconds[0]] * 4
    return Timing(statistics.median(seconds), cuts[0], cuts[3], tuple(seconds))


def flush_buffer(device: str) -> torch.Tensor:
    """What `cold` overwrites; on a CPU a small one, which makes nothing cold and only runs the code."""
    size = FLUSHES * torch.cuda.get_device_properties(device).L2_cache_size if device == "cuda" else 1 << 16
    return torch.empty(size, dtype=torch.uint8, device=device)


def cold(calls: Mapping[str, Call], rounds: int, flushed: torch.Tensor) -> dict[str, Timing]:
    """Each call alone, with nothing of its tensors in the L2."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append((alone if flushed.is_cuda else alone_on_the_host)(call, flushed))
    return {name: timing(seconds) for name, seconds in samples.items()}


def alone(call: Call, flushed: torch.Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flushed.zero_()
    torch.cuda._sleep(HEAD_START)
    start.record()
    call()
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end)


def alone_on_the_host(call: Call, flushed: torch.Tensor) -> float:
    flushed.zero_()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def graphed(calls: Mapping[str, Call], rounds: int, min_time: float) -> tuple[dict[str, Timing], str]:
    """Times of captured calls, and a note on peers that cannot be captured. AssertionError where ours cannot."""
    graphs, refused = {}, []
    for name, call in calls.items():
        try:
            graphs[name], _ = capture(call, times=CAPTURED)
        except RuntimeError as error:
            if name.startswith("clusterq"):
                raise AssertionError(f"{name} cannot be captured: {error}") from error
            refused.append(name)
            print(f"  not captured: {name} ({str(error).strip().splitlines()[0][:120]})", flush=True)
            # What the failed capture left in the stream.
            torch.cuda.synchronize()
    replays: dict[str, Call] = {name: graph.replay for name, graph in graphs.items()}
    times = interleave(replays, rounds=rounds, min_time=min_time, synchronize=torch.cuda.synchronize)
    each = {name: timing([seconds / CAPTURED for seconds in t.rounds]) for name, t in times.items()}
    return each, f"not captured: {', '.join(refused)}" if refused else ""


def ceilings(device: str, *, copied: int = COPIED, matrix: int = MATRIX, rounds: int = 7) -> dict[str, float]:
    """What this very card reaches now: GB/s of a copy (read and written bytes), TFLOP/s of a square product by dtype.

    A data sheet's numbers hold for its clock, not for the one of a card that others heat up.
    """
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    source = torch.empty(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    source.zero_()
    kinds = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    # Random: products of zeros draw less power, and the clock is higher than any real product's.
    sides = {name: torch.randn(matrix, matrix, device=device).to(dtype) for name, dtype in kinds.items()}
    calls: dict[str, Call] = {"copy": lambda: target.copy_(source)}
    calls |= {name: lambda a=a: a @ a for name, a in sides.items()}  # type: ignore[misc]
    if device == "cuda":
        calls["tf32"] = lambda: tf32(sides["float32"])
    times = {
        name: interleave({name: call}, rounds=rounds, warmup=2, min_time=0.0, synchronize=wait)[name]
        for name, call in calls.items()
    }
    found = {"copy GB/s": 2e-9 * copied / times.pop("copy").median}
    found |= {f"matmul {name} TFLOP/s": 2e-12 * matrix**3 / t.median for name, t in times.items()}
    if device == "cuda":
        found["L2 MiB"] = torch.cuda.get_device_properties(device).L2_cache_size / (1 << 20)
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def tf32(a: torch.Tensor) -> torch.Tensor:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        return a @ a
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
