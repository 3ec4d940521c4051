"""Every throughput suite in one go, every bar in one table, and the comparison of two runs.

    python bench/report.py [--threads 2] [--repeats N] [--quick] [--suite NAME ...] [--output FOLDER] [--compare OLD]
    python bench/report.py --from FOLDER [--compare OLD]

Suites run one after another, each in a process of its own, and leave FOLDER/<suite>.json (default: runs/bench). The
terminal gets the bars of the suites that ran, FOLDER/report.md those of all that FOLDER holds, each with the date of
its run. `--from` measures nothing and writes report.md anew. `--compare` sets our own times beside those of an older
folder. Exit code 1: a suite failed; missed bars and slower rows are for the reader to judge.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import Record, Row, add_options, show

HERE = Path(__file__).resolve().parent
SUITES = {path.stem.removeprefix("bench_"): path for path in sorted(HERE.glob("bench_*.py"))}
FLAGGED = 1.1


@dataclass(frozen=True)
class Change:
    """One row of ours in two runs, in milliseconds or bytes; None where one run lacks it."""

    suite: str
    title: str
    old: float | None
    new: float | None

    @property
    def ratio(self) -> float:
        """old / new, above 1 where the new run is faster; NaN where there is nothing to compare."""
        return math.nan if self.old is None or self.new is None else self.old / self.new

    @property
    def flag(self) -> str:
        """`faster` or `SLOWER` beyond a factor of 1.1, `only old` or `only new`, else empty."""
        if self.old is None:
            return "only new"
        if self.new is None:
            return "only old"
        if self.ratio > FLAGGED:
            return "faster"
        return "SLOWER" if 1 / self.ratio > FLAGGED else ""


def compare(old: Sequence[Record], new: Sequence[Record]) -> list[Change]:
    """Our own time of every row, in the order of the new run; of old rows, those of suites that the new run has."""
    before, after = own_times(old), own_times(new)
    suites = {record.suite for record in new}
    keys = [*after, *(key for key in before if key not in after and key[0] in suites)]
    return [Change(*key, before.get(key), after.get(key)) for key in keys]


def own_times(records: Iterable[Record]) -> dict[tuple[str, str], float]:
    return {(r.suite, row.title): row.costs[row.ours] for r in records for row in r.rows}


def differences(old: Sequence[Record], new: Sequence[Record]) -> list[str]:
    """What makes the times of two runs hard to compare, one line each."""
    before = {record.suite: record.facts for record in old}
    pairs = [(r.suite, before[r.suite], r.facts) for r in new if r.suite in before]
    names = ("threads", "processor", "cpu_capability", "torch", "quick", "kernels", "allocator")
    return [
        f"{suite}: {name} was {getattr(was, name)}, now {getattr(now, name)}"
        for suite, was, now in pairs
        for name in names
        if getattr(was, name) != getattr(now, name)
    ]


def load(folder: Path) -> list[Record]:
    """The stored records of a folder in order of suite.

    Raises FileNotFoundError where there are none, ValueError for a JSON file that is something else.
    """
    records = [Record.read(path) for path in sorted(folder.glob("*.json"))]
    if not records:
        raise FileNotFoundError(f"{folder} holds no results of the suites (*.json)")
    return records


def bars(records: Sequence[Record]) -> str:
    """The table of all bars: asked, measured, verdict, command."""
    rows = [["suite", "case", "asked", "measured", "verdict", "command"]]
    for record in records:
        for row in record.rows:
            if row.bar is not None:
                verdict = "met" if row.met else "MISSED"
                rows.append(
                    [record.suite, row.title, str(row.bar), f"{row.measured:.2f}", verdict, f"`{record.facts.command}`"]
                )
    return table(rows) if len(rows) > 1 else "No bars: they are promised for the full shapes, which none of these ran."


def changes(old: Sequence[Record], new: Sequence[Record]) -> str:
    """The table of `compare`, and above it what differs between the runs."""
    rows = [["suite", "case", "old ms", "new ms", "old / new", "change above 10 %"]]
    for change in compare(old, new):
        times = ["" if time is None else show(time) for time in (change.old, change.new)]
        ratio = "" if math.isnan(change.ratio) else f"{change.ratio:.2f}"
        rows.append([change.suite, change.title, *times, ratio, change.flag])
    unlike = "".join(f"- Not alike: {line}\n" for line in differences(old, new))
    return f"{unlike}\n{table(rows)}" if unlike else table(rows)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown that also reads as text: columns padded, the first row the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def render(records: Sequence[Record], compared: str = "") -> str:
    """The whole report in Markdown."""
    parts = ["# Throughput", "## Bars", bars(records)]
    if compared:
        parts += ["## Our own times against the older run", compared]
    for record in records:
        head = ["case", "ours ms", "peer: ms (times ours)", "bar", "note"]
        parts += [f"## {record.suite}", f"{record.facts}", table([head, *map(cells, record.rows)])]
    return "\n\n".join(parts) + "\n"


def cells(row: Row) -> list[str]:
    peers = ", ".join(f"{p}: {show(row.costs[p], row.unit)} ({ratio:.2f}x)" for p, ratio in row.ratio.items())
    return [row.title, show(row.costs[row.ours], row.unit), peers, row.verdict, row.notes]


def run_suites(names: Sequence[str], arguments: Sequence[str], folder: Path) -> list[str]:
    """Run the suites one after another; returns those that failed, whose older results are gone: they would mislead."""
    failed = []
    for name in names:
        target = folder / f"{name}.json"
        target.unlink(missing_ok=True)
        command = [sys.executable, str(SUITES[name]), *arguments, "--json", str(target)]
        if subprocess.run(command, check=False).returncode != 0:
            failed.append(name)
        print(flush=True)
    return failed


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--suite", nargs="+", choices=list(SUITES), metavar="NAME", help=f"of {', '.join(SUITES)}")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--output", type=Path, metavar="FOLDER", default=Path("runs/bench"), help="default: %(default)s")
    place.add_argument("--from", type=Path, metavar="FOLDER", dest="stored", help="show stored results")
    parser.add_argument("--compare", type=Path, metavar="OLD", help="folder of an older run")
    options = parser.parse_args(words)
    folder, failed = options.stored or options.output, []
    try:
        # Read before anything runs: OLD may be the folder that is about to be written.
        old = load(options.compare) if options.compare else []
        if options.stored is None:
            folder.mkdir(parents=True, exist_ok=True)
            failed = run_suites(options.suite or list(SUITES), suite_arguments(options), folder)
        for name in failed:
            print(f"report: suite {name} failed", file=sys.stderr)
        records = load(folder)
    except (OSError, ValueError) as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 1 if failed else 2
    shown = [record for record in records if not options.suite or record.suite in options.suite]
    compared = changes(old, shown) if old else ""
    (folder / "report.md").write_text(render(records, compared))
    print("\n\n".join(filter(None, (bars(shown), compared, str(folder / "report.md")))))
    return 1 if failed else 0


def suite_arguments(options: argparse.Namespace) -> list[str]:
    """The shared options as a suite takes them."""
    repeats = ["--repeats", str(options.repeats)] if options.repeats else []
    allocator = ["--allocator", "system"] if options.allocator == "system" else []
    return ["--threads", str(options.threads), *repeats, *allocator, *["--quick"] * options.quick]


if __name__ == "__main__":
    sys.exit(main())
