"""Fake-quantize kernels in Triton, compiled for GPUs that are not here: no spills, no stack, 16-byte accesses, few
registers.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, os.path.dirname(__file__))
from compiled_kernels import facts

pytest.importorskip("triton", reason="the triton package is not installed")

CASES = r"""
jit = importlib.import_module("clusterq.kernels._fake_quant_jit")
ranges = importlib.import_module("clusterq.kernels._range_jit")
weights = importlib.import_module("clusterq.kernels._weight_jit")
masks = importlib.import_module("clusterq.kernels._mask_jit")
observed = importlib.import_module("clusterq.kernels._observe_jit")
errors = importlib.import_module("clusterq.kernels._error_jit")
packing = importlib.import_module("clusterq.kernels._packing_jit")
WIDE = ("range_flat_kernel", "range_tile_kernel", "observed_flat_kernel", "observed_tile_kernel", "error_kernel")
size = 1024 if element == "fp32" else 2048
rows = {"LAST": False, "GROUP": 16, "BLOCK_R": size // 64, "BLOCK_K": 64}
last = {**rows, "LAST": True}
half = {"GROUP": 16, "BLOCK_R": 16, "BLOCK_K": 64, "TILES": 8}
walk = {"LAST": False, "GROUP": 16, "BLOCK_R": 64, "BLOCK_K": 64}
choices = {"RULE": 0, "SYMMETRIC": False, "ACTIVATION": 0}
wide, byte, codes = {"partial_ptr": "fp64"}, {"mask_ptr": "u8"}, {"x_ptr": "i8", "grad_ptr": "i8"}
cases = {
    "forward": (jit.flat_kernel, {"OP": 0, "ACTIVATION": 0, "BLOCK": size}, {}),
    "forward relu6": (jit.flat_kernel, {"OP": 0, "ACTIVATION": 2, "BLOCK": size}, {}),
    "backward": (jit.flat_kernel, {"OP": 1, "ACTIVATION": 0, "BLOCK": 1024}, {}),
    "forward rows": (jit.tile_kernel, {"OP": 0, "ACTIVATION": 0, **rows}, {}),
    "backward rows": (jit.tile_kernel, {"OP": 1, "ACTIVATION": 0, **rows, "BLOCK_R": 16}, {}),
    "forward last": (jit.tile_kernel, {"OP": 0, "ACTIVATION": 0, **last}, {}),
    "learned": (jit.learned_flat_kernel, {"ACTIVATION": 0, "BLOCK": 1024, "TILES": 8}, wide),
    "learned rows": (jit.learned_tile_kernel, {"ACTIVATION": 0, "LAST": False, **half}, wide),
    "learned last": (jit.learned_tile_kernel, {"ACTIVATION": 0, "LAST": True, **half}, wide),
    "weight": (
        weights.weight_kernel,
        {"SYMMETRIC": True, "LAST": False, "GROUP": 16, "BLOCK_R": 1, "BLOCK_K": 1024, "SINGLE": True},
        {},
    ),
    "weight in a loop": (
        weights.weight_kernel,
        {"SYMMETRIC": False, "LAST": False, "GROUP": 16, "BLOCK_R": 1, "BLOCK_K": 1024, "SINGLE": False},
        {},
    ),
    "weights": (
        weights.weights_kernel,
        {
            "ELEMENT": triton.language.float32 if element == "fp32" else triton.language.bfloat16,
            "SYMMETRIC": True, "GROUP": 4 if element == "fp32" else 8, "ENTRIES": 64, "BLOCK": 1024,
        },
        {"table_ptr": "i64"},
    ),
    "range": (ranges.range_flat_kernel, {"ACTIVATION": 0, "KEEP": True, "BLOCK": 4096}, {}),
    "range rows": (ranges.range_tile_kernel, {"ACTIVATION": 0, "KEEP": True, **walk}, {}),
    "range finish": (
        ranges.range_finish_kernel, {"QPARAMS": 2, "SYMMETRIC": False, "BLOCK_S": 32, "BLOCK_C": 32}, {}
    ),
    "masked": (masks.masked_flat_kernel, {"RULE": 0, "ACTIVATION": 0, "BLOCK": size}, byte),
    "masked rows": (masks.masked_tile_kernel, {"RULE": 0, "ACTIVATION": 0, **rows}, byte),
    "masked any": (masks.masked_any_kernel, {"RULE": 0, "ACTIVATION": 0, "BLOCK": 1024}, byte),
    "masked backward": (masks.masked_backward_kernel, {"BLOCK": size}, byte),
    "observed": (observed.observed_flat_kernel, {**choices, "MODE": 1, "BLOCK": 4096, "SPLITS": 512}, byte),
    "observed rows": (observed.observed_tile_kernel, {**choices, "MODE": 1, **walk, "SPLITS": 64}, byte),
    "delayed": (observed.observed_flat_kernel, {**choices, "MODE": 2, "BLOCK": 2048, "SPLITS": 512}, byte),
    "delayed rows": (
        observed.observed_tile_kernel, {**choices, "MODE": 2, **walk, "BLOCK_R": 32, "SPLITS": 64}, byte
    ),
    "error": (errors.error_kernel, walk, wide),
    "pack": (packing.pack_words_kernel, {"BITS": 4, "BLOCK": 2048}, {"out_ptr": "i16", "codes_ptr": "i32"}),
    "unpack": (
        packing.unpack_words_kernel,
        {"BITS": 4, "SIGNED": True, "BLOCK": 2048},
        {"out_ptr": "i32", "packed_ptr": "i16"},
    ),
    "learned finish": (jit.learned_finish_kernel, {"BLOCK_S": 32, "BLOCK_C": 32}, wide),
    "quantize": (jit.flat_kernel, {"OP": 2, "ACTIVATION": 0, "BLOCK": size}, {"out_ptr": "i8"}),
    "quantize rows": (jit.tile_kernel, {"OP": 2, "ACTIVATION": 0, **rows}, {"out_ptr": "i8"}),
    "dequantize": (jit.flat_kernel, {"OP": 3, "ACTIVATION": 0, "BLOCK": size}, codes),
    "dequantize rows": (jit.tile_kernel, {"OP": 3, "ACTIVATION": 0, **rows}, codes),
    "range reduce": (ranges.range_reduce_kernel, {"BLOCK_S": 32, "BLOCK_C": 32}, {}),
    "error sum": (errors.error_sum_kernel, {"BLOCK_S": 32, "BLOCK_C": 32}, wide),
    "pack any length": (packing.pack_rows_kernel, {"BITS": 4, "BLOCK": 512}, {"out_ptr": "u8", "codes_ptr": "i8"}),
    "unpack any length": (
        packing.unpack_rows_kernel,
        {"BITS": 4, "SIGNED": True, "BLOCK": 512},
        {"out_ptr": "i8", "packed_ptr": "u8"},
    ),
}
report({name: (*case, 8 if case[0].fn.__name__ in WIDE else 4) for name, case in cases.items()})
"""
# Fewest 16-byte loads and stores per thread and tile, (float32, bfloat16): a tile is 8 float32 or 16 bfloat16 elements
# of a thread, in a reduction 8 of either.
ACCESSES = {
    "forward": ((2, 2), (2, 2)),
    "forward relu6": ((2, 2), (2, 2)),
    "backward": ((4, 2), (2, 1)),
    "forward rows": ((2, 2), (2, 2)),
    "backward rows": ((4, 2), (2, 1)),
    "forward last": ((2, 2), (2, 2)),
    "learned": ((4, 2), (2, 1)),
    "learned rows": ((4, 2), (2, 1)),
    "learned last": ((4, 2), (2, 1)),
    "weight": ((2, 2), (1, 1)),
    "weight in a loop": ((4, 2), (2, 1)),
    "weights": ((4, 2), (2, 1)),
    "range": ((2, 0), (1, 0)),
    "range rows": ((2, 0), (1, 0)),
    "masked": ((2, 2), (2, 2)),
    "masked rows": ((2, 2), (2, 2)),
    "masked any": ((2, 2), (1, 1)),
    "masked backward": ((2, 2), (2, 2)),
    "observed": ((2, 2), (1, 1)),
    "observed rows": ((2, 2), (1, 1)),
    "delayed": ((2, 2), (1, 1)),
    "delayed rows": ((2, 2), (1, 1)),
    "error": ((2, 0), (1, 0)),
    "pack": ((2, 0), (2, 0)),
    "unpack": ((0, 2), (0, 2)),
    "range finish": ((0, 0), (0, 0)),
    "learned finish": ((0, 0), (0, 0)),
    # A code is a byte.
    "quantize": ((2, 0), (2, 1)),
    "quantize rows": ((2, 0), (2, 1)),
    "dequantize": ((0, 2), (1, 2)),
    "dequantize rows": ((0, 2), (1, 2)),
    "range reduce": ((0, 0), (0, 0)),
    "error sum": ((0, 0), (0, 0)),
    # Rows that begin anywhere.
    "pack any length": ((0, 0), (0, 0)),
    "unpack any length": ((0, 0), (0, 0)),
}
# Most instructions of the whole program, per element of a tile of one thread: measured, and a tenth.
INSTRUCTIONS = {
    "forward": 45,
    "forward relu6": 51,
    "backward": 49,
    "forward rows": 61,
    "backward rows": 62,
    "forward last": 45,
    "learned": 99,
    "learned rows": 90,
    "learned last": 112,
    "weight": 49,
    "weight in a loop": 74,
    "weights": 80,
    "range": 34,
    "range rows": 42,
    "masked": 65,
    "masked rows": 71,
    "masked backward": 27,
    "observed": 69,
    "observed rows": 49,
    "delayed": 101,
    "delayed rows": 107,
    "error": 52,
    "pack": 24,
    "unpack": 40,
    "range finish": 60,
    "learned finish": 37,
    "masked any": 139,
    "quantize": 47,
    "quantize rows": 53,
    "dequantize": 31,
    "dequantize rows": 34,
    "range reduce": 34,
    "error sum": 30,
    "pack any length": 79,
    "unpack any length": 78,
}


@pytest.mark.parametrize("element", ["fp32", "bf16"])
@pytest.mark.parametrize("arch, names", [(arch, tuple(ACCESSES)) for arch in (80, 90, 100)])
def test_compiled_code(arch, names, element, tmp_path):
    for name, found in facts(CASES, arch, element, names, tmp_path).items():
        loads, stores = ACCESSES[name][element == "bf16"]
        assert found["stack"] == 0 and found["local"] == 0, (name, found)
        assert found["loads"] >= loads and found["stores"] >= stores, (name, found)
        # 64 registers are half of a multiprocessor's warps, 128 a quarter.
        most = 64 if name.split()[0] in ("forward", "backward", "weight") else 128
        assert found["registers"] <= most, (name, found)
        assert found["instructions"] <= INSTRUCTIONS[name], (name, found)
        # The reciprocal's Newton steps live below PTX; a multiply-add here would be a contraction.
        assert found["fused"] == 0, (name, found)


@pytest.mark.checkout("kernels")
def test_every_kernel_is_compiled_somewhere():
    """Of all three families: what the launching code names, `module.kernel[grid](...)`."""
    here = Path(__file__).parent
    launched = {
        name
        for path in (here.parent / "kernels").glob("*.py")
        for name in re.findall(r"\b\w+\.(\w+_kernel)\[", path.read_text())
    }
    compiled = "".join(path.read_text() for path in here.glob("test_*kernels_offline.py"))
    assert len(launched) > 30
    assert {name for name in launched if not re.search(rf"\.{name}\b", compiled)} == set()
