"""Triton kernels without a GPU: the cases in `kernel_cases.py`, in Triton's interpreter, in a process of its own.

The interpreter is chosen by TRITON_INTERPRET=1, which has to be set before triton is imported.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the triton package is not installed")


def test_kernels_in_the_interpreter():
    cases = Path(__file__).with_name("kernel_cases.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CLUSTERQ_BACKEND": "triton", "CLUSTERQ_TEST_DEVICE": "cpu"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", str(cases)]
    child = subprocess.run(command, env=environment, cwd=cases.parents[1], capture_output=True, text=True)
    report = child.stdout + child.stderr
    assert child.returncode == 0, report[-8000:]
    passed = re.search(r"(\d+) passed", report)
    assert passed and int(passed[1]) >= 40 and "skipped" not in report, report[-2000:]
