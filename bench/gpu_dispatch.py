"""Triton or CUDA C++ for every op, by shape class, as far as results say: the table, and the file of each kernel.

    python bench/gpu_dispatch.py [FOLDER] > bench/results/h200/dispatch.md

Where CUDA C++ is built it serves every op, and Triton where it is not (`clusterq/ops/_library.py`); this table says
where that is the slower of the two. It changes nothing yet: a choice for every call, made in Python, would put Python
between the dispatcher and the C++ kernel of small calls too, whose time is the host's already, and kernels that lose
may be mended instead.

A class is an op, a dtype, a layout and one grid per tensor or per channel. What was measured at some number of
elements is taken to hold above it and says nothing below it. Milliseconds are of one interleaved run.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpu_table import split
from harness import OURS, Record

from clusterq.ops import _library

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results/h200"
TRITON = f"{OURS} triton"
# Nearer to each other than this, neither is the faster one.
EVEN = 1.05
Choice = Literal["cuda", "triton", "even"]
# Case of a suite without its `per ...` -> op. Cases of public functions have no row of Triton, see `launchers`.
CASES = {
    "forward": "fake_quantize",
    "clipped backward": "fake_quantize_backward",
    "learned backward": "fake_quantize_learned_backward",
    "masked forward": "fake_quantize_masked",
    "range": "finite_range",
}


@dataclass(frozen=True)
class Sources:
    """Files of an op's kernels, from the root of the checkout: the one that registers it, and the Triton launcher's."""

    cuda: str
    triton: str


@dataclass(frozen=True)
class Entry:
    """One class with its milliseconds; `elements` of the tensor that was measured."""

    op: str
    dtype: str
    layout: str
    per: str
    shape: str
    elements: int
    cuda: float
    triton: float
    result: str

    @property
    def faster(self) -> Choice:
        if max(self.cuda, self.triton) < EVEN * min(self.cuda, self.triton):
            return "even"
        return "cuda" if self.cuda < self.triton else "triton"


def sources() -> dict[str, Sources]:
    """By op; KeyError for one that no file in csrc/cuda registers."""
    registered = {
        name: path.relative_to(ROOT).as_posix()
        for path in sorted(ROOT.glob("csrc/cuda/*_ops.cpp"))
        for name in re.findall(r'm\.impl\("(\w+)"', path.read_text())
    }
    launchers = {name: (op.triton or "").partition(":")[0] for name, op in _library._ops.items()}
    return {
        name: Sources(registered[name], f"kernels/{module}.py" if module else "none")
        for name, module in launchers.items()
    }


def entries(folder: Path = RESULTS) -> list[Entry]:
    """Every class that both kernels were measured in, of all results in a folder."""
    found = []
    for path in sorted(folder.glob("*.json")):
        times: dict[tuple[str, str], dict[str, float]] = {}
        for row in Record.read(path).rows:
            # Calls in a row decide: the rows with a cold L2 and of graphs have names of their own.
            times.setdefault((row.case, row.detail), {})[row.ours] = row.costs[row.ours]
        for (case, detail), by_kernel in times.items():
            name, _, per = case.partition(",")[0].partition(" per ")
            if name not in CASES or "L2 cold" in case or "CUDA graph" in case or by_kernel.keys() != {OURS, TRITON}:
                continue
            shape, dtype, layout = split(detail)
            elements = math.prod(int(n) for n in re.findall(r"\d+", shape))
            kind = per or "tensor"
            found.append(Entry(CASES[name], dtype, layout, kind, shape, elements, by_kernel[OURS], by_kernel[TRITON],
                               path.name))  # fmt: skip
    return found


def faster(table: Sequence[Entry], op: str, dtype: str, elements: int, layout: str, per: str) -> Choice | None:
    """What the results say of a call; None where they say nothing."""
    fitting = [e for e in table if (e.op, e.dtype, e.layout, e.per) == (op, dtype, layout, per)]
    below = [e for e in fitting if e.elements <= elements]
    return max(below, key=lambda e: e.elements).faster if below else None


def page(folder: Path = RESULTS) -> str:
    table, files = entries(folder), sources()
    lines = [
        "# Triton or CUDA C++, by op and shape class",
        "Made by `python bench/gpu_dispatch.py` from the results beside this file; the script says how to read it.",
        "Where the second table says none, the two kernels were not compared on a GPU.",
        "",
        "| op | shape | dtype | layout | grid per | CUDA C++ | Triton | faster |",
        "|---|---|---|---|---|---|---|---|",
    ]
    names = {"cuda": "CUDA C++", "triton": "Triton", "even": "even"}
    lines += [
        f"| {e.op} | {e.shape} | {e.dtype} | {e.layout} | {e.per} | {e.cuda:.3f} | {e.triton:.3f} | {names[e.faster]} |"
        for e in table
    ]
    lines += ["", "| op | CUDA C++ | Triton | results |", "|---|---|---|---|"]
    for op, kernels in sorted(files.items()):
        results = sorted({e.result for e in table if e.op == op})
        lines.append(f"| {op} | {kernels.cuda} | {kernels.triton} | {', '.join(results) or 'none'} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS))
