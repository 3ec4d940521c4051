"""Triton kernels without a GPU: the cases in `*kernel_*cases.py`, in Triton's interpreter, in a process of its own.

The interpreter is chosen by TRITON_INTERPRET=1, which has to be set before triton is imported.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from clusterq.ops import _library

pytest.importorskip("triton", reason="the triton package is not installed")


# Case files, and the fewest cases that have to pass.
CASES = {
    "centroid_kernel_cases.py": 190,
    "statistics_kernel_cases.py": 400,
    "kernel_mask_cases.py": 1500,
    "kernel_cases.py": 200,
    "alignment_kernel_cases.py": 50,
}


def interpret(name):
    cases = Path(__file__).with_name(name)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CLUSTERQ_BACKEND": "triton", "CLUSTERQ_TEST_DEVICE": "cpu"}
    # Two at a time: none of them has much for a second thread to do.
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", str(cases)]
    return subprocess.run(command, env=environment, cwd=cases.parents[1], capture_output=True, text=True)


@pytest.fixture(scope="module")
def children():
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(interpret, name) for name in CASES}


@pytest.mark.parametrize("name, least", CASES.items())
def test_kernels_in_the_interpreter(name, least, children):
    child = children[name].result()
    report = child.stdout + child.stderr
    assert child.returncode == 0, report[-8000:]
    passed = re.search(r"(\d+) passed", report)
    assert passed and int(passed[1]) >= least and "skipped" not in report, report[-2000:]


@pytest.mark.parametrize("name", sorted(name for name, op in _library._ops.items() if op.triton))
def test_a_launcher_takes_the_arguments_of_its_op(name):
    module, function = _library._ops[name].triton.split(":")
    launcher = getattr(importlib.import_module(f"clusterq.kernels.{module}"), function)
    wanted = [argument.name for argument in getattr(torch.ops.clusterq, name).default._schema.arguments]
    assert [parameter.rstrip("_") for parameter in inspect.signature(launcher).parameters] == wanted
