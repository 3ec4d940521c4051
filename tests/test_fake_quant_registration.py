"""The fake-quantize ops under torch.compile, and the same bits from any number of threads."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from torch import Tensor

from clusterq import ops

sys.path.insert(0, os.path.dirname(__file__))
from fake_quant_formulas import OP, fresh, parameters


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


@pytest.mark.compiler
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
