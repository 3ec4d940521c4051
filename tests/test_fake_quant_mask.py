"""What is kept for backward: one bit per element, the input or nothing, all with the same gradient."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from torch import Tensor

from clusterq import ops

sys.path.insert(0, os.path.dirname(__file__))
from fake_quant_formulas import DTYPES, INF, NAN, OP, along, formula, layouts, wide, with_specials

ACTIVATIONS = ("none", "relu", "relu6")
SLOPES = {"none": (-INF, INF), "relu": (0.0, INF), "relu6": (0.0, 6.0)}


def saved_bytes(x: Tensor, run) -> int:
    """Bytes of what autograd keeps between forward and backward, x itself and single numbers left out."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() != x.data_ptr() and t.numel() > 4:
            kept[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(kept.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [None, 1, 3])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradient_reaches_what_the_formula_says(dtype: torch.dtype, axis: int | None, activation: str) -> None:
    torch.manual_seed(3)
    base = with_specials((torch.randn(4, 6, 3, 35) * 3).to(dtype))
    count = 1 if axis is None else base.size(axis)
    scale = (torch.rand(count) * 0.3 + 0.1).to(wide(dtype))
    zero_point = torch.arange(count).remainder(5).to(scale.dtype)
    low, high = -8, 7
    for name, x in layouts(base).items():
        x = x.detach().requires_grad_()
        _, code, _ = formula(x.detach(), scale, zero_point, low, high, axis, activation)
        least, most = SLOPES[activation]
        value = x.detach().to(scale.dtype)
        active = (value > least) & (value < most)
        s, z = along(scale, x, axis), along(zero_point, x, axis)
        clamped = value.clamp(least, most)
        inside = {
            ("clipped", "aten"): active & (code >= low) & (code <= high),
            ("clipped", "real_range"): active & (clamped >= (low - z) * s) & (clamped <= (high - z) * s),
            ("pass_through", "aten"): active if activation != "none" else torch.ones_like(active),
        }
        slope = torch.randn(x.shape).to(dtype)
        for (gradient, semantics), wanted in inside.items():
            y = ops.fake_quantize(
                x,
                scale,
                zero_point,
                low,
                high,
                axis=axis,
                activation=activation,
                gradient=gradient,
                semantics=semantics,
                save="mask",
            )
            (got,) = torch.autograd.grad(y, x, slope)
            assert torch.equal(got, torch.where(wanted, slope, 0.0)), (name, gradient, semantics)
            plain = ops.fake_quantize(x.detach(), scale, zero_point, low, high, axis=axis, activation=activation)
            assert torch.equal(y.nan_to_num(9.0), plain.nan_to_num(9.0)) and y.stride() == plain.stride()


@pytest.mark.parametrize("count", [1, 7, 8, 9, 63, 64, 65, 4095, 4096, 4097, 70001])
def test_bits_in_memory_order(count: int) -> None:
    x = torch.arange(count).remainder(11).sub(5).float()
    y, mask = OP.fake_quantize_masked(x, torch.ones(1), torch.zeros(1), -3, 3, None, "none", "codes")
    bits = [(int(byte) >> k) & 1 for byte in mask for k in range(8)]
    assert bits[:count] == [int(-3 <= v <= 3) for v in x.tolist()] and not any(bits[count:])
    assert torch.equal(y, x.clamp(-3, 3))


def test_agrees_with_torch_where_torch_is_defined() -> None:
    """Per tensor and per channel, on ties, the edges of the range and zero points of either parity."""
    x = (torch.arange(-400, 401) / 16).reshape(3, 267).requires_grad_()
    for zero_point in (-3, 0, 1, 4):
        scale, whole = torch.tensor([0.25, 0.5, 0.75]), torch.full((3,), zero_point, dtype=torch.int32)
        theirs = torch.fake_quantize_per_channel_affine(x, scale, whole, 0, -8, 7)
        one = torch.fake_quantize_per_tensor_affine(x, 0.25, zero_point, -8, 7)
        for save in ("mask", "input"):
            ours = ops.fake_quantize(x, scale, whole, -8, 7, axis=0, save=save)
            single = ops.fake_quantize(x, 0.25, zero_point, -8, 7, save=save)
            for got, wanted in ((ours, theirs), (single, one)):
                assert torch.equal(got, wanted)
                slope = torch.linspace(1, 2, x.numel()).reshape(x.shape)
                grads = [torch.autograd.grad(t, x, slope, retain_graph=True)[0] for t in (got, wanted)]
                assert torch.equal(*grads)


def test_what_is_kept() -> None:
    """A bit per element of an activation, nothing more of a parameter, nothing for a gradient that passes all."""
    leaf = torch.randn(64, 33, requires_grad=True)
    inner = leaf * 1.0
    scale = torch.tensor([0.1])

    def kept(x: Tensor, **arguments) -> int:
        return saved_bytes(x, lambda: ops.fake_quantize(x, scale, 0, -8, 7, **arguments))

    assert kept(inner) == inner.numel() // 8
    assert kept(inner, gradient="pass_through") == 0
    assert kept(inner, gradient="pass_through", activation="relu") == inner.numel() // 8
    assert kept(inner, save="input") == 0 and kept(leaf) == 0
    ranges = torch.tensor([-1.0]), torch.tensor([1.0])
    assert saved_bytes(inner, lambda: ops.observe_fake_quantize(inner, *ranges, 4)) == inner.numel() // 8
    assert saved_bytes(inner, lambda: ops.observe_fake_quantize(inner, *ranges, 4, delayed=True)) == inner.numel() // 8


def test_a_gradient_that_is_not_finite_is_selected_not_multiplied() -> None:
    x = torch.tensor([-9.0, 0.5, 9.0, NAN] * 5).requires_grad_()
    y = ops.fake_quantize(x * 1, 1.0, 0, -4, 3, save="mask")
    (got,) = torch.autograd.grad(y, x, torch.tensor([INF, INF, NAN, NAN] * 5))
    assert torch.equal(got, torch.tensor([0.0, INF, 0.0, 0.0] * 5))


def test_grad_in_another_layout() -> None:
    x = torch.randn(3, 5, 4, 7).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = ops.fake_quantize(x * 1, 0.1, 0, -8, 7)
    assert y.stride() == x.stride()
    theirs = torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -8, 7)
    for slope in (
        torch.randn(3, 5, 4, 7),
        torch.randn(1, 1, 1, 1).expand(3, 5, 4, 7),
        torch.randn(7, 4, 5, 3).permute(3, 2, 1, 0),
        torch.randn(3, 5, 4, 14)[..., ::2],
    ):
        got, wanted = (torch.autograd.grad(t, x, slope, retain_graph=True)[0] for t in (y, theirs))
        assert torch.equal(got, wanted) and got.stride() == x.stride()


@pytest.mark.parametrize(
    "arguments, name",
    [
        ({"semantics": "nncf"}, "semantics"),
        ({"save": "bits"}, "save"),
        ({"semantics": "real_range", "save": "input"}, "save"),
        ({"semantics": "real_range", "gradient": "learned"}, "semantics"),
    ],
)
def test_what_cannot_be_combined_is_named(arguments: dict[str, str], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} is"):
        ops.fake_quantize(torch.randn(3, requires_grad=True), 0.1, 0, -8, 7, **arguments)


def test_mask_of_the_wrong_length_is_refused() -> None:
    with pytest.raises((RuntimeError, ValueError), match="mask"):
        OP.fake_quantize_masked_backward(torch.ones(17), torch.zeros(2, dtype=torch.uint8), [1])


class _Swallow(torch.autograd.Function):
    """Hands no gradient back: not zeros, none."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> None:
        return None


@pytest.mark.parametrize(
    "quantize",
    [
        lambda x: ops.fake_quantize(x, 0.1, 0, -8, 7),
        lambda x: ops.fake_quantize(x, 0.1, 0, -8, 7, save="input"),
        lambda x: ops.fake_quantize(x, torch.tensor([0.1], requires_grad=True), 0, -8, 7, gradient="learned"),
        lambda x: ops.observe_fake_quantize(x, torch.tensor([-1.0]), torch.tensor([1.0]), 4)[0],
        lambda x: ops.observe_fake_quantize(x, torch.tensor([-1.0]), torch.tensor([1.0]), 4, delayed=True)[0],
        lambda x: ops.fake_quantize_weight(x, 4, gradient="clipped"),
        lambda x: ops.fake_quantize_weights([x], 4, gradient="clipped")[0][0],
    ],
)
def test_a_gradient_that_is_not_there(quantize) -> None:
    leaf = torch.randn(3, 5, requires_grad=True)
    x = leaf * 1
    (_Swallow.apply(quantize(x)).sum() + x.sum()).backward()
    assert torch.equal(leaf.grad, torch.ones(3, 5))
