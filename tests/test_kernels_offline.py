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
tools = Path(triton.__file__).parent / "backends/nvidia/bin"
aligned = [["tt.divisibility", 16]]


def inspect(kernel, element, constants, arch, others):
    data = ("out_ptr", "x_ptr", "grad_ptr", "dx_ptr", "y_ptr", "w_ptr")
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*" + (element if name in data else others.get(name, "fp32"))
            attributes[(i,)] = aligned
        else:
            signature[name] = "fp64" if name in ("momentum", "rest") else "i32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": 4, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
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
        "fused": len(re.findall(r"\bfma\.rn\.f32", compiled.asm["ptx"])),
    }


arch, element, wanted = int(sys.argv[1]), sys.argv[2], sys.argv[3].split(",")
size = 1024 if element == "fp32" else 2048
rows = {"LAST": False, "GROUP": 16, "BLOCK_R": size // 64, "BLOCK_K": 64}
last = {**rows, "LAST": True}
half = {"GROUP": 16, "BLOCK_R": 16, "BLOCK_K": 64, "TILES": 8}
wide = {"partial_ptr": "fp64"}
cases = {
    "forward": (jit.flat_kernel, {"OP": 0, "ACTIVATION": 0, "BLOCK": size}, {}),
    "forward relu6": (jit.flat_kernel, {"OP": 0, "ACTIVATION": 2, "BLOCK": size}, {}),
    "backward": (jit.flat_kernel, {"OP": 1, "ACTIVATION": 0, "BLOCK": size}, {}),
    "forward rows": (jit.tile_kernel, {"OP": 0, "ACTIVATION": 0, **rows}, {}),
    "backward rows": (jit.tile_kernel, {"OP": 1, "ACTIVATION": 0, **rows}, {}),
    "forward last": (jit.tile_kernel, {"OP": 0, "ACTIVATION": 0, **last}, {}),
    "learned": (jit.learned_flat_kernel, {"ACTIVATION": 0, "BLOCK": 1024, "TILES": 8}, wide),
    "learned rows": (jit.learned_tile_kernel, {"ACTIVATION": 0, "LAST": False, **half}, wide),
    "learned last": (jit.learned_tile_kernel, {"ACTIVATION": 0, "LAST": True, **half}, wide),
    "weight": (
        ranges.weight_kernel,
        {"SYMMETRIC": True, "LAST": False, "GROUP": 16, "BLOCK_R": 1, "BLOCK_K": 1024, "SINGLE": True},
        {},
    ),
    "weight in a loop": (
        ranges.weight_kernel,
        {"SYMMETRIC": False, "LAST": False, "GROUP": 16, "BLOCK_R": 1, "BLOCK_K": 1024, "SINGLE": False},
        {},
    ),
    "range": (ranges.range_flat_kernel, {"ACTIVATION": 0, "BLOCK": 1024, "TILES": 8}, {}),
    "range finish": (ranges.range_finish_kernel, {"SYMMETRIC": False, "BLOCK_S": 32, "BLOCK_C": 32}, {}),
    "learned finish": (jit.learned_finish_kernel, {"BLOCK_S": 32, "BLOCK_C": 32}, wide),
}
print(json.dumps({name: inspect(cases[name][0], element, cases[name][1], arch, cases[name][2]) for name in wanted}))
"""
# Fewest 16-byte loads and stores per thread and tile, (float32, bfloat16): a tile is 8 float32 or 16 bfloat16 elements
# of a thread, in a reduction 8 of either.
ACCESSES = {
    "forward": ((2, 2), (2, 2)),
    "forward relu6": ((2, 2), (2, 2)),
    "backward": ((4, 2), (4, 2)),
    "forward rows": ((2, 2), (2, 2)),
    "backward rows": ((4, 2), (4, 2)),
    "forward last": ((2, 2), (2, 2)),
    "learned": ((4, 2), (2, 1)),
    "learned rows": ((4, 2), (2, 1)),
    "learned last": ((4, 2), (2, 1)),
    "weight": ((2, 2), (1, 1)),
    "weight in a loop": ((4, 2), (2, 1)),
    "range": ((2, 0), (1, 0)),
    "range finish": ((0, 0), (0, 0)),
    "learned finish": ((0, 0), (0, 0)),
}


# Everything on one architecture, the kernels of a training step on the others.
STEP = ("forward", "backward", "learned", "learned rows")


@pytest.mark.parametrize("element", ["fp32", "bf16"])
@pytest.mark.parametrize("arch, names", [(80, STEP), (90, tuple(ACCESSES)), (100, STEP)])
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
        # The reciprocal's Newton steps live below PTX; a multiply-add here would be a contraction.
        assert facts["fused"] == 0, (name, facts)
