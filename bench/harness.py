"""What the throughput suites share: cases and rows, bars and their verdict, options, facts about the run, JSON.

A suite is a generator of `Case`s, each checked before it is handed out, and ends in

    main("centroids", __doc__, cases, ops=("nearest_centroid",))

Every time is a median of `clusterq.testing.interleave`, every ratio the median of the ratios within the rounds
(`clusterq.testing.Timing.ratio_to`). A ratio is always peer / ours: above 1, ours is faster.

torch is imported where something is measured: `report.py` reads and shows results without waiting for it.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from clusterq.testing import Timing

OURS = "clusterq"
QUICK_REPEATS = 3
# Seconds. Calls that are repeated within a round find their data in the cache, which would favour the faster side: only
# calls too short for the clock are, on the full shapes next to none.
SHORTEST = 2e-4

Call = Callable[[], object]
Direction = Literal["at least x faster", "at most x of the time"]


@dataclass(frozen=True)
class Bar:
    """What the project promises against one peer.

    Attributes:
        peer: the contestant that ours is compared with.
        limit: met when reached exactly.
        direction: `"at least x faster"` bounds peer / ours from below, `"at most x of the time"` bounds ours / peer
            from above.
    """

    peer: str
    limit: float
    direction: Direction = "at least x faster"

    def __post_init__(self) -> None:
        if self.direction not in get_args(Direction):
            raise ValueError(f"direction is {self.direction!r}; wanted one of {get_args(Direction)}")

    def measured(self, ratio: float) -> float:
        """The number that `limit` bounds, from a ratio peer / ours."""
        return ratio if self.direction == "at least x faster" else 1 / ratio

    def met(self, ratio: float) -> bool:
        measured = self.measured(ratio)
        return measured >= self.limit if self.direction == "at least x faster" else measured <= self.limit

    def __str__(self) -> str:
        if self.direction == "at least x faster":
            return f"{self.limit:g}x of {self.peer}"
        return f"at most {self.limit:g} of the time of {self.peer}"


def show(milliseconds: float) -> str:
    """Two decimals, below a millisecond four."""
    return f"{milliseconds:.{2 if milliseconds >= 1 else 4}f}"


@dataclass(frozen=True)
class Row:
    """One contestant of ours against its peers.

    Attributes:
        case: what was computed.
        detail: shape and dtype.
        ours: name of our contestant; `clusterq` unless it is a variant.
        milliseconds: median time by contestant, ours first.
        ratio: peer / ours by peer, above 1 where ours is faster.
        bar: the promise, if there is one.
        note: anything else worth a line, such as label errors.
    """

    case: str
    detail: str
    ours: str
    milliseconds: Mapping[str, float]
    ratio: Mapping[str, float]
    bar: Bar | None = None
    note: str = ""

    @property
    def title(self) -> str:
        """Unique within a suite."""
        variant = self.ours.removeprefix(OURS).strip()
        return f"{self.case} {self.detail}" + (f" ({variant})" if variant else "")

    @property
    def met(self) -> bool | None:
        """Whether the numbers meet the bar; None without one."""
        return None if self.bar is None else self.bar.met(self.ratio[self.bar.peer])

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Row:
        """The verdict is not read but computed anew."""
        fields = {name: value for name, value in values.items() if name not in ("bar", "met")}
        return cls(**fields, bar=None if values["bar"] is None else Bar(**values["bar"]))

    def __str__(self) -> str:
        peers = "  ".join(f"{p} {show(self.milliseconds[p])} ({r:.2f}x)" for p, r in self.ratio.items())
        verdict = "" if self.bar is None else f"  [bar {self.bar}: {'met' if self.met else 'MISSED'}]"
        note = f"  {self.note}" if self.note else ""
        return f"{self.title:56} {show(self.milliseconds[self.ours]):>9}  {peers}{verdict}{note}"


@dataclass(frozen=True)
class Facts:
    """What the times of one run depend on.

    Attributes:
        command: the run, as typed in the root of the checkout.
        kernels: what serves the ops of the suite on the CPU: `cpp` or `reference`.
        cpu_capability: instruction set in use: `default`, `avx2` or `avx512`.
        load_average: of the last minute, at the start; near 0 on an idle machine. Times taken beside other work are
            worth less, above all with as many threads as cores, where the slowest thread sets the time.
    """

    command: str
    torch: str
    clusterq: str
    threads: int
    repeats: int
    quick: bool
    processor: str
    cpu_capability: str
    kernels: Mapping[str, str]
    date: str
    load_average: float

    def __str__(self) -> str:
        kernels = ", ".join(f"{op}: {kernel}" for op, kernel in self.kernels.items())
        return (
            f"threads {self.threads}, medians of {self.repeats} interleaved rounds{', quick shapes' * self.quick}, "
            f"torch {self.torch}, clusterq {self.clusterq}, {self.processor} ({self.cpu_capability}), {kernels}, "
            f"{self.date}, load {self.load_average:.2f} at the start"
        )


@dataclass(frozen=True)
class Record:
    """Facts and rows of one run of one suite: what its JSON holds."""

    suite: str
    facts: Facts
    rows: Sequence[Row]

    def write(self, path: Path) -> None:
        values = {"suite": self.suite, "facts": asdict(self.facts), "rows": [row.to_json() for row in self.rows]}
        path.write_text(json.dumps(values, indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> Record:
        """Raises ValueError for a file that holds no record."""
        values = json.loads(path.read_text())
        if not isinstance(values, dict) or not {"suite", "facts", "rows"} <= values.keys():
            raise ValueError(f"{path} is not the result of a suite")
        return cls(values["suite"], Facts(**values["facts"]), [Row.from_json(row) for row in values["rows"]])


@dataclass(frozen=True)
class Case:
    """Contestants that take turns. Whoever builds one has compared the results of ours.

    Each of ours agrees with a peer that computes the same, where need be on inputs and settings under which it does,
    or else with float64. Not compared: floors that compute less (`clone`, `sum`, `plain`, `float`), a second peer with
    the same formula that may round a tie the other way (`eager` per channel), random draws, and of `torch.ao` all but
    its activation quantizers. The check of each suite says what it leaves out.

    Attributes:
        contestants: name -> call without arguments.
        bar: judged for the first of `ours`, on the full shapes only.
        ours: which contestants are ours; each gets a row against all contestants that are not.
    """

    name: str
    detail: str
    contestants: Mapping[str, Call]
    bar: Bar | None = None
    note: str = ""
    ours: Sequence[str] = (OURS,)

    def __post_init__(self) -> None:
        unknown = set(self.ours) - set(self.contestants)
        if self.bar is not None and self.bar.peer not in self.peers:
            unknown.add(self.bar.peer)
        if unknown:
            raise ValueError(f"case {self.name!r} has no contestants {sorted(unknown)}")

    @property
    def peers(self) -> list[str]:
        return [name for name in self.contestants if name not in self.ours]

    def measure(self, repeats: int, *, quick: bool = False) -> list[Row]:
        """Rows of one interleaved run. `quick` warms up less and leaves out the bar, promised for the full shapes."""
        from clusterq.testing import interleave

        timings = interleave(dict(self.contestants), rounds=repeats, warmup=1 if quick else 3, min_time=SHORTEST)
        bars = {} if quick else {self.ours[0]: self.bar}
        return [self._row(name, timings, bars.get(name)) for name in self.ours]

    def _row(self, ours: str, timings: Mapping[str, Timing], bar: Bar | None) -> Row:
        milliseconds = {name: timings[name].milliseconds for name in (ours, *self.peers)}
        ratio = {peer: timings[peer].ratio_to(timings[ours]) for peer in self.peers}
        return Row(self.name, self.detail, ours, milliseconds, ratio, bar, self.note)

    def benchmark(self, fixture: Any, contestant: str) -> None:
        """One contestant under pytest-benchmark; compare within one run."""
        fixture.group = f"{self.name} {self.detail}"
        fixture.pedantic(self.contestants[contestant], rounds=5, warmup_rounds=1)


def count(text: str) -> int:
    """A command line number of at least 1."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that the suites share with the report."""
    parser.add_argument("--threads", type=count, default=2, help="default: %(default)s")
    parser.add_argument("--repeats", type=count, help="rounds (default: the suite's own)")
    parser.add_argument("--quick", action="store_true", help="small shapes, a few seconds; no bars")


def gather_facts(suite: str, ops: Iterable[str], threads: int, repeats: int, quick: bool) -> Facts:
    """The facts as they are now: call it before anything is timed."""
    from clusterq.ops import backends
    from clusterq.versions import machine, versions

    kernels = {row.op: row.kernel for row in backends() if row.device == "cpu"}
    host = machine()
    return Facts(
        command=f"python bench/bench_{suite}.py --threads {threads} --repeats {repeats}{' --quick' * quick}",
        torch=versions()["torch"],
        clusterq=versions()["clusterq"],
        threads=threads,
        repeats=repeats,
        quick=quick,
        processor=host["processor"],
        cpu_capability=os.environ.get("CLUSTERQ_CPU_CAPABILITY", host["cpu_capability"].lower()),
        kernels={op: kernels[op] for op in ops},
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        load_average=round(os.getloadavg()[0], 2),
    )


def main(
    suite: str, description: str, cases: Callable[[bool], Iterable[Case]], *, ops: Sequence[str], repeats: int = 11
) -> None:
    """Run a suite from its command line.

    Args:
        suite: name of the file without `bench_`.
        cases: quick -> the cases, made one at a time, for all of them together fill much memory.
        ops: whose kernels the facts name.
        repeats: rounds where none are asked for; `--quick` has 3.
    """
    import torch

    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rounds = options.repeats or (QUICK_REPEATS if options.quick else repeats)
    facts = gather_facts(suite, ops, options.threads, rounds, options.quick)
    print(f"{suite}: {facts}\n{'':56} {'ours ms':>9}  peer ms (times ours)", flush=True)
    rows: list[Row] = []
    for case in cases(options.quick):
        for row in case.measure(rounds, quick=options.quick):
            rows.append(row)
            print(row, flush=True)
    if options.json is not None:
        Record(suite, facts, rows).write(options.json)
