"""Code of the CUDA kernels of the centroids: as `test_cuda_code.py` has it; and what a score costs in the search."""

from __future__ import annotations

import os
import re
import sys
from collections import Counter

import pytest

sys.path.insert(0, os.path.dirname(__file__))
from test_cuda_build import ARCHITECTURES, assert_wide, compiled_all

pytestmark = pytest.mark.checkout("csrc")

# Kernels in each file, and most registers: 168 are three blocks of 128 threads on a multiprocessor.
SOURCES = {
    "centroids_prepare.cu": (6, 64),
    "centroids_search.cu": (18, 168),
    "centroids_settle.cu": (18, 128),
    "centroids_sums.cu": (57, 128),
    "centroids_move.cu": (5, 128),
}
SEARCH = re.compile(r"search_kernelILi(?P<kept>\d)ELi(?P<pairs>\d)E(?P<element>f|13__nv_bfloat16|6__half)E")
# Scores of a thread in a tile: 4 rows by 16 centroids.
SCORES = 64
# Instructions for a score once it is there, by the number of scores kept: compare and two selects; for the second best
# a select and a maximum more; for the third a comparison, selects and a maximum.
PER_SCORE = {1: 3, 2: 5, 3: 9}
# Name -> (pattern of the mangled name, kernels it means, fewest 16-byte loads and stores of each, most instructions:
# measured for the three architectures, and a tenth).
WIDE = {
    "search, float32": ("search_kernelILi2ELi4EfE", 1, 2, 0, 1630),
    "search, bfloat16": ("search_kernelILi2ELi4E13__nv_bfloat16E", 1, 2, 0, 3060),
    "sums, float32": ("segment_kernelILb0ELi4EffE", 1, 4, 0, 1370),
    "sums, bfloat16": ("segment_kernelILb0ELi8E13__nv_bfloat16S2_E", 1, 4, 0, 1840),
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def code(request, tmp_path_factory):
    """{file: (ptxas report, {mangled kernel: machine code})} for one architecture."""
    return compiled_all(SOURCES, request.param, tmp_path_factory.mktemp("cuda"))


@pytest.fixture(scope="module")
def search(code):
    """{(kept, pairs, element): basic blocks of the kernel as (opcode, rest of the line)}."""
    found = {}
    for name, listing in code["centroids_search.cu"][1].items():
        match = SEARCH.search(name)
        assert match is not None, name
        lines = re.split(r"^\.L_x_\d+:|(?<=\n)(?=[^\n]*\bBRA\b)", listing, flags=re.MULTILINE)
        pattern = r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)([^\n]*)"
        blocks = [re.findall(pattern, block, flags=re.MULTILINE) for block in lines]
        found[int(match["kept"]), int(match["pairs"]), match["element"]] = blocks
    return found


def test_nothing_spills(code):
    for name, (report, kernels) in code.items():
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
        entries = re.findall(r"Compiling entry function", report)
        count, registers = SOURCES[name]
        assert len(entries) == len(kernels) == count, (name, len(kernels))
        # Kernels, and subroutines of division and of square roots.
        assert len(frames) >= len(kernels) and set(frames) == {("0", "0", "0")}, name
        used = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
        if name == "centroids_search.cu":
            # Two blocks where three scores are kept.
            every = re.findall(r"search_kernelILi(\d)ELi4E.*?Used (\d+) registers", report, flags=re.DOTALL)
            assert len(every) == 9 and max(int(n) for kept, n in every if kept == "3") <= 255
            used = [int(n) for kept, n in every if kept != "3"]
        assert max(used) <= registers, (name, max(used))


def test_wide_kernels(code):
    assert_wide(code, WIDE)


def test_products_are_on_tensor_cores(search):
    """Straight code of whole steps: 16 values of D for 32 rows and 64 centroids, from matrices in shared memory."""
    assert len(search) == 18
    for (_, pairs, element), blocks in search.items():
        steps = [Counter(op for op, _ in block) for block in blocks]
        steps = [counts for counts in steps if counts["HMMA"]]
        # Values as they are take one product and parts of values three, of twice as many matrices.
        ways = {1, 3} if element != "f" else {3}
        wanted = {(way * pairs * 4, (1 if way == 1 else 2) * (2 + pairs)) for way in ways}
        assert {(counts["HMMA"], counts["LDSM"]) for counts in steps} == wanted
        types = {rest.split()[0] for block in blocks for op, rest in block if op == "HMMA"}
        half = {".16816.F32"} if element == "6__half" else set()
        assert types == {".16816.F32.BF16"} | half
        # 16 bytes at a time from memory to shared memory, past the registers
        copies = [rest for block in blocks for op, rest in block if op == "LDGSTS"]
        assert copies and all(".128" in rest for rest in copies)


def test_instructions_of_a_score(search, record_property):
    """Research counts four with the offset's addition, which here is the accumulator's first value, and without the
    second best score that decides whether the label is exact."""
    for (kept, pairs, element), blocks in search.items():
        if pairs != 4:
            continue
        ends = [Counter(op for op, _ in block) for block in blocks]
        ends = [counts for counts in ends if counts["FSETP"] >= SCORES / 2]
        assert len(ends) == (1 if element == "f" else 2)
        for counts in ends:
            # Moves go through other units.
            moves = counts["IMAD"] + counts["MOV"] + counts["NOP"]
            spent = (counts.total() - moves) / SCORES
            record_property(f"instructions per score, {kept} kept, {element}", spent)
            assert PER_SCORE[kept] * 0.6 < spent <= PER_SCORE[kept] + 0.35, (kept, element, counts)
