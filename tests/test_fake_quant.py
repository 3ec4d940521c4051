"""Fake-quantize ops against torch's own op where its semantics are right, and against float64 formulas elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from clusterq import ops

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OP = torch.ops.clusterq


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values in every memory layout a 4-d tensor comes in."""
    padded = torch.full([n + 2 for n in x.shape], NAN, dtype=x.dtype)
    padded[1:-1, 1:-1, 1:-1, 1:-1] = x
    return {
        "contiguous": x.contiguous(),
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "permuted": x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        "sliced": padded[1:-1, 1:-1, 1:-1, 1:-1],
        "expanded": x[:1].expand_as(x),
    }


def along(p: Tensor, x: Tensor, axis: int | None) -> Tensor:
    shape = [1] * x.dim()
    if axis is not None:
        shape[axis] = -1
    return p.reshape(shape)


def formula(
    x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, axis: int | None, activation: str = "none"
) -> tuple[Tensor, Tensor, Tensor]:
    """Value, unclamped code and ratio by the contract, one torch op at a time."""
    s, z = along(scale, x, axis), along(zero_point, x, axis)
    v = x.to(scale.dtype)
    if activation != "none":
        v = torch.where(v < 0, 0.0, v)
    if activation == "relu6":
        v = torch.where(v > 6, 6.0, v)
    ratio = v * (1 / s)
    q = torch.round(ratio) + z
    code = torch.where(q < low, float(low), torch.where(q > high, float(high), q))
    return ((code - z) * s).to(x.dtype), q, ratio


def activation_mask(x: Tensor, activation: str) -> Tensor:
    return {"none": x == x, "relu": x > 0, "relu6": (x > 0) & (x < 6)}[activation]


def parameters(x: Tensor, axis: int | None, low: int, high: int) -> tuple[Tensor, Tensor]:
    count = 1 if axis is None else x.size(axis)
    generator = torch.Generator().manual_seed(count)
    scale = torch.rand(count, generator=generator) * 0.3 + 0.05
    zero_point = torch.randint(low, high + 1, (count,), generator=generator)
    return scale.to(wide(x.dtype)), zero_point.to(wide(x.dtype))


def equal(a: Tensor, b: Tensor) -> bool:
    """Bit-identical up to NaN payloads: -0 differs from +0."""
    same = (a == b) & (a.signbit() == b.signbit())
    return a.dtype == b.dtype and a.shape == b.shape and bool((same | (a.isnan() & b.isnan())).all())


def with_specials(x: Tensor) -> Tensor:
    """Replaces some elements by NaN, infinities, zeros of both signs and huge values."""
    x = x.clone()
    flat = x.view(-1)
    specials = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1e30, -1e30, -1e-8, 6.0], dtype=torch.float64).to(x.dtype)
    places = flat[:: max(1, flat.numel() // 40)][: len(specials)]
    places.copy_(specials[: len(places)])
    return x


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


def test_gradient_is_selected_not_multiplied() -> None:
    x = torch.tensor([100.0, 1.0], requires_grad=True)
    y = ops.fake_quantize(x, 1.0, 0, -8, 7)
    assert torch.autograd.grad(y, x, torch.tensor([INF, INF]))[0].tolist() == [0.0, INF]


def test_clip_mask_is_inclusive_on_the_rounded_value() -> None:
    # -128.5 rounds to the even -128, inside; 127.5 rounds to 128, outside.
    edge = [-129.0, -128.51, -128.5, -128.0, 127.0, 127.49, 127.5, 128.0]
    x = torch.tensor(edge, requires_grad=True)
    y = ops.fake_quantize(x, 1.0, 0, -128, 127)
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [0, 0, 1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize(
    ("activation", "want"), [("none", [1, 1, 1, 1, 1]), ("relu", [0, 0, 1, 1, 1]), ("relu6", [0, 0, 1, 0, 0])]
)
def test_activation_mask_is_strict(activation: Any, want: list[int]) -> None:
    for gradient in ("clipped", "pass_through", "learned"):
        x = torch.tensor([-0.5, 0.0, 0.5, 6.0, 6.5], requires_grad=True)
        y = ops.fake_quantize(x, 0.1, 100, 0, 255, activation=activation, gradient=gradient)
        assert torch.autograd.grad(y.sum(), x)[0].tolist() == want, gradient


def test_pass_through_ignores_the_range() -> None:
    x = torch.tensor([-100.0, 1.0, 100.0], requires_grad=True)
    y = ops.fake_quantize(x, 1.0, 0, -8, 7, gradient="pass_through")
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [1.0, 1.0, 1.0]


def learned_formula(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    low: int,
    high: int,
    axis: int | None,
    activation: str = "none",
) -> tuple[Tensor, Tensor]:
    """LSQ (Esser et al. 2020, eq. 3) and LSQ+ (Bhalgat et al. 2020, eq. 5, 6) as printed, in float64."""
    _, q, _ = formula(x, scale, zero_point, low, high, axis, activation)
    s, z = along(scale.double(), x, axis), along(zero_point.double(), x, axis)
    v = x.double()
    if activation != "none":
        v = v.clamp(min=0)
    if activation == "relu6":
        v = v.clamp(max=6)
    below, above = q < low, q > high
    slope = torch.where(below, low - z, torch.where(above, high - z, q - z - v / s))
    dims = [d for d in range(x.dim()) if axis is None or d != axis % x.dim()]
    to_scale = torch.where(q.isnan(), 0.0, grad.double() * slope)
    to_zero = torch.where(below | above, -grad.double() * s, 0.0)
    if dims:
        to_scale, to_zero = to_scale.sum(dims), to_zero.sum(dims)
    return to_scale.reshape(scale.shape), to_zero.reshape(scale.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [None, 0, 1, 3])
@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
def test_learned_gradients(dtype: torch.dtype, axis: int | None, activation: str) -> None:
    torch.manual_seed(3)
    base = with_specials((torch.randn(4, 40, 3, 5) * 2).to(dtype))
    scale, zero_point = parameters(base, axis, -8, 7)
    grad = torch.randn(4, 40, 3, 5).to(dtype)
    want_scale, want_zero = learned_formula(grad, base, scale, zero_point, -8, 7, axis, activation)
    for name, x in layouts(base).items():
        if name == "expanded":
            continue
        x.requires_grad_()
        s = scale.clone().requires_grad_()
        z = (zero_point + 0.3).requires_grad_()
        y = ops.fake_quantize(x, s, z, -8, 7, axis=axis, gradient="learned", activation=activation)  # type: ignore[arg-type]
        _, q, _ = formula(base, scale, zero_point, -8, 7, axis, activation)
        grad_x, grad_scale, grad_zero = torch.autograd.grad(y, (x, s, z), grad)
        mask = (q >= -8) & (q <= 7) & activation_mask(base, activation)
        assert equal(grad_x, torch.where(mask, grad, torch.zeros_like(grad))), name
        assert grad_scale.dtype == grad_zero.dtype == wide(dtype) and grad_scale.shape == s.shape
        torch.testing.assert_close(grad_scale.double(), want_scale, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(grad_zero.double(), want_zero, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("zero_point", "slope"), [(-1.0, 8.0), (-3.0, 10.0), (2.5, 5.0), (-2.4, 9.0), (-20.0, 15.0)])
def test_backward_uses_the_zero_point_of_the_forward(zero_point: float, slope: float) -> None:
    # torch's learnable per-tensor op adds 0.5 and truncates here, which moves every negative zero point.
    x = torch.tensor([100.0])
    scale = torch.ones(1, requires_grad=True)
    offset = torch.tensor([zero_point], requires_grad=True)
    y = ops.fake_quantize(x, scale, offset, -8, 7, gradient="learned")
    grad_scale, grad_zero = torch.autograd.grad(y.sum(), (scale, offset))
    assert y.item() == slope and grad_scale.item() == slope and grad_zero.item() == -1.0


def test_learned_sum_is_wide() -> None:
    # 2^25 + 1 ones: a float32 accumulator stops at 2^24.
    x = torch.full((1 << 16,), 100.0)
    grad = torch.ones(1 << 16)
    grad[0] = float(1 << 30)
    scale, zero_point = torch.ones(1), torch.zeros(1)
    _, grad_scale, _ = OP.fake_quantize_learned_backward(grad, x, scale, zero_point, -8, 7, None, "none")
    assert grad_scale.item() == torch.tensor(7.0 * ((1 << 30) + (1 << 16) - 1), dtype=torch.float64).float().item()


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


def weight_qparams(w: Tensor, low: int, high: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Per-channel scale and zero point of rows [C, n], in the arithmetic of the contract."""
    scales, zero_points = [], []
    for row in w.to(wide(w.dtype)):
        finite = row[row.isfinite()]
        smallest = torch.cat([finite, finite.new_zeros(1)]).min()
        largest = torch.cat([finite, finite.new_zeros(1)]).max()
        scale = (
            torch.maximum(-smallest, largest) / ((high - low) / 2) if symmetric else (largest - smallest) / (high - low)
        )
        scale = scale if scale > 0 else torch.ones_like(scale)
        scales.append(scale)
        zero = torch.round(low - torch.round(smallest / scale)).clamp(low, high)
        zero = zero if finite.numel() else torch.zeros_like(zero)
        zero_points.append(torch.zeros_like(scale) if symmetric else zero)
    return torch.stack(scales), torch.stack(zero_points)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_weight(dtype: torch.dtype, symmetric: bool, axis: int) -> None:
    torch.manual_seed(7)
    base = (torch.randn(6, 5, 3, 4) * 0.1).to(dtype)
    base[0] = 0
    base[1, 0, 0, 0] = NAN
    base[2, 1, 1, 1] = INF
    base[3] = base[3].abs() + 1
    rows = base.movedim(axis, 0).reshape(base.size(axis), -1)
    for bits in (2, 4, 8):
        low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
        want_scale, want_zero = weight_qparams(rows, low, high, symmetric)
        for name, w in layouts(base).items():
            if name == "expanded":
                continue
            w.requires_grad_()
            y, scale, zero_point = ops.fake_quantize_weight(
                w, bits, axis=axis, symmetric=symmetric, return_qparams=True
            )
            assert equal(scale, want_scale) and equal(zero_point, want_zero), name
            assert equal(y.detach(), formula(base, scale, zero_point, low, high, axis)[0]), name
            assert torch.autograd.grad(y.sum(), w)[0].eq(1).all()
            assert not scale.requires_grad and not zero_point.requires_grad


def test_weight_zero_points() -> None:
    w = torch.tensor([[0.0, 0.0], [1.0, 2.0], [-2.0, -1.0], [NAN, NAN]])
    _, scale, zero_point = ops.fake_quantize_weight(w, 4, return_qparams=True)
    assert scale.tolist()[0] == 1.0 and scale.tolist()[3] == 1.0
    assert zero_point.tolist() == [-8.0, -8.0, 7.0, 0.0]
    _, scale, zero_point = ops.fake_quantize_weight(w, 4, symmetric=True, return_qparams=True)
    assert zero_point.tolist() == [0.0] * 4 and not zero_point.signbit().any()
    assert scale.tolist()[1] == torch.tensor(2 / 7.5).item()


def test_weight_clipped_gradient() -> None:
    # Symmetric, step 2: the largest weight is 7.5 steps, rounds to 8 and is clipped to 7.
    w = torch.tensor([[15.0, 7.0, -14.0]], requires_grad=True)
    y = ops.fake_quantize_weight(w, 4, symmetric=True, gradient="clipped")
    assert torch.autograd.grad(y.sum(), w)[0].tolist() == [[0.0, 1.0, 1.0]]


def test_weight_large_channels_and_many_channels() -> None:
    torch.manual_seed(8)
    for shape, axis in (((2, 300_000), 0), ((3000, 9), 0), ((64, 700), 1)):
        w = torch.randn(shape)
        y, scale, zero_point = ops.fake_quantize_weight(w, 4, axis=axis, return_qparams=True)
        want_scale, want_zero = weight_qparams(w.movedim(axis, 0), -8, 7, False)
        assert equal(scale, want_scale) and equal(zero_point, want_zero)
        assert equal(y, formula(w, scale, zero_point, -8, 7, axis)[0])


@pytest.mark.parametrize("small", [1e-45, 1e-38, 1e-30])
@pytest.mark.parametrize("symmetric", [False, True])
def test_ranges_without_a_normal_scale_stay_finite(small: float, symmetric: bool) -> None:
    w = torch.tensor([[small, -small]])
    assert ops.fake_quantize_weight(w, 8, symmetric=symmetric).isfinite().all()
    big = torch.tensor([[3e38, -3e38]])
    y, scale, _ = ops.fake_quantize_weight(big, 8, symmetric=symmetric, return_qparams=True)
    assert scale.isfinite().all() and y.isfinite().all()


def fresh(count: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.full((count,), INF, dtype=dtype), torch.full((count,), -INF, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [None, 1, 3])
@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
def test_observe(dtype: torch.dtype, axis: int | None, activation: Any) -> None:
    torch.manual_seed(9)
    count = 1 if axis is None else (33 if axis == 1 else 5)
    batches = [with_specials((torch.randn(4, 33, 6, 5) * (k + 1)).to(dtype)) for k in range(3)]
    for name in ("contiguous", "channels_last", "permuted", "sliced"):
        low, high = fresh(count, wide(dtype))
        want_low, want_high = fresh(count, wide(dtype))
        for step, base in enumerate(batches):
            x = layouts(base)[name]
            y, scale, zero_point = ops.observe_fake_quantize(
                x, low, high, 4, momentum=0.75, axis=axis, activation=activation
            )
            v = base.to(wide(dtype))
            v = v if activation == "none" else v.clamp(min=0)
            v = v.clamp(max=6) if activation == "relu6" else v
            rows = v.reshape(1, -1) if axis is None else v.movedim(axis, 0).reshape(count, -1)
            now = [torch.stack([f(r[r.isfinite()]) for r in rows]) for f in (torch.min, torch.max)]
            if step == 0:
                want_low, want_high = now
            else:
                want_low, want_high = 0.75 * want_low + 0.25 * now[0], 0.75 * want_high + 0.25 * now[1]
            assert torch.equal(low, want_low) and torch.equal(high, want_high), name
            left, right = want_low.clamp(max=0), want_high.clamp(min=0)
            assert torch.equal(scale, (right - left) / 15), name
            assert torch.equal(zero_point, (-torch.round(left / scale)).clamp(0, 15)), name
            assert equal(y, formula(base, scale, zero_point, 0, 15, axis, activation)[0]), name


def test_observe_is_never_poisoned() -> None:
    low, high = fresh()
    y, scale, zero_point = ops.observe_fake_quantize(torch.tensor([NAN, INF]), low, high, 4)
    assert (low.item(), high.item(), scale.item(), zero_point.item()) == (INF, -INF, 1.0, 0.0)
    assert y.isnan().tolist() == [True, False] and y[1].item() == 15.0
    ops.observe_fake_quantize(torch.tensor([1.0, -2.0, NAN]), low, high, 4)
    assert (low.item(), high.item()) == (-2.0, 1.0)
    ops.observe_fake_quantize(torch.tensor([NAN, -INF]), low, high, 4)
    ops.observe_fake_quantize(torch.empty(0), low, high, 4)
    assert (low.item(), high.item()) == (-2.0, 1.0)
    ops.observe_fake_quantize(torch.tensor([50.0]), low, high, 4, observe=False)
    assert (low.item(), high.item()) == (-2.0, 1.0)


@pytest.mark.parametrize(("signed", "middle"), [(False, 8.0), (True, 0.0)])
def test_observe_symmetric(signed: bool, middle: float) -> None:
    low, high = fresh()
    x = torch.tensor([-3.0, 1.0])
    _, scale, zero_point = ops.observe_fake_quantize(x, low, high, 4, symmetric=True, signed=signed)
    assert scale.item() == torch.tensor(3 / 7.5).item() and zero_point.item() == middle


def test_observe_gradients() -> None:
    low, high = torch.tensor([0.0]), torch.tensor([1.5])
    for gradient, want in (("clipped", [0.0, 1.0, 0.0]), ("pass_through", [0.0, 1.0, 1.0])):
        x = torch.tensor([-1.0, 1.0, 9.0], requires_grad=True)
        y, scale, _ = ops.observe_fake_quantize(x, low, high, 4, observe=False, activation="relu", gradient=gradient)  # type: ignore[arg-type]
        assert torch.autograd.grad(y.sum(), x)[0].tolist() == want
        assert scale.item() == torch.tensor(0.1).item()


def test_observe_updates_strided_buffers() -> None:
    buffer = torch.tensor([[INF, -INF], [INF, -INF]])
    x = torch.tensor([[1.0, -4.0], [2.0, 3.0]])
    ops.observe_fake_quantize(x, buffer[:, 0], buffer[:, 1], 4, axis=1)
    assert buffer.tolist() == [[1.0, 2.0], [-4.0, 3.0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [None, 0, 1, 3])
def test_quantization_error(dtype: torch.dtype, axis: int | None) -> None:
    torch.manual_seed(11)
    base = (torch.randn(3, 35, 8, 6) * 2).to(dtype)
    base.view(-1)[:3] = torch.tensor([NAN, INF, -INF]).to(dtype)
    count = 1 if axis is None else base.size(axis)
    scales = (torch.rand(4, count) * 0.2 + 0.05).to(wide(dtype))
    zero_points = torch.randint(0, 16, (4, count)).to(wide(dtype))
    for name, x in layouts(base).items():
        if name == "expanded":
            continue
        got = OP.quantization_error(x, scales, zero_points, 0, 15, axis)
        for m in range(4):
            value, _, _ = formula(base.to(wide(dtype)), scales[m], zero_points[m], 0, 15, axis)
            square = torch.where(base.isfinite(), value.double() - base.double(), 0.0).square()
            rows = square.reshape(1, -1) if axis is None else square.movedim(axis, 0).reshape(count, -1)
            torch.testing.assert_close(got[m], rows.sum(1), rtol=1e-5, atol=1e-9, msg=name)


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("symmetric", [False, True])
def test_mse_range_finds_the_best_candidate(axis: int | None, symmetric: bool) -> None:
    torch.manual_seed(13)
    x = torch.randn(4, 1000)
    x[:, 0] = 20.0
    scale, zero_point = ops.mse_range(x, -4, 3, axis=axis, symmetric=symmetric, candidates=20)
    rows = x.reshape(1, -1) if axis is None else x
    for c, row in enumerate(rows.double()):
        errors = []
        for k in range(20, 0, -1):
            low, high = min(row.min().item(), 0.0) * k / 20, max(row.max().item(), 0.0) * k / 20
            s = max(-low, high) / 3.5 if symmetric else (high - low) / 7
            z = 0.0 if symmetric else min(max(-4 - round(low / s), -4), 3)
            y = ((row / s).round() + z).clamp(-4, 3).sub(z).mul(s)
            errors.append((y - row).square().sum().item())
        y = ops.fake_quantize(row.float(), scale[c : c + 1], zero_point[c : c + 1], -4, 3)
        assert math.isclose((y.double() - row).square().sum().item(), min(errors), rel_tol=1e-4)


def test_mse_range_of_nothing() -> None:
    scale, zero_point = ops.mse_range(torch.zeros(0, 3), 0, 15, axis=1)
    assert scale.tolist() == [1.0] * 3 and zero_point.tolist() == [0.0] * 3
    scale, _ = ops.mse_range(torch.zeros(5), 0, 15)
    assert scale.tolist() == [1.0]


OPERATORS: dict[str, Callable[[Tensor], tuple[Any, ...]]] = {
    "fake_quantize": lambda x: (x, *qparams(x), -8, 7, 1, "relu6"),
    "fake_quantize_backward": lambda x: (torch.ones_like(x), x, *qparams(x), -8, 7, 1, "relu"),
    "fake_quantize_learned_backward": lambda x: (torch.ones_like(x), x, *qparams(x), -8, 7, 1, "none"),
    "quantize": lambda x: (x, *qparams(x), -8, 7, 1),
    "fake_quantize_weight": lambda x: (x, -8, 7, 1, False),
    "observe_fake_quantize": lambda x: (x, *fresh(x.size(1), wide(x.dtype)), 0, 15, 0.9, True, False, 1, "relu"),
    "quantization_error": lambda x: (x, *(p.expand(3, -1) for p in qparams(x)), 0, 15, 1),
}


def qparams(x: Tensor) -> tuple[Tensor, Tensor]:
    return parameters(x, 1, -8, 7)


def opcheck_inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(17)
    cases = layouts(torch.randn(2, 3, 4, 5).to(dtype))
    cases["empty"] = torch.empty(0, dtype=dtype).reshape(0, 3, 0, 2)
    cases["no batch"] = torch.empty(0, 3, 4, 4, dtype=dtype)
    cases["no channels"] = torch.empty(2, 0, 4, 4, dtype=dtype)
    return cases


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    for layout, x in opcheck_inputs(dtype).items():
        # Strides of fakes are checked in every layout; the compiled run once, as it takes most of the time.
        utils = ["test_schema", "test_faketensor", "test_autograd_registration"]
        if layout == "channels_last" and dtype == torch.float32:
            utils.append("test_aot_dispatch_dynamic")
        torch.library.opcheck(getattr(OP, name).default, OPERATORS[name](x), test_utils=utils)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_dequantize(dtype: torch.dtype) -> None:
    for x in layouts(torch.randn(2, 3, 4, 5)).values():
        codes = (x * 3).to(torch.int8)
        scale, zero_point = torch.rand(3).to(wide(dtype)), torch.zeros(3).to(wide(dtype))
        torch.library.opcheck(OP.dequantize.default, (codes, scale, zero_point, 1, dtype))


def test_compiles_whole_with_dynamic_shapes() -> None:
    torch.manual_seed(19)
    low, high = fresh()

    def step(x: Tensor, w: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        y, _, _ = ops.observe_fake_quantize(x, low, high, 4, activation="relu")
        z = ops.fake_quantize(x, scale, zero_point, 0, 15, axis=1, gradient="learned")
        return y.sum() + (z * z).sum() + ops.fake_quantize_weight(w, 4, symmetric=True).square().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    want_low, want_high = fresh()
    for n in (2, 5):
        x = torch.randn(n, 3, 4 + n)
        inputs = [x, torch.randn(4, 3 + n), torch.rand(3) + 0.1, torch.rand(3) * 9]
        results = []
        for run in (compiled, step):
            leaves = [t.clone().requires_grad_() for t in inputs]
            loss = run(*leaves)
            results.append([loss.detach(), low.clone(), high.clone(), *torch.autograd.grad(loss, leaves)])
            if run is compiled:
                updated = low.clone(), high.clone()
                low.copy_(want_low), high.copy_(want_high)
        assert torch.isfinite(updated[0]).all()
        want_low, want_high = low.clone(), high.clone()
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


def test_inductor_compiles_forward_and_backward() -> None:
    scale, zero_point = torch.rand(3) + 0.1, torch.randint(0, 16, (3,))

    def step(x: Tensor) -> Tensor:
        return ops.fake_quantize(x + 1, scale, zero_point, 0, 15, axis=1).square().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for n in (2, 3):
        x = torch.randn(n, 3, 5, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
        a, b = compiled(x), step(x)
        torch.testing.assert_close(a, b)
        assert torch.equal(torch.autograd.grad(a, x)[0], torch.autograd.grad(b, x)[0])


def test_thread_count_does_not_change_a_bit() -> None:
    torch.manual_seed(23)
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out: list[Tensor] = []
            generator = torch.Generator().manual_seed(29)
            for shape, axis in (((70_000,), None), ((9, 40, 130), 1), ((3000, 24), 1), ((4, 50, 7), 1)):
                x = torch.randn(shape, generator=generator) * 3
                grad = torch.randn(shape, generator=generator)
                scale, zero_point = parameters(x, axis, -8, 7)
                out += OP.fake_quantize_learned_backward(grad, x, scale, zero_point, -8, 7, axis, "none")
                out += OP.observe_fake_quantize(x, *fresh(scale.numel()), -8, 7, 0.9, True, False, axis, "none")
                out.append(OP.quantization_error(x, scale[None], zero_point[None], -8, 7, axis))
                out += OP.fake_quantize_weight(x, -8, 7, axis or 0, False)
            runs.append(out)
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_large_accumulation_matches_float64() -> None:
    torch.manual_seed(31)
    x, grad = torch.randn(64, 3, 50, 50) * 2, torch.randn(64, 3, 50, 50) + 1
    for memory_format in (torch.contiguous_format, torch.channels_last):
        scale, zero_point = parameters(x, 1, -8, 7)
        got = OP.fake_quantize_learned_backward(
            grad, x.contiguous(memory_format=memory_format), scale, zero_point, -8, 7, 1, "none"
        )
        want = learned_formula(grad, x, scale, zero_point, -8, 7, 1)
        torch.testing.assert_close(got[1].double(), want[0], rtol=1e-6, atol=1e-3)
        torch.testing.assert_close(got[2].double(), want[1], rtol=1e-6, atol=1e-3)


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
    ],
)
def test_errors_name_the_argument(call: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words.replace("(", r"\(")):
        call()
