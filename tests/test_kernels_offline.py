"""Triton kernels compiled for GPUs that are not here: no spills, no stack, 16-byte accesses, few registers.

A kernel is compiled to a cubin for the named architecture; `cuobjdump` and `nvdisasm` come inside triton's package.
The kernels must be read by the compiler, not by the interpreter, so this runs in a child without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the triton package is not installed")

CHILD = r"""
import importlib, json, re, subprocess, sys, tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

jit = importlib.import_module("clusterq.kernels._fake_quant_jit")
ranges = importlib.import_module("clusterq.kernels._range_jit")
weights = importlib.import_module("clusterq.kernels._weight_jit")
masks = importlib.import_module("clusterq.kernels._mask_jit")
observed = importlib.import_module("clusterq.kernels._observe_jit")
errors = importlib.import_module("clusterq.kernels._error_jit")
packing = importlib.import_module("clusterq.kernels._packing_jit")
tools = Path(triton.__file__).parent / "backends/nvidia/bin"
aligned = [["tt.divisibility", 16]]


WIDE = ("range_flat_kernel", "range_tile_kernel", "observed_flat_kernel", "observed_tile_kernel", "error_kernel")


def inspect(kernel, element, constants, arch, others):
    data = ("out_ptr", "x_ptr", "grad_ptr", "dx_ptr", "y_ptr", "w_ptr")
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*" + others.get(name, element if name in data else "fp32")
            attributes[(i,)] = aligned
        else:
            signature[name] = "fp64" if name in ("momentum", "rest") else "i32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    warps = 8 if kernel.fn.__name__ in WIDE else 4
    options = {"num_warps": warps, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tile = constants.get("BLOCK") or constants.get("BLOCK_R", 32) * constants.get("BLOCK_K", 32)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        run = lambda *command: subprocess.run(command, capture_output=True, text=True, check=True).stdout
        usage = run(tools / "cuobjdump", "-res-usage", cubin)
        code = run(tools / "nvdisasm", "-c", cubin)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "local": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "loads": len(re.findall(r"\bLDG\.E\S*\.128\b", code)),
        "stores": len(re.findall(r"\bSTG\.E\S*\.128\b", code)),
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?!NOP)\S", code, re.M)) / (tile / (32 * warps)),
        "fused": len(re.findall(r"\bfma\.rn\.f32", compiled.asm["ptx"])),
    }


arch, element, wanted = int(sys.argv[1]), sys.argv[2], sys.argv[3].split(",")
size = 1024 if element == "fp32" else 2048
rows = {"LAST": False, "GROUP": 16, "BLOCK_R": size // 64, "BLOCK_K": 64}
last = {**rows, "LAST": True}
half = {"GROUP": 16, "BLOCK_R": 16, "BLOCK_K": 64, "TILES": 8}
walk = {"LAST": False, "GROUP": 16, "BLOCK_R": 64, "BLOCK_K": 64}
choices = {"RULE": 0, "SYMMETRIC": False, "ACTIVATION": 0}
wide, byte = {"partial_ptr": "fp64"}, {"mask_ptr": "u8"}
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
}
print(json.dumps({name: inspect(cases[name][0], element, cases[name][1], arch, cases[name][2]) for name in wanted}))
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
}


@pytest.mark.parametrize("element", ["fp32", "bf16"])
@pytest.mark.parametrize("arch, names", [(arch, tuple(ACCESSES)) for arch in (80, 90, 100)])
def test_compiled_code(arch, names, element, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "CLUSTERQ_BACKEND")}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "CLUSTERQ_BACKEND": "reference"}
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(arch), element, ",".join(names)],
        env=environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr[-4000:]
    report = json.loads(child.stdout)
    assert report.keys() == set(names)
    for name, facts in report.items():
        loads, stores = ACCESSES[name][element == "bf16"]
        assert facts["stack"] == 0 and facts["local"] == 0, (name, facts)
        assert facts["loads"] >= loads and facts["stores"] >= stores, (name, facts)
        # 64 registers are half of a multiprocessor's warps, 128 a quarter.
        most = 64 if name.split()[0] in ("forward", "backward", "weight") else 128
        assert facts["registers"] <= most, (name, facts)
        assert facts["instructions"] <= INSTRUCTIONS[name], (name, facts)
        # The reciprocal's Newton steps live below PTX; a multiply-add here would be a contraction.
        assert facts["fused"] == 0, (name, facts)
