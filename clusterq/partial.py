"""The folder beside a run folder in which an interrupted run is kept: its two states, read and checked.

A state that is whole may still have been written by anyone. Its form is checked here, as far as the run relies on it;
what training continues from is checked where it is loaded (`clusterq.synthesis.stored.restoring`).
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from clusterq.errors import CheckpointError
from clusterq.records import NUMBER, first_wrong, shown
from clusterq.states import DamagedError, read_state, verify

STATES = ("last", "previous")
Notify = Callable[[str], None]

# What a run, its report and its figures rely on.
_FIELDS: dict[str, Any] = {
    "words": [str], "identity": dict, "environment": dict, "done": dict, "folders": dict, "extra": dict, "resumed": int,
    "training": (dict, type(None)),
}  # fmt: skip
_WIDTH: dict[str, Any] = {
    "row": dict, "metrics": [dict], "synthesis": [dict], "seconds": NUMBER, "row.bits": str, "row.weight_bits": int,
    "row.activation_bits": int, "row.student_seconds": NUMBER, "row.label_accuracy": NUMBER,
    "row.samples_seen.synthesis": int, "row.samples_seen.finetune": int, "row.unreached": [dict],
    "row.first_layer_bits": (int, type(None)), "row.last_layer_bits": (int, type(None)),
}  # fmt: skip
_ACCURACIES = ("rounded_minmax", "rounded_mse", "calibrated", "clusterq")
_PARTS = re.compile(r"synthesis|W[2-8]A[2-8]")


def partial_folder(output: Path) -> Path:
    """Where the state of the run that makes `output` is kept."""
    return output.with_name(f"{output.name}.partial")


def has_state(folder: Path) -> bool:
    """Whether an interrupted run is kept in a folder."""
    return any((folder / name).is_dir() for name in STATES)


def require_state(folder: Path) -> None:
    """Raises CheckpointError where no interrupted run is kept in a folder."""
    if not has_state(folder):
        raise CheckpointError(f"{folder} holds no interrupted run to continue")


def recorded_words(output: Path) -> list[str]:
    """The command that began the run of `output`, without the program's name.

    Raises:
        CheckpointError: there is no state of an interrupted run, or none that is whole.
    """
    # The folders of finished parts are verified when the run is continued.
    state, _ = newest(partial_folder(output), lambda text: None, parts=False)
    words: list[str] = state["words"]
    return words


def newest(folder: Path, notify: Notify, *, parts: bool = True) -> tuple[dict[str, Any], str]:
    """The content of `last` and its name, or of `previous` where `last` is damaged.

    Args:
        folder: of the run.
        notify: told of damage.
        parts: verify the folders of finished parts too.

    Raises:
        CheckpointError: both are damaged.
    """
    require_state(folder)
    problems = []
    for name in STATES:
        try:
            state = read_state(folder / name)
            _require_form(state, folder / name)
            for part, digest in state["folders"].items():
                if parts and verify(folder / part) != digest:
                    raise DamagedError(f"{folder / part} is not the one that {folder / name} was saved with")
        except DamagedError as error:
            problems.append(str(error))
            continue
        if problems:
            notify(f"{problems[0]}: continuing from the state before it")
        return dict(state), name
    raise CheckpointError(f"{folder} holds no whole state to continue: {problems[0]}")


def difference(old: Any, new: Any, path: str = "") -> str:
    """The first difference of two trees in words; empty when they are equal."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*old, *(key for key in new if key not in old)]:
            found = difference(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
            if found:
                return found
        return ""
    return "" if old == new else f"{path} was {shown(old)} and is {shown(new)}"


def command_to_continue(output: Path, *, trust: bool, overwrite: bool) -> str:
    """What a user types to continue the run of `output`."""
    words = ["clusterq", "quantize", "--resume", str(output)]
    return shlex.join([*words, *(["--trust"] if trust else []), *(["--overwrite"] if overwrite else [])])


def _require_form(state: Any, folder: Path) -> None:
    """Raises DamagedError for a state with a field that is absent or of another kind than the run relies on."""
    wrong = first_wrong(state, _FIELDS)
    if wrong is None and state["training"] is not None:
        wrong = first_wrong(state["training"], {"name": str, "state": dict})
    for part, digest in {} if wrong else state["folders"].items():
        if not isinstance(part, str) or _PARTS.fullmatch(part) is None:
            raise DamagedError(f"{folder} is not the state of a run: it names {part!r}")
        if not isinstance(digest, str) or part not in state["done"]:
            wrong = "folders"
    wrong = wrong or _wrong_extra(state["extra"]) or _wrong_done(state)
    if wrong is not None:
        raise DamagedError(f"{folder} is not the state of a run: {wrong} is absent or not what it should be")


def _wrong_extra(extra: Mapping[str, Any]) -> str | None:
    wrong = first_wrong(extra, {"seconds": dict, "total": NUMBER}) if extra else None
    if wrong is None and not all(map(_is_number, extra.get("seconds", {}).values())):
        wrong = "seconds"
    return None if wrong is None else f"extra.{wrong}"


def _wrong_done(state: Mapping[str, Any]) -> str | None:
    """The first wrong result: of the synthesis, of a width, or an accuracy; all of them end in JSON."""
    try:
        json.dumps(state["done"])
    except (TypeError, ValueError):
        return "done"
    measured = state["identity"].get("data") is not None
    for name, result in state["done"].items():
        wrong = None
        if not isinstance(name, str):
            return "done"
        if _PARTS.fullmatch(name) is None:
            wrong = "" if _is_accuracy(result, measured=measured) else "top1"
        elif name not in state["folders"]:
            return f"folders.{name}"
        elif name != "synthesis":
            wrong = _wrong_width(result, measured=measured)
        if wrong:
            return f"done.{name}.{wrong}"
    return None


def _wrong_width(result: Any, *, measured: bool) -> str | None:
    wrong = first_wrong(result, _WIDTH)
    if wrong is not None:
        return wrong
    row = result["row"]
    for name in _ACCURACIES:
        if name not in row or not _is_accuracy(row[name], measured=measured):
            return f"row.{name}"
    if not all(_is_step(line, "phase", "bits") for line in result["metrics"]):
        return "metrics"
    if not all(_is_step(line) for line in result["synthesis"]):
        return "synthesis"
    return None if all({"name", "note"} <= set(layer) for layer in row["unreached"]) else "row.unreached"


def _is_step(line: Mapping[str, Any], *labels: str) -> bool:
    """Whether a line of the metrics has a step, these texts, and numbers beside them."""
    return (
        isinstance(line.get("step"), int)
        and all(isinstance(line.get(name), str) for name in labels)
        and all(_is_number(value) for name, value in line.items() if name not in labels)
    )


def _is_accuracy(value: Any, *, measured: bool) -> bool:
    fields: dict[str, Any] = {"top1": NUMBER, "top5": (*NUMBER, type(None))}
    return first_wrong(value, fields) is None if measured else value is None


def _is_number(value: Any) -> bool:
    return type(value) in NUMBER
