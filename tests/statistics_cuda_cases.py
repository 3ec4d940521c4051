"""Statistics where the CUDA kernels take another way: planes that start anywhere, parts, long lists, used-up counters.

Run as `statistics_kernel_cases.py` is, on CUDA or on emulated threads; against the same float64 definitions.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, os.path.dirname(__file__))
from alignment_kernel_cases import check, problem
from kernel_cases import DEVICE, INF, NAN, wide
from kernel_cases import fq as ops
from statistics_kernel_cases import (
    arranged,
    assert_statistics,
    class_moments,
    close_to,
    instance_moments,
    make,
    moments,
    own_gradient,
    parameters_of,
    per_position,
    same_layout,
)


def at_offset(shape, dtype, offset):
    """A view that starts `offset` elements into its memory."""
    count = math.prod(shape)
    return (torch.randn(count + offset, dtype=torch.float64) * 2 + 3).to(dtype)[offset:].view(shape)


# Planes of more than a block's chunk, one element more than a part, of odd length, and small ones beside them.
@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "shape", [(2, 3, 33, 35), (1, 2, 1025), (1, 1, 2051), (3, 5, 1027), (1, 1, 20011), (600, 1, 1033), (2, 7, 15)]
)
def test_planes_that_start_anywhere(shape, dtype, offset):
    x, grad = at_offset(shape, dtype, offset), at_offset(shape, dtype, 2)
    images, channels, spacing = *shape[:2], torch.finfo(wide(dtype)).eps
    weight, bias, mean, var, eps = parameters_of(channels, dtype)
    unit = per_position(torch.rsqrt(var.double() + eps)[None], x)
    assert_statistics(ops.batch_norm_statistics(x, 1, None), moments(x, None, 1), dtype)
    y, *statistics = ops.batch_norm_instance_statistics(x, weight, bias, mean, var, eps)
    normal = (x.double() - per_position(mean[None], x)) * unit * per_position(weight[None], x)
    exact = normal + per_position(bias[None], x)
    close_to(y, exact, 5 * spacing * (normal.abs() + exact.abs()))
    for got in (statistics, ops.instance_statistics(x)):
        assert_statistics(got, instance_moments(x), dtype)
    rows = torch.randn(3, images, channels, dtype=wide(dtype)).unbind()
    want, size = own_gradient(x, *rows, 0.25, 0.125)
    close_to(ops.statistics_backward(x, *rows, 0.25, 0.125), want, 4 * spacing * size)
    terms = grad.double() * (x.double() - per_position(mean[None], x)) * unit
    dims = [0, *range(2, x.dim())]
    for got, wanted in zip(ops.batch_norm_parameter_backward(grad, x, mean, var, eps), (terms, grad), strict=True):
        wanted = wanted.double()
        close_to(got, wanted.sum(dims), 16 * spacing * wanted.abs().sum(dims))


WAYS = [(3, 4, 7, 7), (3, 4, 8, 8), (2, 3, 41, 43), (1, 2, 130, 140), (3, 20, 9)]


@pytest.mark.parametrize("shape", WAYS)
@pytest.mark.parametrize("layout", ["contiguous", "inner"])
@pytest.mark.parametrize("spread, offset", [(1e18, 1e20), (1e30, 0), (3e37, 1e38), (1.0, 1e5)])
def test_squares_that_overflow(shape, layout, spread, offset):
    x = arranged((torch.randn(shape, dtype=torch.float64) * spread + offset).float(), layout)
    for got, (mean, var) in (
        (ops.instance_statistics(x), instance_moments(x)),
        (ops.batch_norm_statistics(x, 0, None), moments(x)),
    ):
        assert torch.all((got[0].double() - mean).abs() <= 1e-5 * var.sqrt() + 2.4e-7 * mean.abs())
        fits = var < torch.finfo(torch.float32).max
        assert torch.all((got[1].double() - var).abs()[fits] <= 1e-5 * var[fits]) and torch.all(got[1][~fits] == INF)


@pytest.mark.parametrize("shape", WAYS)
@pytest.mark.parametrize("layout", ["contiguous", "inner"])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_bad_value_on_every_way(shape, layout, bad):
    clean = arranged(torch.randn(shape), layout)
    x = clean.clone()
    x[(0, 1) + (3,) * (len(shape) - 2)] = bad
    for function, where in (
        (ops.instance_statistics, (0, 1)),
        (lambda t: ops.batch_norm_statistics(t, 0, None), (1,)),
        (lambda t: ops.instance_statistics_list([t]), (0, 1)),
    ):
        for got, wanted in zip(function(x), function(clean), strict=True):
            assert (~got.isfinite()).nonzero().tolist() == [list(where)] and wanted.isfinite().all()
            assert torch.equal(got[got.isfinite()], wanted[got.isfinite()])


def test_more_tensors_than_a_table_holds():
    shapes = [(3, 1 + i % 7, 1 + i % 5, 3 + i % 9) for i in range(80)] + [(3, 2, 40, 41), (3, 2, 40, 40), (3, 5)]
    xs = [make(s, ("contiguous", "inner")[i % 2], torch.float32, i) for i, s in enumerate(shapes)]
    mean, var = ops.instance_statistics_list(xs)
    wanted = [instance_moments(x) for x in xs]
    assert_statistics((mean, var), [torch.cat(part, 1) for part in zip(*wanted, strict=True)], torch.float32)
    rows, start = torch.randn(3, 3, mean.shape[1]).unbind(), 0
    for x, dx in zip(xs, ops.statistics_backward_list(xs, *rows), strict=True):
        values, part = math.prod(x.shape[2:]), [t[:, start : start + x.shape[1]] for t in rows]
        want, size = own_gradient(x, *part, 1 / values, 2 / values)
        close_to(dx, want, 4 * torch.finfo(torch.float32).eps * size)
        same_layout(dx, x)
        start += x.shape[1]


@pytest.mark.parametrize("shape", [(600, 8, 2), (40, 64, 5, 5), (700, 40), (2, 1, 9000), (530, 3, 3)])
def test_many_images_and_classes(shape):
    weights = torch.rand(shape[0]) * (torch.rand(shape[0]) > 0.3)
    labels = torch.randint(-2, 30, shape[:1])
    for layout in ("contiguous", "inner") if len(shape) > 2 else ("contiguous",):
        x = arranged(torch.randn(shape) + 1e3, layout)
        for share in (None, weights):
            count, total, *statistics = ops.class_statistics(x, labels, 28, share)
            true_count, true_total, *wanted = class_moments(x, labels, 28, share)
            assert torch.equal(count, true_count)
            close_to(total, true_total, 1e-6 * true_total)
            assert_statistics(statistics, wanted, torch.float32)
        assert_statistics(ops.batch_norm_statistics(x, 1, weights), moments(x, weights, 1), torch.float32)


def test_the_loss_without_a_counter():
    """Launches of captured graphs keep their counters; where none is left, another launch sums the loss."""
    if DEVICE != "cpu":
        pytest.skip("emulated captures")
    # Of tests/cuda_emulation, in the library that serves the ops.
    maps = Path("/proc/self/maps").read_text().splitlines()
    path = next(line.split()[-1] for line in maps if line.endswith("emulated.so"))
    library = ctypes.CDLL(path)
    captured = ctypes.c_int.in_dll(library, "emulated_capture")
    launches = ctypes.c_longlong.in_dll(library, "emulated_launches")
    counts = set()
    one, nothing = torch.ones(1), [None] * 3
    arguments = (one[None], one[None], one, one, torch.ones(3, 1), torch.tensor([0, 1]), 1.0, True, None)
    captured.value = 1
    try:
        for _ in range(2100):
            before = launches.value
            ops.alignment_loss(*arguments, None, None, 0, 0, *nothing, [], False, *nothing)
            counts.add(launches.value - before)
        check(problem(), torch.float32)
    finally:
        captured.value = 0
    assert counts == {1, 2}
