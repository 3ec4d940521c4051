"""The examples run and find what they promise; skipped where their library is not installed."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.checkout("examples")


@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("deep_inversion.py", "torch"),
        ("torch_ao_qat.py", "torch.ao.quantization"),
        ("torchao_quantize.py", "torchao"),
        ("torchao_pt2e.py", "torchao"),
        ("brevitas_layers.py", "brevitas"),
        ("vq_vae.py", "vector_quantize_pytorch"),
    ],
)
def test_example(name: str, library: str) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed (pip install clusterq[peers])")
    child = subprocess.run(
        [sys.executable, str(EXAMPLES / name)], env={**os.environ}, capture_output=True, text=True, timeout=300
    )
    assert child.returncode == 0, child.stderr[-4000:]
    assert "equal" in child.stdout and re.search(r"[0-9.]+ times as fast as", child.stdout), child.stdout
