"""The figures of a GPU run as one table: every row with a bar, met or missed, and what the card was measured to reach.

    python bench/gpu_table.py FOLDER [--all]

Reads the JSON files that the GPU suites left in FOLDER; `--all` shows rows without a bar too. A suite without a file is
named as not run. Exit status 2 where there is no file at all.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import Record, Row

SUITES = ("fake_quant", "bn_stats", "centroids")
DTYPES = ("float32", "float64", "bfloat16", "float16")
LAYOUTS = ("channels_last",)
HEADER = ("op", "kernel", "shape", "dtype", "layout", "ratio", "bar", "verdict")


@dataclass(frozen=True)
class Line:
    """One row of the table; `ratio` is peer / ours, of the peer of the bar or of the first one."""

    op: str
    kernel: str
    shape: str
    dtype: str
    layout: str
    ratio: str
    bar: str
    verdict: str

    @property
    def cells(self) -> tuple[str, ...]:
        return self.op, self.kernel, self.shape, self.dtype, self.layout, self.ratio, self.bar, self.verdict


def split(detail: str) -> tuple[str, str, str]:
    """Shape, dtype and layout out of `Row.detail`."""
    words = detail.split()
    dtype = next((word for word in words if word in DTYPES), "")
    layout = next((word for word in words if word in LAYOUTS), "")
    return " ".join(word for word in words if word not in (dtype, layout)), dtype, layout or "contiguous"


def line(row: Row) -> Line:
    peer = row.bar.peer if row.bar is not None else next(iter(row.ratio), "")
    ratio = f"{row.ratio[peer]:.2f} of {peer}" if peer else ""
    verdict = "" if row.met is None else "met" if row.met else "MISSED"
    return Line(row.case, row.ours, *split(row.detail), ratio, "" if row.bar is None else str(row.bar), verdict)


def records(folder: Path) -> Iterator[tuple[str, Record | None]]:
    """By suite; None where it left no file."""
    for suite in SUITES:
        path = folder / f"{suite}.json"
        yield suite, Record.read(path) if path.exists() else None


def columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--all", action="store_true", help="rows without a bar too")
    options = parser.parse_args(arguments)
    found = 0
    for suite, record in records(options.folder):
        if record is None:
            print(f"{suite}: not run here\n")
            continue
        found += 1
        facts = record.facts
        reached = ", ".join(f"{name} {value:g}" for name, value in facts.ceilings.items()) or "no ceilings measured"
        print(f"{suite}: {facts.processor}, torch {facts.torch}, {facts.date}{', QUICK' * facts.quick}; {reached}")
        lines = [line(row).cells for row in record.rows if options.all or row.bar is not None]
        if lines:
            print("\n".join(columns([HEADER, *lines])))
        met = [row.met for row in record.rows if row.met is not None]
        print(f"{sum(met)} of {len(met)} bars met, {len(record.rows)} rows\n")
    return 0 if found else 2


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, ValueError) as error:
        sys.exit(f"gpu_table.py: {error}")
