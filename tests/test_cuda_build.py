"""CUDA kernels compiled by nvcc without a GPU: no spills, 16-byte accesses, bounded code; the ops they serve."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.checkout("csrc")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
# The ones that stream whole activations, forward and backward; the others share their walk.
SOURCES = ("fake_quant.cu", "fake_quant_mask.cu")
# CPU kernels of the families that CUDA kernels exist for.
FAMILIES = [
    *(path for f in ("fake_quant", "bn_stats", "alignment", "centroids") for path in ROOT.glob(f"csrc/cpu/{f}*.cpp")),
    ROOT / "csrc/cpu/packing.cpp",
]
# Mangled element type, its size in bytes, and the mangled type of a gradient taken as bits.
ELEMENTS = {"float": ("f", 4, "j"), "bfloat16": ("13__nv_bfloat16", 2, "t"), "float16": ("6__half", 2, "t")}
ELEMENTS["double"] = ("d", 8, "m")
# Most instructions of a kernel for float32 per element of a thread, straight and rare paths together: measured for the
# three architectures, and a tenth. A load or a clamp more per element shows.
INSTRUCTIONS = {
    ("Forward", 0): 31,
    ("Backward", 0): 39,
    ("MaskedForward", 0): 46,
    ("masked_backward", 0): 25,
    ("Forward", 1): 136,
    ("Backward", 1): 130,
    ("MaskedForward", 1): 208,
}


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


def compiled(name, architecture, folder):
    """(ptxas report, {mangled kernel: machine code}) of a source, by nvcc; skips where a tool is missing."""
    nvcc, nvdisasm = shutil.which("nvcc"), disassembler()
    if nvcc is None:
        pytest.skip("nvcc is not on PATH")
    if nvdisasm is None:
        pytest.skip("nvdisasm is neither on PATH nor in triton's package")
    cubin = folder / f"{name}.cubin"
    command = [
        nvcc, "-cubin", str(ROOT / "csrc/cuda" / name), "-o", str(cubin), f"-arch={architecture}", "-std=c++20",
        "-O3", "--expt-relaxed-constexpr", "--fmad=false", "-Xptxas=-v", f"-I{ROOT / 'csrc'}",
    ]  # fmt: skip
    child = subprocess.run(command, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-4000:]
    listing = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    sections = re.split(r"^\.text\.(\S+):", listing, flags=re.MULTILINE)
    return child.stderr, dict(zip(sections[1::2], sections[2::2], strict=True))


def compiled_all(sources, architecture, folder):
    """{file: what `compiled` returns}."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(sources, pool.map(lambda name: compiled(name, architecture, folder), sources), strict=True))


def assert_wide(code, wide):
    """`wide`: {what: (pattern of the mangled name, kernels it means, fewest 16-byte loads and stores of each, most
    instructions)}; `code`: of `compiled_all`."""
    every = {name: listing for _, kernels in code.values() for name, listing in kernels.items()}
    found = {}
    for what, (pattern, count, loads, stores, limit) in wide.items():
        kernels = {name: listing for name, listing in every.items() if re.search(pattern, name)}
        assert len(kernels) == count, (what, list(kernels))
        for name, listing in kernels.items():
            assert len(re.findall(r"\bLDG\.E\S*\.128", listing)) >= loads, name
            assert len(re.findall(r"\bSTG\.E\S*\.128", listing)) >= stores, name
        instructions = [
            len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?!NOP)\S", c, re.MULTILINE)) for c in kernels.values()
        ]
        found[what] = (max(instructions), limit)
    # Far below the bound the pattern no longer reads the listing.
    assert all(limit / 3 < most <= limit for most, limit in found.values()), found


@pytest.fixture(scope="module", params=ARCHITECTURES)
def built(request, tmp_path_factory):
    """(ptxas report, {mangled kernel: machine code}) for one architecture."""
    report, kernels = "", {}
    for name in SOURCES:
        said, code = compiled(name, request.param, tmp_path_factory.mktemp("cuda"))
        report, kernels = report + said, kernels | code
    return report, kernels


def described(name):
    """(op, mangled element or bits, Channels, pack width) of a kernel's mangled name."""
    if match := re.search(r"masked_backward_kernelI([tjm])Li(\d)E", name):
        return "masked_backward", match[1], 0, int(match[2])
    match = re.search(
        r"elementwise_kernelINS0_\d+(\w*?(?:For|Back)ward)I(13__nv_bfloat16|6__half|f|d)\w*?ChannelsE(\d)ELi(\d)E", name
    )
    assert match is not None, name
    return match[1], match[2], int(match[3]), int(match[4])


def test_nothing_spills(built):
    report, kernels = built
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(frames) == len(kernels) == 54
    assert set(frames) == {("0", "0", "0")}


def test_registers_leave_room_for_occupancy(built):
    report, _ = built
    # 80 registers are three blocks of 256 threads on a multiprocessor.
    assert max(int(n) for n in re.findall(r"Used (\d+) registers", report)) <= 80


@pytest.mark.parametrize("element", ELEMENTS)
def test_accesses_are_16_bytes_wide(built, element):
    _, kernels = built
    mangled, size, bits = ELEMENTS[element]
    seen = []
    for name, code in kernels.items():
        op, of, channels, width = described(name)
        if of not in (mangled, bits) or width != 16 // size:
            continue
        # Two packs in flight, one where a pack leaves its run and for 8 bytes.
        packs = 1 if channels == 2 or size == 8 else 2
        tensors = 2 if op == "Backward" else 1
        assert len(re.findall(r"\bLDG\.E\S*\.128", code)) >= packs * tensors, name
        assert len(re.findall(r"\bSTG\.E\S*\.128", code)) >= packs, name
        seen.append((op, channels))
    wanted = [(op, channels) for op in ("Forward", "Backward", "MaskedForward") for channels in range(3)]
    assert sorted(seen) == sorted([*wanted, ("masked_backward", 0)])


def test_instructions_per_element_are_bounded(built, record_property):
    _, kernels = built
    found = {}
    for name, code in kernels.items():
        op, of, channels, width = described(name)
        if of not in ("f", "j") or width != 4 or channels == 2:
            continue
        instructions = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?!NOP)\S", code, flags=re.MULTILINE)
        found[op, channels] = len(instructions) / (2 * width)
        record_property(f"instructions per element, {op}, channels {channels}", found[op, channels])
    assert found.keys() == INSTRUCTIONS.keys()
    # Below half the bound the pattern no longer reads the listing.
    assert all(limit / 2 < found[key] <= limit for key, limit in INSTRUCTIONS.items()), found


def test_no_contraction(built):
    """Rounding twice, product then sum, is the contract: the only multiply-adds are the two of each reciprocal."""
    _, kernels = built
    name = next(n for n in kernels if described(n) == ("Forward", "f", 0, 4))
    code = kernels[name]
    reciprocals = len(re.findall(r"\bMUFU\.RCP\b", code))
    # A product may be written as a multiply-add with RZ: nothing is added.
    multiply_adds = [line for line in re.findall(r"\bFFMA\S* .*", code) if not line.rstrip(" ;").endswith("RZ")]
    assert reciprocals > 0 and len(multiply_adds) == 2 * reciprocals


def test_every_op_has_a_cuda_kernel():
    """What the CPU library registers of the families, the CUDA library registers too; Triton is kept out."""
    source = (
        "import json, torch\n"
        "from clusterq import ops\n"
        "from clusterq.ops import _fake_quant_ops, _library\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "keys = ('CPU', 'CUDA')\n"
        "found = {name: [has(f'clusterq::{name}', key) for key in keys] for name in _library._ops}\n"
        "print(json.dumps(found | {'': _library._missing.get('cuda')}))\n"
    )
    if not list((ROOT / "clusterq").glob("_C_cuda*.so")):
        pytest.skip("the CUDA library is not built: no nvcc, or a torch without CUDA")
    environment = {**os.environ, "CLUSTERQ_BACKEND": "cuda"}
    child = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert child.returncode == 0, child.stderr
    found = json.loads(child.stdout.splitlines()[-1])
    missing = found.pop("")
    if missing:
        pytest.skip(missing)
    declared = re.findall(r"m\.impl\(\"(\w+)\"", "".join(p.read_text() for p in FAMILIES))
    family = set(declared)
    assert len(family) == 34 and family <= found.keys()
    assert {name: found[name] for name in family} == {name: [True, True] for name in family}
