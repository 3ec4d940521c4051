"""Nearest-centroid search and the moving-average step against PyTorch, label errors against float64 beside every time.

    python bench/bench_centroids.py [--threads 2] [--rounds 7] [--quick] [--json FILE]

Peers: `cdist` is `torch.cdist(x, c).argmin(1)`; `addmm` is `(|c|^2 / 2 - x c^T).argmin(1)` in blocks of 8192 rows; the
step `index_add` is the `cdist` search followed by `index_add_`, `bincount` and the average of the centroids. Each round
times all variants in turn within one process; a figure is the median over the rounds, a ratio that of the medians
(above 1: clusterq is faster). Before anything is timed, the labels are compared with a direct float64 search on up to
4096 rows, and one wrong label from clusterq ends the run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clusterq import ops
from clusterq.testing import interleave

# (N, D, K)
SHAPES = ((65536, 64, 512), (131072, 16, 256), (16384, 256, 1024), (65536, 64, 10))
QUICK = ((8192, 64, 512), (8192, 16, 10))
STEP = (65536, 64, 512)
DECAY = 0.99
CHECKED = 4096


def data(name: str, rows: int, dim: int, clusters: int) -> tuple[Tensor, Tensor]:
    """x [N, D] and centroids [K, D], float32: N(0, 1), or N(8, 1) for `offset`, where expanded squares lose digits."""
    generator = torch.Generator().manual_seed(0)
    shift = 8.0 if name == "offset" else 0.0
    x = torch.randn(rows, dim, generator=generator) + shift
    return x, torch.randn(clusters, dim, generator=generator) + shift


def search_float64(x: Tensor, centroids: Tensor) -> Tensor:
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cat([torch.cdist(p.double(), centroids.double(), compute_mode=exact).argmin(1) for p in x.split(1024)])


def search_cdist(x: Tensor, centroids: Tensor) -> Tensor:
    return torch.cdist(x, centroids).argmin(1)


def search_addmm(x: Tensor, centroids: Tensor) -> Tensor:
    half = 0.5 * centroids.square().sum(1)
    return torch.cat([torch.addmm(half, part, centroids.t(), alpha=-1).argmin(1) for part in x.split(8192)])


def search_clusterq(x: Tensor, centroids: Tensor) -> Tensor:
    return ops.nearest_centroid(x, centroids)[0]


SEARCHES = {"clusterq": search_clusterq, "cdist": search_cdist, "addmm": search_addmm}


def step_clusterq(x: Tensor, centroids: Tensor, size: Tensor) -> None:
    ops.assign_and_update_(centroids, size, x, DECAY)


def step_index_add(x: Tensor, centroids: Tensor, size: Tensor) -> None:
    index = search_cdist(x, centroids)
    sums = torch.zeros_like(centroids).index_add_(0, index, x)
    count = torch.bincount(index, minlength=centroids.shape[0]).float()
    mean = torch.where(count[:, None] > 0, sums / count.clamp_min(1)[:, None], centroids)
    centroids.lerp_(mean, 1 - DECAY)
    size.lerp_(count, 1 - DECAY)


STEPS = {"clusterq": step_clusterq, "index_add": step_index_add}


def wrong_labels(search: Callable[[Tensor, Tensor], Tensor], x: Tensor, centroids: Tensor, truth: Tensor) -> int:
    return int((search(x, centroids)[: len(truth)] != truth).sum())


def check_step() -> None:
    """Both steps give the same centroids to float32 accuracy."""
    results = []
    for step in STEPS.values():
        x, centroids = data("normal", 4096, 16, 32)
        size = torch.zeros(32)
        step(x, centroids, size)
        results.append((centroids, size))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def report(functions: dict[str, Callable[[], Any]], wrong: dict[str, str], rounds: int) -> list[dict[str, Any]]:
    timings = interleave(functions, rounds=rounds)
    rows = []
    for name, timing in timings.items():
        ratio = timing.median / timings["clusterq"].median
        rows.append({"name": name, "ms": timing.milliseconds, "ratio": ratio, "wrong": wrong.get(name, "")})
        print(f"  {name:<10} {timing.milliseconds:10.2f} ms   {ratio:6.2f}x   {wrong.get(name, '')}")
    return rows


@pytest.mark.parametrize("name", list(SEARCHES))
def test_search(benchmark, name):
    """One search under pytest-benchmark; compare within one run."""
    x, centroids = data("normal", 8192, 64, 512)
    benchmark.pedantic(SEARCHES[name], (x, centroids), rounds=5, warmup_rounds=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="small shapes, a few seconds")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    kernel = next(b.kernel for b in ops.backends() if b.op == "nearest_centroid" and b.device == "cpu")
    level = os.environ.get("CLUSTERQ_CPU_CAPABILITY", torch.backends.cpu.get_cpu_capability().lower())
    print(f"torch {torch.__version__}, {arguments.threads} threads, kernel {kernel}, {level}, float32")
    results: dict[str, Any] = {
        "torch": torch.__version__,
        "threads": arguments.threads,
        "kernel": kernel,
        "level": level,
        "machine": platform.processor() or platform.machine(),
        "rounds": arguments.rounds,
    }
    for kind in ("normal", "offset"):
        for rows, dim, clusters in QUICK if arguments.quick else SHAPES:
            x, centroids = data(kind, rows, dim, clusters)
            truth = search_float64(x[:CHECKED], centroids)
            counts = {name: wrong_labels(f, x, centroids, truth) for name, f in SEARCHES.items()}
            if counts["clusterq"]:
                raise SystemExit(f"clusterq gave {counts['clusterq']} wrong labels of {len(truth)}")
            key = f"{kind} N={rows} D={dim} K={clusters}"
            print(f"{key} (wrong labels of {len(truth)})")
            functions = {name: lambda f=f, x=x, c=centroids: f(x, c) for name, f in SEARCHES.items()}
            wrong = {name: f"{count} wrong" for name, count in counts.items()}
            results[key] = report(functions, wrong, arguments.rounds)
    check_step()
    rows, dim, clusters = QUICK[0] if arguments.quick else STEP
    x, centroids = data("normal", rows, dim, clusters)
    states = {name: (centroids.clone(), torch.zeros(clusters)) for name in STEPS}
    key = f"search and average N={rows} D={dim} K={clusters}"
    print(key)
    steps = {name: lambda f=f, s=states[name], x=x: f(x, *s) for name, f in STEPS.items()}
    results[key] = report(steps, {}, arguments.rounds)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
