"""An ablation from the checked table to its folder: `results.json`, `results.csv`, `results.png`, `cells`, `synthesis`.

A cell is a row with one seed at one width. What is finished is found again by the hash in its file's name, so the same
command continues an interrupted ablation, and a changed row runs again alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from clusterq import bank
from clusterq.ablation.cells import (
    CELLS,
    Shared,
    StudentWork,
    SynthesisWork,
    accuracy_by_section,
    bank_path,
    carry_out,
    cell_path,
    data_identity,
    forget,
    network_identity,
    opened,
    read_cell,
)
from clusterq.ablation.pool import Task, run_tasks
from clusterq.ablation.results import gather, write_results
from clusterq.ablation.table import Row, Table, expand, section_range
from clusterq.data import EvaluationSet
from clusterq.errors import DataError, OutputError
from clusterq.folders import write_file
from clusterq.models import LoadedModel
from clusterq.readers import read_json
from clusterq.records import NUMBER, first_wrong
from clusterq.versions import code_identity, environment

Notify = Callable[[str], None]


def default_jobs(threads: int, device: str) -> int:
    """Processes of so many threads that this process's cores hold, at least one; on a GPU one, which has all of it."""
    if device != "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // threads)


def run_table(
    table: Table, output: Path, *, jobs: int | None, device: str, command: str, notify: Notify
) -> dict[str, Any]:
    """Run what is not finished yet and write the folder.

    Args:
        table: what to run.
        output: folder of this table, made when absent.
        jobs: processes at a time; None: `default_jobs`.
        device: where to compute.
        command: as typed.
        notify: called with a sentence for every piece of work that ended.

    Returns:
        The content of `results.json`; its `failed` lists what did not work, one entry per cell.

    Raises:
        ClusterQError: the network or the data cannot be used, a section is not there, or the folder is something else.
        KeyboardInterrupt: finished cells stay.
    """
    _check_folder(output)
    forget()
    torch.set_num_threads(table.threads)
    loaded, data, shared = _open(table, output, jobs or default_jobs(table.threads, device), device, command)
    works = {row.name: _works(row, table, shared, len(data)) for row in table.rows}
    tasks = _tasks(works, output)
    full = _float_accuracy(loaded, data, shared)
    notify(f"FP32: {', '.join(f'{name} {value:.2f}' for name, value in full.items())}; {len(tasks)} pieces of work")
    ended = 0

    def on_end(task: Task, error: str | None) -> None:
        nonlocal ended
        ended += 1
        said = (error and f"failed: {error}") or _said(task, output)
        notify(f"[{ended}/{len(tasks)}] {task.name}: {said}")

    failed = run_tasks(tasks, carry_out, jobs=shared.jobs, on_end=on_end)
    reasons = {key: error for task in tasks if (error := failed.get(task.name)) for key in _keys(task.work)}
    facts = {**loaded.facts(), "model": table.model}
    results = gather(table, shared, works, reasons, full=full, network=facts, data=data)
    notify(write_results(output, results))
    return results


def _open(
    table: Table, output: Path, jobs: int, device: str, command: str
) -> tuple[LoadedModel, EvaluationSet, Shared]:
    model, data_name = expand(table.model), expand(table.data)
    weights = None if table.weights is None else expand(table.weights)
    inputs = tuple(table.inputs.items())
    loaded, data = opened(model, weights, data_name, inputs)
    shared = Shared(
        model,
        weights,
        data_name,
        inputs,
        tuple((name, section_range(section, len(data))) for name, section in table.sections.items()),
        network_identity(loaded),
        data_identity(data),
        # Of the number of threads that has just been set.
        tuple(environment(device).items()),
        table.threads,
        jobs,
        device,
        output.absolute(),
        command,
        code_identity(),
    )
    sections = dict(shared.sections)
    first, second = sections["choose"], sections["report"]
    if max(first[0], second[0]) < min(first[1], second[1]):
        raise DataError(f"sections choose {first} and report {second} share images; wanted different ones")
    return loaded, data, shared


def _works(row: Row, table: Table, shared: Shared, images: int) -> list[StudentWork]:
    """One piece per seed and width; all widths together where each would train the same generator again."""
    section = None if row.images is None else section_range(row.images, images)
    together = section is None and row.config.finetune.images == "stream"
    groups = [row.widths] if together else [(width,) for width in row.widths]
    return [
        StudentWork(shared, replace(row.config, seed=seed), group, section) for seed in table.seeds for group in groups
    ]


def _tasks(works: dict[str, list[StudentWork]], output: Path) -> list[Task]:
    """What is left: every bank once, before the first student that needs it, and every student once.

    Rows may share a cell, and those with several widths in one piece only some of theirs: each piece is what no earlier
    one makes.
    """
    tasks: dict[str, Task] = {}
    planned: set[str] = set()
    for name, students in works.items():
        for work in students:
            keys = {width: work.key(width) for width in work.widths}
            left = tuple(w for w, key in keys.items() if key not in planned and read_cell(output, key) is None)
            if not left:
                continue
            planned.update(keys[width] for width in left)
            synthesis = work.synthesis
            needs = None
            if synthesis is not None and not bank_path(output, synthesis.key).exists():
                needs = synthesis.key
                tasks.setdefault(needs, Task(f"images of {name}, seed {work.config.seed}", synthesis))
            label = f"{name}, {' '.join(map(str, left))}, seed {work.config.seed}"
            tasks[label] = Task(label, replace(work, widths=left), needs and tasks[needs].name)
    return list(tasks.values())


def _keys(work: SynthesisWork | StudentWork) -> list[str]:
    return [] if isinstance(work, SynthesisWork) else [work.key(width) for width in work.widths]


def _said(task: Task, output: Path) -> str:
    """What a finished task found."""
    if isinstance(task.work, SynthesisWork):
        record = bank.read_record(bank_path(output, task.work.key))
        return f"{record['images']['count']} in {record['parts'][0]['seconds']:.0f} s"
    found = []
    for key in _keys(task.work):
        cell = read_cell(output, key)
        assert cell is not None
        accuracies = ", ".join(f"{name} {value:.2f}" for name, value in cell["accuracy"].items())
        found.append(f"{cell['bits']} {accuracies} in {cell['seconds']['total']:.0f} s")
    return "; ".join(found)


def _float_accuracy(loaded: LoadedModel, data: EvaluationSet, shared: Shared) -> dict[str, float]:
    """Top-1 of the network in floating point by section, measured once per folder."""
    sections = dict(shared.sections)
    identity = {**shared.numbers_depend_on, "data": shared.data_sha256, "sections": shared.sections}
    # As JSON reads it back: tuples are lists there.
    identity = json.loads(json.dumps(identity))
    path = cell_path(shared.folder, "float")
    if path.is_file():
        known = read_json(path, DataError)
        wrong = first_wrong(known, {"identity": dict, **{f"accuracy.{name}": NUMBER for name in sections}})
        if wrong is not None:
            raise DataError(f"{path} is damaged: {wrong} is absent or of another type; remove it to have it made again")
        if known["identity"] == identity:
            return {name: float(known["accuracy"][name]) for name in sections}
    accuracy = accuracy_by_section(loaded.model.to(shared.device), data, sections, device=shared.device)
    write_file(path, (json.dumps({"identity": identity, "accuracy": accuracy}, indent=2) + "\n").encode())
    return accuracy


def _check_folder(output: Path) -> None:
    """Refuse to write among files of something else."""
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file; wanted the name of a folder")
    if output.exists() and any(output.iterdir()) and not (output / CELLS).is_dir():
        raise OutputError(f"{output} exists and is not the folder of an ablation; choose another --output")
