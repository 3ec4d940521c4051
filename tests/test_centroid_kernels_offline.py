"""Triton kernels of the centroid ops, compiled for GPUs that are not here."""

from __future__ import annotations

import importlib
import os
import sys

import pytest
import torch

sys.path.insert(0, os.path.dirname(__file__))
from compiled_kernels import facts

pytest.importorskip("triton", reason="the triton package is not installed")

CASES = r"""
search = importlib.import_module("clusterq.kernels._centroids_jit")
prepare = importlib.import_module("clusterq.kernels._centroids_prepare_jit")
settle = importlib.import_module("clusterq.kernels._centroids_settle_jit")
sums = importlib.import_module("clusterq.kernels._centroids_sums_jit")
move = importlib.import_module("clusterq.kernels._centroids_move_jit")

REAL = (*REAL, "decay", "smoothing")
half = element in ("bf16", "fp16")
parts = {
    "packed_ptr": element if half else "bf16", "info_ptr": "i32", "label_ptr": "i32", "c_ptr": element,
    "turned_ptr": element, "plain_ptr": element, "list_ptr": "i64", "count_ptr": "i32", "index_ptr": "i64",
    "distance_ptr": "fp64" if element == "fp64" else "fp32", "undecided_ptr": "u8", "slot_ptr": "i32",
    "order_ptr": "i64", "carry_ptr": "fp64", "range_ptr": "i64", "sums_ptr": "fp64", "whole_ptr": "fp64",
}
tile = {
    "PLAIN": half, "TRACK": 2, "GROUP": 16, "RESIDENT": True, "BLOCK_N": 128, "LANES": 16, "step_d": 1,
}
wide = 64 if arch >= 90 else 32
# What the launcher chooses: centroids of a tile, columns of a chunk, chunks, stages, registers (None: no limit).
shapes = {
    "D=64": (128, wide, 64 // wide, 3 if half else 2, 128),
    "D=96": (128 if half else 64, 32, 3, 2, 128 if half else None),
    "D=192": (64 if half else 32, wide, 192 // wide, 2, None),
    "D=513": (128 if arch >= 90 else 32, 32, 0, 2, None),
}
cases, limits = {}, {}
for name, (block_k, block_d, chunks, stages, registers) in shapes.items():
    constants = {**tile, "BLOCK_K": block_k, "BLOCK_D": block_d, "CHUNKS": chunks or 17, "STAGES": stages}
    if chunks > 0 and arch >= 100:
        constants["STAGES"] = 1
    constants |= {"RESIDENT": chunks > 0, "dim": int(name[2:]), "GROUP": 1 if chunks == 0 else 16}
    cases[name] = (search.search_kernel, constants, parts, 8, False, 128 * block_k)
    limits[name] = {"num_stages": 3, "maxnreg": registers if arch == 90 else None}
cases["fast"] = (search.search_kernel, {**cases["D=64"][1], "TRACK": 1}, *cases["D=64"][2:])
cases["two"] = (search.search_kernel, {**cases["D=64"][1], "TRACK": 3}, *cases["D=64"][2:])
fewer = {**cases["D=513"][1], "TRACK": 3, "BLOCK_K": 64 if arch >= 90 else 32}
cases["two D=513"] = (search.search_kernel, fewer, *cases["D=513"][2:])
one_tile = {**tile, "BLOCK_N": 64, "BLOCK_K": 16, "BLOCK_D": 16, "CHUNKS": 1, "STAGES": 3, "dim": 8}
cases["few"] = (search.search_kernel, one_tile, parts, 4, False, 1024)
limits["fast"] = limits["D=64"]
sum_of = {"out_ptr": "fp64", "weight_ptr": "fp64" if element == "fp64" else "fp32"}
cases |= {
    "centre": (prepare.centre_kernel, {"PLAIN": half, "SAMPLE": 32, "BLOCK_D": 128, "step_d": 1}, {}, 4, False, 4096),
    "pack": (
        prepare.pack_kernel, {"PLAIN": half, "WIDTH": 64, "BLOCK_K": 32, "BLOCK_D": 64, "step_d": 1},
        {"packed_ptr": "bf16"}, 4, False, 2048,
    ),
    "finish": (
        settle.finish_kernel,
        {"TRACK": 2, "EXACT": True, "MASK": False, "BLOCK_R": 32, "BLOCK_D": 32, "step_d": 1, "step_xd": 1},
        {}, 4, False, 1024,
    ),
    "finish two": (
        settle.finish_kernel,
        {"TRACK": 3, "EXACT": True, "MASK": False, "BLOCK_R": 32, "BLOCK_D": 32, "step_d": 1, "step_xd": 1},
        {}, 4, False, 1024,
    ),
    "settle": (
        settle.settle_kernel, {"ALL": False, "TWO": False, "BLOCK_R": 8, "BLOCK_K": 128, "step_d": 1}, {}, 4, False,
        1024,
    ),
    "settle all": (
        settle.settle_kernel, {"ALL": True, "TWO": True, "BLOCK_R": 16, "BLOCK_K": 128, "step_d": 1}, {}, 4, False,
        2048,
    ),
    "slots": (sums.slot_kernel, {"WEIGHTED": True, "BLOCK": 512}, sum_of),
    "segments": (
        sums.segment_kernel, {"WEIGHTED": True, "SLOPE": False, "LENGTH": 32, "BLOCK_D": 64, "step_d": 1}, sum_of, 4,
        False, 2048,
    ),
    "long segments": (
        sums.segment_kernel, {"WEIGHTED": True, "SLOPE": False, "LENGTH": 64, "BLOCK_D": 32, "step_d": 1}, sum_of, 4,
        False, 2048,
    ),
    "slope segments": (
        sums.segment_kernel, {"WEIGHTED": True, "SLOPE": True, "LENGTH": 32, "BLOCK_D": 64, "step_d": 1},
        {**sum_of, "out_ptr": element}, 4, False, 2048,
    ),
    "join": (
        sums.join_kernel, {"SLOPE": False, "LENGTH": 32, "BLOCK_S": 16, "BLOCK_D": 64}, sum_of, 1, False, 1024
    ),
    "loose": (
        sums.loose_kernel, {"WEIGHTED": True, "BLOCK_R": 16, "BLOCK_D": 64, "step_d": 1}, sum_of, 4, False, 1024
    ),
    "slope": (
        sums.slope_kernel, {"BLOCK_R": 16, "BLOCK_D": 64, "step_d": 1},
        {"grad_ptr": "fp64" if element == "fp64" else "fp32"}, 4, False, 1024,
    ),
    "whole": (move.whole_kernel, {"BLOCK_K": 1024}, {}, 4, False, 1024),
    "move": (
        move.move_kernel, {"MEAN": False, "RUNNING": True, "SMOOTH": True, "BLOCK_K": 8, "BLOCK_D": 64},
        {"running_ptr": "fp64" if element == "fp64" else "fp32"}, 4, False, 512,
    ),
}
compiled = []
compile_kernel = triton.compile


def keep(source, target, options):
    compiled.append(compile_kernel(source, target=target, options={**options, **extra}))
    return compiled[-1]


triton.compile = keep
found = {}
for name in wanted:
    kernel, constants, types, *rest = cases[name] if len(cases[name]) > 3 else (*cases[name], 4)
    extra = {k: v for k, v in limits.get(name, {}).items() if v is not None}
    found[name] = inspect(kernel, constants, {**parts, **types}, *rest)
    ptx = compiled[-1].asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled[-1].asm["cubin"])
        code = subprocess.run([tools / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout
    steps = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?(?:FMNMX3?|FSETP|F?SEL)\b", code, re.M)
    scores = constants.get("BLOCK_N", 32) * constants.get("BLOCK_K", 32) / (32 * 8)
    found[name] |= {
        "tensor": len(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma\.", ptx)),
        "shared": compiled[-1].metadata.shared,
        "comparisons": len(steps) / scores,
        "converted": compiled[-1].asm["ttgir"].count("convert_layout"),
    }
print(json.dumps(found))
"""
SEARCHES = ("D=64", "D=96", "D=192", "D=513", "fast", "two", "two D=513", "few")
OTHERS = (
    "centre", "pack", "finish", "finish two", "settle", "settle all", "slots", "segments", "long segments",
    "slope segments", "join", "loose", "slope", "whole", "move",
)  # fmt: skip
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}


@pytest.mark.parametrize("arch, element", [(80, "fp32"), (80, "fp16"), (90, "fp32"), (90, "bf16"), (100, "fp32")])
def test_search(arch, element, tmp_path):
    found = facts(CASES, arch, element, SEARCHES, tmp_path)
    for name, fact in found.items():
        assert fact["stack"] == 0 and fact["local"] == 0, (name, fact)
        assert fact["registers"] <= (128 if arch == 90 and name in ("D=64", "fast") else 255), (name, fact)
        assert fact["shared"] <= SHARED[arch], (name, fact)
        assert fact["tensor"] > 0, (name, fact)
    if arch == 90:
        # one wgmma of 16 columns for each product: nothing is multiplied beyond a multiple of 32
        products = 3 if element == "fp32" else 1
        for name, columns in (("D=64", 64), ("D=96", 96), ("D=192", 192), ("D=513", 32)):
            assert found[name]["tensor"] == products * columns // 16, (name, found[name])
        # max, compare, select of the index; two more for the second score; what is left belongs to the ends
        assert found["D=64"]["comparisons"] < 5.5 and found["fast"]["comparisons"] < 3.5, found
        # scores stay where the tensor cores leave them: the only moves are those of the results
        assert found["D=64"]["converted"] <= 3, found["D=64"]


@pytest.mark.parametrize("arch, element", [(80, "fp16"), (90, "fp32"), (90, "fp64"), (100, "bf16")])
def test_the_other_kernels(arch, element, tmp_path):
    names = tuple(n for n in OTHERS if element != "fp64" or n not in ("centre", "pack", "finish", "finish two"))
    for name, fact in facts(CASES, arch, element, names, tmp_path).items():
        assert fact["stack"] == 0 and fact["local"] == 0, (name, fact)
        assert fact["registers"] <= 255 and fact["tensor"] == 0, (name, fact)


def test_sizes_are_run_time_numbers():
    """No kernel is compiled again because rows, clusters or batch entries are others."""
    number = 0
    for module in ("", "_prepare", "_settle", "_sums", "_move"):
        kernels = importlib.import_module(f"clusterq.kernels._centroids{module}_jit")
        for name in dir(kernels):
            if name.endswith("_kernel"):
                numbers = [p for p in getattr(kernels, name).params if not (p.is_constexpr or p.name.endswith("_ptr"))]
                specialized = {p.name for p in numbers if not p.do_not_specialize and p.annotation_type != "fp64"}
                assert specialized <= {"dim", "step_d", "step_xd"}, (name, specialized)
                number += 1
    assert number == 12


def test_columns_are_not_padded_to_a_power_of_two():
    layout = importlib.import_module("clusterq.kernels._centroids_layout")
    for dim, width in ((5, 16), (16, 16), (48, 48), (65, 80), (96, 96), (192, 192), (320, 320), (513, 544)):
        for dtype in (torch.float32, torch.float16):
            plan = layout.search_plan(torch.empty(1, 200, dim, dtype=dtype), 128, dtype == torch.float16, 2)
            assert plan["CHUNKS"] * plan["BLOCK_D"] == width, (dim, plan)
