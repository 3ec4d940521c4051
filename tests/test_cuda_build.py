"""CUDA kernels compiled by nvcc without a GPU: no spills, no stack, 16-byte accesses in the machine code."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
TORCH_HEADERS = Path(torch.__file__).parent / "include"
# Mangled element type, its size in bytes.
ELEMENTS = {"float": ("f", 4), "bfloat16": ("13__nv_bfloat16", 2), "float16": ("6__half", 2), "double": ("d", 8)}


def disassembler():
    """nvdisasm from PATH or from triton's package."""
    found = shutil.which("nvdisasm")
    if found is None:
        try:
            import triton
        except ImportError:
            return None
        packaged = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
        found = str(packaged) if packaged.exists() else None
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(ptxas report, {mangled kernel: machine code}) of csrc/cuda/fake_quant*.cu for sm_90."""
    nvcc, nvdisasm = shutil.which("nvcc"), disassembler()
    if nvcc is None:
        pytest.skip("nvcc is not on PATH")
    if nvdisasm is None:
        pytest.skip("nvdisasm is neither on PATH nor in triton's package")
    if torch.version.cuda is None:
        pytest.skip("this PyTorch is built without CUDA")
    if not (TORCH_HEADERS / "torch/csrc/stable/accelerator.h").exists():
        pytest.skip("this PyTorch has no stable-ABI headers")
    report, kernels = "", {}
    for source in sorted(ROOT.glob("csrc/cuda/fake_quant*.cu")):
        cubin = tmp_path_factory.mktemp("cuda") / "kernels.cubin"
        command = [
            nvcc, "-cubin", str(source), "-o", str(cubin), "-arch=sm_90", "-std=c++20", "-O3",
            "--expt-relaxed-constexpr", "--fmad=false", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA",
            "-Xptxas=-v", f"-I{ROOT / 'csrc'}", f"-I{TORCH_HEADERS}", f"-I{TORCH_HEADERS / 'torch/csrc/api/include'}",
        ]  # fmt: skip
        child = subprocess.run(command, capture_output=True, text=True)
        assert child.returncode == 0, child.stderr[-4000:]
        report += child.stderr
        listing = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
        sections = re.split(r"^\.text\.(\S+):", listing, flags=re.MULTILINE)
        kernels |= dict(zip(sections[1::2], sections[2::2], strict=True))
    return report, kernels


def test_nothing_spills(built):
    report, kernels = built
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(frames) >= len(kernels) >= 100
    assert set(frames) == {("0", "0", "0")}


def test_registers_leave_room_for_occupancy(built):
    report, _ = built
    # 80 registers are three blocks of 256 threads on a multiprocessor.
    assert max(int(n) for n in re.findall(r"Used (\d+) registers", report)) <= 80


@pytest.mark.parametrize("element", ELEMENTS)
def test_accesses_are_16_bytes_wide(built, element):
    _, kernels = built
    mangled, size = ELEMENTS[element]
    # Width, index type (j 32, m 64 bits), element type: the last template arguments before the arithmetic type.
    pattern = re.compile(rf"(elementwise|learned_run|learned_column)_kernel\S*?Li{16 // size}E([jm]){mangled}[fdS]")
    seen = []
    for name, code in kernels.items():
        match = pattern.search(name)
        if match is None:
            continue
        # The elementwise kernels have two packs of a tensor in flight, one where 64-bit divisions take the registers.
        packs = 2 if match[1] == "elementwise" and match[2] == "j" and element != "double" else 1
        tensors = 1 if "Forward" in name else 2
        assert len(re.findall(r"\bLDG\.E\S*\.128", code)) >= packs * tensors, name
        assert len(re.findall(r"\bSTG\.E\S*\.128", code)) >= packs, name
        seen.append(match[1])
    # Forward and backward, each for one scale, runs and any channels; the last two with 64-bit indices too.
    assert (seen.count("elementwise"), seen.count("learned_run")) == (10, 2)
    # A column of doubles is 8 bytes wide.
    assert seen.count("learned_column") == (0 if element == "double" else 2)


def test_no_contraction(built):
    """Rounding twice, product then sum, is the contract: the only multiply-adds are the two of each reciprocal."""
    _, kernels = built
    name = next(n for n in kernels if re.search(r"elementwise_kernel\S*Forward\S*ChannelsE0ELi4EjffE", n))
    code = kernels[name]
    reciprocals = len(re.findall(r"\bMUFU\.RCP\b", code))
    # A product may be written as a multiply-add with RZ: nothing is added.
    multiply_adds = [line for line in re.findall(r"\bFFMA\S* .*", code) if not line.rstrip(" ;").endswith("RZ")]
    assert reciprocals > 0 and len(multiply_adds) == 2 * reciprocals
