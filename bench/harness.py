"""What the throughput suites share: cases and rows, bars and their verdict, options, facts about the run, JSON.

A suite is a generator of `Case`s, each checked before it is handed out, and ends in

    main("centroids", __doc__, cases, ops=("nearest_centroid",))

Every time is a median of `clusterq.testing.interleave`, every ratio the median of the ratios within the rounds
(`clusterq.testing.Timing.ratio_to`). A ratio is always peer / ours: above 1, ours is faster. Every row also has the
page faults of one call of each contestant, and `--allocator` says what causes them (`memory.set_allocator`).

torch is imported where something is measured: `report.py` reads and shows results without waiting for it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from memory import Allocator, minor_faults, peak_bytes, set_allocator

if TYPE_CHECKING:
    from clusterq.testing import Timing

OURS = "clusterq"
QUICK_REPEATS = 3
# Seconds; shorter calls are repeated within a round, and those of their peers with them.
SHORTEST = 1e-3

Call = Callable[[], object]
Direction = Literal["at least x faster", "at most x of the time", "at most x microseconds over"]
Unit = Literal["ms", "B"]
# Page faults of one call that are worth a word: beyond them they take a part of the time.
FAULTS = 64


@dataclass(frozen=True)
class Bar:
    """What the project promises against one peer.

    Attributes:
        peer: the contestant that ours is compared with.
        limit: met when reached exactly.
        direction: `"at least x faster"` bounds peer / ours from below, `"at most x of the time"` bounds ours / peer
            from above, `"at most x microseconds over"` bounds ours - peer from above.
    """

    peer: str
    limit: float
    direction: Direction = "at least x faster"

    def __post_init__(self) -> None:
        if self.direction not in get_args(Direction):
            raise ValueError(f"direction is {self.direction!r}; wanted one of {get_args(Direction)}")

    def measured(self, ratio: float, peer: float = math.nan) -> float:
        """The number that `limit` bounds, from a ratio peer / ours and, for a difference, the peer's milliseconds."""
        if self.direction == "at least x faster":
            return ratio
        return 1 / ratio if self.direction == "at most x of the time" else 1e3 * peer * (1 / ratio - 1)

    def met(self, ratio: float, peer: float = math.nan) -> bool:
        measured = self.measured(ratio, peer)
        return measured >= self.limit if self.direction == "at least x faster" else measured <= self.limit

    def __str__(self) -> str:
        if self.direction == "at least x faster":
            return f"{self.limit:g}x of {self.peer}"
        if self.direction == "at most x of the time":
            return f"at most {self.limit:g} of the time of {self.peer}"
        return f"at most {self.limit:g} microseconds over {self.peer}"


def show(cost: float, unit: Unit = "ms") -> str:
    """Two decimals, below 1 four; milliseconds are written without their unit."""
    return f"{cost:.{2 if cost >= 1 else 4}f}{' B' * (unit == 'B')}"


@dataclass(frozen=True)
class Row:
    """One contestant of ours against its peers.

    Attributes:
        case: what was computed.
        detail: shape and dtype.
        ours: name of our contestant; `clusterq` unless it is a variant.
        costs: by contestant, ours first: median time or bytes for each element, see `unit`.
        ratio: peer / ours by peer, above 1 where ours is faster or smaller.
        bar: the promise, if there is one.
        note: anything else worth a line, such as label errors.
        unit: `ms` or `B`.
        faults: minor page faults of one call after the timing, by contestant: memory that the C library took anew from
            the system. Empty where they were not counted.
    """

    case: str
    detail: str
    ours: str
    costs: Mapping[str, float]
    ratio: Mapping[str, float]
    bar: Bar | None = None
    note: str = ""
    unit: Unit = "ms"
    faults: Mapping[str, int] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Unique within a suite."""
        variant = self.ours.removeprefix(OURS).strip()
        return f"{self.case} {self.detail}" + (f" ({variant})" if variant else "")

    @property
    def met(self) -> bool | None:
        """Whether the numbers meet the bar; None without one."""
        return None if self.bar is None else self.bar.met(self.ratio[self.bar.peer], self.costs[self.bar.peer])

    @property
    def measured(self) -> float:
        """The number that the bar bounds; NaN without one."""
        if self.bar is None:
            return math.nan
        return self.bar.measured(self.ratio[self.bar.peer], self.costs[self.bar.peer])

    @property
    def verdict(self) -> str:
        """Empty without a bar."""
        return "" if self.bar is None else f"{self.bar}: {'met' if self.met else 'MISSED'}"

    @property
    def notes(self) -> str:
        """The note, and the page faults where a call of any contestant has many."""
        many = max(self.faults.values(), default=0) > FAULTS
        faults = "page faults " + ", ".join(f"{n} {count}" for n, count in self.faults.items()) if many else ""
        return "; ".join(filter(None, (self.note, faults)))

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Row:
        """The verdict is not read but computed anew; results before there were other costs have `milliseconds`."""
        names = {"milliseconds": "costs"}
        fields = {names.get(name, name): value for name, value in values.items() if name not in ("bar", "met")}
        return cls(**fields, bar=None if values["bar"] is None else Bar(**values["bar"]))

    def __str__(self) -> str:
        peers = "  ".join(f"{p} {show(self.costs[p], self.unit)} ({r:.2f}x)" for p, r in self.ratio.items())
        verdict = "" if self.bar is None else f"  [bar {self.verdict}]"
        notes = f"  {self.notes}" if self.notes else ""
        return f"{self.title:76} {show(self.costs[self.ours], self.unit):>9}  {peers}{verdict}{notes}"


@dataclass(frozen=True)
class Facts:
    """What the times of one run depend on.

    Attributes:
        command: the run, as typed in the root of the checkout.
        kernels: what serves the ops of the suite on the CPU: `cpp` or `reference`.
        cpu_capability: instruction set in use: `default`, `avx2` or `avx512`.
        load_average: of the last minute, at the start; near 0 on an idle machine. Times taken beside other work are
            worth less, above all with as many threads as cores, where the slowest thread sets the time.
        allocator: see `memory.set_allocator`.
        ceilings: what a GPU was measured to reach before the suite, by name with unit; empty on a CPU.
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
    allocator: Allocator = "system"
    ceilings: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        kernels = ", ".join(f"{op}: {kernel}" for op, kernel in self.kernels.items())
        return (
            f"threads {self.threads}, medians of {self.repeats} interleaved rounds{', quick shapes' * self.quick}, "
            f"torch {self.torch}, clusterq {self.clusterq}, {self.processor} ({self.cpu_capability}), {kernels}, "
            f"allocator {self.allocator}, "
            f"{self.date}, load {self.load_average:.2f} at the start"
            + "".join(f", {name} {value:g}" for name, value in self.ceilings.items())
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
    or else with float64. Not compared: floors that compute less (`clone`, `empty op`, `sum`, `plain`, `float`), random
    draws, the gradients of torchao, whole networks of Brevitas, and of `torch.ao` in them all but its activation
    quantizers. The check of each suite says what it leaves out.

    Attributes:
        contestants: name -> call without arguments.
        bar: judged for the first of `ours`, or one each by their names; on the full shapes only.
        ours: which contestants are ours; each gets a row against all contestants that are not.
    """

    name: str
    detail: str
    contestants: Mapping[str, Call]
    bar: Bar | Mapping[str, Bar] | None = None
    note: str = ""
    ours: Sequence[str] = (OURS,)

    def __post_init__(self) -> None:
        unknown = {*self.ours} - {*self.contestants} | {*self.bars} - {*self.ours}
        unknown |= {bar.peer for bar in self.bars.values()} - {*self.peers}
        if unknown:
            raise ValueError(f"case {self.name!r} has no contestants {sorted(unknown)}")

    @property
    def bars(self) -> Mapping[str, Bar]:
        """By contestant of ours."""
        if self.bar is None:
            return {}
        return {self.ours[0]: self.bar} if isinstance(self.bar, Bar) else self.bar

    @property
    def peers(self) -> list[str]:
        return [name for name in self.contestants if name not in self.ours]

    def measure(self, repeats: int, *, quick: bool = False, **timer: Any) -> list[Row]:
        """Rows of one interleaved run. `quick` warms up less and leaves out the bar, promised for the full shapes.

        `timer`: `min_time` and `synchronize` of `clusterq.testing.interleave` where they are not the CPU's.
        """
        from clusterq.testing import interleave

        timer = {"min_time": SHORTEST, **timer}
        timings = interleave(dict(self.contestants), rounds=repeats, warmup=1 if quick else 3, **timer)
        faults = {name: minor_faults(call) for name, call in self.contestants.items()}
        return [self._row(name, timings, faults, None if quick else self.bars.get(name)) for name in self.ours]

    def _row(self, ours: str, timings: Mapping[str, Timing], faults: Mapping[str, int], bar: Bar | None) -> Row:
        costs = {name: timings[name].milliseconds for name in (ours, *self.peers)}
        ratio = {peer: timings[peer].ratio_to(timings[ours]) for peer in self.peers}
        return Row(self.name, self.detail, ours, costs, ratio, bar, self.note, faults={n: faults[n] for n in costs})

    def benchmark(self, fixture: Any, contestant: str) -> None:
        """One contestant under pytest-benchmark; compare within one run."""
        fixture.group = f"{self.name} {self.detail}"
        fixture.pedantic(self.contestants[contestant], rounds=5, warmup_rounds=1)


@dataclass(frozen=True)
class MemoryCase(Case):
    """Contestants by the peak of the memory that one call holds, in bytes for each of `elements`; one call decides."""

    elements: int = 1

    def measure(self, repeats: int, *, quick: bool = False) -> list[Row]:
        held = {name: peak_bytes(call) / self.elements for name, call in self.contestants.items()}
        rows = []
        for ours in self.ours:
            costs = {name: held[name] for name in (ours, *self.peers)}
            ratio = {peer: held[peer] / held[ours] for peer in self.peers}
            bar = None if quick else self.bars.get(ours)
            rows.append(Row(self.name, self.detail, ours, costs, ratio, bar, self.note, "B"))
        return rows


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
    parser.add_argument(
        "--allocator",
        choices=get_args(Allocator),
        default="kept",
        help="kept: freed memory stays with the process, no page faults on any side; default: %(default)s",
    )


def gather_facts(
    suite: str,
    ops: Iterable[str],
    *,
    threads: int,
    repeats: int,
    quick: bool = False,
    allocator: Allocator = "kept",
    chosen: str = "",
) -> Facts:
    """The facts as they are now: call it before anything is timed. `chosen` is part of the command."""
    from clusterq.ops import backends
    from clusterq.versions import machine, versions

    kernels = {row.op: row.kernel for row in backends() if row.device == "cpu"}
    host = machine()
    command = f"python bench/bench_{suite}.py --threads {threads} --repeats {repeats}{' --quick' * quick}"
    system = " --allocator system" * (allocator == "system")
    return Facts(
        command=f"{command}{system}{f' {chosen}' if chosen else ''}",
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
        allocator=allocator,
    )


def main(
    suite: str,
    description: str,
    cases: Callable[..., Iterable[Case]],
    *,
    ops: Sequence[str],
    repeats: int = 11,
    choice: str = "",
    choices: Sequence[str] = (),
) -> None:
    """Run a suite from its command line.

    Args:
        suite: name of the file without `bench_`.
        cases: quick -> the cases, made one at a time, for all of them together fill much memory.
        ops: whose kernels the facts name.
        repeats: rounds where none are asked for; `--quick` has 3.
        choice: name of an option that picks some of `choices`, which `cases` then gets as a second argument.
    """
    import torch

    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    if choice:
        parser.add_argument(f"--{choice}", nargs="+", choices=choices, dest="chosen", metavar="NAME", default=(),
                            help=f"only these of {', '.join(choices)}")  # fmt: skip
    options = parser.parse_args()
    chosen = options.chosen if choice else ()
    set_allocator(options.allocator)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rounds = options.repeats or (QUICK_REPEATS if options.quick else repeats)
    facts = gather_facts(
        suite,
        ops,
        threads=options.threads,
        repeats=rounds,
        quick=options.quick,
        allocator=options.allocator,
        chosen=f"--{choice} {' '.join(chosen)}" if chosen else "",
    )
    print(f"{suite}: {facts}\n{'':76} {'ours ms':>9}  peer ms (times ours)", flush=True)
    rows: list[Row] = []
    for case in cases(options.quick, chosen) if chosen else cases(options.quick):
        for row in case.measure(rounds, quick=options.quick):
            rows.append(row)
            print(row, flush=True)
    if options.json is not None:
        Record(suite, facts, rows).write(options.json)
