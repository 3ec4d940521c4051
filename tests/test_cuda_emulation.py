"""CUDA kernels without a GPU: compiled for the CPU and run thread by thread.

`cuda_emulation/` stands in for the CUDA runtime: threads of a block are fibers that take turns at barriers, in an order
that changes from launch to launch. The cases are those of the Triton interpreter, against the same expectations. It
finds a wrong index, a missing barrier or a formula that is off; of speed and of the memory model it says nothing.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from clusterq.op_cases import OP_CASES

ROOT = Path(__file__).parents[1]
TORCH = Path(torch.__file__).parent
RUN = (
    "import sys, torch, clusterq.ops, pytest; torch.ops.load_library(sys.argv[1]); sys.exit(pytest.main(sys.argv[2:]))"
)
OPS = """
import sys, torch, clusterq.ops
torch.ops.load_library(sys.argv[1])
for name in sys.argv[2:]:
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"clusterq::{name}", "CPU"):
        print(name)
"""
FAMILY = sorted(OP_CASES)
pytestmark = pytest.mark.checkout("csrc")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not on PATH")
    if not (TORCH / "include/torch/csrc/stable/accelerator.h").exists():
        pytest.skip("this PyTorch has no stable-ABI headers")
    folder = tmp_path_factory.mktemp("emulation")
    options = [
        "-x", "c++", "-std=c++20", "-O1", "-fPIC", "-ffp-contract=off", "-DCLUSTERQ_EMULATED", "-DUSE_CUDA",
        "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{ROOT / 'tests/cuda_emulation'}", f"-I{ROOT / 'csrc'}",
        f"-isystem{TORCH / 'include'}",
    ]  # fmt: skip
    sources = [*ROOT.glob("csrc/cuda/*.cu"), *ROOT.glob("csrc/cuda/*_ops.cpp")]
    sources.append(ROOT / "tests/cuda_emulation/emulation.cpp")

    def build(source: Path) -> str:
        target = folder / f"{source.name}.o"
        child = subprocess.run(
            [compiler, *options, "-c", str(source), "-o", str(target)], capture_output=True, text=True
        )
        assert child.returncode == 0, child.stderr[-4000:]
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(build, sources))
    result = folder / "emulated.so"
    link = [compiler, "-shared", "-o", str(result), *objects, f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(link, check=True)
    return str(result)


def test_a_missing_barrier_is_caught(tmp_path: Path) -> None:
    """The emulation can fail: a kernel without the __syncthreads it needs is wrong in every launch, with it in none."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not on PATH")
    folder, target = ROOT / "tests/cuda_emulation", tmp_path / "canary.so"
    sources = [str(folder / name) for name in ("canary.cpp", "emulation.cpp")]
    # The other two canaries of the file are not launched here.
    options = ["-std=c++20", "-O1", "-fPIC", "-shared", "-Wno-unused-function", "-DCLUSTERQ_EMULATED", f"-I{folder}"]
    subprocess.run([compiler, *options, *sources, "-o", str(target)], check=True)
    canary = ctypes.CDLL(str(target))
    assert canary.wrong_launches(ctypes.c_bool(True), 64) == 0
    assert canary.wrong_launches(ctypes.c_bool(False), 64) == 64


def run(*command: str) -> str:
    # Nothing else serves the CPU: what is not emulated would fall to the reference, see `test_every_op_is_emulated`.
    environment = {**os.environ, "CLUSTERQ_BACKEND": "reference", "CLUSTERQ_TEST_DEVICE": "cpu"}
    child = subprocess.run(
        [sys.executable, "-c", *command], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    report = child.stdout + child.stderr
    assert child.returncode == 0, report[-8000:]
    return report


def test_every_op_is_emulated(library: str) -> None:
    assert run(OPS, library, *FAMILY).split() == FAMILY and len(FAMILY) == 34


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("kernel_cases.py", 200),
        ("kernel_mask_cases.py", 1200),
        ("statistics_kernel_cases.py", 350),
        ("statistics_cuda_cases.py", 150),
        ("alignment_kernel_cases.py", 50),
        ("centroid_kernel_cases.py", 200),
        ("centroid_cuda_cases.py", 150),
    ],
)
def test_kernels_on_emulated_threads(library: str, name: str, least: int) -> None:
    # Which backend serves an op is not the question here.
    options = ["-q", "-p", "no:cacheprovider", "--import-mode=importlib", "-k", "not serves"]
    report = run(RUN, library, *options, str(ROOT / "tests" / name))
    passed = re.search(r"(\d+) passed", report)
    assert passed and int(passed[1]) >= least and "skipped" not in report, report[-2000:]
