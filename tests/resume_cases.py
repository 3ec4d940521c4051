"""Short runs of `clusterq quantize` that are interrupted."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clusterq import resume
from clusterq.cli import main
from clusterq.resume import Session

FAST = [
    "--model", "builtin:digits", "--bits", "W4A4", "W2A3", "--device", "cpu", "--threads", "1", "--quiet", "--set",
    "finetune.steps=4", "finetune.batch_size=8", "finetune.calibration_images=8", "synthesis.batch_size=16",
    # Every look at the images draws a shift, whose random state has to come back too.
    "synthesis.num_images=32", "synthesis.image_steps=2", "synthesis.shifted_share=1.0",
]  # fmt: skip


def students(output: str = "out") -> dict[str, str]:
    """SHA-256 of the tensors of every width."""
    files = sorted(Path(output, "checkpoints").glob("*/model.safetensors"))
    assert [file.parent.name for file in files] == ["W2A3", "W4A4"]
    return {file.parent.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], None]) -> None:
    """Do something in the middle of the run: before the `step`-th step of all is noticed by the session."""
    after_step, left = Session.after_step, [step]

    def watched(session: Session, name: str, state: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            act()
        after_step(session, name, state)

    monkeypatch.setattr(Session, "after_step", watched)


def interrupt(monkeypatch: pytest.MonkeyPatch, step: int, *more: str) -> None:
    """Leave the state of a run that got a signal in its `step`-th step, and of one step before."""
    with monkeypatch.context() as patch:
        patch.setattr(resume, "_COST_SHARE", float("inf"))
        at_step(patch, step, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert main(["quantize", *FAST, "--output", "out", "--save-every", "0", *more]) == 130


def same(a: Any, b: Any) -> None:
    """Two trees of values and tensors are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert type(a) is type(b) and len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)
    else:
        assert type(a) is type(b) and (a == b or a != a)
