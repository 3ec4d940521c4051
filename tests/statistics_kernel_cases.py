"""What every accelerated kernel of the BatchNorm statistics must do, on the device CLUSTERQ_TEST_DEVICE.

Run as `kernel_cases.py` is. Expected values are float64 definitions: sums over the images and positions concerned, the
closed forms of the gradients, autograd for the alignment loss (`alignment_kernel_cases.py`).
"""

from __future__ import annotations

import math
import os
import sys

import pytest
import torch

import clusterq.ops

sys.path.insert(0, os.path.dirname(__file__))
from kernel_cases import (
    DEVICE,
    INF,
    NAN,
    quiet_numpy,  # noqa: F401 (a fixture that every case uses)
    wide,
)
from kernel_cases import fq as ops
from statistics_formulas import (
    arranged,
    assert_statistics,
    class_moments,
    close_to,
    hard_data,
    instance_moments,
    make,
    moments,
    own_gradient,
    parameters_of,
    per_position,
    random_labels,
    row_sets,
    same_layout,
)

# Positions per image 1, 7, 17, 49, 64, 3136 and more than one part; channels 1, 3, 16, 65, 100; one image and many.
SHAPES = [
    (5, 6),
    (3000, 3),
    (70, 100),
    (1, 1),
    (3, 4, 17),
    (6, 1, 7),
    (2, 65, 7, 7),
    (9, 16, 8, 8),
    (4, 100, 1, 1),
    (1, 3, 56, 56),
    (2, 3, 2, 3, 4),
    (3000, 2, 1, 3),
    (1, 2, 90, 110),
    # Off 16 bytes, and a little less or more than a tile of 4096.
    (1, 2, 4095),
    (1, 2, 65, 65),
    (2, 3, 4099),
]
# In every layout and, in two of them, in every dtype.
TYPICAL = [(5, 6), (3, 4, 17), (9, 16, 8, 8), (2, 65, 7, 7), (2, 3, 2, 3, 4)]
LAYOUTS = ("contiguous", "inner", "sliced", "reversed", "offset")
CASES = [
    (shape, layout, torch.float32)
    for shape in SHAPES
    for layout in (LAYOUTS if shape in TYPICAL else LAYOUTS[: 1 if shape[0] == 3000 else 2])
    if len(shape) > 2 or layout != "inner"
] + [
    (shape, layout, dtype)
    for shape in TYPICAL
    for layout in LAYOUTS[:2]
    if len(shape) > 2 or layout != "inner"
    for dtype in (torch.bfloat16, torch.float16, torch.float64)
    if layout == "contiguous" or dtype != torch.float16
]
CASES.append(((1, 3, 4091), "contiguous", torch.bfloat16))
EMPTY = [(0, 4, 3, 3), (3, 0, 2, 2), (2, 4, 0, 3), (0, 4), (3, 0)]
every_case = pytest.mark.parametrize("shape, layout, dtype", CASES)


def test_a_kernel_serves_every_op():
    kernels = {row.op: row.kernel for row in clusterq.ops.backends() if row.device == DEVICE}
    wanted = {"triton"} if os.environ.get("CLUSTERQ_BACKEND") == "triton" else {"cuda", "triton"}
    for name in (
        "instance_statistics", "instance_statistics_list", "batch_norm_statistics", "class_statistics",
        "batch_norm_instance_statistics", "batch_norm_batch_statistics", "statistics_backward",
        "statistics_backward_list", "batch_norm_statistics_backward", "batch_norm_parameter_backward",
    ):  # fmt: skip
        assert kernels[name] in wanted, name


@every_case
def test_statistics(shape, layout, dtype, poisoned):
    x, weights = make(shape, layout, dtype), torch.randint(0, 4, shape[:1]) * 0.5
    assert_statistics(ops.instance_statistics(x), instance_moments(x), dtype)
    for correction in (0, 1):
        assert_statistics(ops.batch_norm_statistics(x, correction, None), moments(x, None, correction), dtype)
    weighted = ops.batch_norm_statistics(x, 1, weights.to(wide(dtype)))
    assert_statistics(weighted, moments(x, weights, 1), dtype)


@every_case
def test_class_statistics(shape, layout, dtype, poisoned):
    x, labels = make(shape, layout, dtype), random_labels(shape[0], 5)
    weights = torch.randint(0, 4, shape[:1]) * 0.5
    for share in (None, weights) if layout == "contiguous" else (weights,):
        own = None if share is None else share.to(wide(dtype))
        count, total, *statistics = ops.class_statistics(x, labels, 5, own)
        true_count, true_total, *wanted = class_moments(x, labels, 5, share)
        assert count.dtype == torch.int64 and torch.equal(count, true_count)
        assert total.dtype == wide(dtype) and torch.equal(total.double(), true_total)
        assert_statistics(statistics, wanted, dtype)


@pytest.mark.parametrize("layout", ["contiguous", "inner", "rows"])
@pytest.mark.parametrize("name", hard_data())
def test_hard_data_keeps_its_digits(name, layout):
    x = hard_data()[name].float()
    # "rows": statistics of [N, C], whose images merge without a spread of their own.
    x = x.movedim(1, -1).reshape(-1, 3)[:2000] if layout == "rows" else arranged(x, layout)
    labels = torch.arange(len(x)) % 3
    parameters = torch.full((3,), 0.5), torch.ones(3), 0.0
    for got, wanted in (
        (ops.batch_norm_statistics(x, 0, None), moments(x)),
        (ops.instance_statistics(x), instance_moments(x)),
        (ops.class_statistics(x, labels, 3, None)[2:], class_moments(x, labels, 3)[2:]),
        (ops.batch_norm_batch_statistics(x, None, None, *parameters)[1:], moments(x)),
        (ops.batch_norm_instance_statistics(x, None, None, *parameters)[1:], instance_moments(x)),
    ):
        if name in ("constant", "nearly constant"):
            # Below what float32 resolves: nothing is invented.
            assert torch.all((got[1] - wanted[1]).abs() < 1e-6) and torch.allclose(got[0].double(), wanted[0])
        else:
            assert_statistics(got, wanted, torch.float32)


@pytest.mark.parametrize("bad", [NAN, -INF])
@pytest.mark.parametrize("shape, layout", [((6, 20, 5, 5), "contiguous"), ((6, 20, 5, 5), "inner"), ((6, 20), "rows")])
def test_a_bad_value_stays_in_its_own_statistics(shape, layout, bad):
    clean = arranged(torch.randn(shape), layout)
    x = clean.clone()
    x[(2, 7, 1, 3)[: len(shape)]] = bad
    labels, out = torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([0, 1, -1, 0, 1, 2])
    parameters = torch.zeros(20), torch.ones(20), 1e-5
    for function, where in (
        (lambda t: ops.batch_norm_statistics(t, 0, None), 7),
        (lambda t: ops.batch_norm_batch_statistics(t, None, None, *parameters)[1:], 7),
        (ops.instance_statistics, (2, 7)),
        (lambda t: ops.instance_statistics_list([t, t])[:1], (2, torch.tensor([7, 27]))),
        (lambda t: ops.class_statistics(t, labels, 4, None)[2:], (2, 7)),
        (lambda t: ops.batch_norm_instance_statistics(t, None, None, *parameters)[1:], (2, 7)),
    ):
        for got, wanted in zip(function(x), function(clean), strict=True):
            hit = torch.zeros_like(wanted, dtype=torch.bool)
            hit[where] = True
            assert not got[hit].isfinite().any() and wanted.isfinite().all()
            assert torch.equal(got[~hit], wanted[~hit])
    # Neither an image of weight 0 nor one outside the classes enters.
    without = torch.tensor([1.0, 0.5, 0.0, 1.0, 2.0, 1.0])
    assert_statistics(ops.batch_norm_statistics(x, 1, without), moments(clean, without, 1), torch.float32)
    for given, share in ((labels, without), (out, None)):
        count, total, *statistics = ops.class_statistics(x, given, 4, share)
        true_count, true_total, *wanted = class_moments(clean, given, 4, share)
        assert torch.equal(count, true_count) and torch.equal(total.double(), true_total)
        assert_statistics(statistics, wanted, torch.float32)


@pytest.mark.parametrize("shape", EMPTY)
def test_empty_dimensions(shape, poisoned):
    x = torch.randn(shape)
    n, c = shape[:2]
    parameters = (torch.ones(c), torch.ones(c), torch.zeros(c), torch.ones(c), 1e-5)
    positions = math.prod(shape[2:])
    instance = ops.instance_statistics(x)
    listed = ops.instance_statistics_list([x, x])
    y, *with_y = ops.batch_norm_instance_statistics(x, *parameters)
    for got, columns in ((instance, c), (listed, 2 * c), (with_y, c)):
        assert all(t.shape == (n, columns) and (positions > 0 or t.isnan().all()) for t in got)
    assert y.shape == shape
    y, *batch = ops.batch_norm_batch_statistics(x, *parameters)
    assert y.shape == shape
    for got in (batch, ops.batch_norm_statistics(x, 0, None), ops.batch_norm_statistics(x, 1, torch.ones(n))):
        assert all(t.shape == (c,) and (t.isnan().all() or c == 0) for t in got)
    count, total, mean, var = ops.class_statistics(x, torch.zeros(n, dtype=torch.int64), 2, None)
    assert count.tolist() == [n, 0] and total.tolist() == [n, 0]
    assert mean.shape == var.shape == (2, c) and not mean[1].any() and not var[1].any()
    assert positions > 0 or (mean[0].isnan().all() and var[0].isnan().all())
    assert n > 0 or not (mean.any() or var.any())
    rows = torch.ones(n, c)
    assert ops.statistics_backward(x, rows, rows, rows, NAN, NAN).shape == shape
    assert [t.shape for t in ops.statistics_backward_list([x, x], *[torch.ones(n, 2 * c)] * 3)] == [shape] * 2
    own = (torch.ones(c), torch.ones(c), 1e-5, rows, rows, rows, NAN, NAN)
    assert ops.batch_norm_statistics_backward(x, x, *own).shape == shape
    for t in ops.batch_norm_parameter_backward(x, x, *parameters[2:]):
        assert t.shape == (c,) and not t.any()


def test_too_few_values_for_the_correction():
    x = torch.randn(1, 3, 1, 1)
    for weights in (None, torch.ones(1)):
        mean, var = ops.batch_norm_statistics(x, 1, weights)
        assert torch.equal(mean, x[0, :, 0, 0]) and var.isnan().all()
    mean, var = ops.batch_norm_statistics(x, 0, torch.zeros(1))
    assert mean.isnan().all() and var.isnan().all()


def test_an_expanded_input_and_one_channel_among_many_images():
    x = torch.randn(1, 4, 6, 6).expand(3, 4, 6, 6)
    assert_statistics(ops.batch_norm_statistics(x, 0, None), moments(x), torch.float32)
    x = torch.randn(3000, 1) + 1e3
    assert_statistics(ops.batch_norm_statistics(x, 0, None), moments(x), torch.float32)


def test_many_classes_and_wide_labels():
    x, labels = torch.randn(150, 5, 2, 2) + 4, torch.arange(150) * 7 % 43
    labels[:3] = torch.tensor([-(1 << 40), 1 << 40, (1 << 32) + 1])
    count, total, *statistics = ops.class_statistics(x, labels, 43, None)
    true_count, true_total, *wanted = class_moments(x, labels, 43)
    assert torch.equal(count, true_count) and torch.equal(total.double(), true_total)
    assert_statistics(statistics, wanted, torch.float32)


@every_case
def test_batch_norm(shape, layout, dtype, poisoned):
    x = make(shape, layout, dtype)
    weight, bias, mean, var, eps = parameters_of(shape[1], dtype)
    spacing = torch.finfo(wide(dtype)).eps
    for w, b in ((weight, bias), (None, None), (None, bias)) if layout == "offset" else ((weight, bias),):
        normal = (x.double() - per_position(mean[None], x)) * per_position(torch.rsqrt(var.double() + eps)[None], x)
        normal = normal if w is None else normal * per_position(w[None], x)
        exact = normal if b is None else normal + per_position(b[None], x)
        y, *instance = ops.batch_norm_instance_statistics(x, w, b, mean, var, eps)
        same_layout(y, x)
        close_to(y, exact, 5 * spacing * (normal.abs() + exact.abs()))
        assert_statistics(instance, instance_moments(x), dtype)
        again, *batch = ops.batch_norm_batch_statistics(x, w, b, mean, var, eps)
        same_layout(again, x)
        assert torch.equal(again, y)
        assert_statistics(batch, moments(x), dtype)


def test_batch_norm_of_offset_data():
    """x - mean before the scale: the error is that of x's spread, not of its offset."""
    x, mean = torch.randn(8, 4, 6, 6) + 1e4, torch.full((4,), 1e4)
    y, *_ = ops.batch_norm_instance_statistics(x, None, None, mean, torch.ones(4), 1e-5)
    exact = (x.double() - 1e4) / math.sqrt(1 + 1e-5)
    torch.testing.assert_close(y.double(), exact, rtol=1e-6, atol=1e-6)


@every_case
def test_statistics_backward(shape, layout, dtype, poisoned):
    x, spacing = make(shape, layout, dtype), torch.finfo(wide(dtype)).eps
    sets = row_sets(*shape[:2], dtype)
    chosen = sets if layout in ("inner", "offset") and shape in TYPICAL else ("channels", "columns")
    for name, (center, grad_mean, grad_var) in ((name, sets[name]) for name in chosen):
        given = [(grad_mean, grad_var)] if name != "channels" else [(grad_mean, None), (None, grad_var), (None, None)]
        for rows in given:
            dx = ops.statistics_backward(x, center, *rows, 0.25, 0.125)
            same_layout(dx, x)
            want, size = own_gradient(x, center, *rows, 0.25, 0.125)
            close_to(dx, want, 4 * spacing * size)


@every_case
def test_batch_norm_backward(shape, layout, dtype, poisoned):
    x, grad = make(shape, layout, dtype), make(shape, "contiguous", dtype, 7)
    weight, _, _, var, eps = parameters_of(shape[1], dtype)
    spacing, unit = torch.finfo(wide(dtype)).eps, per_position(torch.rsqrt(var.double() + eps)[None], x)
    sets = row_sets(*shape[:2], dtype)
    for name, w in (("channels", None), ("columns", weight)):
        center, grad_mean, grad_var = sets[name]
        scale = unit if w is None else unit * per_position(w[None], x)
        for rows in [(grad_mean, grad_var), (grad_mean, None), (None, grad_var)][: 3 if name == "channels" else 1]:
            dx = ops.batch_norm_statistics_backward(grad, x, w, var, eps, center, *rows, 0.25, 0.125)
            same_layout(dx, x)
            own, size = own_gradient(x, center, *rows, 0.25, 0.125)
            incoming = grad.double() * scale
            close_to(dx, incoming + own, 5 * spacing * (incoming.abs() + size))


@every_case
def test_parameter_backward(shape, layout, dtype, poisoned):
    x, grad = make(shape, layout, dtype), make(shape, "contiguous", dtype, 7)
    _, _, mean, var, eps = parameters_of(shape[1], dtype)
    spacing, unit = torch.finfo(wide(dtype)).eps, per_position(torch.rsqrt(var.double() + eps)[None], x)
    dweight, dbias = ops.batch_norm_parameter_backward(grad, x, mean, var, eps)
    terms = grad.double() * (x.double() - per_position(mean[None], x)) * unit
    dims = [0, *range(2, x.dim())]
    for got, wanted in ((dweight, terms), (dbias, grad.double())):
        assert got.dtype == wide(dtype)
        close_to(got, wanted.sum(dims), 16 * spacing * wanted.abs().sum(dims))


def test_gradients_are_rounded_once():
    """1e-9 per element from the statistics, beside an incoming gradient: float16 could hold neither alone."""
    x, grad = torch.randn(4, 2, 8, 8).half(), (torch.randn(4, 2, 8, 8) * 1e-3).half()
    rows, ones = torch.tensor([[3.0, -2.0]]), torch.ones(2)
    for mean_factor, var_factor in ((2.0**-18, 2.0**-17), (2.0**-12, 2.0**-11)):
        own, _ = own_gradient(x, rows, rows, rows, mean_factor, var_factor)
        dx = ops.batch_norm_statistics_backward(grad, x, None, ones, 0.0, rows, rows, rows, mean_factor, var_factor)
        torch.testing.assert_close(dx.double(), grad.double() + own, rtol=0.501 * 2.0**-10, atol=3.1e-8)


@pytest.mark.parametrize("layout", ["contiguous", "inner"])
@pytest.mark.parametrize("per_image", [True, False])
def test_without_a_slope_x_does_not_enter(per_image, layout):
    """a == 0: NaN and infinities of x and of the center stay out of dx."""
    x = arranged(torch.randn(4, 5, 3, 3), layout)
    x[1, 2, 0, 1], x[1, 2, 2, 2], x[3, 4] = NAN, INF, -INF
    center, grad_mean, grad_var = torch.randn(3, 4 if per_image else 1, 5).unbind()
    row = 1 if per_image else 0
    grad_var[row, 2], center[row, 2] = 0.0, NAN
    grad_var[3 if per_image else 0, 4] = -0.0
    for mean_rows in (grad_mean, None):
        own, size = own_gradient(x, center, mean_rows, grad_var, 0.5, 2.0)
        assert own.isfinite().all()
        close_to(ops.statistics_backward(x, center, mean_rows, grad_var, 0.5, 2.0), own, 1e-6 * size)
        arguments = (None, torch.ones(5), 0.0, center, mean_rows, grad_var, 0.5, 2.0)
        grad = torch.randn(4, 5, 3, 3)
        dx = ops.batch_norm_statistics_backward(grad, x, *arguments)
        close_to(dx, grad.double() + own, 1e-6 * (size + grad.double().abs()))
    # Without grad_var x is not looked at.
    dx = ops.batch_norm_statistics_backward(grad, x, None, torch.ones(5), 0.0, center, grad_mean, None, 0.5, NAN)
    assert dx.isfinite().all()


LISTS = [
    ([(3, 4, 7, 7), (3, 16, 8, 8), (3, 1, 1, 1), (3, 65, 7), (3, 10)], "contiguous"),
    ([(3, 4, 7, 7), (3, 16, 8, 8), (3, 100, 1, 1), (3, 5, 3)], "inner"),
    ([(2, 3, 40, 41), (2, 16, 4, 4), (2, 1, 2, 2, 2)], "mixed"),
    ([(7, 3, 4, 4)], "contiguous"),
    ([(4, 3, 5, 5), (4, 0, 2, 2), (4, 8, 2, 2)], "sliced"),
    ([(300, 2, 2, 2), (300, 3)], "offset"),
]


@pytest.mark.parametrize(
    "shapes, layout, dtype",
    [(*case, torch.float32) for case in LISTS]
    + [(*case, dtype) for case in LISTS[::2] for dtype in (torch.bfloat16, torch.float16, torch.float64)],
)
def test_lists(shapes, layout, dtype, poisoned):
    chosen = [LAYOUTS[i % 3] if layout == "mixed" else layout for i in range(len(shapes))]
    xs = [make(s, way if len(s) > 2 or way != "inner" else "contiguous", dtype, i)
          for i, (s, way) in enumerate(zip(shapes, chosen, strict=True))]  # fmt: skip
    mean, var = ops.instance_statistics_list(xs)
    wanted = [instance_moments(x) for x in xs]
    assert_statistics((mean, var), [torch.cat(part, 1) for part in zip(*wanted, strict=True)], dtype)
    images, columns, spacing = shapes[0][0], mean.shape[1], torch.finfo(wide(dtype)).eps
    for name, rows in row_sets(images, columns, dtype).items():
        if name in ("channels", "mixed"):
            continue
        for given in (rows, (rows[0], None, rows[2]), (rows[0], rows[1], None)) if name == "columns" else (rows,):
            start = 0
            for x, dx in zip(xs, ops.statistics_backward_list(xs, *given), strict=True):
                same_layout(dx, x)
                part = [None if t is None else t[:, start : start + x.shape[1]] for t in given]
                values = math.prod(x.shape[2:])
                want, size = own_gradient(x, *part, 1 / values, 2 / values)
                close_to(dx, want, 4 * spacing * size)
                start += x.shape[1]


def test_the_same_bits_every_time():
    x, labels = torch.randn(12, 16, 9, 9), torch.arange(12) % 5
    parameters = torch.zeros(16), torch.ones(16), 1e-5
    for y in (x, arranged(x, "inner")):

        def run(y=y):
            return (
                *ops.batch_norm_statistics(y, 0, None), *ops.class_statistics(y, labels, 5, None),
                *ops.batch_norm_batch_statistics(y, None, None, *parameters),
                *ops.batch_norm_parameter_backward(y, y, *parameters),
            )  # fmt: skip

        first = run()
        for ours, theirs in zip(run(), first, strict=True):
            assert torch.equal(ours, theirs)
