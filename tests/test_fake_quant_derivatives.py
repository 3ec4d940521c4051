"""Beyond the first derivative: second derivatives, forward mode, torch.func, outputs that no gradient reaches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from clusterq import ops

Function = Callable[[Tensor], Tensor]
SCALE = 0.25


def torch_own(x: Tensor) -> Tensor:
    return torch.fake_quantize_per_tensor_affine(x, SCALE, 1, -8, 7)


def ranges() -> tuple[Tensor, Tensor]:
    """Such that a range of 4 bits has the scale and zero point of `torch_own`."""
    return torch.tensor([-9 * SCALE]), torch.tensor([6 * SCALE])


# Each of them computes what torch's own op computes.
CLIPPED: dict[str, Function] = {
    "mask": lambda x: ops.fake_quantize(x, SCALE, 1, -8, 7, save="mask"),
    "input": lambda x: ops.fake_quantize(x, SCALE, 1, -8, 7, save="input"),
    "observed, mask": lambda x: ops.observe_fake_quantize(x, *ranges(), 4, observe=False, signed=True, save="mask")[0],
    "observed, input": lambda x: ops.observe_fake_quantize(x, *ranges(), 4, observe=False, signed=True, save="input")[
        0
    ],
    "delayed": lambda x: ops.observe_fake_quantize(x, *ranges(), 4, signed=True, delayed=True)[0],
}


def points() -> Tensor:
    """Of both sides of the range [-2.25, 1.5], none at a tie."""
    return torch.tensor([[-7.0, -2.1, -0.3], [0.1, 1.4, 5.0]])


@pytest.mark.parametrize("name", CLIPPED)
def test_second_derivatives_are_those_of_torch(name: str) -> None:
    def curved(function: Function) -> Function:
        return lambda x: (function(x * x - 2.5) ** 2).sum() + (function(x) ** 3).sum()

    got = torch.autograd.functional.hessian(curved(CLIPPED[name]), points())
    want = torch.autograd.functional.hessian(curved(torch_own), points())
    assert want.abs().sum() > 0
    torch.testing.assert_close(got, want)


def test_third_derivatives_are_those_of_torch() -> None:
    def third(function: Function) -> Tensor:
        x = points().requires_grad_()
        value = (function(x) ** 3).sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, x, create_graph=True)
            value = gradient.sum()
        return gradient.detach()

    got = third(CLIPPED["mask"])
    assert got.abs().sum() > 0 and torch.equal(got, third(torch_own))


@pytest.mark.parametrize("gradient", ["clipped", "pass_through"])
def test_second_derivatives_of_weights(gradient: str) -> None:
    def curved(w: Tensor) -> Tensor:
        single = ops.fake_quantize_weight(w, 4, gradient=gradient)  # type: ignore[call-overload]
        (listed,), _, _ = ops.fake_quantize_weights([w], 4, gradient=gradient)  # type: ignore[arg-type]
        return (single**2).sum() + (listed**2).sum()

    # Minimum and maximum are in the range, so every gradient passes: f'' = 4 on the diagonal.
    got = torch.autograd.functional.hessian(curved, points())
    torch.testing.assert_close(got.reshape(6, 6), 4 * torch.eye(6))


def test_second_derivatives_with_an_activation() -> None:
    def curved(gradient: str) -> Function:
        return lambda x: (ops.fake_quantize(x, 0.25, 0, 0, 7, activation="relu", gradient=gradient) ** 2).sum()  # type: ignore[arg-type]

    x = points()
    inside = torch.diag(((x > 0) & (x < 1.875)).float().flatten())
    positive = torch.diag((x > 0).float().flatten())
    for gradient, want in (("clipped", inside), ("pass_through", positive)):
        got = torch.autograd.functional.hessian(curved(gradient), x).reshape(6, 6)
        torch.testing.assert_close(got, 2 * want)


@pytest.mark.parametrize("wanted", ["x", "scale", "zero_point"])
def test_second_derivatives_of_learned_gradients_raise(wanted: str) -> None:
    leaves = {
        "x": points().requires_grad_(),
        "scale": torch.tensor([SCALE]).requires_grad_(),
        "zero_point": torch.tensor([1.0]).requires_grad_(),
    }
    y = ops.fake_quantize(**leaves, quant_min=-8, quant_max=7, gradient="learned")
    # Also where the incoming gradient is a constant.
    (gradient,) = torch.autograd.grad(y, leaves[wanted], torch.ones_like(y), create_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(gradient.sum(), tuple(leaves.values()), allow_unused=True)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(
    "function",
    [
        *CLIPPED.values(),
        lambda x: ops.fake_quantize(x, 0.1, 0, -8, 7, gradient="pass_through"),
        lambda x: ops.fake_quantize(x, 0.1, 0, -8, 7, gradient="learned"),
        lambda x: ops.fake_quantize_weight(x, 4),
        lambda x: ops.fake_quantize_weights([x], 4)[0][0],
    ],
)
def test_forward_mode_raises(function: Function, requires_grad: bool) -> None:
    # Not a derivative of 0, which the ops alone would give.
    x = points().requires_grad_(requires_grad)
    with pytest.raises(NotImplementedError, match="forward mode AD"):
        torch.func.jvp(function, (x,), (torch.ones_like(x),))


def test_transforms_give_the_gradients_of_autograd() -> None:
    # Functions are called in another way while torch.func is at work.
    torch.manual_seed(12)
    x, scale, zero_point = torch.randn(3, 4, 5), torch.rand(4) + 0.1, torch.zeros(4)

    def loss(x: Tensor, scale: Tensor, gradient: str) -> Tensor:
        y = ops.fake_quantize(x, scale, zero_point, -2, 1, axis=1, gradient=gradient)  # type: ignore[arg-type]
        return (y * y).sum()

    for gradient, leaves in (("clipped", (x,)), ("learned", (x, scale))):
        numbers = tuple(range(len(leaves)))
        got = torch.func.grad(lambda *a, g=gradient: loss(*(*a, scale)[:2], g), argnums=numbers)(*leaves)
        parameters = [leaf.clone().requires_grad_() for leaf in leaves]
        want = torch.autograd.grad(loss(*(*parameters, scale)[:2], gradient), parameters)
        for ours, theirs in zip(got, want, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("gradient", ["clipped", "pass_through"])
def test_weights_without_a_use_or_without_training_get_no_gradient(gradient: str) -> None:
    # A gradient of zeros would let weight decay and momentum move them.
    torch.manual_seed(5)
    used, unused, frozen = (torch.randn(3, 4, requires_grad=r) for r in (True, True, False))
    outputs, _, _ = ops.fake_quantize_weights([used, unused, frozen], 4, gradient=gradient)  # type: ignore[arg-type]
    assert not outputs[2].requires_grad
    (outputs[0].sum() + outputs[2].sum()).backward()
    assert used.grad is not None and torch.equal(used.grad, torch.ones(3, 4))
    assert unused.grad is None and frozen.grad is None
