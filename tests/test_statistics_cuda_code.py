"""Code of the CUDA kernels of the BatchNorm statistics and of the alignment loss: as `test_cuda_code.py` has it."""

from __future__ import annotations

import os
import re
import sys

import pytest

sys.path.insert(0, os.path.dirname(__file__))
from test_cuda_build import ARCHITECTURES, assert_wide, compiled_all

pytestmark = pytest.mark.checkout("csrc")

# Kernels in each file.
SOURCES = {
    "bn_stats_planes.cu": 24,
    "bn_stats_rows.cu": 16,
    "bn_stats_list.cu": 4,
    "bn_stats_merge.cu": 6,
    "bn_stats_backward.cu": 36,
    "bn_stats_parameters.cu": 10,
    "alignment.cu": 8,
}
ELEMENT = "(?:f|13__nv_bfloat16)f"
PLANES = "plane_kernelILNS_4WalkE{}ELb{}E" + ELEMENT
ROWS = "row_kernelILi[48]ELb{}E" + ELEMENT
BACKWARD = "statistics_backward_kernelILb{}ELb{}ELi[48]E" + ELEMENT
# Name -> (pattern of the mangled name, kernels it means, fewest 16-byte loads and stores of each, most instructions:
# measured for the three architectures, and a tenth). Statistics alone store 16 bytes of moments.
WIDE = {
    "planes in registers": (PLANES.format(0, 0), 2, 4, 1, 710),
    "planes by slabs": (PLANES.format(1, 0), 2, 4, 1, 720),
    "large planes": (PLANES.format(2, 0), 2, 4, 1, 1220),
    "planes in registers, BatchNorm": (PLANES.format(0, 1), 2, 4, 5, 980),
    "planes by slabs, BatchNorm": (PLANES.format(1, 1), 2, 4, 4, 1100),
    "large planes, BatchNorm": (PLANES.format(2, 1), 2, 4, 5, 1530),
    "rows": (ROWS.format(0), 2, 8, 1, 1910),
    "rows, BatchNorm": (ROWS.format(1), 2, 8, 9, 2350),
    "list": (f"(?<!backward_)list_kernelI{ELEMENT}", 2, 16, 5, 5200),
    "merge": ("merge_kernelINS0_6StoredEfE", 1, 8, 0, 2390),
    "backward of planes": (BACKWARD.format(0, 0), 2, 2, 2, 820),
    "backward of rows": (BACKWARD.format(1, 0), 2, 4, 4, 1270),
    "backward of planes, BatchNorm": (BACKWARD.format(0, 1), 2, 4, 2, 1270),
    "backward of rows, BatchNorm": (BACKWARD.format(1, 1), 2, 8, 4, 1880),
    "backward list": (f"statistics_backward_list_kernelI{ELEMENT}", 2, 6, 6, 3040),
    "parameters": (f"parameter_kernelILi[48]E{ELEMENT}", 2, 8, 0, 770),
    "alignment": ("alignment_kernelILb[01]ELb1EfE", 2, 0, 0, 4140),
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def code(request, tmp_path_factory):
    """{file: (ptxas report, {mangled kernel: machine code})} for one architecture."""
    return compiled_all(SOURCES, request.param, tmp_path_factory.mktemp("cuda"))


def test_nothing_spills(code):
    for name, (report, kernels) in code.items():
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
        entries = re.findall(r"Compiling entry function", report)
        assert len(entries) == len(kernels) == SOURCES[name], name
        # Kernels, and subroutines of division.
        assert len(frames) >= len(kernels) and set(frames) == {("0", "0", "0")}, name
        # 128 registers are four blocks of 128 threads on a multiprocessor.
        assert max(int(n) for n in re.findall(r"Used (\d+) registers", report)) <= 128, name


def test_wide_kernels(code):
    assert_wide(code, WIDE)
