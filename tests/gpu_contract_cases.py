"""What `test_op_contract.py` and `test_op_functions.py` ask of the ops on a CPU, on the device CLUSTERQ_TEST_DEVICE.

opcheck of every op in every layout, the same bits from 100 calls, and every public function compiled whole. Run by
`bench/gpu_check.sh` on a GPU, and in part on the CPU by `test_gpu_check.py`; not collected by itself.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from clusterq import ops
from clusterq.op_cases import OpCase, values

sys.path.insert(0, os.path.dirname(__file__))
from kernel_cases import DEVICE, carry
from op_contract import CASES, IDS, LAYOUTS, empty_shapes, laid_out, overload
from op_contract import tensors as results_of
from test_op_contract import STATIC, TRACED
from test_op_functions import FUNCTIONS, LEAVES, tensors

if DEVICE == "cuda" and not torch.cuda.is_available():
    raise RuntimeError("CLUSTERQ_TEST_DEVICE=cuda, and torch sees no GPU")


def on_device(value: Any) -> Any:
    """A value, or a list or dictionary of such, with its tensors on the device and their strides as they are."""
    if isinstance(value, Tensor):
        return carry(value)
    if isinstance(value, dict):
        return {name: on_device(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(on_device(part) for part in value)
    return value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "case"), CASES, ids=IDS)
def test_opcheck(name: str, case: OpCase, dtype: torch.dtype) -> None:
    for layout in LAYOUTS:
        arguments = on_device(laid_out(name, case.arguments(dtype=dtype), layout))
        # The traced run takes most of the time, and its layouts are not the device's matter.
        utils = TRACED if dtype == torch.float32 and layout in ("contiguous", "channels_last") else STATIC
        opcheck(overload(name), arguments, test_utils=utils)
    for shape in empty_shapes(case):
        opcheck(overload(name), on_device(case.arguments(shape, dtype)), test_utils=STATIC)


def any_order(name: str, case: OpCase) -> bool:
    """Whether the case asks for sums that may differ from call to call."""
    names = [argument.name for argument in overload(name)._schema.arguments]
    return dict(zip(names, case.arguments(), strict=True)).get("deterministic") is False


REPEATABLE = [(name, case) for name, case in CASES if not any_order(name, case)]
REPEATABLE_IDS = [i for i, case in zip(IDS, CASES, strict=True) if case in REPEATABLE]


@pytest.mark.parametrize(("name", "case"), REPEATABLE, ids=REPEATABLE_IDS)
def test_the_same_bits_from_every_call(name: str, case: OpCase) -> None:
    """At a size that takes several blocks; results, and what is written in place."""
    shape = {2: (3000, 40), 3: (2, 3000, 12), 4: (5, 20, 40, 41)}[len(case.shape)]
    made = case.arguments(shape)
    first: list[Tensor] = []
    for _ in range(100 if DEVICE == "cuda" else 3):
        arguments = on_device(made)
        run = [*results_of(overload(name)(*arguments)), *results_of(arguments)]
        # On a CPU `carry` is no copy, and what is written in place is another input at the next call.
        made = made if DEVICE == "cuda" else case.arguments(shape)
        first = first or run
        assert len(run) == len(first)
        for ours, wanted in zip(run, first, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=0, atol=0, equal_nan=True)


def step(name: str, function: Any, n: int) -> list[Tensor]:
    """Outputs, gradients, and arguments, which may have changed."""
    arguments, leaves = on_device(FUNCTIONS[name](n, torch.float32)), LEAVES.get(name, ())
    wanted = [t.requires_grad_() for leaf in leaves for t in tensors(arguments[leaf])]
    outputs = tensors(function(**arguments))
    differentiable = [t for t in outputs if t.requires_grad]
    slopes = [values(t.shape, t.dtype, 5).to(t.device) for t in differentiable]
    grads = torch.autograd.grad(differentiable, wanted, slopes) if leaves else ()
    return [*outputs, *grads, *tensors(arguments.values())]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiles_whole_for_any_size(name: str) -> None:
    function = getattr(ops, name)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (5, 8):
        for eager, traced in zip(step(name, function, n), step(name, compiled, n), strict=True):
            assert eager.stride() == traced.stride() and torch.equal(eager, traced)


@pytest.mark.skipif(DEVICE != "cuda", reason="test_op_functions does this on the CPU")
@pytest.mark.parametrize("name", ["fake_quantize", "batch_norm_with_statistics", "nearest_centroid"])
def test_inductor_compiles_forward_and_backward(name: str) -> None:
    """One of each family, compiled by what users compile with."""
    torch._dynamo.reset()
    compiled = torch.compile(getattr(ops, name), fullgraph=True, dynamic=True)
    for n in (5, 8):
        for eager, made in zip(step(name, getattr(ops, name), n), step(name, compiled, n), strict=True):
            torch.testing.assert_close(made, eager, rtol=1e-6, atol=1e-6)
