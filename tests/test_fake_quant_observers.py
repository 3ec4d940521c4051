"""Ranges alone, ranges that lag one step behind, ranges shared by processes, and all weights of a network at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clusterq import ops

sys.path.insert(0, os.path.dirname(__file__))
from fake_quant_formulas import DTYPES, INF, NAN, layouts, wide, with_specials


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [None, 0, 1, -1])
def test_finite_range(dtype: torch.dtype, axis: int | None) -> None:
    torch.manual_seed(5)
    base = with_specials(torch.randn(5, 4, 3, 33).to(dtype))
    for name, x in layouts(base).items():
        rows = x.reshape(1, -1) if axis is None else x.movedim(axis, 0).flatten(1)
        for activation, function in (("none", torch.nn.Identity()), ("relu", torch.relu), ("relu6", torch.nn.ReLU6())):
            low, high = ops.finite_range(x, axis=axis, activation=activation)
            assert low.dtype == high.dtype == wide(dtype)
            for c, row in enumerate(rows):
                # An infinity that relu6 makes 6 counts: what is observed is what is quantized.
                row = function(row)
                row = row[row.isfinite()]
                assert (low[c], high[c]) == (row.min().to(low.dtype), row.max().to(low.dtype)), (name, activation, c)


def test_range_of_nothing_finite() -> None:
    for x in (torch.empty(0, 3), torch.full((4, 3), NAN), torch.full((2, 3), INF)):
        low, high = ops.finite_range(x, axis=1)
        assert low.tolist() == [INF] * 3 and high.tolist() == [-INF] * 3


@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_delayed_range(axis: int | None, memory_format: torch.memory_format) -> None:
    """Step t is quantized with the moving average over the steps before t: torch's own ops fed with that range."""
    torch.manual_seed(0)
    count = 1 if axis is None else 6
    running = torch.full((count,), -1.5), torch.full((count,), 2.5)
    low, high = running[0].double().clone(), running[1].double().clone()
    for step in range(4):
        x = (torch.randn(3, 6, 9, 9) * (step + 1)).contiguous(memory_format=memory_format).requires_grad_()
        scale = ((high - low) / 15).float()
        zero_point = (-(low.float() / scale).round()).int()
        y, used, offset = ops.observe_fake_quantize(x, *running, 4, momentum=0.75, axis=axis, delayed=True)
        torch.testing.assert_close(used, scale, rtol=1e-6, atol=0)
        assert torch.equal(offset.int(), zero_point)
        if axis is None:
            theirs = torch.fake_quantize_per_tensor_affine(x, used.item(), int(offset), 0, 15)
        else:
            theirs = torch.fake_quantize_per_channel_affine(x, used, offset.int(), axis, 0, 15)
        assert torch.equal(y, theirs)
        slope = torch.randn_like(x)
        assert torch.equal(torch.autograd.grad(y, x, slope)[0], torch.autograd.grad(theirs, x, slope)[0])
        rows = x.detach().double().reshape(1, -1) if axis is None else x.detach().double().movedim(1, 0).flatten(1)
        low, high = 0.75 * low + 0.25 * rows.amin(1), 0.75 * high + 0.25 * rows.amax(1)
        torch.testing.assert_close(running[0].double(), low, rtol=1e-6, atol=0)
        torch.testing.assert_close(running[1].double(), high, rtol=1e-6, atol=0)


@pytest.mark.parametrize("gradient", ["clipped", "pass_through"])
@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
def test_delayed_range_has_the_gradient_of_the_other_form(gradient: str, activation: str) -> None:
    x = torch.tensor([1.0, -1.0, 20.0, 5.0, 0.0, NAN, INF, -INF, 7.0], requires_grad=True)
    slope = torch.arange(1.0, 10.0)
    gradients = []
    for delayed in (False, True):
        running = torch.tensor([-0.5]), torch.tensor([6.5])
        y, _, _ = ops.observe_fake_quantize(
            x,
            *running,
            4,
            momentum=0.999,
            gradient=gradient,
            activation=activation,
            delayed=delayed,  # type: ignore[arg-type]
        )
        gradients.append(torch.autograd.grad(y, x, slope)[0])
    assert torch.equal(*gradients) and gradients[0][0] == 1


def test_delayed_range_before_anything_was_seen() -> None:
    running = torch.tensor([INF]), torch.tensor([-INF])
    y, scale, zero_point = ops.observe_fake_quantize(torch.tensor([0.4, 2.6, NAN]), *running, 4, delayed=True)
    assert (scale.item(), zero_point.item()) == (1.0, 0.0) and y[:2].tolist() == [0.0, 3.0]
    assert (running[0].item(), running[1].item()) == pytest.approx((0.4, 2.6))


@pytest.mark.parametrize("wrong", [{"observe": False}, {"process_group": object()}, {"save": "input"}])
def test_delayed_without_observation_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="delayed"):
        ops.observe_fake_quantize(torch.ones(3), torch.zeros(1), torch.ones(1), 4, delayed=True, **wrong)


PROCESS = """
import sys, torch, torch.distributed as dist
from clusterq import ops
rank, port = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{port}", rank=rank, world_size=2)
x = torch.tensor([[-1.0, 2.0], [-0.5, 8.0]])[rank]
running = torch.tensor([-2.0]), torch.tensor([4.0])
y, scale, zero_point = ops.observe_fake_quantize(x, *running, 4, momentum=0.5, process_group=dist.group.WORLD)
print(running[0].item(), running[1].item(), scale.item(), int(zero_point))
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_range_shared_by_processes(tmp_path: Path) -> None:
    """Each process has half of the batch and ends with the range of the whole: (-2 - 1) / 2 and (4 + 8) / 2."""
    command = [sys.executable, "-c", PROCESS]
    children = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for child in children:
        output, _ = child.communicate(timeout=120)
        assert child.returncode == 0
        # Zero point: -(-1.5 / 0.5).
        assert [float(v) for v in output.split()] == [-1.5, 6.0, 0.5, 3.0]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_weights_of_a_network(symmetric: bool, axis: int) -> None:
    """Each as torch quantizes it with the scale and zero point returned, which are those of its own range."""
    torch.manual_seed(1)
    shapes = [(64, 3, 7, 7), (10, 64), (32, 64, 1, 1), (8, 1, 3, 3), (300, 40, 5, 5), (4, 5)]
    weights = [torch.randn(shape).requires_grad_() for shape in shapes]
    with torch.no_grad():
        weights[2].set_(weights[2].detach().contiguous(memory_format=torch.channels_last))
    for gradient in ("pass_through", "clipped"):
        quantized, scales, zero_points = ops.fake_quantize_weights(
            weights, 4, axis=axis, symmetric=symmetric, gradient=gradient
        )
        assert len(quantized) == len(scales) == len(zero_points) == len(weights)
        for w, y, scale, zero_point in zip(weights, quantized, scales, zero_points, strict=True):
            rows = w.detach().movedim(axis, 0).flatten(1)
            low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
            wanted = torch.maximum(-low, high) / 7.5 if symmetric else (high - low) / 15
            torch.testing.assert_close(scale, wanted, rtol=1e-6, atol=0)
            theirs = torch.fake_quantize_per_channel_affine(w, scale, zero_point.int(), axis, -8, 7)
            assert torch.equal(y, theirs) and y.stride() == w.stride()
            slope = torch.randn_like(w)
            (got,) = torch.autograd.grad(y, w, slope, retain_graph=True)
            clipped = torch.autograd.grad(theirs, w, slope)[0]
            assert torch.equal(got, slope if gradient == "pass_through" else clipped)


def test_weights_without_gradient_and_by_one_are_the_same() -> None:
    weights = [torch.randn(6, 5, 3, 3), torch.randn(9, 4)]
    quantized, scales, zero_points = ops.fake_quantize_weights(weights, 3)
    for i, w in enumerate(weights):
        y, scale, zero_point = ops.fake_quantize_weight(w, 3, return_qparams=True)
        assert (
            torch.equal(y, quantized[i]) and torch.equal(scale, scales[i]) and torch.equal(zero_point, zero_points[i])
        )


@pytest.mark.parametrize(
    "weights, error, text",
    [
        ([], ValueError, "weights is empty"),
        ([torch.ones(3, 2), torch.ones(3, 2).double()], TypeError, r"weights\[1\] has dtype"),
        ([torch.ones(3, 2), torch.ones(3, 2, device="meta")], ValueError, r"weights\[1\] is on meta"),
        ([torch.ones(3, 2), torch.ones(3, 2).int()], TypeError, r"weights\[1\] has dtype"),
        ([torch.ones(3), torch.ones(())], ValueError, "axis is 0"),
    ],
)
def test_weights_that_cannot_be_used_are_named(weights: list[torch.Tensor], error: type, text: str) -> None:
    with pytest.raises(error, match=f"^{text}"):
        ops.fake_quantize_weights(weights, 4)
