"""Kernels of BatchNorm statistics and of the alignment loss in Triton, compiled for GPUs that are not here."""

from __future__ import annotations

import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(__file__))
from compiled_kernels import facts

pytest.importorskip("triton", reason="the triton package is not installed")

CASES = r"""
statistics = importlib.import_module("clusterq.kernels._bn_stats_jit")
merge = importlib.import_module("clusterq.kernels._bn_stats_merge_jit")
backward = importlib.import_module("clusterq.kernels._bn_stats_backward_jit")
lists = importlib.import_module("clusterq.kernels._bn_stats_list_jit")
alignment = importlib.import_module("clusterq.kernels._alignment_jit")

vec = {"fp32": 4, "bf16": 8, "fp64": 2}[element]
real = {"fp32": triton.language.float32, "bf16": triton.language.bfloat16, "fp64": triton.language.float64}[element]
plane = {
    "NORM": -1, "FINAL": True, "SINGLE": True, "EXACT": False, "VEC": 1, "FEW": False, "MANY": True, "GROUP": 16,
    "BLOCK_G": 32, "BLOCK_K": 64,
}
exact, odd = {**plane, "EXACT": True}, {**plane, "VEC": vec, "GROUP": 1}
wide = {**plane, "BLOCK_G": 1, "BLOCK_K": 4096}
inner = {
    "NORM": -1, "FINAL": False, "SINGLE": False, "EACH": False, "FOLD": False, "GROUP": 16, "BLOCK_R": 32, "BLOCK_K": 64
}
sums = {"SINGLE": True, "EXACT": True, "VEC": 1, "MANY": True, "GROUP": 16, "BLOCK_G": 32, "BLOCK_K": 64}
slope = {"TERMS": 3, "NORM": -1, "MANY": True, "GROUP": 16, "BLOCK_R": 16, "BLOCK_K": 64}
rows = {"TERMS": 3, "NORM": -1, "EACH": False, "FOLD": False, "GROUP": 16, "BLOCK_R": 16, "BLOCK_K": 64}
flat = {"TERMS": 3, "NORM": -1, "MANY": True, "FEW": False, "ROWS": 32, "BLOCK": 1024}
# Of float64 data the parameters of BatchNorm and the gradients of statistics are float64 too.
DOUBLE = {} if element != "fp64" else dict.fromkeys(
    ("dweight_ptr", "dbias_ptr", "var_ptr", "weight_ptr", "bias_ptr", "mean_ptr", "center_ptr", "grad_mean_ptr",
     "grad_var_ptr", "first_ptr", "second_ptr"), "fp64",
)
part = {"first_ptr": "fp64", "second_ptr": "fp64"}
partial = {"partial_ptr": "fp64"}
table = {"table_ptr": "i64"}
merged = {"center_ptr": "fp64", "spread_ptr": "fp64", "label_ptr": "i64", "count_ptr": "i64"}
groups = {
    "work_ptr": "fp64", "counts_ptr": "fp64", "partial_ptr": "fp64", "norm_ptr": "fp64", "count_ptr": "i64",
    "labels_ptr": "i64", "starts_ptr": "i64", "mask_ptr": "u8", "known_ptr": "u8", "merged_count_ptr": "fp64",
    "merged_mean_ptr": "fp64", "merged_var_ptr": "fp64",
}
given = {"MASKED": True, "KNOWN": True, "TERMS": 1}
planes, channels = statistics.planes_kernel, statistics.inner_kernel
cases = {
    "8x8": (planes, exact, {}),
    "8x8 parts": (planes, {**exact, "FINAL": False}, part),
    "8x8 norm": (planes, {**exact, "NORM": 3}, {}),
    "7x7": (planes, odd, {}),
    "7x7 norm": (planes, {**odd, "NORM": 3}, {}),
    "32x32": (planes, {**exact, "BLOCK_G": 2, "BLOCK_K": 1024}, {}),
    "56x56": (planes, wide, {}, 8),
    "56x56 norm": (planes, {**wide, "NORM": 3}, {}, 8),
    "tiles": (planes, {**wide, "SINGLE": False, "FINAL": False}, part, 8),
    "tiles norm": (planes, {**wide, "SINGLE": False, "FINAL": False, "NORM": 3}, part, 8),
    "inner": (channels, inner, part),
    "inner norm": (channels, {**inner, "NORM": 3}, part),
    "inner image": (channels, {**inner, "SINGLE": True, "FINAL": True, "BLOCK_R": 64, "BLOCK_K": 32}, {}),
    "merge": (merge.merge_kernel, {"MODE": 1, "PLAIN": False, "WEIGHTED": False, "BLOCK_S": 128, "BLOCK_C": 8}, merged),
    "merge classes": (
        merge.merge_kernel, {"MODE": 2, "PLAIN": False, "WEIGHTED": True, "BLOCK_S": 128, "BLOCK_C": 8}, merged
    ),
    "backward": (backward.planes_backward_kernel, slope, {}),
    "backward norm": (backward.planes_backward_kernel, {**slope, "NORM": 1}, {}),
    "backward 7x7": (backward.flat_backward_kernel, flat, {}),
    "backward 7x7 norm": (backward.flat_backward_kernel, {**flat, "NORM": 1}, {}),
    "backward inner": (backward.inner_backward_kernel, rows, {}),
    "backward inner norm": (backward.inner_backward_kernel, {**rows, "NORM": 1}, {}),
    "backward rows": (backward.inner_backward_kernel, {**rows, "NORM": 1, "EACH": True}, {}),
    "parameters": (backward.planes_parameter_kernel, sums, partial),
    "parameters 7x7": (backward.planes_parameter_kernel, {**sums, "EXACT": False, "VEC": vec, "GROUP": 1}, partial),
    "parameters inner": (
        backward.inner_parameter_kernel, {"FOLD": False, "GROUP": 16, "BLOCK_R": 32, "BLOCK_K": 64}, partial
    ),
    "parameter sums": (
        backward.parameter_sum_kernel, {"BLOCK_S": 128, "BLOCK_C": 8}, partial,
    ),
    "list": (lists.instance_list_kernel, {"ELEMENT": real, "VEC": vec, "ENTRIES": 32}, table, 4, True, 1024),
    "backward list": (
        lists.backward_list_kernel, {"ELEMENT": real, "TERMS": 3, "VEC": vec, "ENTRIES": 32, "BLOCK": 1024}, table, 4,
        True, 1024,
    ),
    "groups": (
        alignment.groups_kernel,
        {
            "SQUARED": True, "ROOT": True, "SLOTS": True, "MERGED": False, "BLOCK_N": 64, "BLOCK_D": 32, **given
        },
        groups, 4, True, 2048,
    ),
    "norms": (alignment.norms_kernel, {"BLOCK": 256}, groups),
    "gradients": (
        alignment.gradients_kernel, {"AVERAGE": True, "BLOCK_N": 16, "BLOCK_D": 64, **given}, groups, 4, True, 1024
    ),
}
cases = {name: (case[0], case[1], {**DOUBLE, **case[2]}, *case[3:]) for name, case in cases.items()}
# Contraction is on: no result of these kernels is compared bit by bit with that of another backend.
report({name: case if len(case) > 4 else (*case, *(4,)[len(case) - 3:], True) for name, case in cases.items()})
"""
# Fewest 16-byte loads and stores, (float32, bfloat16), of a tile of 16 elements of a thread, of 8 in a backward. Where
# planes do not begin at 16 bytes, and in a loop, the tile is in the code twice.
ACCESSES = {
    "8x8": ((4, 0), (2, 0)),
    "8x8 parts": ((4, 0), (2, 0)),
    "8x8 norm": ((4, 4), (2, 2)),
    "7x7": ((4, 0), (2, 0)),
    "7x7 norm": ((6, 2), (3, 1)),
    "32x32": ((4, 0), (2, 0)),
    "56x56": ((4, 0), (2, 0)),
    "56x56 norm": ((4, 4), (2, 2)),
    "tiles": ((8, 0), (4, 0)),
    "tiles norm": ((8, 4), (4, 2)),
    "inner": ((8, 0), (4, 0)),
    "inner norm": ((8, 4), (4, 2)),
    "inner image": ((4, 0), (2, 0)),
    "backward": ((2, 2), (1, 1)),
    "backward norm": ((4, 2), (2, 1)),
    "backward 7x7": ((2, 2), (1, 1)),
    "backward 7x7 norm": ((4, 2), (2, 1)),
    "backward inner": ((2, 2), (1, 1)),
    "backward inner norm": ((4, 2), (2, 1)),
    "backward rows": ((4, 2), (2, 1)),
    "parameters": ((8, 0), (4, 0)),
    "parameters 7x7": ((8, 0), (4, 0)),
    "parameters inner": ((8, 0), (4, 0)),
    "list": ((16, 0), (8, 0)),
    "backward list": ((4, 4), (2, 2)),
    "parameter sums": ((0, 0), (0, 0)),
    "merge": ((0, 0), (0, 0)),
    "merge classes": ((0, 0), (0, 0)),
    "groups": ((0, 0), (0, 0)),
    "norms": ((0, 0), (0, 0)),
    "gradients": ((0, 0), (0, 0)),
}
# Most registers, and most instructions of the whole program per element of a tile of one thread: measured, and a tenth.
# Those of a list have all kinds of tiles in them.
LIMITS = {
    "8x8": (40, 29),
    "8x8 parts": (64, 41),
    "8x8 norm": (64, 61),
    "7x7": (80, 49),
    "7x7 norm": (96, 95),
    "32x32": (64, 27),
    "56x56": (40, 23),
    "56x56 norm": (64, 39),
    "tiles": (96, 40),
    "tiles norm": (128, 53),
    "inner": (128, 66),
    "inner norm": (128, 99),
    "inner image": (64, 52),
    "backward": (40, 46),
    "backward norm": (40, 77),
    "backward 7x7": (64, 70),
    "backward 7x7 norm": (64, 103),
    "backward inner": (64, 33),
    "backward inner norm": (64, 91),
    "backward rows": (64, 95),
    "parameters": (64, 30),
    "parameters 7x7": (80, 61),
    "parameters inner": (128, 34),
    "parameter sums": (96, 58),
    "list": (128, 492),
    "backward list": (96, 338),
    "merge": (96, 175),
    "merge classes": (80, 137),
    "groups": (168, 134),
    "norms": (64, 357),
    "gradients": (128, 179),
}


@pytest.mark.parametrize("element", ["fp32", "bf16"])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiled_code(arch, element, tmp_path):
    for name, found in facts(CASES, arch, element, tuple(ACCESSES), tmp_path).items():
        loads, stores = ACCESSES[name][element == "bf16"]
        registers, instructions = LIMITS[name]
        assert found["stack"] == 0 and found["local"] == 0, (name, found)
        assert found["loads"] >= loads and found["stores"] >= stores, (name, found)
        assert found["registers"] <= registers and found["instructions"] <= instructions, (name, found)


def test_float64_compiles(tmp_path):
    """The interpreter does not see what the compiler refuses."""
    names = ("8x8 norm", "7x7 norm", "inner norm", "backward norm", "backward 7x7 norm", "backward inner norm")
    facts(CASES, 90, "fp64", (*names, "parameter sums"), tmp_path)
