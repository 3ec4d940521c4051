"""Nearest-centroid search and the moving-average step against what else does it; label errors beside every time.

    python bench/bench_centroids.py [--threads 2] [--repeats 7] [--quick] [--part step] [--json FILE]
    pytest bench/bench_centroids.py --benchmark-only

Searches (`centroid_peers.py`): `cdist` is `torch.cdist(x, c).argmin(1)`; `addmm` is `(|c|^2 / 2 - x c^T).argmin(1)` in
blocks of 8192 rows; `faiss` a flat index; `scikit-learn` its `pairwise_distances_argmin`; `multiply-adds` as many
multiply-adds in float32 as N x K distances have, in registers: no search. Steps: one search and one average. Before
anything is timed, labels are compared with a direct float64 search on up to 4096 rows, and one wrong label from
clusterq ends the run. `heap beyond the result` is counted by malloc itself, in a process of its own.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from centroid_peers import DECAY, SEARCHES, STEPS, built, multiply_adds
from harness import OURS, Bar, Call, Case, Row, main
from torch import Tensor

from clusterq import ops

# (N, D, K)
SHAPES = (
    (131072, 8, 256),
    (131072, 32, 512),
    (65536, 64, 512),
    (16384, 256, 1024),
    (4096, 512, 8192),
    (65536, 64, 16),
)
STEP = (65536, 64, 512)
QUICK = ((4096, 64, 128), (4096, 16, 10))
CHECKED = 4096
PARTS = ("search", "step", "heap")
# The least number of times faster that is promised of every step.
STEP_BARS = {"faiss": 1.5, "scikit-learn": 2.0, "vector-quantize-pytorch": 20.0}


def data(kind: str, rows: int, dim: int, clusters: int) -> tuple[Tensor, Tensor]:
    """x [N, D] and centroids [K, D], float32: N(0, 1), or N(8, 1) for `offset`, where expanded squares lose digits."""
    generator = torch.Generator().manual_seed(0)
    shift = 8.0 if kind == "offset" else 0.0
    x = torch.randn(rows, dim, generator=generator) + shift
    return x, torch.randn(clusters, dim, generator=generator) + shift


def search_float64(x: Tensor, centroids: Tensor) -> Tensor:
    exact = "donot_use_mm_for_euclid_dist"
    parts = x.split(max(1, (1 << 22) // len(centroids)))
    return torch.cat([torch.cdist(p.double(), centroids.double(), compute_mode=exact).argmin(1) for p in parts])


def search_clusterq(x: Tensor, centroids: Tensor) -> Tensor:
    return ops.nearest_centroid(x, centroids)[0]


def searches(x: Tensor, centroids: Tensor) -> dict[str, Call]:
    """Ours and the peers that are installed."""
    made = {name: make(x, centroids) for name, make in SEARCHES.items()}
    return {OURS: partial(search_clusterq, x, centroids), **{n: call for n, call in made.items() if call is not None}}


def label_errors(calls: Mapping[str, Call], x: Tensor, centroids: Tensor) -> str:
    truth = search_float64(x[:CHECKED], centroids)
    results: dict[str, Any] = {name: call() for name, call in calls.items()}
    wrong = {name: int((labels[:CHECKED] != truth).sum()) for name, labels in results.items()}
    if wrong[OURS]:
        raise SystemExit(f"clusterq gave {wrong[OURS]} wrong labels of {len(truth)}")
    share = ops.undecided_rows(x, centroids).float().mean()
    errors = ", ".join(f"{name} {count}" for name, count in wrong.items())
    return f"wrong labels of {len(truth)}: {errors}; {100 * share:.2g} % of the rows told apart by distances in float64"


def search_cases(kind: str, rows: int, dim: int, clusters: int) -> Iterator[Case]:
    x, centroids = data(kind, rows, dim, clusters)
    calls, detail = searches(x, centroids), f"N={rows} D={dim} K={clusters}"
    promised = kind == "normal"
    note = label_errors(calls, x, centroids)
    yield Case(f"search, {kind} data", detail, calls, Bar("cdist", 2.0) if promised else None, note)
    if promised and "faiss" in calls:
        pair = {name: calls[name] for name in (OURS, "faiss")}
        yield Case("search against faiss", detail, pair, Bar("faiss", 1.2 if clusters <= 16 else 1.6))
    floor = multiply_adds(rows * dim * clusters)
    if promised and floor is not None and dim >= 32:
        bar = Bar("multiply-adds", 1 / 0.65, "at most x of the time") if clusters > 16 else None
        yield Case("share of the peak", detail, {OURS: calls[OURS], "multiply-adds": floor}, bar)


def step_clusterq(x: Tensor, centroids: Tensor) -> Call:
    means, size = centroids.clone(), torch.zeros(len(centroids))
    return partial(ops.assign_and_update_, means, size, x, DECAY)


def check_step() -> None:
    """Our step and the one of torch's ops give the same centroids to float32 accuracy."""
    x, centroids = data("normal", 4096, 16, 32)
    means, size, index = centroids.clone(), torch.zeros(32), search_float64(x, centroids)
    ops.assign_and_update_(means, size, x, DECAY)
    one_hot = torch.nn.functional.one_hot(index, 32).double()
    count = one_hot.sum(0)
    wanted = DECAY * centroids.double() + (1 - DECAY) * (one_hot.t() @ x.double()) / count[:, None]
    torch.testing.assert_close(means, wanted.float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(size, (1 - DECAY) * count.float(), rtol=1e-6, atol=0)


def step_cases(rows: int, dim: int, clusters: int) -> Iterator[Case]:
    check_step()
    x, centroids = data("normal", rows, dim, clusters)
    detail, ours = f"N={rows} D={dim} K={clusters}", step_clusterq(x, centroids)
    for name, make in STEPS.items():
        call = make(x, centroids)
        if call is None:
            continue
        bar = Bar(name, STEP_BARS[name]) if name in STEP_BARS else None
        yield Case(f"search and average against {name}", detail, {OURS: ours, name: call}, bar)


@dataclass(frozen=True)
class HeapCase(Case):
    """Bytes on the heap beyond the result; the peer is 1 % of a table of N x K distances."""

    shape: tuple[int, int, int] = (1, 1, 1)

    def measure(self, repeats: int, *, quick: bool = False, **timer: Any) -> list[Row]:
        rows, _, clusters = self.shape
        held, allowed = float(heap_beyond_the_result(*self.shape)), 0.04 * rows * clusters
        costs, bar = {OURS: held, "1 % of N x K": allowed}, None if quick else Bar("1 % of N x K", 1.0)
        return [Row(self.name, self.detail, OURS, costs, {"1 % of N x K": allowed / held}, bar, self.note, "B")]


_HEAP = """
import ctypes, sys, torch
from clusterq import ops
rows, dim, clusters, threads = map(int, sys.argv[1:])
torch.set_num_threads(threads)
heap = ctypes.CDLL(None)
x, centroids = torch.randn(rows, dim), torch.randn(clusters, dim)
ops.nearest_centroid(x, centroids)
heap.heap_reset()
result = ops.nearest_centroid(x, centroids)
heap.heap_peak.restype = ctypes.c_long
print(heap.heap_peak() - sum(t.numel() * t.element_size() for t in result))
"""


def heap_beyond_the_result(rows: int, dim: int, clusters: int) -> int:
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    child = subprocess.run(
        [sys.executable, "-c", _HEAP, *map(str, (rows, dim, clusters, torch.get_num_threads()))],
        env={**environment, "LD_PRELOAD": str(counted_heap())}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(child.stdout)


def counted_heap() -> Path | None:
    """The library that counts what malloc hands out; only glibc's can be counted."""
    return built("heap_peak.c", "-fno-builtin") if platform.libc_ver()[0] == "glibc" else None


def cases(quick: bool, parts: Sequence[str] = PARTS) -> Iterator[Case]:
    shapes = QUICK if quick else SHAPES
    for kind in ("normal", "offset"):
        for shape in shapes if "search" in parts else ():
            yield from search_cases(kind, *shape)
    if "step" in parts:
        yield from step_cases(*(shapes[0] if quick else STEP))
    if "heap" not in parts or counted_heap() is None:
        return
    for rows, dim, clusters in shapes:
        # the harness wants a contestant of that name; it is never called
        unused: dict[str, Call] = {OURS: object, "1 % of N x K": object}
        detail = f"N={rows} D={dim} K={clusters}"
        yield HeapCase("heap beyond the result", detail, unused, shape=(rows, dim, clusters))


@pytest.mark.parametrize("contestant", [OURS, *SEARCHES])
def test_search(benchmark: Any, contestant: str) -> None:
    x, centroids = data("normal", 8192, 64, 512)
    calls = searches(x, centroids)
    if contestant not in calls:
        pytest.skip(f"{contestant} is not installed")
    Case("search", "N=8192 D=64 K=512", calls).benchmark(benchmark, contestant)


if __name__ == "__main__":
    served = ("nearest_centroid", "assign_and_sum", "move_centroids_")
    main("centroids", __doc__, cases, ops=served, repeats=7, choice="part", choices=PARTS)
