"""k-means against scikit-learn from the same start, and what it owes beyond that."""

from __future__ import annotations

import numpy
import pytest
import torch
from sklearn.cluster import KMeans, kmeans_plusplus
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from clusterq import ops
from clusterq.ops.kmeans import _draw, plus_plus_start

INF, NAN = float("inf"), float("nan")


def blobs(
    count: int, features: int, centers: int, seed: int, *, spread: float = 3.0, dtype: torch.dtype = torch.float64
) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    middle = spread * torch.randn(centers, features, generator=random, dtype=torch.float64)
    member = torch.randint(0, centers, (count,), generator=random)
    return (middle[member] + torch.randn(count, features, generator=random, dtype=torch.float64)).to(dtype)


def some_rows(x: Tensor, k: int, seed: int) -> Tensor:
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:k]].clone()


def sklearn_run(x: Tensor, init: Tensor, weights: Tensor | None = None, **options: object) -> KMeans:
    model = KMeans(len(init), init=init.numpy(), n_init=1, algorithm="lloyd", **options)
    return model.fit(x.numpy(), sample_weight=None if weights is None else weights.numpy())


def assert_same(result: ops.KMeansResult, theirs: KMeans, rtol: float) -> None:
    assert result.labels.tolist() == theirs.labels_.tolist()
    assert result.inertia.item() == pytest.approx(theirs.inertia_, rel=rtol)
    assert result.n_iter.item() == theirs.n_iter_
    wanted = torch.from_numpy(theirs.cluster_centers_).to(result.cluster_centers.dtype)
    torch.testing.assert_close(result.cluster_centers, wanted, rtol=rtol, atol=rtol)


def direct(x: Tensor, centers: Tensor, weights: Tensor) -> tuple[Tensor, float]:
    """Labels and inertia by all float64 distances."""
    distances = (x.double()[:, None] - centers.double()).square().sum(-1)
    best, labels = distances.min(1)
    return labels, (best * weights.double()).sum().item()


SHAPES = [(600, 5, 8), (300, 1, 4), (50, 3, 1), (9, 2, 9)]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("count", "features", "k", "dtype", "rtol"),
    [(*shape, torch.float64, 1e-12) for shape in [*SHAPES, (2000, 17, 30)]]
    + [(*shape, torch.float32, 1e-5) for shape in SHAPES],
)
def test_same_start_same_result(
    count: int, features: int, k: int, dtype: torch.dtype, rtol: float, weighted: bool
) -> None:
    for seed in range(3):
        x = blobs(count, features, 6, seed, dtype=dtype)
        init = some_rows(x, k, seed)
        weights = torch.rand(count, dtype=dtype) if weighted else None
        assert_same(ops.kmeans(x, k, init=init, sample_weight=weights), sklearn_run(x, init, weights), rtol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("max_iter", [1, 300])
def test_labels_and_inertia_belong_to_the_centres(dtype: torch.dtype, max_iter: int) -> None:
    """Clusters that overlap, where scikit-learn's float32 labels depend on its rounding."""
    x, weights = blobs(2000, 17, 6, 3, dtype=dtype), torch.rand(2000)
    result = ops.kmeans(x, 30, sample_weight=weights, max_iter=max_iter)
    labels, inertia = direct(x, result.cluster_centers, weights)
    assert result.labels.tolist() == labels.tolist()
    assert result.inertia.item() == pytest.approx(inertia, rel=1e-6)


@pytest.mark.parametrize("tol", [0.0, 1e-4, 1e-2, 0.3])
@pytest.mark.parametrize("max_iter", [1, 2, 5, 300])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_stops_where_scikit_learn_stops(tol: float, max_iter: int) -> None:
    seen = set()
    for seed in range(4):
        x = blobs(500, 4, 5, seed)
        init = some_rows(x, 12, seed)
        theirs = sklearn_run(x, init, tol=tol, max_iter=max_iter)
        assert_same(ops.kmeans(x, 12, init=init, tol=tol, max_iter=max_iter), theirs, 1e-12)
        seen.add(theirs.n_iter_)
    assert len(seen) > 1 or max_iter < 300


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_rows_have_float32_centres(dtype: torch.dtype) -> None:
    x = blobs(800, 6, 5, 1).to(dtype)
    init = some_rows(x, 7, 1)
    result = ops.kmeans(x, 7, init=init)
    assert result.cluster_centers.dtype == torch.float32 and result.inertia.dtype == torch.float64
    assert_same(result, sklearn_run(x.float(), init.float()), 1e-5)


def test_rows_far_from_the_origin() -> None:
    """Distances of 1 at 1e4: float32 scores that contain |x|^2 would be rounded to multiples of 8."""
    x = (blobs(1000, 8, 5, 2) + 1e4).float()
    init = some_rows(x, 5, 2)
    result = ops.kmeans(x, 5, init=init)
    theirs = sklearn_run(x.double(), init.double())
    assert result.labels.tolist() == theirs.labels_.tolist()
    assert result.inertia.item() == pytest.approx(theirs.inertia_, rel=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_one_empty_cluster_is_filled_as_there(weighted: bool) -> None:
    for seed in range(5):
        x = blobs(400, 3, 4, seed)
        init = some_rows(x, 5, seed)
        init[2] = 1e3  # nobody's nearest
        weights = torch.rand(400, dtype=torch.float64) + 0.1 if weighted else None
        result = ops.kmeans(x, 5, init=init, sample_weight=weights)
        assert_same(result, sklearn_run(x, init, weights), 1e-12)
        assert result.labels.bincount(minlength=5).min() > 0


def test_several_empty_clusters_take_the_farthest_rows_in_order() -> None:
    x = torch.tensor([[0.0], [1.0], [2.0], [9.0], [-6.0], [5.0], [9.0]])
    init = torch.tensor([[1.0], [100.0], [200.0], [-300.0]])
    # The farthest: 9 (twice, the first row first) and -6; centre 0 keeps 0, 1, 2 and 5.
    result = ops.kmeans(x, 4, init=init, max_iter=1)
    assert result.cluster_centers.squeeze(1).tolist() == [2.0, 9.0, 9.0, -6.0]
    assert result.labels.tolist() == [0, 0, 0, 1, 3, 0, 1]
    # In the next iterations cluster 2, empty again, takes what is then the farthest.
    result = ops.kmeans(x, 4, init=init)
    assert sorted(result.cluster_centers.squeeze(1).tolist()) == [-6.0, 1.0, 5.0, 9.0] and result.inertia == 2


def test_more_clusters_than_different_rows() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).repeat(10, 1)
    for init in ("k-means++", torch.randn(5, 2)):
        result = ops.kmeans(x, 5, init=init)
        assert result.inertia == 0 and torch.isfinite(result.cluster_centers).all()
        assert torch.equal(result.cluster_centers[result.labels], x)
    # A cluster that no row is far enough for keeps its centre.
    result = ops.kmeans(torch.tensor([[0.0], [0.0], [4.0]]), 3, init=torch.tensor([[0.0], [4.0], [100.0]]))
    assert result.cluster_centers.squeeze(1).tolist() == [0.0, 4.0, 100.0]


def test_rows_of_weight_0_get_a_label_and_nothing_else() -> None:
    x = blobs(300, 3, 4, 5)
    weights = torch.ones(300, dtype=torch.float64)
    # Far away, and one centre begins empty: none of these may be given to it.
    x[::10], weights[::10] = x[::10] * 50, 0
    used = weights > 0
    init = some_rows(x[used], 4, 5)
    init[0] = 1e4
    # Without a tolerance, which follows the variance of all rows.
    result = ops.kmeans(x, 4, init=init, sample_weight=weights, tol=0)
    assert_same(result._replace(labels=result.labels[used]), sklearn_run(x[used], init, tol=0), 1e-12)
    assert result.labels.tolist() == direct(x, result.cluster_centers, weights)[0].tolist()


@pytest.mark.parametrize("init", ["k-means++", "given"])
def test_rows_that_are_not_finite_are_left_out(init: str) -> None:
    x = blobs(200, 3, 4, 6, dtype=torch.float32)
    bad = torch.tensor([0, 7, 8, 199])
    x[0, 1], x[7, 0], x[8, 2], x[199] = NAN, INF, -INF, NAN
    kept = torch.ones(200, dtype=torch.bool).index_fill(0, bad, False)
    start = some_rows(x[kept], 4, 6) if init == "given" else init
    result = ops.kmeans(x, 4, init=start, generator=torch.Generator().manual_seed(3))
    assert result.labels[bad].tolist() == [-1] * 4
    labels, inertia = direct(x[kept], result.cluster_centers, torch.ones(196))
    assert result.labels[kept].tolist() == labels.tolist() and result.inertia.item() == pytest.approx(inertia, rel=1e-6)
    if init == "given":
        assert_same(result._replace(labels=result.labels[kept]), sklearn_run(x[kept], start), 1e-5)


@pytest.mark.parametrize("tol", [0.0, 1e-4, 0.05])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_batch_is_as_many_clusterings(dtype: torch.dtype, tol: float) -> None:
    problems = [blobs(300, 4, centers, seed, dtype=dtype) for seed, centers in enumerate((1, 3, 9))]
    starts = [some_rows(x, 6, seed) for seed, x in enumerate(problems)]
    starts[1][4] = 1e3
    weights = torch.rand(3, 300)
    batch = ops.kmeans(torch.stack(problems), 6, init=torch.stack(starts), sample_weight=weights, tol=tol)
    assert len(set(batch.n_iter.tolist())) > 1, "one of them should go on when another has stopped"
    for b in range(3):
        alone = ops.kmeans(problems[b], 6, init=starts[b], sample_weight=weights[b], tol=tol)
        for mine, own in zip(batch, alone, strict=True):
            assert torch.equal(mine[b], own)


def test_a_start_by_k_means_plus_plus_finds_blobs_apart() -> None:
    x = blobs(2000, 3, 10, 7, spread=100.0)
    best = sklearn_run(x, some_rows(x, 10, 7)).inertia_
    found = [ops.kmeans(x, 10, generator=torch.Generator().manual_seed(s)).inertia.item() for s in range(10)]
    theirs = [KMeans(10, n_init=1, random_state=s).fit(x.numpy()).inertia_ for s in range(10)]
    assert max(found) == pytest.approx(min(theirs), rel=1e-9) and best >= min(theirs) * (1 - 1e-9)


@pytest.mark.parametrize(("count", "features", "k"), [(600, 5, 20), (1500, 8, 40)])
def test_k_means_plus_plus_is_no_worse_than_scikit_learn_s(count: int, features: int, k: int) -> None:
    x = blobs(count, features, 8, 8)
    seeds = range(10)
    ours = [ops.kmeans(x, k, generator=torch.Generator().manual_seed(s)).inertia.item() for s in seeds]
    theirs = [KMeans(k, n_init=1, random_state=s).fit(x.numpy()).inertia_ for s in seeds]
    noise = numpy.std(theirs) / len(seeds) ** 0.5
    assert numpy.mean(ours) <= numpy.mean(theirs) + 2 * noise
    # The start alone, of which Lloyd's iterations forgive much.
    weights = torch.ones(count, dtype=torch.float64)
    starts = [plus_plus_start(x[None], weights[None], k, torch.Generator().manual_seed(s))[0] for s in seeds]
    ours = [direct(x, start, weights)[1] for start in starts]
    begun = [torch.from_numpy(kmeans_plusplus(x.numpy(), k, random_state=s)[0]) for s in seeds]
    theirs = [direct(x, start, weights)[1] for start in begun]
    assert numpy.mean(ours) <= numpy.mean(theirs) + 2 * numpy.std(theirs) / len(seeds) ** 0.5


def test_k_means_plus_plus_chooses_different_rows_that_count() -> None:
    x = blobs(100, 4, 3, 9, dtype=torch.bfloat16)
    weights = (torch.arange(100) % 3 > 0).double()
    start = plus_plus_start(x[None], weights[None].float(), 20, torch.Generator().manual_seed(1))[0]
    places = (start[:, None] == x[weights > 0]).all(-1)
    assert places.any(1).all() and len(torch.unique(start, dim=0)) == 20


def test_rows_are_drawn_in_proportion() -> None:
    mass = torch.tensor([[0.0, 1.0, 2.0, 0.0, 5.0, 0.0]], dtype=torch.float64) * 1e-30
    drawn = _draw(mass, mass, torch.rand(1, 40000, dtype=torch.float64))[0].bincount(minlength=6).double()
    wanted = mass[0] / mass.sum() * 40000
    assert (drawn[wanted == 0] == 0).all()
    chosen = wanted > 0
    # 99.9 % quantile of chi-squared with two degrees of freedom
    assert ((drawn - wanted)[chosen].square() / wanted[chosen]).sum() < 13.8
    ends = torch.tensor([[0.0, 1 - 2.0**-53]], dtype=torch.float64)
    assert _draw(mass, mass, ends)[0].tolist() == [1, 4]
    assert _draw(torch.zeros_like(mass), mass, ends)[0].tolist() == [1, 4]


def test_the_generator_decides() -> None:
    x = blobs(200, 3, 4, 10, dtype=torch.float32)

    def centers(seed: int) -> Tensor:
        return ops.kmeans(x, 9, max_iter=1, generator=torch.Generator().manual_seed(seed)).cluster_centers

    assert torch.equal(centers(1), centers(1)) and not torch.equal(centers(1), centers(2))
    torch.manual_seed(1)
    assert torch.equal(ops.kmeans(x, 9, max_iter=1).cluster_centers, centers(1))


def test_any_number_of_threads_gives_the_same_bits() -> None:
    x = blobs(5000, 7, 9, 11, dtype=torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(ops.kmeans(x, 12, generator=torch.Generator().manual_seed(1)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


class Watch(TorchDispatchMode):
    """Counts what makes the host wait, and the elements of the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.waits, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        assert func not in (torch.ops.aten.nonzero.default, torch.ops.aten.masked_select.default), func
        self.waits += func == torch.ops.aten._local_scalar_dense.default
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.untyped_storage().nbytes() // value.element_size())
        return result


def test_the_host_waits_once_per_assignment_and_no_matrix_of_distances_is_made() -> None:
    x = blobs(3000, 4, 9, 12, dtype=torch.float32)
    init = some_rows(x, 64, 12)
    init[5] = 1e3
    for start in (init, "k-means++"):
        with Watch() as watch:
            result = ops.kmeans(x, 64, init=start, sample_weight=torch.rand(3000))
        assert result.n_iter > 2 and watch.waits <= result.n_iter + 1
        # x has 4 numbers a row, the choice of a start 2 + ln 64 = 6
        assert watch.largest <= 3000 * 6 < 3000 * 64 / 10


def test_no_gradient_and_arguments_stay_as_they_are() -> None:
    x = blobs(100, 3, 4, 13, dtype=torch.float32).requires_grad_()
    init = some_rows(x.detach(), 4, 1)
    before = init.clone()
    result = ops.kmeans(x, 4, init=init)
    assert torch.equal(init, before) and not any(field.requires_grad for field in result)


X = torch.randn(10, 3)


@pytest.mark.parametrize(
    ("error", "text", "change"),
    [
        (TypeError, "x is list", {"x": [[1.0]]}),
        (TypeError, "x has dtype torch.int64", {"x": X.long()}),
        (ValueError, r"x has shape \(10,\)", {"x": X[:, 0]}),
        (ValueError, r"x has shape \(10, 0\)", {"x": X[:, :0]}),
        (ValueError, "k is 0", {"k": 0}),
        (TypeError, "k is 2.0", {"k": 2.0}),
        (ValueError, "k is 11; wanted at most N = 10", {"k": 11}),
        (ValueError, "init is 'random'", {"init": "random"}),
        (ValueError, r"init has shape \(3, 3\)", {"init": X[:3]}),
        (ValueError, "init has values", {"k": 2, "init": torch.full((2, 3), NAN)}),
        (TypeError, "init has dtype torch.int64", {"init": X[:2].long()}),
        (ValueError, "sample_weight has shape", {"sample_weight": torch.ones(9)}),
        (
            TypeError,
            "sample_weight has dtype torch.complex64",
            {"sample_weight": torch.ones(10, dtype=torch.complex64)},
        ),
        (ValueError, "sample_weight has values", {"sample_weight": -torch.ones(10)}),
        (ValueError, "sample_weight has values", {"sample_weight": torch.ones(10).index_fill(0, torch.tensor(3), NAN)}),
        (ValueError, "x has no row to cluster", {"sample_weight": torch.zeros(10)}),
        (ValueError, "x has no row to cluster", {"x": X * NAN}),
        (ValueError, "max_iter is 0", {"max_iter": 0}),
        (ValueError, "tol is -1", {"tol": -1.0}),
        (ValueError, "precision is 'tf32'", {"precision": "tf32"}),
    ],
)
def test_bad_arguments_are_named(error: type[Exception], text: str, change: dict[str, object]) -> None:
    with pytest.raises(error, match=text):
        ops.kmeans(**{"x": X, "k": 2, **change})  # type: ignore[arg-type]
