"""Kills a run of `clusterq quantize` again and again and continues it; prints what came of it as JSON.

Usage: python kill_harness.py FOLDER KILLS SEED. One process imports torch and forks a child per attempt, which costs
milliseconds. Half of the children end themselves with SIGKILL at a random one of their own events (a step, a rename, a
flush to disk, before and after it); the others are killed by this process after a random time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from clusterq import figures, resume
from clusterq.cli import main

COMMON = [
    "quantize", "--model", "builtin:digits", "--bits", "W4A4", "W2A3", "--device", "cpu", "--threads", "1", "--quiet",
    "--save-every", "0", "--set", "finetune.steps=6", "finetune.batch_size=8", "finetune.calibration_images=8",
    "synthesis.batch_size=16",
]  # fmt: skip
# The bank with centroids, and a generator that trains beside the student.
KINDS = {
    "bank": ["synthesis.num_images=32", "synthesis.image_steps=4", "synthesis.warmup_steps=2",
             "synthesis.alignment_weight=0.1", "synthesis.diversity_weight=0.1", "synthesis.shifted_share=1.0"],
    "stream": ["synthesis.source=generator", "finetune.images=stream", "synthesis.warmup_steps=6",
               "synthesis.generator_width=8", "synthesis.num_images=16", "synthesis.alignment_weight=0.1"],
}  # fmt: skip


def begin(kind: str) -> list[str]:
    return [*COMMON, *KINDS[kind], "--output", kind]


def students(kind: str) -> dict[str, str]:
    """SHA-256 of the tensors of every width."""
    files = sorted(Path(kind, "checkpoints").glob("*/model.safetensors"))
    return {file.parent.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def die_at(event: int) -> None:
    """End this process at its `event`-th event, without any cleaning up."""
    left = [event]

    def watched(function: Any) -> Any:
        def call(*arguments: Any, **settings: Any) -> Any:
            for after in (False, True):
                if after:
                    result = function(*arguments, **settings)
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    os.fsync = watched(os.fsync)
    Path.rename = watched(Path.rename)  # type: ignore[method-assign]
    Path.write_bytes = watched(Path.write_bytes)  # type: ignore[method-assign]
    resume.Session.after_step = watched(resume.Session.after_step)  # type: ignore[method-assign]


def attempt(words: list[str], event: int | None, seconds: float | None) -> int:
    """Exit code of one child; -9 when it was killed."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if event is not None:
            die_at(event)
        os._exit(main(words))
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def drive(kills: int, seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    figures.draw = lambda *arguments, **settings: {}  # type: ignore[assignment]
    # Every step is saved, whatever it costs.
    resume._COST_SHARE = float("inf")
    expected, length = {}, {}
    for kind in KINDS:
        # In this process: children then inherit everything that is set up at first use.
        with open("log", "w") as log, contextlib.redirect_stdout(log):
            assert main(begin(kind)) == 0
        start = time.perf_counter()
        assert attempt([*begin(kind), "--overwrite"], None, None) == 0
        length[kind] = time.perf_counter() - start
        expected[kind] = students(kind)
    done: dict[str, Any] = {"kills": 0, "resumed": 0, "finished": 0, "wrong": [], "codes": [], "expected": expected}
    draw = random.Random(seed)
    kind = "bank"
    while done["kills"] < kills:
        kind = "stream" if kind == "bank" else "bank"
        words = [*begin(kind), "--overwrite"]
        while True:
            by_event = draw.random() < 0.5
            event = draw.randint(1, 150) if by_event else None
            code = attempt(words, event, None if by_event else draw.uniform(0.02, 0.7 * length[kind]))
            if code == 0:
                break
            if code != -signal.SIGKILL:
                done["codes"].append(code)
                return done
            done["kills"] += 1
            kept = any(Path(f"{kind}.partial", name).is_dir() for name in ("last", "previous"))
            done["resumed"] += kept
            words = ["quantize", "--resume", kind, "--overwrite"] if kept else [*begin(kind), "--overwrite"]
        done["finished"] += 1
        if students(kind) != expected[kind]:
            done["wrong"].append(kind)
    done["left"] = sorted(name for name in os.listdir() if name.startswith(".") or name.endswith(".partial"))
    return done


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    begun = time.perf_counter()
    print(json.dumps({**drive(int(sys.argv[2]), int(sys.argv[3])), "seconds": time.perf_counter() - begun}))
