"""What only a GPU can show of the fake-quantize ops; run by `bench/gpu_check.sh`, not collected by itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from clusterq import ops
from clusterq.testing import capture

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda")


def step(x: Tensor, grad: Tensor, scale: Tensor, zero_point: Tensor, low: Tensor, high: Tensor) -> list[Tensor]:
    """Forward and backward of every form."""
    results = []

    def both(y: Tensor, *leaves: Tensor) -> None:
        results.extend((y.detach(), *torch.autograd.grad(y, leaves, grad)))

    both(ops.fake_quantize(x, scale, zero_point, -8, 7, axis=1), x)
    both(ops.fake_quantize(x, scale, zero_point, -8, 7, axis=1, save="input"), x)
    both(ops.fake_quantize(x, scale, zero_point, -8, 7, axis=1, gradient="learned"), x, scale)
    both(ops.observe_fake_quantize(x, low, high, 4, activation="relu")[0], x)
    both(ops.observe_fake_quantize(x, low, high, 4, delayed=True)[0], x)
    both(ops.fake_quantize_weight(x, 4), x)
    results += ops.fake_quantize_weights([x.detach()] * 3, 4)[0]
    results += [ops.quantize(x, scale, zero_point, -8, 7, axis=1), *ops.finite_range(x.detach(), axis=1)]
    return results


def inputs(seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(8, 16, 14, 14, generator=generator) * 2 for _ in range(2))
    scale = torch.rand(16, generator=generator) * 0.2 + 0.1
    values = (x, grad, scale, torch.arange(16) % 5 - 2.0, torch.tensor([-1.0]), torch.tensor([1.0]))
    return tuple(v.to(CUDA) for v in values)


def prepared(seed: int) -> tuple[Tensor, ...]:
    x, grad, scale, *rest = inputs(seed)
    return (x.requires_grad_(), grad, scale.requires_grad_(), *rest)


def call_without_waiting(call: Callable[[], object]) -> None:
    """Raises where a call, not the first one, waits for the device."""
    # Kernels are loaded and compiled by the first call.
    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_no_call_waits_for_the_device() -> None:
    arguments = prepared(0)
    call_without_waiting(lambda: step(*arguments))


def test_captured_and_replayed_with_other_input() -> None:
    fixed = prepared(0)
    graph, captured = capture(lambda: step(*fixed))
    for seed in (1, 2):
        with torch.no_grad():
            for target, source in zip(fixed, inputs(seed), strict=True):
                target.copy_(source)
        graph.replay()
        wanted = step(*prepared(seed))
        for ours, theirs in zip(captured, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def on_a_late_stream(call: Callable[..., list[Tensor]], make: Callable[[], tuple[Tensor, ...]]) -> list[Tensor]:
    """Results of `call(*make())` on a side stream that is busy: what ran elsewhere would read x before it is there."""
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        arguments = make()
        late = arguments[0].detach().clone()
        with torch.no_grad():
            arguments[0].zero_()
            torch.cuda._sleep(50_000_000)
            arguments[0].copy_(late)
        got = call(*arguments)
    stream.synchronize()
    return got


def test_the_current_stream_is_used() -> None:
    wanted = step(*prepared(3))
    for ours, theirs in zip(on_a_late_stream(step, lambda: prepared(3)), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_the_same_bits_every_time() -> None:
    first = step(*prepared(4))
    for _ in range(100):
        for ours, theirs in zip(step(*prepared(4)), first, strict=True):
            assert torch.equal(ours, theirs)


def learned_backward(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """1 where the gradient of x is not 0, for x as the incoming one; the sum of the step's gradient is checked here."""
    grad, by_scale, _ = torch.ops.clusterq.fake_quantize_learned_backward(x, x, scale, zero_point, -8, 7, None, "none")
    # (code - x / scale) * grad of five elements of 1.1 in bfloat16.
    value = float(torch.tensor(1.1, dtype=torch.bfloat16))
    torch.testing.assert_close(float(by_scale), 5 * (4 - value / 0.25) * value, rtol=1e-4, atol=0)
    return (grad != 0).to(x.dtype)


def forms() -> dict[str, Callable[[Tensor], Tensor]]:
    scale, zero_point = torch.tensor([0.25], device=CUDA), torch.zeros(1, device=CUDA)
    return {
        "forward": lambda x: ops.fake_quantize(x, scale, zero_point, -8, 7),
        "observed": lambda x: ops.observe_fake_quantize(
            x, torch.tensor([-2.0], device=CUDA), torch.tensor([1.75], device=CUDA), 4, observe=False
        )[0],
        "masked": lambda x: torch.ops.clusterq.fake_quantize_masked(x, scale, zero_point, -8, 7, None, "none", "codes")[
            0
        ],
        "learned backward": lambda x: learned_backward(x, scale, zero_point),
        "channels": lambda x: ops.fake_quantize(
            x.view(-1, 3), scale.expand(3).contiguous(), zero_point.expand(3).contiguous(), -8, 7, axis=1
        ).view(-1),
    }


@pytest.mark.parametrize("form", ["forward", "observed", "masked", "learned backward", "channels"])
def test_more_than_two_to_the_31_elements(form: str) -> None:
    # A multiple of 3, for the channels.
    count = (1 << 31) + 31
    assert count % 3 == 0
    x = torch.zeros(count, dtype=torch.bfloat16, device=CUDA)
    edges = torch.tensor([0, (1 << 31) - 2, (1 << 31) - 1, 1 << 31, count - 1], device=CUDA)
    x[edges] = 1.1
    y = forms()[form](x)
    assert y[edges].tolist() == [1.0] * 5
    assert int((y != 0).sum()) == 5
