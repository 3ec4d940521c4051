"""What every registered op owes PyTorch, without exception: opcheck, and the same bits from any number of threads.

The parametrisation takes the ops from the registry, so that a new op without a case in `clusterq.op_cases` fails here.
"""

from __future__ import annotations

import os
import sys

import pytest
import torch
from torch.library import opcheck

from clusterq.op_cases import OP_CASES, OpCase
from clusterq.ops import _library
from clusterq.testing import FLOAT_DTYPES

sys.path.insert(0, os.path.dirname(__file__))
from op_contract import CASES, IDS, LAYOUTS, NAMES, empty_shapes, laid_out, overload, tensors

STATIC = ("test_schema", "test_autograd_registration", "test_faketensor")
TRACED = (*STATIC, "test_aot_dispatch_dynamic")


def test_every_op_has_a_case() -> None:
    assert set(OP_CASES) == set(NAMES) == set(_library._ops)
    assert all(OP_CASES.values())


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize(("name", "case"), CASES, ids=IDS)
def test_opcheck(name: str, case: OpCase, dtype: torch.dtype) -> None:
    for layout in LAYOUTS:
        arguments = laid_out(name, case.arguments(dtype=dtype), layout)
        # The traced run takes most of the time: every layout in one dtype, every dtype in one layout.
        utils = TRACED if dtype == torch.float32 or layout == "permuted" else STATIC
        opcheck(overload(name), arguments, test_utils=utils)
    for shape in empty_shapes(case):
        opcheck(overload(name), case.arguments(shape, dtype), test_utils=STATIC)


@pytest.mark.parametrize(("name", "case"), CASES, ids=IDS)
def test_opcheck_of_a_traced_run_on_nothing(name: str, case: OpCase) -> None:
    for shape in empty_shapes(case):
        results = tensors(overload(name)(*case.arguments(shape)))
        # The mean of nothing is NaN, which opcheck takes for a difference between the eager and the traced run.
        if not any(t.isnan().any() for t in results):
            opcheck(overload(name), case.arguments(shape), test_utils="test_aot_dispatch_dynamic")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "case"), CASES, ids=IDS)
def test_threads_do_not_change_a_bit(name: str, case: OpCase, dtype: torch.dtype) -> None:
    shape = {2: (3000, 40), 3: (2, 3000, 12), 4: (5, 20, 40, 41)}[len(case.shape)]
    before = torch.get_num_threads()
    try:
        for layout in ("contiguous", "channels_last", "sliced"):
            runs = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                arguments = laid_out(name, case.arguments(shape, dtype), layout)
                runs.append([*tensors(overload(name)(*arguments)), *tensors(arguments)])
            for run in runs[1:]:
                assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True)), layout
    finally:
        torch.set_num_threads(before)
