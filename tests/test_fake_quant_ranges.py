"""Weights, observed ranges and searched ranges against their definitions."""

from __future__ import annotations

import math
import os
import sys
from typing import Any

import pytest
import torch

from clusterq import ops

sys.path.insert(0, os.path.dirname(__file__))
from fake_quant_formulas import (
    DTYPES,
    INF,
    NAN,
    OP,
    equal,
    formula,
    fresh,
    layouts,
    weight_qparams,
    wide,
    with_specials,
)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_qparams_of_a_16_bit_range_are_those_of_float32(dtype: torch.dtype) -> None:
    # In bfloat16 the zero point would be 21888, in float16 the scale of the small range 0.
    for ends, codes in (((-1.0, 2.0), (0, 65535)), ((-1e-3, 3e-3), (0, 255))):
        low, high = (torch.tensor([end], dtype=dtype, requires_grad=True) for end in ends)
        scale, zero_point = ops.range_to_qparams(low, high, *codes)
        assert scale.dtype == zero_point.dtype == torch.float32 and not scale.requires_grad
        steps = codes[1] - codes[0]
        want = (high.double() - low.double()) / steps
        torch.testing.assert_close(scale.double(), want, rtol=1e-6, atol=0)
        assert zero_point.item() == codes[0] + round((-low.double() / want).item())
