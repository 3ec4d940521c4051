"""Index arithmetic, formulas and grids of the CUDA kernels, built by a host compiler: no GPU, no memory past 2^31."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.checkout("csrc")


@pytest.mark.parametrize(
    ("name", "least"), [("cuda_indexing", 1_000_000), ("statistics_plans", 1_000_000), ("centroid_plans", 150_000)]
)
def test_index_arithmetic_and_formulas(name: str, least: int, tmp_path: Path) -> None:
    compiler = next(filter(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++")), None)
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / name
    flags = ["-std=c++20", "-O2", "-ffp-contract=off", "-fno-sanitize-recover=all"]
    flags += ["-fsanitize=address,undefined,float-cast-overflow"]
    source = ROOT / f"tests/{name}.cpp"
    subprocess.run([compiler, *flags, f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)], check=True)
    child = subprocess.run([program], capture_output=True, text=True)
    assert child.returncode == 0, child.stdout + child.stderr
    counted = re.search(r"(\d+) checks, 0 failures", child.stdout)
    assert counted is not None and int(counted[1]) > least
