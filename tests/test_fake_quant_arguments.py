"""Arguments of the fake-quantize family that are refused, the same in training and in evaluation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from clusterq import ops

INF, NAN = float("inf"), float("nan")
X = torch.zeros(2, 3, 4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gradient", ["clipped", "pass_through", "learned"])
@pytest.mark.parametrize("zero_point", [NAN, INF, -INF, 16, -1, 15.6, -0.6, 1e30])
def test_numbers_outside_the_codes_are_refused_whatever_the_mode(
    zero_point: float, gradient: Any, training: bool
) -> None:
    x = X.clone().requires_grad_(training)
    scale = torch.ones(1, requires_grad=training)
    with nullcontext() if training else torch.no_grad(), pytest.raises(ValueError, match="zero_point is"):
        ops.fake_quantize(x, scale, zero_point, 0, 15, gradient=gradient)
    with pytest.raises(ValueError, match="zero_point is"):
        ops.quantize(x, scale, zero_point, 0, 15)


@pytest.mark.parametrize(("zero_point", "code"), [(15.4, 15), (0.5, 0), (1.5, 2), (-0.4, 0), (7.0, 7)])
def test_numbers_are_rounded_half_to_even_whatever_the_mode(zero_point: float, code: int) -> None:
    x = torch.linspace(-20, 20, 9)
    want = ops.fake_quantize(x, 1.0, code, 0, 15)
    for scale in (1.0, torch.ones(1), torch.ones(1, requires_grad=True)):
        for gradient in ("clipped", "learned"):
            assert torch.equal(ops.fake_quantize(x, scale, zero_point, 0, 15, gradient=gradient), want)  # type: ignore[arg-type]


@pytest.mark.parametrize("zero_point", [torch.tensor([99.0]), torch.tensor([-99.0])])
def test_zero_points_in_a_tensor_are_clamped_whatever_the_mode(zero_point: Tensor) -> None:
    x = torch.linspace(-20, 20, 9)
    want = ops.fake_quantize(x, 1.0, int(zero_point.clamp(0, 15)), 0, 15)
    for scale in (torch.ones(1), torch.ones(1, requires_grad=True)):
        assert torch.equal(ops.fake_quantize(x, scale, zero_point, 0, 15, gradient="learned"), want)


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [
        (1e39, torch.float32),
        (1e39, torch.float16),
        (1e-39, torch.float32),
        (1e-46, torch.bfloat16),
        (1e-310, torch.float64),
        (-1.0, torch.float32),
        (0, torch.float64),
        (NAN, torch.float64),
        (INF, torch.float64),
    ],
    ids=str,
)
def test_scales_that_are_no_normal_number_of_the_arithmetic_are_refused(scale: float, dtype: torch.dtype) -> None:
    x = X.to(dtype)
    for call in (
        lambda: ops.fake_quantize(x, scale, 0, 0, 15),
        lambda: ops.fake_quantize(x.requires_grad_(), scale, 0, 0, 15, gradient="learned"),
        lambda: ops.quantize(x, scale, 0, 0, 15),
        lambda: ops.dequantize(torch.zeros(3, dtype=torch.uint8), scale, 0, dtype=dtype),
    ):
        with pytest.raises(ValueError, match=r"scale is .*normal positive numbers"):
            call()


def test_the_ends_of_the_normal_numbers_are_scales() -> None:
    for dtype in (torch.float32, torch.float64):
        finfo = torch.finfo(dtype)
        x = torch.tensor([finfo.tiny, 0.0, finfo.max], dtype=dtype)
        assert ops.fake_quantize(x, finfo.tiny, 0, 0, 15).tolist() == [finfo.tiny, 0.0, 15 * finfo.tiny]
        assert ops.fake_quantize(x, finfo.max, 0, 0, 15).tolist() == [0.0, 0.0, finfo.max]


def running() -> Tensor:
    return torch.zeros(3)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda bad: ops.fake_quantize(bad, 1.0, 0, 0, 15), "x"),
        (lambda bad: ops.fake_quantize(X, bad, 0, 0, 15), "scale"),
        (lambda bad: ops.fake_quantize(X, 1.0, bad, 0, 15), "zero_point"),
        (lambda bad: ops.fake_quantize(X.clone().requires_grad_(), 1.0, bad, 0, 15, gradient="learned"), "zero_point"),
        (lambda bad: ops.quantize(bad, 1.0, 0, 0, 15), "x"),
        (lambda bad: ops.quantize(X, bad, 0, 0, 15), "scale"),
        (lambda bad: ops.dequantize(bad, 1.0, 0), "codes"),
        (lambda bad: ops.dequantize(X.int(), 1.0, bad), "zero_point"),
        (lambda bad: ops.fake_quantize_weight(bad, 4), "w"),
        (lambda bad: ops.observe_fake_quantize(bad, running(), running(), 4, axis=1), "x"),
        (lambda bad: ops.observe_fake_quantize(X, bad, running(), 4, axis=1), "running_min"),
        (lambda bad: ops.observe_fake_quantize(X, running(), bad, 4, axis=1), "running_max"),
        (lambda bad: ops.range_to_qparams(bad, running(), 0, 15), "low"),
        (lambda bad: ops.range_to_qparams(running(), bad, 0, 15), "high"),
        (lambda bad: ops.mse_range(bad, 0, 15), "x"),
    ],
)
@pytest.mark.parametrize("bad", [[1.0, 2.0, 3.0], None, X.numpy()], ids=["list", "None", "ndarray"])
def test_what_is_no_tensor_is_named(call: Callable[[object], object], name: str, bad: object) -> None:
    with pytest.raises(TypeError, match=f"^{name} is {type(bad).__name__}; wanted"):
        call(bad)


def test_running_ranges_must_not_share_memory() -> None:
    x = torch.randn(2, 3, 4)
    pairs = (
        ("running_min", torch.zeros(1).expand(3), torch.zeros(3)),
        ("running_max", torch.zeros(3), torch.zeros(1).expand(3)),
    )
    for name, low, high in pairs:
        with pytest.raises(ValueError, match=f"{name} has shape .* share memory"):
            ops.observe_fake_quantize(x, low, high, 4, axis=1)
        assert not low.any() and not high.any()
    same = torch.zeros(3)
    for other in (same, same.view(3), same.as_strided((3,), (1,))):
        with pytest.raises(ValueError, match="running_max is the same memory as running_min"):
            ops.observe_fake_quantize(x, same, other, 4, axis=1)
    with pytest.raises(ValueError, match="running_min requires a gradient"):
        ops.observe_fake_quantize(x, torch.zeros(3, requires_grad=True), torch.zeros(3), 4, axis=1)
    both = torch.zeros(3, 2)
    ops.observe_fake_quantize(x, both[:, 0], both[:, 1], 4, axis=1, momentum=0.0)
    assert torch.equal(both, torch.stack([x.amin((0, 2)), x.amax((0, 2))], 1))


def test_triton_launchers_refuse_a_gradient_of_another_shape() -> None:
    """With the strides of x but fewer rows it would be read past its end."""
    pytest.importorskip("triton")
    from clusterq.kernels import fake_quant as launchers

    x, scale, zero_point = torch.randn(4, 3), torch.ones(1), torch.zeros(1)
    for launcher in (launchers.fake_quantize_backward, launchers.fake_quantize_learned_backward):
        with pytest.raises(ValueError, match=r"grad has shape \(2, 3\); wanted \(4, 3\)"):
            launcher(torch.ones(2, 3), x, scale, zero_point, 0, 15, None, "none")


class Calls(TorchDispatchMode):
    """Names of the clusterq ops that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "clusterq":
            self.names.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("learned", [True, False])
def test_sums_for_parameters_are_made_only_where_one_is_learned(learned: bool) -> None:
    x = torch.randn(2, 3, 4, requires_grad=True)
    scale = torch.full((1,), 0.25, requires_grad=learned)
    y = ops.fake_quantize(x, scale, 3, 0, 15, gradient="learned")
    with Calls() as calls:
        (got,) = torch.autograd.grad(y.sum(), x)
    assert calls.names == ["fake_quantize_learned_backward" if learned else "fake_quantize_backward"]
    code = torch.round(x.detach() / 0.25) + 3
    assert torch.equal(got, ((code >= 0) & (code <= 15)).float())


def test_numbers_may_be_arguments_of_a_compiled_function() -> None:
    def step(x: Tensor, scale: float, zero_point: float) -> Tensor:
        return ops.fake_quantize(x, scale, zero_point, 0, 15)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    x = torch.randn(5, 7)
    for scale, zero_point in ((0.25, 3), (0.5, 4.4), (0.125, 5.0)):
        assert torch.equal(compiled(x, scale, zero_point), step(x, scale, zero_point))
