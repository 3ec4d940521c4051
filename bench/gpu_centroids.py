"""Nearest centroids and their average on a GPU: every kernel against torch, compiled torch and flash-kmeans.

    python bench/gpu_centroids.py --json FILE [--repeats 15] [--quick] [--device cpu]
    python bench/gpu_centroids.py --plan

Times as in `gpu_fake_quant.py`. `clusterq` is the kernel that serves the op, `clusterq triton` the Triton launcher
called directly. `matmul` computes the N x K products alone. `compiled` is `torch.compile` of
`(|c|^2 / 2 - x c^T).argmin(1)`, `tf32` that in TF32. flash-kmeans is left out where it is not installed; it gets its
float32 table of |x|^2 for nothing, and an untimed call for every shape, because it compiles for every N. Labels are
compared with a float64 search on up to 4096 rows before anything is timed: ours must have none wrong.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import bench_centroids as cpu
import torch
from fake_quant_peers import able, installed
from gpu_harness import launchers, run
from harness import Bar, Call, Case
from torch import Tensor

MODULES = ("centroids",)
# (N, D, K)
LARGE = tuple((65536, dim, clusters) for dim in (64, 128, 256) for clusters in (1024, 4096))
SMALL = ((65536, 64, 512), (131072, 8, 256), (4096, 512, 8192), (65536, 64, 16))
STEP = (65536, 64, 1024)
DTYPES = (torch.bfloat16, torch.float32)
OPS = ("nearest_centroid", "assign_and_sum", "centroid_sums", "move_centroids_")


def scores(x: Tensor, centroids: Tensor) -> Tensor:
    half = 0.5 * centroids.float().square().sum(1)
    return (half - (x @ centroids.t()).float()).argmin(1)


@functools.cache
def compiled(tf32: bool) -> Call:
    """`scores` compiled; a function of its own for each setting, which is read while it is compiled."""

    def function(x: Tensor, centroids: Tensor) -> Tensor:
        return scores(x, centroids)

    made: Callable[..., Any] = torch.compile(function, dynamic=True)

    def call(x: Tensor, centroids: Tensor) -> Any:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = tf32
        try:
            return made(x, centroids)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    return call


def flash_kmeans(x: Tensor, centroids: Tensor) -> dict[str, Call]:
    if not x.is_cuda or not installed("flash_kmeans"):
        return {}
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton

    squares = x[None].float().square().sum(-1)
    return {"flash-kmeans": functools.partial(euclid_assign_triton, x[None], centroids[None], squares)}


def data(rows: int, dim: int, clusters: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, dim).to(dtype), torch.randn(clusters, dim).to(dtype)


def search_case(rows: int, dim: int, clusters: int, dtype: torch.dtype, precision: str, bar: Bar | None) -> Case:
    x, centroids = data(rows, dim, clusters, dtype)
    title, detail = f"search, {precision}", f"N={rows} D={dim} K={clusters} {str(dtype).removeprefix('torch.')}"
    truth = cpu.search_float64(x[: cpu.CHECKED], centroids)
    kernels = launchers(x.device.type, MODULES)
    for kernel, call in kernels.items():
        wrong = int((call("nearest_centroid", x[None], centroids[None], precision)[0][0, : len(truth)] != truth).sum())
        if wrong and precision == "exact":
            raise AssertionError(f"{title} {detail} {kernel}: {wrong} wrong labels of {len(truth)}")
    calls: dict[str, Call] = {
        kernel: functools.partial(call, "nearest_centroid", x[None], centroids[None], precision)
        for kernel, call in kernels.items()
    }
    calls |= {"matmul": lambda: x @ centroids.t(), "cdist": lambda: torch.cdist(x.float(), centroids.float()).argmin(1)}
    if x.is_cuda:
        calls["compiled"] = functools.partial(compiled(False), x, centroids)
        if dtype == torch.float32:
            calls["tf32"] = functools.partial(compiled(True), x, centroids)
    kept, note = able({**calls, **flash_kmeans(x, centroids)}, title)
    undecided = torch.ops.clusterq.undecided_rows(x[None], centroids[None]).float().mean()
    note = "; ".join(filter(None, (f"{100 * undecided:.2g} % of the rows measured in float64", note)))
    bars = {kernel: bar for kernel in kernels} if bar is not None and bar.peer in kept else None
    return Case(title, detail, kept, bars, note, ours=tuple(kernels))


def searches(quick: bool) -> Iterator[Callable[[], Case]]:
    """1.4 times flash-kmeans in bfloat16; exact float32 not slower than its TF32."""
    for shape in ((512, 24, 70),) if quick else (*LARGE, *SMALL):
        for dtype in DTYPES:
            for precision in ("exact", "fast"):
                promised = shape in LARGE and precision == "exact"
                bar = Bar("flash-kmeans", 1.4 if dtype == torch.bfloat16 else 1.0) if promised else None
                yield lambda s=shape, t=dtype, p=precision, b=bar: search_case(*s, t, p, b)


def flash_kmeans_step(x: Tensor, centroids: Tensor) -> dict[str, Call]:
    if not x.is_cuda or not installed("flash_kmeans"):
        return {}
    from flash_kmeans import batch_kmeans_Euclid

    def call() -> object:
        return batch_kmeans_Euclid(x[None], len(centroids), max_iters=1, tol=-1, init_centroids=centroids[None])

    return {"flash-kmeans": call}


def step_case(rows: int, dim: int, clusters: int, dtype: torch.dtype, deterministic: bool) -> Case:
    """Search, sums and average; `one-hot` is the average as VQ-VAE code does it."""
    x, centroids = data(rows, dim, clusters, dtype)
    title = "step" if deterministic else "step, any order"
    detail = f"N={rows} D={dim} K={clusters} {str(dtype).removeprefix('torch.')}"
    index = torch.ops.clusterq.nearest_centroid(x[None], centroids[None], "exact")[0][0]
    wanted = torch.zeros(clusters, dim, dtype=torch.float64).index_add_(0, index, x.double())
    kernels = launchers(x.device.type, MODULES)
    calls: dict[str, Call] = {}
    for kernel, call in kernels.items():
        means, size = centroids.float()[None], torch.zeros(1, clusters)

        def step(call: Callable[..., Any] = call, means: Tensor = means, size: Tensor = size) -> Tensor:
            sums: Tensor = call("assign_and_sum", x[None], means.to(dtype), None, "exact", deterministic)[2]
            call("move_centroids_", means, size, None, sums, cpu.DECAY, "mean", 0.0)
            return sums

        torch.testing.assert_close(step()[0, :, :-1], wanted, rtol=1e-9, atol=1e-9, msg=lambda m, k=kernel: f"{k}: {m}")
        calls[kernel] = step

    def one_hot() -> None:
        labels = scores(x, centroids)
        chosen = torch.nn.functional.one_hot(labels, clusters).to(x.dtype)
        torch.mm(chosen.t(), x), chosen.sum(0)

    kept, note = able({**calls, "one-hot": one_hot, **flash_kmeans_step(x, centroids)}, title)
    promised = (rows, dim, clusters) == STEP and "flash-kmeans" in kept
    bars = {kernel: Bar("flash-kmeans", 5.0) for kernel in kernels} if promised else None
    return Case(title, detail, kept, bars, note, ours=tuple(kernels))


def steps(quick: bool) -> Iterator[Callable[[], Case]]:
    for shape in ((512, 24, 70),) if quick else (STEP, (131072, 8, 256), (4096, 512, 8192)):
        for dtype in DTYPES:
            for deterministic in (True, False):
                yield lambda s=shape, t=dtype, d=deterministic: step_case(*s, t, d)


GROUPS = (searches, steps)


if __name__ == "__main__":
    sys.exit(run("centroids", __doc__, GROUPS, OPS))
