"""What the command line does on behalf of a folder: continue its run, run the Python file it names.

A model source `FILE.py:FACTORY` runs that file. Typed as `--model` it is the user's own word; recorded in a folder it
is the word of whoever wrote the folder, and takes `--trust`. Where files are written, whether they are replaced and
whether the network is used is always typed; whatever else a folder records is data.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path

from clusterq.errors import CheckpointError, ModelError
from clusterq.models import runs_code
from clusterq.partial import recorded_words

# What may stand beside `--resume RUN` without the rest of the command.
_OWN = (
    "resume",
    "trust",
    "overwrite",
    "download",
    "threads",
    "device",
    "quiet",
    "json",
    "save_every",
    "run",
    "command",
)


def continued(
    options: argparse.Namespace, parse: Callable[[Sequence[str]], argparse.Namespace]
) -> tuple[argparse.Namespace, list[str]]:
    """The options with which the run of `options.resume` was begun, and the words they were typed in.

    Args:
        options: of `clusterq quantize --resume RUN` without `--model`.
        parse: the command's parser.

    Raises:
        CheckpointError: no state to continue, or of a command that this version does not understand.
        ModelError: the run's network comes from a Python file and `--trust` is not given.
        ValueError: no run is named, or options beside it that would have no effect.
    """
    if not options.resume:
        raise ValueError("--resume: name the run folder, or give the command that began the run")
    plain = vars(parse(["quantize"]))
    surplus = next((name for name, value in vars(options).items() if name not in _OWN and value != plain[name]), None)
    if surplus is not None:
        raise ValueError(
            f"--{surplus.replace('_', '-')} beside --resume RUN: the run has its own; leave it out, or give the whole "
            "command that began the run, with --resume"
        )
    words = recorded_words(Path(options.resume))
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            began = parse(words)
    except SystemExit:
        raise CheckpointError(f"{options.resume} was begun by a command this version does not understand") from None
    if began.command != "quantize" or began.model is None:
        raise CheckpointError(f"{options.resume} was begun by a command this version does not understand")
    if runs_code(began.model) and not options.trust:
        raise ModelError(
            f"the run was begun with --model {began.model}, a file that would be run: give --trust to run it, or the "
            "whole command that began the run, with --resume"
        )
    for name in ("overwrite", "download", "quiet", "json", "resume"):
        setattr(began, name, getattr(options, name))
    for name in ("threads", "device", "save_every"):
        if getattr(options, name) is not None:
            setattr(began, name, getattr(options, name))
    return began, words


def network_source(given: str | None, recorded: str | None, *, trust: bool) -> str | None:
    """Where the network of a checkpoint is to come from: what was typed, or with `trust` the file that it records."""
    if given is None and trust and recorded is not None and runs_code(recorded):
        return recorded
    return given
