"""`clusterq synthesize` and `clusterq ablate`: the method in parts, and many times over."""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from clusterq.cli_options import PRESETS, add_command, add_machine, add_model, input_of, machine_of, require_positive
from clusterq.config import ClusterQConfig, preset
from clusterq.errors import DataError
from clusterq.progress import ConsoleProgress
from clusterq.settings import override


def add_commands(commands: Any) -> None:
    """Both commands to the command line's parser."""
    _add_synthesize(commands)
    _add_ablate(commands)


def _add_synthesize(commands: Any) -> None:
    summary = "make, extend or inspect a bank of images without quantizing; `quantize --images BANK` uses it"
    synthesize = add_command(commands, "synthesize", _synthesize, summary)
    add_model(synthesize, required=False, data=False)
    synthesize.add_argument("--output", type=Path, metavar="BANK", help="folder to make (default: runs/MODEL-bank)")
    synthesize.add_argument("--overwrite", action="store_true", help="replace the folder when it exists")
    which = synthesize.add_mutually_exclusive_group()
    which.add_argument(
        "--extend", type=Path, metavar="BANK", help="add images with the bank's settings and its next seed"
    )
    which.add_argument(
        "--inspect",
        type=Path,
        metavar="BANK",
        help="counts, label accuracy, BatchNorm alignment, diversity, pixels; --model: the bank's own if left out",
    )
    synthesize.add_argument("--any-network", action="store_true", help="inspect with another network than the bank's")
    synthesize.add_argument(
        "--preset", choices=PRESETS, help="starting point (default: default; of --extend, the bank's own settings)"
    )
    synthesize.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="synthesis.FIELD=VALUE",
        help="change single settings, which `quantize --help` lists",
    )
    synthesize.add_argument("--seed", type=int, help="of everything random (default: 0; of --extend, the next one)")
    add_machine(synthesize)


def _synthesize(options: argparse.Namespace, command: str) -> int:
    from clusterq import bank
    from clusterq.models import load_model

    device = machine_of(options)
    if options.inspect is not None:
        return _inspect(options, device)
    if options.model is None:
        raise ValueError("nothing to make images of: give --model (and --weights), or --inspect BANK")
    if options.any_network:
        raise ValueError("--any-network belongs to --inspect and to `clusterq quantize --images`")
    if options.extend is not None and options.output is not None:
        raise ValueError("--extend and --output are both given; a bank is extended in its place")
    earlier = None if options.extend is None else bank.read(options.extend)
    config = _bank_config(options, earlier)
    loaded = load_model(options.model, options.weights, **input_of(options))
    with ConsoleProgress(quiet=options.quiet) as progress:
        if options.extend is not None:
            folder = options.extend
            made = bank.extend(folder, loaded, config, device=device, command=command, progress=progress)
        else:
            name = re.sub(r"[^\w.-]+", "-", options.model.rsplit("/", 1)[-1])
            folder = options.output or Path("runs", f"{name}-bank")
            made = bank.make(
                loaded, config, folder, overwrite=options.overwrite, device=device, command=command, progress=progress
            )
    if options.json:
        print(json.dumps(made.record, indent=2))
        return 0
    part = made.record["parts"][-1]
    sheet = made.record["contact_sheet"]
    print(
        f"{part['count']} images with seed {part['seed']} in {part['seconds']:.0f} s, {len(made.images)} in all; the "
        f"network assigns {made.record['label_accuracy']:.1f} % to their label\n{folder / bank.IMAGES}\n"
        + (str(folder / sheet) if sheet == bank.SHEET else f"contact sheet {sheet}")
    )
    return 0


def _bank_config(options: argparse.Namespace, earlier: Any) -> ClusterQConfig:
    """Settings of a new part: the preset's or those of the bank to extend, and the next free seed."""
    from clusterq import bank

    foreign = [text for text in options.set if not text.startswith("synthesis.")]
    if foreign:
        raise ValueError(f"--set {foreign[0]!r}: a bank has settings of the section synthesis only")
    config = bank.settings_for_bank(preset(options.preset or "default"))
    seed = 0
    if earlier is not None:
        seed = max(earlier.seeds) + 1
        if options.preset is None:
            own = earlier.record["parts"][-1]["preset"]
            config = replace(config, synthesis=bank.last_settings(earlier), preset=own)
    return replace(override(config, options.set), seed=seed if options.seed is None else options.seed)


def _inspect(options: argparse.Namespace, device: str) -> int:
    from clusterq import bank
    from clusterq.bank_quality import describe, inspect_images
    from clusterq.models import load_model
    from clusterq.records import REBUILT
    from clusterq.synthesis import Teacher

    for name in ("output", "seed", "preset", "set", "overwrite"):
        if getattr(options, name) not in (None, [], False):
            raise ValueError(f"--{name} is of no use with --inspect, which makes nothing")
    found = bank.read(options.inspect)
    model = options.model
    if model is None:
        model = found.record["network"]["model"]
        if model.split(":", 1)[0] not in REBUILT:
            raise DataError(f"{options.inspect} was made for {model}, a Python file: give --model to have it run")
    loaded = load_model(model, options.weights, **input_of(options))
    if not options.any_network:
        bank.require_network(options.inspect, found.record, loaded)
    teacher = Teacher(loaded.model, loaded.input_shape, device=device)
    quality = inspect_images(teacher, found.images, found.labels, mean=loaded.mean, std=loaded.std)
    if options.json:
        print(json.dumps({"bank": found.record, "quality": quality.to_dict()}, indent=2))
        return 0
    print(describe(quality))
    for part in found.record["parts"]:
        print(f"part of {part['count']} images: seed {part['seed']}, {part['seconds']:.0f} s, {part['command']}")
    if options.any_network:
        print("inspected without asking whether it was made for this network", file=sys.stderr)
    return 0


def _add_ablate(commands: Any) -> None:
    ablate = add_command(
        commands, "ablate", _ablate, "run the rows of a table with seeds, or write their results as a page"
    )
    ablate.add_argument("table", nargs="?", type=Path, help="TABLE.toml or .yaml: [base], [[row]] (see the README)")
    ablate.add_argument(
        "--render", nargs="+", type=Path, metavar="RESULTS.json", help="write a Markdown page from results instead"
    )
    ablate.add_argument(
        "--output", type=Path, help="folder of the results (default: runs/TABLE); of --render, the .md file"
    )
    ablate.add_argument("--jobs", type=int, metavar="N", help="processes at a time (default: cores / threads)")
    ablate.add_argument("--seeds", type=int, nargs="+", default=[], metavar="SEED", help="in place of the table's")
    ablate.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="SECTION.FIELD=VALUE", help="in every row, last"
    )
    add_machine(ablate)


def _ablate(options: argparse.Namespace, command: str) -> int:
    if (options.table is None) == (options.render is None):
        raise ValueError("wanted a table to run or --render RESULTS.json, one of them")
    if options.render is not None:
        return _render(options, command)
    from clusterq.ablation import page
    from clusterq.ablation.run import run_table
    from clusterq.ablation.table import read_table

    require_positive(options, "jobs")
    table = read_table(options.table, assignments=options.set, seeds=options.seeds)
    if options.threads is not None:
        table = replace(table, threads=options.threads)
    device = machine_of(options)
    output = options.output or Path("runs", table.name)

    def notify(text: str) -> None:
        if not options.quiet:
            print(text, file=sys.stderr, flush=True)

    try:
        results = run_table(table, output, jobs=options.jobs, device=device, command=command, notify=notify)
    except KeyboardInterrupt:
        print(f"clusterq: interrupted; the same command continues with what {output} holds", file=sys.stderr)
        return 130
    print(json.dumps(results, indent=2) if options.json else page.terminal(results))
    for cell in results["failed"]:
        where = f"{cell['row']}, {cell['bits']}, seed {cell['seed']}"
        print(f"clusterq: error: {where}: {cell['reason']}", file=sys.stderr)
    return 2 if results["failed"] else 0


def _render(options: argparse.Namespace, command: str) -> int:
    from clusterq.ablation import page
    from clusterq.ablation.results import read_results
    from clusterq.folders import write_file

    if options.output is None:
        raise ValueError("--render: give --output, the Markdown file to write")
    found = [(path.as_posix(), read_results(path)) for path in options.render]
    try:
        text = page.render(found, command)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"a file of --render is damaged: {type(error).__name__} {error}") from error
    write_file(options.output, text.encode())
    return 0
