"""Compiles Triton kernels for GPUs that are not here and reads their code; for `test_*kernels_offline.py`.

A kernel is compiled to a cubin for the named architecture; `cuobjdump` and `nvdisasm` come inside triton's package.
The kernels must be read by the compiler, not by the interpreter, so this runs in a child without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

INSPECT = r"""
import importlib, json, re, subprocess, sys, tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

tools = Path(triton.__file__).parent / "backends/nvidia/bin"
arch, element, wanted = int(sys.argv[1]), sys.argv[2], sys.argv[3].split(",")
aligned = [["tt.divisibility", 16]]
REAL = (
    "momentum", "rest", "eps", "inverse", "inverse_last", "mean_factor", "var_factor", "weight", "floor",
    "w0", "w1", "w2", "w3",
)


def inspect(kernel, constants, others, warps=4, fusion=False, tile=None):
    data = ("out_ptr", "x_ptr", "grad_ptr", "dx_ptr", "y_ptr", "w_ptr")
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*" + others.get(name, element if name in data else "fp32")
            attributes[(i,)] = aligned
        else:
            signature[name] = "fp64" if name in REAL else "i32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "enable_fp_fusion": fusion}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    if tile is None:
        rows = constants.get("BLOCK_R") or constants.get("BLOCK_G", 32)
        tile = constants.get("BLOCK") or rows * constants.get("BLOCK_K", 32)
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


def report(cases):
    print(json.dumps({name: inspect(*cases[name]) for name in wanted}))
"""


def facts(cases: str, arch: int, element: str, names: tuple[str, ...], folder: Path) -> dict[str, dict[str, float]]:
    """What `inspect` says of the named kernels; `cases` is source that calls `report` on a dictionary of them."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "CLUSTERQ_BACKEND")}
    environment |= {"TRITON_CACHE_DIR": str(folder), "CLUSTERQ_BACKEND": "reference"}
    child = subprocess.run(
        [sys.executable, "-c", INSPECT + cases, str(arch), element, ",".join(names)],
        env=environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr[-4000:]
    result: dict[str, dict[str, float]] = json.loads(child.stdout)
    assert result.keys() == set(names)
    return result
