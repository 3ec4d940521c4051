"""Cells gathered into one result: JSON with every number and its origin, CSV with a line per cell, a picture."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clusterq.ablation import plot
from clusterq.ablation.cells import SAMPLES, SECONDS, Shared, StudentWork, read_cell
from clusterq.ablation.table import Table
from clusterq.data import EvaluationSet
from clusterq.errors import DataError
from clusterq.folders import write_file
from clusterq.readers import read_record
from clusterq.versions import machine, now, versions

FORMAT, FORMAT_VERSION = "clusterq-ablation", 1
JSON, CSV, PICTURE = "results.json", "results.csv", "results.png"


def gather(
    table: Table,
    shared: Shared,
    works: Mapping[str, Sequence[StudentWork]],
    reasons: Mapping[str, str],
    *,
    full: Mapping[str, float],
    network: Mapping[str, Any],
    data: EvaluationSet,
) -> dict[str, Any]:
    """The content of `results.json`.

    Args:
        table, shared: what was run.
        works: row name -> its pieces of work.
        reasons: key of a cell -> why it failed.
        full: top-1 of the network in floating point by section.
        network: facts of the network.
        data: what was measured on.
    """
    rows, failed = [], []
    for row in table.rows:
        cells = []
        for work in works[row.name]:
            for width in work.widths:
                key = work.key(width)
                cell = read_cell(shared.folder, key)
                if cell is None:
                    where = {"row": row.name, "bits": str(width), "seed": work.config.seed}
                    failed.append({**where, "reason": reasons.get(key, "not run")})
                else:
                    cells.append({name: value for name, value in cell.items() if not name.startswith("format")})
        section = works[row.name][0].images
        rows.append(
            {
                "name": row.name,
                "preset": row.config.preset,
                "settings": list(row.assignments),
                "bits": [str(width) for width in row.widths],
                "images": "synthesised" if section is None else "NOT DATA-FREE: real images {}:{}".format(*section),
                "section": section,
                "data_free": section is None,
                # A student may know the images of these sections: it was trained on some of them, without labels.
                "trained_on": [] if section is None else _overlapping(section, dict(shared.sections)),
                "cells": cells,
                "config": row.config.to_dict(),
            }
        )
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "table": {"name": table.name, "sha256": table.sha256},
        "command": shared.command,
        "created": now(),
        "network": dict(network),
        "data": {"name": data.name, "images": len(data), "sha256": shared.data_sha256},
        "sections": {name: list(section) for name, section in shared.sections},
        "seeds": list(table.seeds),
        "settings": {"base": list(table.base), "command": list(table.last)},
        "float": dict(full),
        "rows": rows,
        "failed": failed,
        "machine": {**machine(shared.device), "device": shared.device, "threads": shared.threads, "jobs": shared.jobs},
        "versions": versions(),
        "code": dict(shared.code),
    }


def write_results(folder: Path, results: Mapping[str, Any]) -> str:
    """`results.json`, `results.csv` and `results.png`; returns a sentence on the picture, which may not be drawn.

    A picture of earlier numbers goes first: it never lies beside new ones.
    """
    (folder / PICTURE).unlink(missing_ok=True)
    write_file(folder / JSON, (json.dumps(results, indent=2) + "\n").encode())
    write_file(folder / CSV, as_csv(results).encode())
    picture = plot.draw(results)
    if isinstance(picture, str):
        return f"{folder / PICTURE} was not drawn: {picture}"
    write_file(folder / PICTURE, picture)
    return f"{folder / PICTURE}"


def read_results(path: Path) -> dict[str, Any]:
    """A result from its file. Raises DataError for anything else and OSError when it cannot be read."""
    what = "a result of `clusterq ablate`"
    return read_record(path, DataError, format=FORMAT, version=FORMAT_VERSION, what=what)


def as_csv(results: Mapping[str, Any]) -> str:
    """One line per cell, with all that is needed to make it again or to distrust it."""
    sections, common = list(results["sections"]), results["settings"]
    lines = []
    for row in results["rows"]:
        for cell in row["cells"]:
            lines.append(
                {
                    "table": results["table"]["name"],
                    "row": row["name"],
                    "bits": cell["bits"],
                    "seed": cell["seed"],
                    "data_free": "yes" if row["data_free"] else "NO",
                    "images": row["images"],
                    **{f"top1_{name}": cell["accuracy"][name] for name in sections},
                    **{f"fp32_{name}": results["float"][name] for name in sections},
                    **{f"images_{name}": "{}:{}".format(*results["sections"][name]) for name in sections},
                    "trained_on": " ".join(row["trained_on"]),
                    "label_accuracy": cell["label_accuracy"],
                    "agreement": cell["agreement"],
                    "image_count": cell["images"],
                    **{f"samples_{phase}": cell["samples_seen"][phase] for phase in SAMPLES},
                    **{f"seconds_{phase}": round(cell["seconds"][phase], 3) for phase in SECONDS},
                    "synthesis": cell["synthesis"] or "",
                    "preset": row["preset"],
                    "settings": " ".join([*common["base"], *row["settings"], *common["command"]]),
                    "model": results["network"]["model"],
                    "weights_sha256": results["network"]["weights_sha256"],
                    "data": results["data"]["name"],
                    "data_sha256": results["data"]["sha256"],
                    **{name: cell["machine"][name] for name in ("processor", "cores", "threads", "jobs", "device")},
                    **{name: cell["versions"][name] for name in ("clusterq", "python", "torch")},
                    "commit": cell["code"]["commit"] or "",
                    "code_sha256": cell["code"]["sha256"],
                    "key": cell["key"],
                    "created": cell["created"],
                    "command": cell["command"],
                }
            )
    text = io.StringIO()
    if lines:
        writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    return text.getvalue()


def _overlapping(section: tuple[int, int], sections: Mapping[str, tuple[int, int]]) -> list[str]:
    return [name for name, (first, last) in sections.items() if max(first, section[0]) < min(last, section[1])]
