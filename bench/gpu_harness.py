"""What the GPU suites share: the kernels of an op side by side, the timer, options and JSON."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from harness import OURS, Case, Record, Row, gather_facts

from clusterq.ops import backends

OP = torch.ops.clusterq
TRITON = f"{OURS} triton"
MIN_TIME = 1e-2

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


def run(suite: str, description: str | None, groups: Sequence[Group], ops: Sequence[str]) -> int:
    """Command line of a suite; returns its exit status, 1 where a result was wrong."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="small shapes, no bars")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    torch.manual_seed(0)
    cuda = options.device == "cuda"
    facts = gather_facts(suite, ops, threads=torch.get_num_threads(), repeats=options.repeats,
                         quick=options.quick, allocator="system")  # fmt: skip
    serving = {row.op: row.kernel for row in backends() if row.device == options.device}
    facts = replace(
        facts,
        command=f"python bench/gpu_{suite}.py --repeats {options.repeats}",
        processor=torch.cuda.get_device_name() if cuda else facts.processor,
        kernels={op: serving[op] for op in ops},
    )
    print(facts, flush=True)
    rows: list[Row] = []
    wrong = 0
    timer: dict[str, Any] = {"min_time": 1e-4 if options.quick else MIN_TIME}
    if cuda:
        timer["synchronize"] = torch.cuda.synchronize
    for build in on_device(groups, options.device, options.quick):
        try:
            case = build()
        except AssertionError as error:
            wrong += 1
            print(f"WRONG {error}", flush=True)
            continue
        # While a default device is set every call of torch's functions costs some microseconds more.
        torch.set_default_device(None)
        for row in case.measure(options.repeats, quick=options.quick, **timer):
            rows.append(row)
            print(row, flush=True)
    Record(f"gpu_{suite}", facts, rows).write(options.json)
    print(f"{wrong} cases were wrong, {sum(row.met is False for row in rows)} bars missed", flush=True)
    return 1 if wrong else 0
