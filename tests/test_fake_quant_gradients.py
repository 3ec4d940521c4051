"""Gradients of the fake-quantize ops against the formulas of LSQ and LSQ+, and their masks at the edges."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

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
    layouts,
    learned_formula,
    parameters,
    wide,
    with_specials,
)


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


@pytest.mark.parametrize("axis", [None, 1])
def test_grad_factor_is_that_of_torch(axis: int | None) -> None:
    torch.manual_seed(11)
    x, grad = torch.randn(4, 5, 6, 6) * 2, torch.randn(4, 5, 6, 6)
    channels = 1 if axis is None else 5
    scale, zero_point = torch.rand(channels) * 0.1 + 0.2, torch.zeros(channels)
    results = []
    for ours in (True, False):
        leaves = [v.clone().requires_grad_() for v in (x, scale, zero_point)]
        if ours:
            y = ops.fake_quantize(*leaves, -8, 7, axis=axis, gradient="learned", grad_factor=0.125)
        elif axis is None:
            y = torch._fake_quantize_learnable_per_tensor_affine(*leaves, -8, 7, 0.125)
        else:
            y = torch._fake_quantize_learnable_per_channel_affine(*leaves, axis, -8, 7, 0.125)
        results.append(torch.autograd.grad(y, leaves, grad))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


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


def test_weight_clipped_gradient() -> None:
    # Symmetric, step 2: the largest weight is 7.5 steps, rounds to 8 and is clipped to 7.
    w = torch.tensor([[15.0, 7.0, -14.0]], requires_grad=True)
    y = ops.fake_quantize_weight(w, 4, symmetric=True, gradient="clipped")
    assert torch.autograd.grad(y.sum(), w)[0].tolist() == [[0.0, 1.0, 1.0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gradient", ["clipped", "pass_through"])
def test_gradients_under_live_and_observed_ranges(dtype: torch.dtype, gradient: Any) -> None:
    """Straight-through: the incoming gradient where code and activation let it through, to the bit, 0 elsewhere."""
    torch.manual_seed(41)
    base, grad = with_specials((torch.randn(4, 33, 3, 5) * 4).to(dtype)), torch.randn(4, 33, 3, 5).to(dtype)
    for name, x in layouts(base).items():
        if name == "expanded":
            continue
        for axis, symmetric in ((0, True), (1, False)):
            w = x.detach().requires_grad_()
            y, scale, zero_point = ops.fake_quantize_weight(
                w, 3, axis=axis, symmetric=symmetric, gradient=gradient, return_qparams=True
            )
            _, q, _ = formula(base, scale, zero_point, -4, 3, axis)
            mask = (q >= -4) & (q <= 3) if gradient == "clipped" else torch.ones_like(q, dtype=torch.bool)
            assert equal(torch.autograd.grad(y, w, grad)[0], torch.where(mask, grad, torch.zeros_like(grad))), name
        for axis, activation in ((None, "relu"), (1, "relu6"), (1, "none")):
            w = x.detach().requires_grad_()
            low, high = (torch.full((1 if axis is None else 33,), end, dtype=wide(dtype)) for end in (-1.0, 2.0))
            y, scale, zero_point = ops.observe_fake_quantize(
                w, low, high, 4, observe=False, axis=axis, gradient=gradient, activation=activation
            )
            _, q, _ = formula(base, scale, zero_point, 0, 15, axis, activation)
            inside = (q >= 0) & (q <= 15) & activation_mask(base, activation)
            through = torch.ones_like(inside) if activation == "none" else activation_mask(base, activation)
            if activation != "none":
                through &= base.isfinite()
            mask = inside if gradient == "clipped" else through
            assert equal(torch.autograd.grad(y, w, grad)[0], torch.where(mask, grad, torch.zeros_like(grad))), name


def test_observe_gradients() -> None:
    low, high = torch.tensor([0.0]), torch.tensor([1.5])
    for gradient, want in (("clipped", [0.0, 1.0, 0.0]), ("pass_through", [0.0, 1.0, 1.0])):
        x = torch.tensor([-1.0, 1.0, 9.0], requires_grad=True)
        y, scale, _ = ops.observe_fake_quantize(x, low, high, 4, observe=False, activation="relu", gradient=gradient)  # type: ignore[arg-type]
        assert torch.autograd.grad(y.sum(), x)[0].tolist() == want
        assert scale.item() == torch.tensor(0.1).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_pass_through_is_masked_by_the_activation_alone(dtype: torch.dtype, activation: Any) -> None:
    torch.manual_seed(37)
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    ends = torch.tensor([largest, -largest, smallest, -smallest, 0.0, -0.0, 6.0], dtype=dtype)
    base = (torch.randn(3, 37, 6, 5) * 4).to(dtype)
    base.view(-1)[: len(ends)] = ends
    grad = torch.randn(3, 37, 6, 5).to(dtype)
    want = torch.where(activation_mask(base, activation), grad, torch.zeros_like(grad))
    for name, x in layouts(base).items():
        if name == "expanded":
            continue
        x.requires_grad_()
        y = ops.fake_quantize(x, 0.5, 0, 0, 15, gradient="pass_through", activation=activation)
        assert equal(torch.autograd.grad(y, x, grad)[0], want), name
        low, high = torch.tensor([0.0, 1.5], dtype=wide(dtype)).split(1)
        y, _, _ = ops.observe_fake_quantize(
            x, low, high, 4, observe=False, gradient="pass_through", activation=activation
        )
        assert equal(torch.autograd.grad(y, x, grad)[0], want), name


@pytest.mark.parametrize("activation", ["relu", "relu6"])
@pytest.mark.parametrize("gradient", ["clipped", "pass_through", "learned"])
def test_what_is_not_finite_gets_no_gradient_through_an_activation(activation: Any, gradient: Any) -> None:
    x = torch.tensor([NAN, INF, -INF, 1.0] * 9, requires_grad=True)
    y = ops.fake_quantize(x, 0.5, 0, 0, 15, gradient=gradient, activation=activation)
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [0.0, 0.0, 0.0, 1.0] * 9


def test_pass_through_compiles() -> None:
    def loss(x: Tensor) -> Tensor:
        return ops.fake_quantize(x, 0.5, 0, 0, 15, gradient="pass_through", activation="relu6").square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (3, 8):
        x = (torch.randn(n, 4) * 5).requires_grad_()
        assert torch.equal(torch.autograd.grad(compiled(x), x)[0], torch.autograd.grad(loss(x), x)[0])
