"""BatchNorm statistics against float64 definitions, on data that breaks the usual shortcuts."""

import functools
import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from clusterq import ops
from clusterq.testing import FLOAT_DTYPES, layouts

SHAPES = [
    (5, 6),
    (3, 4, 17),
    (2, 3, 5, 7),
    (6, 16, 8, 8),
    (2, 65, 7, 7),
    (2, 3, 66, 64),
    (2, 3, 2, 3, 4),
    (4, 100, 1, 1),
]
LABELS = 5


def all_layouts(x):
    variants = layouts(x)
    if x.dim() == 5:
        variants["channels_last_3d"] = x.contiguous(memory_format=torch.channels_last_3d)
    return variants


def truth(x, dims, correction=0):
    wide = x.double()
    mean = wide.mean(dims, keepdim=True)
    count = math.prod(x.shape[d] for d in dims)
    var = (wide - mean).square().sum(dims) / (count - correction)
    return mean.squeeze(dims), var


def instance_truth(x):
    if x.dim() == 2:
        return x.double(), torch.zeros_like(x, dtype=torch.float64)
    return truth(x, list(range(2, x.dim())))


def class_truth(x, labels, num_classes, mask=None):
    """Per class, by picking its images: the definition."""
    channels = x.shape[1]
    count = torch.zeros(num_classes, dtype=torch.int64)
    mean, var = torch.zeros(2, num_classes, channels, dtype=torch.float64)
    for k in range(num_classes):
        chosen = labels == k if mask is None else (labels == k) & mask
        count[k] = chosen.sum()
        if count[k] > 0:
            mean[k], var[k] = truth(x[chosen], [0, *range(2, x.dim())])
    return count, mean, var


def assert_statistics(actual, wanted, x, tolerance=1e-5):
    """Mean within `tolerance` spreads (plus its own rounding), variance within a relative `tolerance`."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    (mean, var), (true_mean, true_var) = actual, wanted
    assert mean.dtype == var.dtype == dtype
    assert mean.shape == true_mean.shape and var.shape == true_var.shape
    rounding = 2 * torch.finfo(dtype).eps * true_mean.abs()
    assert torch.all((mean.double() - true_mean).abs() <= tolerance * true_var.sqrt() + rounding)
    assert torch.all((var.double() - true_var).abs() <= tolerance * true_var)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_statistics_match_their_definition(shape, dtype, poisoned):
    values = (torch.randn(shape, dtype=torch.float64) * 2 + 3).to(dtype)
    labels, mask = torch.randint(-1, LABELS, shape[:1]), torch.rand(shape[0]) > 0.2
    dims = [0, *range(2, len(shape))]
    for x in all_layouts(values).values():
        assert_statistics(ops.instance_statistics(x), instance_truth(x), x)
        for correction in (0, 1):
            assert_statistics(ops.batch_norm_statistics(x, correction=correction), truth(x, dims, correction), x)
        for chosen in (None, mask):
            count, *statistics = ops.class_statistics(x, labels, LABELS, mask=chosen)
            true_count, *wanted = class_truth(x, labels, LABELS, chosen)
            assert count.dtype == torch.int64
            assert torch.equal(count, true_count)
            assert_statistics(statistics, wanted, x)


def repeated(x, weights):
    """Images as often as their whole-number weight says: what a weight means."""
    return x.repeat_interleave(weights.long(), 0)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", [(7, 5), (6, 16, 8, 8), (7, 3, 66, 64), (5, 65, 7, 7)])
def test_weights_count_images(shape, dtype):
    values = (torch.randn(shape, dtype=torch.float64) * 2 + 3).to(dtype)
    weights = torch.tensor([2, 0, 1, 3, 1, 0, 4])[: shape[0]]
    labels = torch.tensor([0, 0, 1, -1, 1, 2, 0])[: shape[0]]
    stored = torch.float64 if dtype == torch.float64 else torch.float32
    dims = [0, *range(2, len(shape))]
    for x in all_layouts(values).values():
        for given in (weights.to(stored), weights.to(dtype)):
            for correction in (0, 1):
                actual = ops.batch_norm_statistics(x, correction=correction, weights=given)
                assert_statistics(actual, truth(repeated(x, weights), dims, correction), x)
            count, *actual = ops.class_statistics(x, labels, 4, weights=given)
            _, *wanted = class_truth(repeated(x, weights), labels.repeat_interleave(weights), 4)
            assert torch.equal(count, class_truth(x, labels, 4, weights > 0)[0])
            assert_statistics(actual, wanted, x)
        mask = weights > 1
        actual = ops.batch_norm_statistics(x, mask=mask)
        assert_statistics(actual, truth(x[mask], dims), x)
        actual = ops.batch_norm_statistics(x, mask=mask, weights=weights.to(stored))
        assert_statistics(actual, truth(repeated(x, weights * mask), dims), x)


def test_weights_halve_a_batch():
    """Fractions, against the same statistics from twice the images."""
    x, weights = torch.randn(8, 3, 4, 4), torch.rand(8) + 0.5
    actual = ops.batch_norm_statistics(x, weights=weights)
    wanted = ops.batch_norm_statistics(torch.cat([x, x]), weights=torch.cat([weights, weights]) / 2)
    for a, b in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_an_image_left_out_has_no_influence_and_no_gradient(memory_format):
    clean = torch.randn(5, 4, 6, 6)
    x = clean.clone()
    x[3] = math.nan
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    keep, labels = torch.tensor([True, True, True, False, True]), torch.tensor([0, 1, 0, 1, 1])
    for function in (
        lambda t: ops.batch_norm_statistics(t, mask=keep),
        lambda t: ops.class_statistics(t, labels, 2, mask=keep)[1:],
    ):
        other = clean.clone().requires_grad_()
        for actual, wanted in zip(function(x), function(other), strict=True):
            torch.testing.assert_close(actual, wanted)
        (gradient,) = torch.autograd.grad(sum(t.square().sum() for t in function(x)), x)
        (wanted,) = torch.autograd.grad(sum(t.square().sum() for t in function(other)), other)
        torch.testing.assert_close(gradient, wanted)
        assert torch.equal(gradient[3], torch.zeros(4, 6, 6))
        # Whatever the others hold.
        spoiled = x.detach().clone()
        spoiled[2] = math.nan
        spoiled.requires_grad_()
        (gradient,) = torch.autograd.grad(sum(t.square().sum() for t in function(spoiled)), spoiled)
        assert torch.equal(gradient[3], torch.zeros(4, 6, 6))


def test_a_list_is_its_layers():
    xs = [
        torch.randn(4, c, *rest).requires_grad_() for c, *rest in ((3, 5, 5), (16, 8, 8), (7,), (2, 3, 2, 4), (65, 1))
    ]
    xs[1].data = xs[1].data.contiguous(memory_format=torch.channels_last)
    mean, var = ops.instance_statistics_list(xs)
    single = [ops.instance_statistics(x) for x in xs]
    close = functools.partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6)
    for actual, parts in zip((mean, var), zip(*single, strict=True), strict=True):
        close(actual, torch.cat(parts, 1))
    weight = torch.randn(2, *mean.shape)
    for keep in ((mean, var), (mean,), (var,)):
        loss = sum((w * t).sum() for w, t in zip(weight, keep, strict=False))
        grads = torch.autograd.grad(loss, xs, retain_graph=True)
        parts = [torch.cat(p, 1) for p in zip(*single, strict=True)]
        chosen = parts if len(keep) == 2 else parts[:1] if keep[0] is mean else parts[1:]
        same = sum((w * t).sum() for w, t in zip(weight, chosen, strict=False))
        for grad, wanted in zip(grads, torch.autograd.grad(same, xs, retain_graph=True), strict=True):
            close(grad, wanted)
    double = [x.detach().double().requires_grad_() for x in xs]
    assert gradcheck(lambda *t: ops.instance_statistics_list(t), double)


def hard_data():
    noise = torch.randn(32, 3, 28, 28, dtype=torch.float64)
    outlier = noise.clone()
    outlier[0, :, 0, 0] = 1e6
    return {
        **{f"offset {offset:g}": noise + offset for offset in (1e3, 1e4, 1e5)},
        "outlier first": outlier,
        "offset per image": noise + 1e4 * torch.arange(32)[:, None, None, None],
        "squares overflow float32": noise * 1e18 + 1e20,
        "nearly constant": noise * 1e-20,
        "constant": torch.full_like(noise, 1234.567),
        # Few distinct squares, which all round the same way.
        "two values": (noise > 2).double() * 0.05,
    }


@pytest.mark.parametrize("name", hard_data())
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_hard_data_keeps_its_digits(name, memory_format):
    x = hard_data()[name].float().contiguous(memory_format=memory_format)
    labels = torch.arange(32) % 3
    for actual, wanted in (
        (ops.batch_norm_statistics(x), truth(x, [0, 2, 3])),
        (ops.instance_statistics(x), instance_truth(x)),
        (ops.class_statistics(x, labels, 3)[1:], class_truth(x, labels, 3)[1:]),
    ):
        if name == "constant":
            assert torch.all(actual[1] < 1e-6)
        else:
            assert_statistics(actual, wanted, x)
    instance = instance_truth(x)
    for actual, wanted in (
        (ops.merge_instance_statistics(*instance, 28 * 28), truth(x, [0, 2, 3])),
        (ops.merge_class_statistics(*instance, labels, 3)[1:], class_truth(x, labels, 3)[1:]),
    ):
        if name != "constant":
            assert_statistics(actual, wanted, x.double())


def test_fused_batch_statistics_of_offset_data():
    """Merged before any rounding to float32."""
    x = torch.randn(32, 3, 28, 28) + 1e4
    _, *actual = ops.batch_norm_with_statistics(x, None, None, torch.zeros(3), torch.ones(3), 0.0)
    assert_statistics(actual, truth(x, [0, 2, 3]), x)


@pytest.mark.parametrize("shape", [(3000, 2, 3, 3), (4096, 2, 3, 4), (1, 3, 1, 1), (1, 16, 56, 56), (2500, 7)])
def test_unusual_batch_sizes(shape):
    x = torch.randn(shape) + 2
    for y in (x, x.movedim(1, -1).contiguous().movedim(-1, 1)):
        assert_statistics(ops.batch_norm_statistics(y), truth(y, [0, *range(2, y.dim())]), y)
        assert_statistics(ops.instance_statistics(y), instance_truth(y), y)


def test_expanded_input():
    x = torch.randn(1, 4, 6, 6).expand(3, 4, 6, 6)
    assert_statistics(ops.batch_norm_statistics(x), truth(x, [0, 2, 3]), x)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_bad_value_stays_in_its_own_statistics(bad, memory_format):
    clean = torch.randn(6, 20, 5, 5)
    x = clean.clone().contiguous(memory_format=memory_format)
    x[2, 7, 1, 3] = bad
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    touched = {
        "batch": (ops.batch_norm_statistics, (7,)),
        "instance": (ops.instance_statistics, (2, 7)),
        "class": (lambda t: ops.class_statistics(t, labels, 4)[1:], (2, 7)),
    }
    for function, where in touched.values():
        hit = torch.zeros_like(function(clean)[0], dtype=torch.bool)
        hit[where] = True
        for actual, wanted in zip(function(x), function(clean), strict=True):
            assert not actual[hit].isfinite().any()
            torch.testing.assert_close(actual[~hit], wanted[~hit])
    _, mean, var = ops.class_statistics(x, labels, 4, mask=labels != 2)
    assert mean.isfinite().all() and var.isfinite().all()
    _, mean, var = ops.merge_class_statistics(*ops.instance_statistics(x), labels, 4, labels != 2)
    assert mean.isfinite().all() and var.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (3, 0, 2, 2), (2, 4, 0, 3), (0, 4)])
def test_empty_dimensions(shape):
    x = torch.randn(shape)
    n, c = shape[:2]
    mean, var = ops.instance_statistics(x)
    assert mean.shape == var.shape == (n, c)
    assert mean.isnan().all() and var.isnan().all()
    mean, var = ops.batch_norm_statistics(x)
    assert mean.shape == var.shape == (c,)
    assert mean.isnan().all() and var.isnan().all()
    count, mean, var = ops.class_statistics(x, torch.zeros(n, dtype=torch.int64), 2)
    assert count.tolist() == [n, 0]
    assert torch.equal(mean[1], torch.zeros(c)) and torch.equal(var[1], torch.zeros(c))


def test_too_few_values_for_the_correction():
    x = torch.randn(1, 3, 1, 1, requires_grad=True)
    mean, var = ops.batch_norm_statistics(x, correction=1)
    assert torch.equal(mean, x[0, :, 0, 0]) and var.isnan().all()
    (gradient,) = torch.autograd.grad(var.sum(), x)
    assert gradient.isnan().all()


def bn_arguments(channels, dtype, requires_grad=False):
    weight, bias, mean = (torch.randn(channels, dtype=dtype) for _ in range(3))
    return [
        weight.requires_grad_(requires_grad),
        bias.requires_grad_(requires_grad),
        mean,
        torch.rand(channels, dtype=dtype) + 0.1,
        1e-5,
    ]


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 5), (3, 2, 3, 4), (2, 2, 2, 2, 3)])
def test_gradients_are_the_true_derivatives(shape):
    labels, mask = torch.tensor([2, 0, 2])[: shape[0]], torch.tensor([True, True, False])[: shape[0]]
    weights = torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64)[: shape[0]]
    weight, bias, *rest = bn_arguments(shape[1], torch.float64, requires_grad=True)
    for x in all_layouts(torch.randn(shape, dtype=torch.float64)).values():
        x = x.detach().requires_grad_()
        assert gradcheck(ops.instance_statistics, x)
        assert gradcheck(lambda x: ops.batch_norm_statistics(x, correction=1), x)
        assert gradcheck(lambda x: ops.batch_norm_statistics(x, correction=1, weights=weights), x)
        assert gradcheck(lambda x: ops.class_statistics(x, labels, 4)[1:], x)
        assert gradcheck(lambda x: ops.class_statistics(x, labels, 4, weights=weights)[1:], x)
        assert gradcheck(lambda x: ops.class_statistics(x, labels, 4, mask=mask)[1:], x)
        for function in (ops.batch_norm_with_statistics, ops.batch_norm_with_instance_statistics):
            assert gradcheck(lambda x, w, b, f=function: f(x, w, b, *rest), (x, weight, bias))


def test_second_derivatives():
    """Where autograd asks for them; nothing else of the loss may hide that they are missing."""
    labels = torch.tensor([2, 0, 2])
    weights = torch.tensor([0.5, 0.0, 1.5], dtype=torch.float64)
    weight, bias, *rest = bn_arguments(2, torch.float64, requires_grad=True)
    x = torch.randn(3, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert gradgradcheck(ops.instance_statistics, x)
    assert gradgradcheck(lambda x: ops.instance_statistics_list([x, x * 2]), x)
    for given in (None, weights):
        assert gradgradcheck(lambda x, w=given: ops.batch_norm_statistics(x, correction=1, weights=w), x)
        assert gradgradcheck(lambda x, w=given: ops.class_statistics(x, labels, 4, weights=w)[1:], x)
    for function in (ops.batch_norm_with_statistics, ops.batch_norm_with_instance_statistics):
        assert gradgradcheck(lambda x, w, b, f=function: f(x, w, b, *rest), (x, weight, bias))
    hessian = torch.autograd.functional.hessian(lambda x: ops.batch_norm_statistics(x)[1].sum(), x[:, :, :2, :2])
    wanted = torch.autograd.functional.hessian(lambda x: x.var((0, 2, 3), correction=0).sum(), x[:, :, :2, :2])
    torch.testing.assert_close(hessian, wanted)


def test_a_list_computes_the_gradients_that_are_needed():
    xs = [torch.randn(3, c, 4, 4, requires_grad=c != 5) for c in (2, 5, 3)]
    mean, var = ops.instance_statistics_list(xs)
    weight = torch.randn(2, *mean.shape)
    grads = torch.autograd.grad((weight[0] * mean + weight[1] * var).sum(), [xs[0], xs[2]])
    for x, grad, (a, b) in zip((xs[0], xs[2]), grads, ((0, 2), (7, 10)), strict=True):
        m, v = ops.instance_statistics(x)
        (wanted,) = torch.autograd.grad((weight[0][:, a:b] * m + weight[1][:, a:b] * v).sum(), x)
        torch.testing.assert_close(grad, wanted)


def test_merges_are_differentiable():
    mean, var = (torch.rand(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    labels, mask = torch.tensor([1, 1, 0, 3]), torch.tensor([True, True, False, True])
    assert gradcheck(lambda m, v: ops.merge_instance_statistics(m, v, 5, 1), (mean, var))
    assert gradcheck(lambda m, v: ops.merge_class_statistics(m, v, labels, 5, mask)[1:], (mean, var))


def test_merges_agree_with_the_direct_statistics():
    x = torch.randn(9, 4, 5, 5) * 3 + 7
    labels, mask = torch.randint(-1, 4, (9,)), torch.rand(9) > 0.3
    instance = ops.instance_statistics(x)
    for actual, wanted in zip(
        (*ops.merge_instance_statistics(*instance, 25, 1), *ops.merge_class_statistics(*instance, labels, 4, mask)),
        (*ops.batch_norm_statistics(x, correction=1), *ops.class_statistics(x, labels, 4, mask=mask)),
        strict=True,
    ):
        torch.testing.assert_close(actual, wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = ops.merge_class_statistics(*instance, labels, 4, mask)
    for actual, wanted in zip(again, ops.merge_class_statistics(*instance, labels, 4, mask), strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_batch_norm(shape, dtype):
    """y within two units in the last place of the float64 result, as is torch's own."""
    stored = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias, mean, var, eps = bn_arguments(shape[1], stored)
    for x in all_layouts((torch.randn(shape, dtype=torch.float64) * 2 + 3).to(dtype)).values():
        y, *statistics = ops.batch_norm_with_instance_statistics(x, weight, bias, mean, var, eps)
        exact = F.batch_norm(x.double(), mean.double(), var.double(), weight.double(), bias.double(), eps=eps)
        assert y.dtype == dtype
        spacing = torch.finfo(dtype).eps
        torch.testing.assert_close(y.double(), exact, rtol=2 * spacing, atol=4e-6 if stored == torch.float32 else 1e-14)
        assert_statistics(statistics, instance_truth(x), x)
        y2, *batch = ops.batch_norm_with_statistics(x, weight, bias, mean, var, eps)
        assert torch.equal(y, y2)
        assert_statistics(batch, truth(x, [0, *range(2, x.dim())]), x)


def test_fused_batch_norm_on_offset_data_beats_a_folded_shift():
    """x - mean before the scale: the error stays at one rounding of x's spread, not of its offset."""
    x = torch.randn(8, 4, 6, 6) + 1e4
    mean, var = torch.full((4,), 1e4), torch.ones(4)
    y, *_ = ops.batch_norm_with_instance_statistics(x, None, None, mean, var, 1e-5)
    exact = F.batch_norm(x.double(), mean.double(), var.double(), eps=1e-5)
    torch.testing.assert_close(y.double(), exact, rtol=1e-6, atol=1e-6)


def test_outputs_keep_the_layout():
    arguments = bn_arguments(4, torch.float32)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 4, 5, 5).contiguous(memory_format=memory_format).requires_grad_()
        y, *_ = ops.batch_norm_with_instance_statistics(x, *arguments)
        (gradient,) = torch.autograd.grad(y, x, torch.randn_like(y))
        assert y.is_contiguous(memory_format=memory_format)
        assert gradient.is_contiguous(memory_format=memory_format)


class Calls(TorchDispatchMode):
    """Names of the clusterq ops that run inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "clusterq":
            self.names.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


def backward_calls(outputs, inputs):
    with Calls() as calls:
        torch.autograd.grad(sum(t.sum() for t in outputs), inputs)
    return calls.names


def test_the_backward_costs_only_what_is_asked_for():
    weight, bias, *rest = bn_arguments(3, torch.float32)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    run = ops.batch_norm_with_instance_statistics
    y, mean, var = run(x, weight, bias, *rest)
    assert backward_calls([y, mean, var], [x]) == ["batch_norm_statistics_backward"]
    assert backward_calls([run(x, weight, bias, *rest)[0]], [x]) == ["batch_norm_statistics_backward"]
    assert backward_calls(run(x, weight, bias, *rest)[1:], [x]) == ["statistics_backward"]
    weight.requires_grad_()
    y, mean, var = run(x.detach(), weight, bias, *rest)
    assert backward_calls([y], [weight]) == ["batch_norm_parameter_backward"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_gradients_are_rounded_once(dtype):
    """With 2^18 values per channel the statistics' gradient, 1e-9 per element, would vanish in float16 on its own."""
    x = torch.randn(16, 2, 128, 64).to(dtype).requires_grad_()
    weight, bias, mean, var, eps = bn_arguments(2, torch.float32)
    y, *statistics = ops.batch_norm_with_statistics(x, weight, bias, mean, var, eps)
    incoming = torch.randn(x.shape).mul(1e-3).to(dtype)
    weights = torch.tensor([3.0, -2.0])
    (dx,) = torch.autograd.grad([y, *statistics], x, [incoming, weights, weights])

    wide = x.detach().double().requires_grad_()
    y64 = F.batch_norm(wide, mean.double(), var.double(), weight.double(), bias.double(), eps=eps)
    outputs = [y64, wide.mean([0, 2, 3]), wide.var([0, 2, 3], correction=0)]
    (exact,) = torch.autograd.grad(outputs, wide, [incoming.double(), weights.double(), weights.double()])
    spacing = torch.finfo(dtype).eps
    torch.testing.assert_close(dx.double(), exact, rtol=0.51 * spacing, atol=6e-8 if dtype == torch.float16 else 1e-12)

    (dx,) = torch.autograd.grad(ops.batch_norm_statistics(x)[1].sum(), x)
    assert dx.dtype == dtype


def test_bad_arguments_are_named():
    x, labels = torch.randn(3, 2, 4, 4), torch.tensor([0, 1, 0])
    vector = torch.ones(2)
    for error, name, call in [
        (TypeError, "x has dtype", lambda: ops.instance_statistics(x.int())),
        (TypeError, "x is list", lambda: ops.instance_statistics([1.0])),
        (TypeError, "labels is list", lambda: ops.class_statistics(x, [0, 1, 0], 2)),
        (TypeError, "mask is list", lambda: ops.class_statistics(x, labels, 2, mask=[True] * 3)),
        (TypeError, "weight is float", lambda: ops.batch_norm_with_statistics(x, 1.0, None, vector, vector, 0.1)),
        (TypeError, "mean is list", lambda: ops.merge_instance_statistics([[1.0]], vector[None], 4)),
        (TypeError, "var is float", lambda: ops.merge_class_statistics(vector[None], 1.0, labels[:1], 2)),
        (ValueError, "var has shape", lambda: ops.merge_instance_statistics(vector[None], vector, 4)),
        (ValueError, "x has shape", lambda: ops.batch_norm_statistics(torch.randn(3))),
        (ValueError, "correction is -1", lambda: ops.batch_norm_statistics(x, correction=-1)),
        (ValueError, "labels has shape", lambda: ops.class_statistics(x, labels[:2], 2)),
        (TypeError, "labels has dtype", lambda: ops.class_statistics(x, labels.int(), 2)),
        (ValueError, "num_classes is 0", lambda: ops.class_statistics(x, labels, 0)),
        (TypeError, "mask has dtype", lambda: ops.class_statistics(x, labels, 2, mask=labels)),
        (TypeError, "weights has dtype", lambda: ops.batch_norm_statistics(x, weights=labels)),
        (ValueError, "weights has shape", lambda: ops.batch_norm_statistics(x, weights=vector)),
        (ValueError, "xs is empty", lambda: ops.instance_statistics_list([])),
        (ValueError, "xs is empty or a single", lambda: ops.instance_statistics_list(x)),
        (ValueError, r"xs\[1\] is torch.float32 \(2,", lambda: ops.instance_statistics_list([x, x[:2]])),
        (ValueError, r"xs\[1\] is torch.float64", lambda: ops.instance_statistics_list([x, x.double()])),
        (
            ValueError,
            "weight has shape",
            lambda: ops.batch_norm_with_statistics(x, torch.ones(3), None, vector, vector, 0.1),
        ),
        (TypeError, "running_mean is None", lambda: ops.batch_norm_with_statistics(x, None, None, None, vector, 0.1)),
        (
            ValueError,
            "labels has shape",
            lambda: ops.merge_class_statistics(vector[:, None], vector[:, None], labels, 2),
        ),
    ]:
        with pytest.raises(error, match=name):
            call()
