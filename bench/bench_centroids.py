"""Nearest-centroid search and the moving-average step against PyTorch, label errors against float64 beside every time.

    python bench/bench_centroids.py [--threads 2] [--repeats 7] [--quick] [--json FILE]
    pytest bench/bench_centroids.py --benchmark-only

Peers: `cdist` is `torch.cdist(x, c).argmin(1)`; `addmm` is `(|c|^2 / 2 - x c^T).argmin(1)` in blocks of 8192 rows; the
step `index_add` is the `cdist` search followed by `index_add_`, `bincount` and the average of the centroids. Before
anything is timed, the labels are compared with a direct float64 search on up to 4096 rows, and one wrong label from
clusterq ends the run.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from harness import Bar, Case, main
from torch import Tensor

from clusterq import ops

# (N, D, K)
SHAPES = ((65536, 64, 512), (131072, 16, 256), (16384, 256, 1024), (65536, 64, 10))
QUICK = ((4096, 64, 128), (4096, 16, 10))
DECAY = 0.99
CHECKED = 4096


def data(kind: str, rows: int, dim: int, clusters: int) -> tuple[Tensor, Tensor]:
    """x [N, D] and centroids [K, D], float32: N(0, 1), or N(8, 1) for `offset`, where expanded squares lose digits."""
    generator = torch.Generator().manual_seed(0)
    shift = 8.0 if kind == "offset" else 0.0
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


def search_case(kind: str, rows: int, dim: int, clusters: int, bar: Bar | None = None) -> Case:
    x, centroids = data(kind, rows, dim, clusters)
    truth = search_float64(x[:CHECKED], centroids)
    wrong = {name: int((search(x, centroids)[:CHECKED] != truth).sum()) for name, search in SEARCHES.items()}
    if wrong["clusterq"]:
        raise SystemExit(f"clusterq gave {wrong['clusterq']} wrong labels of {len(truth)}")
    note = f"wrong labels of {len(truth)}: " + ", ".join(f"{name} {errors}" for name, errors in wrong.items())
    contestants = {name: partial(search, x, centroids) for name, search in SEARCHES.items()}
    return Case(f"search, {kind} data", f"N={rows} D={dim} K={clusters}", contestants, bar, note)


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


def step_case(rows: int, dim: int, clusters: int) -> Case:
    check_step()
    x, centroids = data("normal", rows, dim, clusters)
    contestants = {name: partial(step, x, centroids.clone(), torch.zeros(clusters)) for name, step in STEPS.items()}
    return Case("search and average", f"N={rows} D={dim} K={clusters}", contestants)


def cases(quick: bool) -> Iterator[Case]:
    shapes = QUICK if quick else SHAPES
    for kind in ("normal", "offset"):
        for shape in shapes:
            promised = kind == "normal" and shape == shapes[0]
            yield search_case(kind, *shape, bar=Bar("cdist", 4.0) if promised else None)
    yield step_case(*shapes[0])


@pytest.mark.parametrize("contestant", list(SEARCHES))
def test_search(benchmark: Any, contestant: str) -> None:
    search_case("normal", 8192, 64, 512).benchmark(benchmark, contestant)


if __name__ == "__main__":
    main("centroids", __doc__, cases, ops=("nearest_centroid", "assign_and_update_"), repeats=7)
