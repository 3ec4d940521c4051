"""`torchrun -m clusterq quantize`: one folder, one voice; whatever ends it leaves a state that any number finishes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clusterq.cli import main

sys.path.insert(0, os.path.dirname(__file__))
from small_network import FAST, MODEL, write_place

COMMON = ["--data", "set.npz", "--bits", "W4A4", "--device", "cpu", "--threads", "1", "--trust", "--save-every", "0"]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_place(tmp_path)
    return tmp_path


def begin(*settings: str, size: int = 2) -> subprocess.Popen[str]:
    """Processes of `torchrun` that quantize the small network into `run`."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), "-m", "clusterq",
         "quantize", *MODEL, *COMMON, "--output", "run", "--set", *FAST, *settings],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def result() -> dict:
    return json.loads(Path("run/result.json").read_text())


def wait_for_training() -> None:
    """Until fine-tuning has been saved once."""
    state = Path("run.partial/last/state.json")
    for _ in range(1200):
        if state.is_file() and '"W4A4 calibrated"' in state.read_text():
            return
        time.sleep(0.05)
    raise AssertionError("no state was saved")


def test_processes_write_one_folder(place):
    process = begin()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.count("top-1 in %") == 1 and err.count("evaluate FP32: 24/24") == 1
    assert result()["machine"]["processes"] == 2
    alone = [*MODEL, *COMMON, "--output", "alone", "--quiet", "--set", *FAST]
    assert main(["quantize", *alone]) == 0
    one = json.loads(Path("alone/result.json").read_text())
    assert one["machine"]["processes"] == 1
    # No training in these: the images differ in rounding alone, and so does the accuracy on 24 of them hardly.
    assert result()["float"] == one["float"]
    assert [path.name for path in place.iterdir() if "partial" in path.name or path.name.startswith(".")] == []


@pytest.mark.parametrize("how", ["terminated", "killed"])
def test_a_run_that_was_ended_can_be_finished(how, capsys):
    process = begin("finetune.steps=2000", "finetune.batch_size=4")
    wait_for_training()
    if how == "terminated":
        process.terminate()
    else:
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
        os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0
    assert not Path("run").exists()
    assert err.count("continue with: clusterq quantize --resume run") == 1, err
    assert main(["quantize", "--resume", "run", "--trust", "--quiet"]) == 0
    assert "processes was 2 and is 1" in capsys.readouterr().err
    assert result()["resumed"] == 1


def test_an_error_is_told_once(place):
    (place / "run").mkdir()
    process = begin()
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0
    assert err.count("clusterq: error: ") == 1 and "run exists" in err
