"""The centroid ops under torch.compile, the same bits from any number of threads, errors with names."""

import math

import pytest
import torch

from clusterq import ops


def test_results_do_not_depend_on_the_number_of_threads():
    x, centroids = torch.randn(5000, 24), torch.randn(70, 24)
    x[:, 0] = x[:, 0].round()

    def everything():
        a, b = x.clone().requires_grad_(), centroids.clone().requires_grad_()
        index, distance = ops.nearest_centroid(a, b)
        (distance * torch.arange(5000)).sum().backward()
        means, size = centroids.clone(), torch.zeros(70)
        ops.assign_and_update_(means, size, x, 0.9)
        return index, distance.detach(), a.grad, b.grad, means, size

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        wanted = everything()
        for count in (2, 3, 4):
            torch.set_num_threads(count)
            for _ in range(3):
                assert all(torch.equal(a, b) for a, b in zip(wanted, everything(), strict=True))
    finally:
        torch.set_num_threads(threads)


def test_compile_forward_backward_and_update():
    def step(x, centroids, means, size):
        index, distance = ops.nearest_centroid(x, centroids)
        ops.update_centroids_(means, size, x, index, 0.9, mode="codebook")
        ops.assign_and_update_(means, size, x, 0.5)
        return index, (distance * 2).sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, clusters, dim in ((30, 5, 4), (41, 7, 6)):
        results = []
        x, centroids = torch.randn(rows, dim), torch.randn(clusters, dim)
        for function in (step, compiled):
            a, b = x.clone().requires_grad_(), centroids.clone().requires_grad_()
            means, size = centroids.clone(), torch.ones(clusters)
            index, loss = function(a, b, means, size)
            loss.backward()
            results.append((index, loss.detach(), a.grad, b.grad, means, size))
        assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


def test_bad_arguments():
    x, c, size = torch.randn(6, 3), torch.randn(4, 3), torch.zeros(4)
    index = torch.zeros(6, dtype=torch.int64)
    for error, name, args in (
        (TypeError, "x has dtype torch.int64", (index[:, None], c)),
        (TypeError, "centroids has dtype torch.int64", (x, index[:, None])),
        (ValueError, "x has shape", (x[0], c)),
        (ValueError, "centroids has shape", (x, c[None])),
        (ValueError, "centroids has shape", (x, c[:0])),
        (ValueError, "D = 3 but centroids has D = 2", (x, c[:, :2])),
        (ValueError, "B = 2 but centroids has B = 1", (x.expand(2, 6, 3), c[None])),
        (TypeError, "float64", (x.double(), c)),
        (ValueError, "centroids is on meta", (x, c.to("meta"))),
        (TypeError, "x is list", ([[1.0]], c)),
        (TypeError, "centroids is ndarray", (x, c.numpy())),
    ):
        with pytest.raises(error, match=name):
            ops.nearest_centroid(*args)
    for error, name, args, options in (
        (TypeError, "cluster_size has dtype", (c, size.double(), x, index, 0.5), {}),
        (ValueError, "cluster_size has shape", (c, size[:3], x, index, 0.5), {}),
        (TypeError, "index has dtype", (c, size, x, index.int(), 0.5), {}),
        (ValueError, "index has shape", (c, size, x, index[:5], 0.5), {}),
        (ValueError, "decay is 1.5", (c, size, x, index, 1.5), {}),
        (ValueError, "decay is nan", (c, size, x, index, math.nan), {}),
        (ValueError, "mode is 'sum'", (c, size, x, index, 0.5), {"mode": "sum"}),
        (ValueError, "weights has shape", (c, size, x, index, 0.5), {"weights": torch.ones(5)}),
        (TypeError, "weights is list", (c, size, x, index, 0.5), {"weights": [1.0] * 6}),
        (TypeError, "cluster_size is list", (c, [0.0] * 4, x, index, 0.5), {}),
        (TypeError, "index is list", (c, size, x, [0] * 6, 0.5), {}),
    ):
        with pytest.raises(error, match=name):
            ops.update_centroids_(*args, **options)
    with pytest.raises(ValueError, match="mode is 'sum'"):
        ops.assign_and_update_(c, size, x, 0.5, mode="sum")


def test_tensors_written_in_place_must_not_share_memory():
    x, index = torch.randn(6, 3), torch.zeros(6, dtype=torch.int64)
    shared = torch.as_strided(torch.randn(6), (4, 3), (1, 1))
    for name, centroids, size in (
        ("centroids", torch.randn(1, 3).expand(4, 3), torch.zeros(4)),
        ("centroids", shared, torch.zeros(4)),
        ("cluster_size", torch.randn(4, 3), torch.zeros(1).expand(4)),
    ):
        before = centroids.clone(), size.clone()
        with pytest.raises(ValueError, match=f"{name} has shape .* share memory"):
            ops.update_centroids_(centroids, size, x, index, 0.5)
        with pytest.raises(ValueError, match=f"{name} has shape .* share memory"):
            ops.assign_and_update_(centroids, size, x, 0.5)
        assert torch.equal(centroids, before[0]) and torch.equal(size, before[1])


def test_backward_after_an_update_of_the_same_centroids_is_an_error():
    """The saved centroids are gone; without the version counter the gradient would be that of the new ones."""
    x, centroids, size = torch.randn(20, 3, requires_grad=True), torch.randn(4, 3), torch.zeros(4)
    index, distance = ops.nearest_centroid(x, centroids)
    ops.update_centroids_(centroids, size, x, index, 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        distance.sum().backward()
    _, distance = ops.nearest_centroid(x, centroids)
    ops.assign_and_update_(centroids, size, x, 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        distance.sum().backward()


@pytest.mark.parametrize("wrong", [-2, 4, 2**40])
def test_index_out_of_range_changes_nothing(wrong):
    centroids, size, index = torch.randn(4, 3), torch.ones(4), torch.zeros(6, dtype=torch.int64)
    index[5] = wrong
    before = centroids.clone()
    with pytest.raises(RuntimeError, match="index has"):
        ops.update_centroids_(centroids, size, torch.randn(6, 3), index, 0.5)
    assert torch.equal(centroids, before) and torch.equal(size, torch.ones(4))
