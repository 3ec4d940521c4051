"""What the GPU suites share: the kernels of an op side by side, how they are timed, the plan, options and JSON."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_timers import ceilings, cold, flush_buffer, graphed
from harness import OURS, Case, Record, Row, gather_facts
from torch import Tensor

from clusterq.ops import backends
from clusterq.testing import Timing

OP = torch.ops.clusterq
TRITON = f"{OURS} triton"
MIN_TIME = 1e-2
# Milliseconds of a call, below which the host may cost more than the kernel; and seconds of a turn of captured calls.
SHORT, GRAPH_TIME = 0.1, 2e-3

Build = Callable[[], Case]
Group = Callable[[bool], Iterator[Build]]


def launchers(device: str, modules: Sequence[str]) -> Mapping[str, Callable[..., Any]]:
    """The kernels of an op by contestant: name -> function of the op's name and arguments.

    Args:
        device: `"cuda"` or `"cpu"`; Triton only on the former.
        modules: of `clusterq.kernels`, where the Triton launchers are.
    """
    found: dict[str, Callable[..., Any]] = {OURS: lambda name, *arguments: getattr(OP, name)(*arguments)}
    if device == "cuda":
        kernels = [importlib.import_module(f"clusterq.kernels.{module}") for module in modules]

        def triton(name: str, *arguments: Any) -> Any:
            return next(getattr(kernel, name) for kernel in kernels if hasattr(kernel, name))(*arguments)

        found[TRITON] = triton
    return found


def on_device(groups: Sequence[Group], device: str, quick: bool) -> Iterator[Build]:
    """The cases of all groups, each to be built before the next is asked for: their tensors are made on `device`."""
    torch.set_default_device(device)
    for group in groups:
        for build in group(quick):
            yield build
            torch.set_default_device(device)


def plan(groups: Sequence[Group]) -> int:
    """Without a GPU: cases of each group, counted on tensors without memory, and the small ones built on the CPU."""
    total, built = 0, 0
    for group in groups:
        count = sum(1 for _ in on_device([group], "meta", False))
        cases = []
        for build in on_device([group], "cpu", True):
            cases.append(build())
        torch.set_default_device(None)
        total, built = total + count, built + len(cases)
        for case in {case.name: case for case in cases}.values():
            bars = "; ".join(f"{ours}: {bar}" for ours, bar in case.bars.items())
            print(f"{group.__name__}: {case.name}: {', '.join(case.contestants)}{f' [{bars}]' if bars else ''}")
    print(f"{total} cases planned, {built} small ones built and right on the CPU, nothing timed")
    return 0


def rows_of(case: Case, times: Mapping[str, Timing], kind: str, note: str = "") -> list[Row]:
    """Rows of another way to time than `Case.measure`, without bars: those are promised for calls in a row."""
    peers = [name for name in case.peers if name in times]
    return [
        Row(
            f"{case.name}, {kind}", case.detail, ours,
            {name: times[name].milliseconds for name in (ours, *peers)},
            {peer: times[peer].ratio_to(times[ours]) for peer in peers},
            note="; ".join(filter(None, (case.note, note))),
        )
        for ours in case.ours
    ]  # fmt: skip


def measure(case: Case, repeats: int, flushed: Tensor, *, quick: bool) -> Iterator[Row]:
    """Calls in a row with bars; each alone with a cold L2; where one is short, captured as a CUDA graph too."""
    cuda = flushed.is_cuda
    timer: dict[str, Any] = {"min_time": 1e-4 if quick else MIN_TIME}
    if cuda:
        timer["synchronize"] = torch.cuda.synchronize
    rows = case.measure(repeats, quick=quick, **timer)
    yield from rows
    yield from rows_of(case, cold(case.contestants, repeats, flushed), "L2 cold")
    if cuda and min(row.costs[row.ours] for row in rows) < SHORT:
        times, note = graphed(case.contestants, repeats, GRAPH_TIME)
        yield from rows_of(case, times, "CUDA graph", note)


def run(suite: str, description: str | None, groups: Sequence[Group], ops: Sequence[str]) -> int:
    """Command line of a suite; returns its exit status, 1 where a result was wrong."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--json", type=Path, metavar="FILE")
    asked.add_argument("--plan", action="store_true", help="no GPU: count the cases, build small ones, time nothing")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="small shapes, no bars")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.plan:
        return plan(groups)
    cuda = options.device == "cuda"
    facts = gather_facts(suite, ops, threads=torch.get_num_threads(), repeats=options.repeats,
                         quick=options.quick, allocator="system")  # fmt: skip
    serving = {row.op: row.kernel for row in backends() if row.device == options.device}
    small = {"copied": 1 << 16, "matrix": 32} if options.quick else {}
    facts = replace(
        facts,
        command=f"python bench/gpu_{suite}.py --repeats {options.repeats}",
        processor=torch.cuda.get_device_name() if cuda else facts.processor,
        kernels={op: serving[op] for op in ops},
        ceilings=ceilings(options.device, **small),
    )
    print(facts, flush=True)
    rows: list[Row] = []
    wrong = 0
    flushed = flush_buffer(options.device)
    for build in on_device(groups, options.device, options.quick):
        try:
            case = build()
            # While a default device is set every call of torch's functions costs some microseconds more.
            torch.set_default_device(None)
            for row in measure(case, options.repeats, flushed, quick=options.quick):
                rows.append(row)
                print(row, flush=True)
        except AssertionError as error:
            wrong += 1
            print(f"WRONG {error}", flush=True)
        # After every case: one that is cut off leaves what it measured.
        Record(f"gpu_{suite}", facts, rows).write(options.json)
    print(f"{wrong} cases were wrong, {sum(row.met is False for row in rows)} bars missed", flush=True)
    return 1 if wrong else 0
