"""Code of the CUDA kernels that `test_cuda_build.py` leaves out: learned, ranges, weights, codes, error, packing.

Every kernel: no spills, no stack, registers. The wide ones for float32 and bfloat16: 16-byte accesses and the number of
instructions, rare paths included.
"""

from __future__ import annotations

import os
import re
import sys

import pytest

sys.path.insert(0, os.path.dirname(__file__))
from test_centroid_cuda_code import SOURCES as CENTROIDS
from test_cuda_build import ARCHITECTURES, ROOT, assert_wide, compiled_all
from test_statistics_cuda_code import SOURCES as STATISTICS

pytestmark = pytest.mark.checkout("csrc")

# Kernels in each file.
SOURCES = {
    "fake_quant_learned.cu": 17,
    "fake_quant_observed.cu": 24,
    "fake_quant_ranges.cu": 24,
    "fake_quant_weights.cu": 4,
    "fake_quant_codes.cu": 72,
    "fake_quant_error.cu": 9,
    "packing.cu": 6,
}
ELEMENT = "(?:f|13__nv_bfloat16)"
OBSERVED = "INS0_7ForwardI{}fNS0_15RangeParametersIfEEEELNS0_8ChannelsE{}ELi[48]E"
MASKED = "INS0_13MaskedForwardI{}fNS0_15RangeParametersIfEEEE"
# Name -> (pattern of the mangled name, kernels it means, fewest 16-byte loads and stores of each, most instructions:
# measured for the three architectures, and a tenth).
WIDE = {
    "learned, runs": (f"learned_run_kernelILi[48]E{ELEMENT}f", 2, 2, 1, 1070),
    "learned, columns": (f"learned_column_kernelILi[48]E{ELEMENT}f", 2, 2, 1, 2490),
    "range": (f"range_kernelINS0_5WatchI{ELEMENT}EELb1ELi[48]E", 2, 4, 0, 2090),
    "range of channels": (f"range_kernelINS0_5WatchI{ELEMENT}EELb0ELi[48]E", 2, 4, 0, 6240),
    "delayed": (f"range_kernel{MASKED.format(ELEMENT)}Lb1ELi[48]E", 2, 2, 2, 2310),
    "delayed channels": (f"range_kernel{MASKED.format(ELEMENT)}Lb0ELi[48]E", 2, 2, 2, 4080),
    "observed": (f"elementwise_kernel{OBSERVED.format(ELEMENT, 0)}", 2, 2, 2, 1510),
    "observed channels": (f"elementwise_kernel{OBSERVED.format(ELEMENT, 2)}", 2, 1, 1, 1910),
    "observed, masked": (f"elementwise_kernel{MASKED.format(ELEMENT)}LNS0_8ChannelsE0ELi[48]E", 2, 2, 2, 1690),
    "observed channels, masked": (f"elementwise_kernel{MASKED.format(ELEMENT)}LNS0_8ChannelsE2ELi[48]E", 2, 1, 1, 2050),
    "weights": (f"weights_kernelI{ELEMENT}f", 2, 10, 9, 5600),
    "error": (f"error_kernelILi[48]E{ELEMENT}f", 2, 2, 0, 1950),
    "pack": ("(?<!un)pack_stream_kernelILi[24]E", 2, 1, 0, 220),
    "unpack": ("unpack_stream_kernelILi[24]E", 2, 0, 1, 270),
    "to bytes": (f"ToCodesI{ELEMENT}fhEELNS0_8ChannelsE0ELi[48]E", 2, 2, 0, 470),
    "from bytes": (f"FromCodesIh{ELEMENT}fEELNS0_8ChannelsE0ELi[48]E", 2, 0, 2, 380),
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def code(request, tmp_path_factory):
    """{file: (ptxas report, {mangled kernel: machine code})} for one architecture."""
    return compiled_all(SOURCES, request.param, tmp_path_factory.mktemp("cuda"))


def test_every_source_is_read():
    found = {path.name for path in ROOT.glob("csrc/cuda/*.cu")}
    assert found == {*SOURCES, *STATISTICS, *CENTROIDS, "fake_quant.cu", "fake_quant_mask.cu"}


def test_nothing_spills(code):
    for name, (report, kernels) in code.items():
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
        assert len(frames) == len(kernels) == SOURCES[name], name
        assert set(frames) == {("0", "0", "0")}, name
        # 128 registers are two blocks of 256 threads on a multiprocessor.
        assert max(int(n) for n in re.findall(r"Used (\d+) registers", report)) <= 128, name


def test_wide_kernels(code):
    assert_wide(code, WIDE)
