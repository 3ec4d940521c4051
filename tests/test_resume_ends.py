"""Ends of a run that need care: in the report, twice at once, after damage, with other files than it was begun with."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from resume_cases import FAST, at_step, interrupt, same, students

from clusterq import data, figures, models, partial, resume, states, versions
from clusterq.cli import main
from clusterq.resume import Session

STREAM = [
    "--model", "builtin:digits", "--bits", "W4A4", "W2A3", "--device", "cpu", "--threads", "1", "--quiet",
    "--save-images", "--save-every", "0", "--set", "synthesis.source=generator", "finetune.images=stream",
    "synthesis.warmup_steps=2", "synthesis.generator_width=8", "synthesis.num_images=16", "synthesis.batch_size=8",
    "finetune.steps=3", "finetune.batch_size=8", "finetune.calibration_images=8",
]  # fmt: skip
MARK = "0123abcd"


@pytest.fixture(autouse=True)
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the figures of each run were drawn from, in place of drawing them."""
    calls: list[dict[str, Any]] = []

    def draw(folder: Path, result: Any, **settings: Any) -> dict[str, Any]:
        calls.append(settings)
        return {}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, "draw", draw)
    return calls


def _signal_in(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, *numbers: int) -> None:
    """Send signals to this process when a function is called, once it is done."""
    function = getattr(place, name)

    def watched(*arguments: Any, **settings: Any) -> Any:
        answer = function(*arguments, **settings)
        for number in numbers:
            os.kill(os.getpid(), number)
        return answer

    monkeypatch.setattr(place, name, watched)


@pytest.mark.parametrize("moment", ["report", "second width"])
def test_streamed_images_of_a_continued_run(
    monkeypatch: pytest.MonkeyPatch, drawn: list[dict[str, Any]], moment: str
) -> None:
    assert main(["quantize", *STREAM, "--output", "whole"]) == 0
    with monkeypatch.context() as patch:
        if moment == "report":
            _signal_in(patch, figures, "draw", signal.SIGTERM)
        else:
            at_step(patch, 2 + 3 + 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert main(["quantize", *STREAM, "--output", "out"]) == 143
    assert not Path("out").exists()
    assert main(["quantize", "--resume", "out", "--quiet"]) == 0
    assert students() == students("whole")
    for name in ("images.safetensors", "metrics.jsonl"):
        assert Path("out", name).read_bytes() == Path("whole", name).read_bytes(), name
    # The generator has learned something: images of the warm-up are others.
    assert len(Path("out/metrics.jsonl").read_text().splitlines()) == 2 + 3 + 2 * 3
    assert sorted(os.listdir("out/checkpoints/W4A4")) == ["checkpoint.json", "model.safetensors"]
    first, last = drawn[0], drawn[-1]
    same({name: first[name] for name in ("images", "labels", "separability", "metrics")},
         {name: last[name] for name in ("images", "labels", "separability", "metrics")})  # fmt: skip


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_the_report_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], number: int, code: int
) -> None:
    with monkeypatch.context() as patch:
        _signal_in(patch, figures, "draw", number)
        assert main(["quantize", *FAST, "--output", "out"]) == code
    assert "everything is saved; continue with: clusterq quantize --resume out" in capfd.readouterr().err
    assert os.listdir() == ["out.partial"]
    assert main(["quantize", "--resume", "out", "--quiet"]) == 0
    assert sorted(os.listdir()) == ["out"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_gives_its_own_exit_code(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], number: int, code: int
) -> None:
    at_step(monkeypatch, 3, lambda: [os.kill(os.getpid(), each) for each in (signal.SIGINT, number)] and None)
    assert main(["quantize", *FAST, "--output", "out", "--save-every", "0"]) == code
    assert "clusterq: interrupted, " in capfd.readouterr().err


def test_a_signal_while_a_part_is_kept_saves_once(monkeypatch: pytest.MonkeyPatch) -> None:
    saves = []
    save = Session.save

    def counted(session: Session) -> None:
        saves.append(sorted(session.done))
        save(session)

    monkeypatch.setattr(Session, "save", counted)
    _signal_in(monkeypatch, resume, "seal", signal.SIGINT)
    assert main(["quantize", *FAST, "--output", "out", "--save-every", "1000"]) == 130
    assert saves == [["float", "synthesis"]]


def test_another_output_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    interrupt(monkeypatch, 2)
    capsys.readouterr()
    assert main(["quantize", *FAST, "--resume", "out", "--output", "other"]) == 2
    captured = capsys.readouterr().err.strip()
    assert "--output other beside --resume out: a run is continued into its own folder" in captured
    assert "\n" not in captured and os.listdir() == ["out.partial"]
    assert main(["quantize", *FAST, "--resume", "out", "--output", "out"]) == 0


def test_the_state_fallen_back_to_stays(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    interrupt(monkeypatch, 4)
    folder = Path("out.partial")
    before = states.read_state(folder / "previous")
    (folder / "last" / "state.safetensors").write_bytes(b"")
    with monkeypatch.context() as patch:
        # Killed after its first save.
        save = Session.save

        def once(session: Session) -> None:
            save(session)
            raise SystemExit

        patch.setattr(Session, "save", once)
        at_step(patch, 1, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(SystemExit):
            main(["quantize", "--resume", "out", "--quiet"])
    same(states.read_state(folder / "previous"), before)
    assert states.read_state(folder / "last")["resumed"] == 1


def test_remains_of_a_killed_process_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch, 2)
    for name in (f".out.{MARK}.probe", f".out.{MARK}.tmp", f".out.partial.{MARK}.tmp", f".out.partial.{MARK}.old",
                 f"out.partial/.last.{MARK}.old", f"out.partial/.last.{MARK}.tmp", f".mine.{MARK}.tmp"):  # fmt: skip
        Path(name).mkdir()
        Path(name, "file").touch()
    assert main(["quantize", "--resume", "out", "--quiet"]) == 0
    assert sorted(os.listdir()) == [f".mine.{MARK}.tmp", "out"]


def test_a_run_folder_moved_away_by_a_killed_process_comes_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt(monkeypatch, 2)
    Path(f".out.{MARK}.old").mkdir()
    Path(f".out.{MARK}.old", "mine").write_text("mine")
    capsys.readouterr()
    assert main(["quantize", "--resume", "out", "--quiet"]) == 2
    assert "out exists already; choose another name or give --overwrite" in capsys.readouterr().err
    assert sorted(os.listdir()) == ["out", "out.partial"] and os.listdir("out") == ["mine"]
    Path("out").rename(f".out.{MARK}.old")
    assert main(["quantize", "--resume", "out", "--quiet", "--overwrite"]) == 0
    assert os.listdir() == ["out"] and not Path("out/mine").exists()


def _network(text: str) -> None:
    Path("net.py").write_text(
        "from clusterq.models import load_model\ndef make():\n    " + text + "\n"
        "    return load_model('builtin:digits').model\n"
    )


def test_a_python_file_that_changed_in_between(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _network("pass")
    own = ["--model", "net.py:make", "--input-size", "16", "--mean", "0.3", "--std", "0.3"]
    interrupt(monkeypatch, 2, *own)
    # The tensors are the same; what the network computes with them may not be.
    _network("print")
    capsys.readouterr()
    assert main(["quantize", "--resume", "out", "--trust", "--quiet"]) == 2
    assert "belongs to another run: file was" in capsys.readouterr().err


def _pictures(folder: Path, shade: int) -> None:
    from PIL import Image

    for label in range(10):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        Image.new("L", (16, 16), 20 * label + shade).save(folder / str(label) / "a.bmp")


def test_images_that_changed_in_between(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchvision")
    _pictures(Path("set"), 0)
    interrupt(monkeypatch, 2, "--data", "set")
    _pictures(Path("set"), 1)
    capsys.readouterr()
    assert main(["quantize", "--resume", "out", "--quiet"]) == 2
    assert "belongs to another run: data.sha256 was" in capsys.readouterr().err
    _pictures(Path("set"), 0)
    assert main(["quantize", "--resume", "out", "--quiet"]) == 0
    assert json.loads(Path("out/result.json").read_text())["data"]["sha256"] == data.content_sha256("set")


@pytest.mark.parametrize("what", ["code", "autocast", "kernels"])
def test_what_the_last_bits_depend_on_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    interrupt(monkeypatch, 2)
    if what == "code":
        changed = (("version", versions.versions()["clusterq"]), ("commit", None), ("sha256", "0" * 64))
        monkeypatch.setattr(versions, "code_identity", lambda: changed)
    elif what == "autocast":
        supported = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        monkeypatch.setattr("clusterq.precision.has_bfloat16", lambda device: not supported)
    else:
        monkeypatch.setattr("clusterq.run.kernels", lambda device: {"fake_quantize": "another"})
    capsys.readouterr()
    assert main(["quantize", "--resume", "out", "--quiet"]) == 0
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"clusterq: {what}")
    assert lines[0].endswith("the result can differ in its last bits from that of a run in one go")


def test_a_file_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(models.read_state_dict(models.DIGITS_WEIGHTS), "weights.pt")
    shutil.copyfile(Path(__file__), "set.npz")
    _set("set.npz")
    interrupt(monkeypatch, 5, "--data", "set.npz", "--weights", "weights.pt")
    hashed: list[str] = []
    file_sha256 = models.file_sha256

    def counted(path: str | Path) -> str:
        hashed.append(Path(path).name if "partial" not in str(path) else "/".join(Path(path).parts[-2:]))
        return file_sha256(path)

    for module in (models, states, data):
        monkeypatch.setattr(module, "file_sha256", counted)
    assert main(["quantize", "--resume", "out", "--quiet"]) == 0
    for name in ("set.npz", "weights.pt", "synthesis/state.safetensors"):
        assert hashed.count(name) == 1, (name, hashed)


def _set(path: str) -> None:
    import numpy as np

    images = np.random.default_rng(0).integers(0, 256, (10, 16, 16, 1), dtype=np.uint8)
    np.savez(path, images=images, labels=np.arange(10))


def _put(*path: Any, value: Any) -> Callable[[Any], None]:
    def act(state: Any) -> None:
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value

    return act


def _drop(*path: Any) -> Callable[[Any], None]:
    def act(state: Any) -> None:
        for key in path[:-1]:
            state = state[key]
        del state[path[-1]]

    return act


ROW, STATE = ("done", "W4A4", "row"), ("training", "state")
HOSTILE = [
    *(_drop(name) for name in ("words", "identity", "environment", "done", "folders", "extra", "resumed")),
    *(_put(name, value="x") for name in ("words", "identity", "environment", "done", "folders", "extra", "resumed")),
    _put("words", value=[1]), _put("training", value=5), _drop("training", "state"), _put("training", "name", value=1),
    _put("extra", value={"seconds": {}}), _put("extra", "total", value="x"),
    _put("extra", "seconds", "load", value="x"),
    _put("done", "W4A4", value=None), _drop("done", "W4A4"), _drop("folders", "W4A4"), _put("folders", "W4A4", value=1),
    _put("done", "float", value={"top1": 1.0, "top5": None}), _put("done", "synthesis", value=torch.zeros(2)),
    *(_drop(*ROW, key) for key in ("bits", "label_accuracy", "student_seconds", "samples_seen", "clusterq",
                                   "rounded_mse", "unreached", "first_layer_bits")),
    _put(*ROW, "extra", value=torch.zeros(2)), _put(*ROW, "student_seconds", value="x"),
    _put(*ROW, "unreached", value=[{}]), _put("done", "W4A4", "metrics", value=[{"step": 0}]),
    _put("done", "W4A4", "metrics", 0, "kd", value="x"), _put("done", "W4A4", "synthesis", value=[{"step": "x"}]),
    _put("done", "W4A4", "seconds", value=None), _put("done", 3, value=None),
    _drop(*STATE, "finetuner"), _put(*STATE, "finetuner", "step", value="x"),
    _put(*STATE, "finetuner", "step", value=-1),
    _drop(*STATE, "finetuner", "student"), _put(*STATE, "finetuner", "random", value=torch.zeros(3)),
    _put(*STATE, "finetuner", "metrics", value=[1]), _drop(*STATE, "finetuner", "optimizer", "param_groups"),
]  # fmt: skip


def test_a_hostile_state_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    interrupt(monkeypatch, 4 + 4 + 2)
    whole = states.read_state(Path("out.partial/last"))
    shutil.rmtree("out.partial/previous")
    for number, act in enumerate(HOSTILE):
        state = copy.deepcopy(whole)
        act(state)
        states.write_state(Path("out.partial/last"), state)
        states.seal(Path("out.partial/last"))
        capsys.readouterr()
        assert main(["quantize", "--resume", "out", "--quiet"]) == 2, number
        captured = capsys.readouterr().err.strip()
        assert captured.startswith("clusterq: error: ") and "\n" not in captured, (number, captured)
        assert "is not the state of a run" in captured or "the saved state does not fit: " in captured, captured
        assert "continue with" not in captured and not Path("out").exists()
    states.write_state(Path("out.partial/last"), whole)
    states.seal(Path("out.partial/last"))
    assert partial.newest(Path("out.partial"), lambda text: None)[1] == "last"
    assert main(["quantize", "--resume", "out", "--quiet"]) == 0
