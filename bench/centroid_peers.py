"""Who else finds nearest centroids and averages them: torch, faiss, scikit-learn, fastkmeans, vector-quantize-pytorch.

Optional libraries that are not installed are left out, and a line says so. All of them are told the number of threads
of torch.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

DECAY = 0.99

Search = Callable[[Tensor, Tensor], Callable[[], Tensor]]
Step = Callable[[Tensor, Tensor], Callable[[], object]]


@functools.cache
def library(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        print(f"({name} is not installed: left out)", flush=True)
        return None


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Gone when the process ends."""
    return tempfile.TemporaryDirectory()


@functools.cache
def built(source: str, *options: str) -> Path | None:
    """Shared library of a C or C++ file beside this one, for this processor; None without a compiler."""
    name = "gcc" if source.endswith(".c") else "g++"
    compiler = shutil.which(name)
    if compiler is None:
        print(f"(no {name}: {source} left out)", flush=True)
        return None
    target = Path(_folder().name, f"{source}.so")
    command = [compiler, "-O3", "-march=native", "-shared", "-fPIC", *options, "-o", str(target)]
    subprocess.run([*command, str(Path(__file__).with_name(source))], check=True)
    return target


def multiply_adds(count: int) -> Callable[[], object] | None:
    """As many multiply-adds in float32, in registers, on torch's number of threads."""
    library = built("multiply_adds.cpp", "-pthread")
    if library is None:
        return None
    helper = ctypes.CDLL(str(library))
    helper.multiply_adds.argtypes = [ctypes.c_int64, ctypes.c_int]
    return functools.partial(helper.multiply_adds, count, torch.get_num_threads())


def cdist(x: Tensor, centroids: Tensor) -> Callable[[], Tensor]:
    return lambda: torch.cdist(x, centroids).argmin(1)


def addmm(x: Tensor, centroids: Tensor) -> Callable[[], Tensor]:
    def search() -> Tensor:
        half = 0.5 * centroids.square().sum(1)
        return torch.cat([torch.addmm(half, part, centroids.t(), alpha=-1).argmin(1) for part in x.split(8192)])

    return search


def _faiss() -> Any:
    faiss: Any = library("faiss")
    if faiss is not None:
        faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


def faiss_flat(x: Tensor, centroids: Tensor) -> Callable[[], Tensor] | None:
    """Its index is built beforehand: it keeps the centroids as they are, and their norms."""
    faiss = _faiss()
    if faiss is None:
        return None
    index = faiss.IndexFlatL2(x.shape[1])
    index.add(centroids.numpy())
    rows = x.numpy()
    return lambda: torch.from_numpy(index.search(rows, 1)[1][:, 0])


def _limited(call: Callable[[], Any]) -> Callable[[], Any]:
    pools: Any = library("threadpoolctl")
    threads = torch.get_num_threads()

    def run() -> Any:
        with pools.threadpool_limits(threads):
            return call()

    return run


def sklearn_argmin(x: Tensor, centroids: Tensor) -> Callable[[], Tensor] | None:
    metrics: Any = library("sklearn.metrics")
    if metrics is None:
        return None
    rows, means = x.numpy(), centroids.numpy()
    return _limited(lambda: torch.from_numpy(metrics.pairwise_distances_argmin(rows, means)))


def index_add_step(x: Tensor, centroids: Tensor) -> Callable[[], object]:
    search, means, size = cdist(x, centroids), centroids.clone(), torch.zeros(len(centroids))

    def step() -> None:
        index = search()
        sums = torch.zeros_like(means).index_add_(0, index, x)
        count = torch.bincount(index, minlength=len(means)).float()
        means.lerp_(torch.where(count[:, None] > 0, sums / count.clamp_min(1)[:, None], means), 1 - DECAY)
        size.lerp_(count, 1 - DECAY)

    return step


def faiss_step(x: Tensor, centroids: Tensor) -> Callable[[], object] | None:
    """One iteration of its k-means from these centroids."""
    faiss = _faiss()
    if faiss is None:
        return None
    rows, means, (clusters, dim) = x.numpy(), centroids.numpy(), centroids.shape

    def step() -> None:
        kmeans = faiss.Kmeans(dim, clusters, niter=1, max_points_per_centroid=len(rows), min_points_per_centroid=1)
        kmeans.train(rows, init_centroids=means)

    return step


def sklearn_step(x: Tensor, centroids: Tensor) -> Callable[[], object] | None:
    """The one iteration inside scikit-learn's Lloyd, without what `fit` does around it."""
    lloyd: Any = library("sklearn.cluster._k_means_lloyd")
    if lloyd is None:
        return None
    rows, old = x.numpy(), centroids.numpy()
    ones, labels = torch.ones(len(x)).numpy(), torch.zeros(len(x), dtype=torch.int32).numpy()
    new, weight, shift = (torch.zeros_like(t).numpy() for t in (centroids, centroids[:, 0], centroids[:, 0]))
    threads = torch.get_num_threads()
    pools: Any = library("threadpoolctl")

    def step() -> None:
        # as its own `fit` does: its threads are outside BLAS
        with pools.threadpool_limits(1, user_api="blas"):
            lloyd.lloyd_iter_chunked_dense(rows, ones, old, new, weight, labels, shift, threads)

    return step


def fastkmeans_step(x: Tensor, centroids: Tensor) -> Callable[[], object] | None:
    """One iteration, with its choice of initial rows."""
    fast: Any = library("fastkmeans")
    if fast is None:
        return None
    rows, (clusters, dim) = x.numpy(), centroids.shape
    return lambda: fast.FastKMeans(dim, clusters, niter=1, gpu=False, device="cpu").train(rows)


def vector_quantize_step(x: Tensor, centroids: Tensor) -> Callable[[], object] | None:
    """A training step of its codebook with exponential moving average."""
    module: Any = library("vector_quantize_pytorch")
    if module is None:
        return None
    clusters, dim = centroids.shape
    layer = module.VectorQuantize(dim=dim, codebook_size=clusters, decay=DECAY)
    book = layer._codebook
    book.embed.data.copy_(centroids[None])
    book.embed_avg.copy_(centroids[None])
    book.train()
    rows = x[None]

    def step() -> None:
        with torch.no_grad():
            book(rows)

    return step


SEARCHES: dict[str, Any] = {"cdist": cdist, "addmm": addmm, "faiss": faiss_flat, "scikit-learn": sklearn_argmin}
STEPS: dict[str, Any] = {
    "index_add": index_add_step,
    "faiss": faiss_step,
    "scikit-learn": sklearn_step,
    "fastkmeans": fastkmeans_step,
    "vector-quantize-pytorch": vector_quantize_step,
}
