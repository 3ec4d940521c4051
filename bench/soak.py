"""Whole runs again and again: does memory grow, do files stay open, does it get slower?

    python bench/soak.py [--minutes 30] [--seed 0]

Every round makes images and fine-tunes a student with an object of its own, as a service would, and is timed beside a
piece of work in torch alone, which other programs slow down alike, both in time of the processor. After a warm-up of a
fifth of the time it fits a line to the memory in use over the steps done. Exits with 1 beyond 1 MB per 1,000 steps or
when more files are open at the end than after the warm-up; the speed is printed and judged by nobody: on a shared
machine it was 20 % apart between thirds of one run, that of the work in torch 10 %.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from clusterq.config import ClusterQConfig, FinetuneConfig, QuantizationConfig, SynthesisConfig
from clusterq.method import ClusterQ

LIMIT_MB = 1.0
CONFIG = ClusterQConfig(
    quantization=QuantizationConfig(weight_bits=4, activation_bits=4),
    synthesis=SynthesisConfig(num_images=32, batch_size=16, image_steps=20, autocast=False),
    finetune=FinetuneConfig(steps=30, batch_size=8, calibration_images=16, autocast=False),
)


class Round(NamedTuple):
    """Of the process, after a number of steps in all; `seconds` since its start, the others those of the processor."""

    steps: int
    seconds: float
    round_seconds: float
    yardstick_seconds: float
    resident_mb: float
    open_files: int


def network(seed: int) -> nn.Module:
    """Untrained, with statistics of its own: what it would classify is not the question."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for width, previous in ((16, 3), (32, 16), (32, 32)):
        layers += [nn.Conv2d(previous, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(32, 3, 16, 16))
    return model.eval()


def release_free_memory() -> None:
    """What the C allocator keeps of freed memory goes back, so that fragmentation does not look like growth."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def yardstick(model: nn.Module, images: torch.Tensor) -> float:
    """Processor seconds of forwards and backwards in floating point, the same work at every call."""
    start = time.process_time()
    for _ in range(8):
        model(images).square().mean().backward()
    model.zero_grad()
    return time.process_time() - start


def measure(steps: int, start: float, round_seconds: float, yardstick_seconds: float) -> Round:
    release_free_memory()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    resident = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
    files = len(os.listdir("/proc/self/fd"))
    return Round(steps, time.monotonic() - start, round_seconds, yardstick_seconds, resident, files)


def soak(minutes: float, seed: int) -> list[Round]:
    model, start, steps = network(seed), time.monotonic(), 0

    def count(phase: str, step: int, terms: object) -> None:
        nonlocal steps
        steps += 1

    rounds: list[Round] = []
    other, images = network(seed + 1), torch.randn(32, 3, 16, 16)
    while time.monotonic() - start < 60 * minutes:
        method = ClusterQ(model, CONFIG, input_shape=(3, 16, 16), on_step=count)
        before = yardstick(other, images)
        begin = time.process_time()
        method.run()
        end = time.process_time()
        # Before and after, as the load may change within a round.
        around = (before + yardstick(other, images)) / 2
        rounds.append(measure(steps, start, end - begin, around))
    return rounds


def report(rounds: list[Round]) -> bool:
    """Prints the verdict on the rounds after the warm-up; True when nothing grows."""
    kept = [r for r in rounds if r.seconds > rounds[-1].seconds / 5]
    if len(kept) < 4:
        raise SystemExit(f"soak: {len(kept)} rounds after the warm-up tell nothing; give it more --minutes")
    slope = 1000 * statistics.linear_regression([r.steps for r in kept], [r.resident_mb for r in kept]).slope
    files = kept[-1].open_files - kept[0].open_files
    costs = [r.round_seconds / r.yardstick_seconds for r in kept]
    third = max(len(kept) // 3, 1)
    slower = statistics.median(costs[-third:]) / statistics.median(costs[:third]) - 1
    absolute = statistics.median(r.round_seconds for r in kept)
    print(f"{rounds[-1].steps} steps in {len(rounds)} runs, {rounds[-1].seconds / 60:.1f} minutes")
    print(f"memory {kept[0].resident_mb:.0f} to {kept[-1].resident_mb:.0f} MB: {slope:+.3f} MB per 1000 steps")
    print(f"open files {kept[0].open_files} to {kept[-1].open_files}")
    print(
        f"a run took {absolute:.2f} s; beside work in torch alone, from first to last third: {100 * slower:+.1f} % time"
    )
    return slope <= LIMIT_MB and files <= 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    return 0 if report(soak(options.minutes, options.seed)) else 1


if __name__ == "__main__":
    sys.exit(main())
