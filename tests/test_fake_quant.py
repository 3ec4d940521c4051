"""Fake-quantize values and codes against torch's own op where its semantics are right, and formulas elsewhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import pytest
import torch

from clusterq import ops

sys.path.insert(0, os.path.dirname(__file__))
from fake_quant_formulas import (
    DTYPES,
    INF,
    NAN,
    OP,
    activation_mask,
    equal,
    formula,
    fresh,
    layouts,
    learned_formula,
    parameters,
    with_specials,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [None, 0, 1, 2, -1])
@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
def test_forward_and_clipped_gradient_in_every_layout(dtype: torch.dtype, axis: int | None, activation: str) -> None:
    torch.manual_seed(0)
    base = with_specials((torch.randn(3, 37, 6, 5) * 2).to(dtype))
    grad = torch.randn(3, 37, 6, 5).to(dtype)
    scale, zero_point = parameters(base, axis, -8, 7)
    for name, x in layouts(base).items():
        x.requires_grad_()
        y = ops.fake_quantize(x, scale, zero_point, -8, 7, axis=axis, activation=activation)  # type: ignore[arg-type]
        value, q, _ = formula(x.detach(), scale, zero_point, -8, 7, axis, activation)
        assert equal(y.detach(), value), name
        if name in ("contiguous", "channels_last", "permuted"):
            assert y.stride() == x.stride(), name
        else:
            assert y.is_contiguous(), name
        if name == "expanded":
            continue
        (got,) = torch.autograd.grad(y, x, grad)
        mask = (q >= -8) & (q <= 7) & activation_mask(x.detach(), activation)
        assert equal(got, torch.where(mask, grad, torch.zeros_like(grad))), name
        assert not got[x.detach().isnan()].any()


@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
@pytest.mark.parametrize(("low", "high"), [(-2, 1), (0, 3), (-4, 3), (-8, 7), (0, 15), (-16, 15), (-32, 31), (0, 255)])
def test_every_bfloat16_value(low: int, high: int, activation: str) -> None:
    """Exhaustive: kernels may take another way for 16-bit values on few codes than for all others."""
    bits = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
    x = bits.view(torch.bfloat16)
    for zero_point in {low, 0, (low + high + 1) // 2, high}:
        for scale in (0.07, 0.25, 1.0, 3.3, 1e-30, 1e-38, 1e36, 6.0 / high, 2.0**-126):
            s, z = torch.tensor([scale]), torch.tensor([float(zero_point)])
            value, _, _ = formula(x, s, z, low, high, None, activation)
            assert equal(OP.fake_quantize(x, s, z, low, high, None, activation), value), (zero_point, scale)


# Channels that come again after 16, 32, 64 and more elements, in whole vectors and not, with rows that end anywhere.
@pytest.mark.parametrize("channels", [2, 3, 16, 24, 32, 48, 64, 65, 128, 600])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_channels_fastest(dtype: torch.dtype, channels: int) -> None:
    torch.manual_seed(channels)
    x = with_specials((torch.randn(7, channels, 9, 13) * 2).to(dtype)).contiguous(memory_format=torch.channels_last)
    grad = torch.randn(x.shape).to(dtype)
    scale, zero_point = parameters(x, 1, -8, 7)
    for activation in ("none", "relu6"):
        arguments = (scale, zero_point, -8, 7, 1, activation)
        value, q, _ = formula(x, *arguments)
        assert equal(OP.fake_quantize(x, *arguments), value)
        mask = (q >= -8) & (q <= 7) & activation_mask(x, activation)
        kept = torch.where(mask, grad, torch.zeros_like(grad))
        assert equal(OP.fake_quantize_backward(grad, x, *arguments), kept)
        y, saved = OP.fake_quantize_masked(x, *arguments, "codes")
        assert equal(y, value) and equal(OP.fake_quantize_masked_backward(grad, saved, list(x.stride())), kept)
        to_x, *to_parameters = OP.fake_quantize_learned_backward(grad, x, *arguments)
        assert equal(to_x, kept)
        for ours, truth in zip(to_parameters, learned_formula(grad, x, *arguments), strict=True):
            torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-4)
        finite = torch.where(x.isfinite(), x.to(scale.dtype), torch.nan)
        if activation == "none":
            wanted = [f(finite.nan_to_num(fill), (0, 2, 3)) for f, fill in ((torch.amin, INF), (torch.amax, -INF))]
            assert [equal(a, b + 0.0) for a, b in zip(OP.finite_range(x, 1, "none"), wanted, strict=True)] == [True] * 2


# Lengths around the block size, the vector widths, and the choice between runs and rows of parameters.
@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((1,), None),
        ((33000,), None),
        ((7,), 0),
        ((1, 5), 0),
        ((5, 1), 0),
        ((5, 1, 3), 1),
        ((2, 3), -1),
        ((400, 3), 1),
        ((3, 1000), 1),
        ((2, 17000), 1),
        ((2, 3, 16385), 1),
        ((3, 700, 31), 1),
        ((3, 7, 32), 1),
        ((1000, 9), 0),
        ((), None),
    ],
    ids=str,
)
def test_extents(shape: tuple[int, ...], axis: int | None) -> None:
    torch.manual_seed(1)
    x = with_specials(torch.randn(shape) * 3)
    grad = torch.randn(shape)
    scale, zero_point = parameters(x, axis, 0, 15)
    value, q, _ = formula(x, scale, zero_point, 0, 15, axis)
    assert equal(ops.fake_quantize(x, scale, zero_point, 0, 15, axis=axis), value)
    inside = (q >= 0) & (q <= 15)
    grad_x, grad_scale, grad_zero = OP.fake_quantize_learned_backward(grad, x, scale, zero_point, 0, 15, axis, "none")
    assert equal(grad_x, torch.where(inside, grad, 0.0))
    want_scale, want_zero = learned_formula(grad, x, scale, zero_point, 0, 15, axis)
    torch.testing.assert_close(grad_scale, want_scale.float(), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(grad_zero, want_zero.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [False, True])
def test_matches_torch_on_random_data(bits: int, signed: bool) -> None:
    low = -(1 << (bits - 1)) if signed else 0
    high = low + (1 << bits) - 1
    torch.manual_seed(bits)
    x = (torch.randn(4, 6, 9) * 3).requires_grad_()
    ours, theirs = x.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    scale, zero_point = torch.rand(6) + 0.05, torch.randint(low, high + 1, (6,))
    a = ops.fake_quantize(ours, scale, zero_point, low, high, axis=1)
    b = torch.fake_quantize_per_channel_affine(theirs, scale, zero_point.int(), 1, low, high)
    a.square().sum().backward()
    b.square().sum().backward()
    assert torch.equal(a, b) and torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]
    single = ops.fake_quantize(x.detach(), 0.3, low + 1, low, high)
    assert torch.equal(single, torch.fake_quantize_per_tensor_affine(x.detach(), 0.3, low + 1, low, high))
    codes = ops.quantize(x.detach(), scale, zero_point, low, high, axis=1)
    assert codes.dtype == (torch.int8 if signed else torch.uint8)
    assert torch.equal(ops.dequantize(codes, scale, zero_point, axis=1), a.detach())


@pytest.mark.parametrize("zero_point", [0, 1, -1, 3])
def test_ties_round_to_even_before_the_zero_point_is_added(zero_point: int) -> None:
    x = torch.arange(-6, 6) + 0.5
    y = ops.fake_quantize(x, 1.0, zero_point, -128, 127)
    assert y.tolist() == [-6, -4, -4, -2, -2, 0, 0, 2, 2, 4, 4, 6]
    assert torch.equal(y, torch.fake_quantize_per_tensor_affine(x, 1.0, zero_point, -128, 127))


def test_no_negative_zero() -> None:
    x = torch.tensor([-0.0, -1e-9, -0.49, 0.0])
    for zero_point in (-8, 0, 7):
        assert not ops.fake_quantize(x, 1.0, zero_point, -8, 7).signbit().any()
    codes = torch.zeros(3, dtype=torch.int8)
    assert not ops.dequantize(codes, 0.5, 0).signbit().any()


def test_infinities_saturate_and_huge_values_do_not_wrap() -> None:
    x = torch.tensor([INF, 1e30, 3e38, -INF, -1e30])
    for axis, scale, zero_point in ((None, 0.5, -3), (0, torch.full((5,), 0.5), torch.full((5,), -3))):
        y = ops.fake_quantize(x, scale, zero_point, -8, 7, axis=axis)
        assert y.tolist() == [5.0, 5.0, 5.0, -2.5, -2.5]
        assert ops.quantize(x, scale, zero_point, -8, 7, axis=axis).tolist() == [7, 7, 7, -8, -8]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_nan_gets_no_gradient_and_the_code_of_zero(dtype: torch.dtype) -> None:
    x = torch.tensor([NAN, 1.0], dtype=dtype, requires_grad=True)
    for gradient in ("clipped", "learned"):
        y = ops.fake_quantize(x, 0.5, 3, 0, 15, gradient=gradient)
        assert y.isnan().tolist() == [True, False]
        assert torch.autograd.grad(y.sum(), x)[0].tolist() == [0.0, 1.0]
    assert ops.quantize(x, 0.5, 3, 0, 15).tolist() == [3, 5]


@pytest.mark.parametrize(
    "low,high,dtype",
    [
        (0, 15, torch.uint8),
        (0, 255, torch.uint8),
        (-8, 7, torch.int8),
        (-128, 127, torch.int8),
        (-1, 200, torch.int16),
        (0, 65535, torch.int32),
    ],
)
def test_code_dtypes(low: int, high: int, dtype: torch.dtype) -> None:
    x = torch.tensor([-1e9, 0.0, 1e9])
    codes = ops.quantize(x, 0.25, 0, low, high)
    assert codes.dtype == dtype and codes.tolist() == [low, 0, high]
    for out in DTYPES[:1] + DTYPES[3:]:
        assert ops.dequantize(codes, 0.25, 0, dtype=out).tolist() == [0.25 * low, 0.0, 0.25 * high]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [None, 1, 3])
def test_quantize_and_dequantize_in_every_layout(dtype: torch.dtype, axis: int | None) -> None:
    torch.manual_seed(5)
    base = (torch.randn(3, 34, 4, 5) * 2).to(dtype)
    scale, zero_point = parameters(base, axis, 0, 15)
    _, q, _ = formula(base, scale, zero_point, 0, 15, axis)
    for name, x in layouts(base).items():
        if name == "expanded":
            continue
        codes = ops.quantize(x, scale, zero_point, 0, 15, axis=axis)
        assert torch.equal(codes, q.clamp(0, 15).to(torch.uint8)), name
        back = ops.dequantize(codes, scale, zero_point, axis=axis, dtype=dtype)
        assert equal(back, formula(base, scale, zero_point, 0, 15, axis)[0]), name


def test_half_conversions_are_exact() -> None:
    every = torch.arange(-32768, 32768, dtype=torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        x = every.view(dtype)
        # One code per value would need a finer grid than there is: the identity on what a step of 2^-24 can represent.
        small = x[x.double().abs() <= 2.0**-2]
        y = ops.fake_quantize(small, 2.0**-24, 0, -(1 << 22), 1 << 22)
        assert torch.equal(y, ((small.float() * 2.0**24).round() * 2.0**-24).to(dtype))
        large = x[~(x.double().abs() < 2.0**-2)]
        y = ops.fake_quantize(large, 2.0**-6, 0, -(1 << 23), 1 << 23)
        want = ((large.float() * 2.0**6).round().clamp(-(1 << 23), 1 << 23) * 2.0**-6).to(dtype)
        assert equal(y, want)


x4 = torch.zeros(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ops.fake_quantize(x4.int(), 1.0, 0, 0, 15), TypeError, "x has dtype torch.int32"),
        (lambda: ops.fake_quantize(x4, 0.0, 0, 0, 15), ValueError, "scale is 0.0"),
        (lambda: ops.fake_quantize(x4, NAN, 0, 0, 15), ValueError, "scale is nan"),
        (lambda: ops.fake_quantize(x4, INF, 0, 0, 15), ValueError, "scale is inf"),
        (lambda: ops.fake_quantize(x4, torch.ones(2), 0, 0, 15, axis=1), ValueError, "scale has 2 elements; wanted 3"),
        (lambda: ops.fake_quantize(x4, torch.ones(3), 0, 0, 15), ValueError, "scale has 3 elements; wanted 1"),
        (lambda: ops.fake_quantize(x4, torch.ones(1).int(), 0, 0, 15), TypeError, "scale has dtype torch.int32"),
        (lambda: ops.fake_quantize(x4, torch.ones(1, device="meta"), 0, 0, 15), ValueError, "scale is on meta"),
        (lambda: ops.fake_quantize(x4, 1.0, 16, 0, 15), ValueError, "zero_point is 16; wanted 0 to 15"),
        (lambda: ops.fake_quantize(x4, 1.0, NAN, 0, 15), ValueError, "zero_point is nan"),
        (lambda: ops.fake_quantize(x4, 1.0, torch.zeros(4), 0, 15), ValueError, "zero_point has 4 elements"),
        (lambda: ops.fake_quantize(x4, 1.0, 0, 15, 0), ValueError, "quant_min is 15 and quant_max is 0"),
        (lambda: ops.fake_quantize(x4, 1.0, 0, 0, 1 << 24), ValueError, "quant_max"),
        (lambda: ops.fake_quantize(x4, 1.0, 0, 0, 15, axis=4), ValueError, "axis is 4"),
        (lambda: ops.fake_quantize(x4, 1.0, 0, 0, 15, gradient="lsq"), ValueError, "gradient is 'lsq'"),  # type: ignore[arg-type]
        (lambda: ops.fake_quantize(x4, 1.0, 0, 0, 15, activation="gelu"), ValueError, "activation is 'gelu'"),  # type: ignore[arg-type]
        (lambda: ops.quantize(x4.int(), 1.0, 0, 0, 15), TypeError, "x has dtype"),
        (lambda: ops.dequantize(x4, 1.0, 0), TypeError, "codes has dtype torch.float32"),
        (lambda: ops.dequantize(x4.int(), 1.0, 0, dtype=torch.int8), TypeError, "dtype is torch.int8"),
        (lambda: ops.fake_quantize_weight(x4, 1), ValueError, "bits is 1"),
        (lambda: ops.fake_quantize_weight(x4, 4, axis=-5), ValueError, "axis is -5"),
        (lambda: ops.fake_quantize_weight(x4, 4, gradient="learned"), ValueError, "gradient is 'learned'"),  # type: ignore[call-overload]
        (lambda: ops.observe_fake_quantize(x4, *fresh(), 4, momentum=1.0), ValueError, "momentum is 1.0"),
        (lambda: ops.observe_fake_quantize(x4, *fresh(), 4, axis=1), ValueError, "running_min has 1 elements"),
        (lambda: ops.observe_fake_quantize(x4.double(), *fresh(), 4), TypeError, "running_min has dtype"),
        (lambda: ops.observe_fake_quantize(x4, fresh()[0], torch.zeros(2), 4), ValueError, "running_max has 2"),
        (lambda: ops.mse_range(x4, 0, 15, candidates=0), ValueError, "candidates is 0"),
        (lambda: ops.range_to_qparams(torch.zeros(2), torch.zeros(3), 0, 15), ValueError, "high has shape"),
        (lambda: ops.range_to_qparams(torch.zeros(2), torch.zeros(2).double(), 0, 15), TypeError, "high has dtype"),
    ],
)
def test_errors_name_the_argument(call: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words.replace("(", r"\(")):
        call()


def free_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0


@pytest.mark.skipif(free_memory() < 12 << 30, reason="needs 12 GiB of free memory")
@pytest.mark.skipif(
    not any(row.op == "fake_quantize" and row.kernel == "cpp" for row in ops.backends()),
    reason="needs the C++ kernels: the reference makes temporaries of several times the size",
)
def test_more_than_two_to_the_31_elements() -> None:
    count = (1 << 31) + 31
    x = torch.zeros(count, dtype=torch.bfloat16)
    edges = torch.tensor([0, (1 << 31) - 2, (1 << 31) - 1, 1 << 31, count - 1])
    x[edges] = 2.25
    scale, zero_point = torch.ones(1), torch.zeros(1)
    y = OP.fake_quantize(x, scale, zero_point, -8, 7, None, "none")
    assert y[edges].tolist() == [2.0] * 5 and int(y.count_nonzero()) == 5
    del y
    assert [v.item() for v in OP.finite_range(x, None, "none")] == [0.0, 2.25]
    to_x, to_scale, _ = OP.fake_quantize_learned_backward(x, x, scale, zero_point, -8, 7, None, "none")
    # Five times the gradient 2.25 on a rounding error of -0.25.
    assert to_x[edges].tolist() == [2.25] * 5 and to_scale.item() == -5 * 2.25 * 0.25
