"""What a build here does not show of the C++ sources: the oldest torch compiles them as C++17, this one as C++20."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[1]
SOURCES = sorted(ROOT.glob("csrc/**/*.cpp"))
pytestmark = pytest.mark.checkout("csrc")


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_host_files_are_cpp17(source: Path, tmp_path: Path) -> None:
    flags = ["-std=c++17", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA"]
    flags += ['-DCLUSTERQ_LIBRARY="any"', '-DCLUSTERQ_COMPILER="any"']
    flags += [f"-I{path}" for path in (ROOT / "csrc", *include_paths(), sysconfig.get_path("include"))]
    if source.parent.name == "cuda":
        # nvcc knows where its headers are.
        compiler = shutil.which("nvcc")
        flags += ["-O0", "-c", "-o", str(tmp_path / "object.o")]
    else:
        compiler = next(filter(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++")), None)
        flags.append("-fsyntax-only")
    if compiler is None:
        pytest.skip("nvcc is not on PATH" if source.parent.name == "cuda" else "no C++ compiler")
    done = subprocess.run([compiler, *flags, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_checks_write_to_no_stream() -> None:
    # Writing a number to an ostream ended the process on a machine that links libstdc++ into the library.
    for path in ROOT.glob("csrc/**/*.*"):
        code = re.sub(r"//.*", "", path.read_text())
        assert not re.search(r"\bSTD_TORCH_CHECK\b|\bTORCH_CHECK\b|stringstream|ostream", code), path.name
