"""Interrupted runs: whatever ends one, it continues to the very student it would have made, or says why it cannot."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clusterq import figures, resume, states
from clusterq.cli import main
from clusterq.errors import CheckpointError
from clusterq.resume import Session

FAST = [
    "--model", "builtin:digits", "--bits", "W4A4", "W2A3", "--device", "cpu", "--threads", "1", "--quiet", "--set",
    "finetune.steps=4", "finetune.batch_size=8", "finetune.calibration_images=8", "synthesis.batch_size=16",
    # Every look at the images draws a shift, whose random state has to come back too.
    "synthesis.num_images=32", "synthesis.image_steps=2", "synthesis.shifted_share=1.0",
]  # fmt: skip
SYNTHESIS, STEPS = 4, 4


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, "draw", lambda *arguments, **settings: {})
    return tmp_path


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    output = str(tmp_path_factory.mktemp("reference") / "out")
    assert main(["quantize", *FAST, "--output", output]) == 0
    return _students(output)


def _students(output: str = "out") -> dict[str, str]:
    files = sorted(Path(output, "checkpoints").glob("*/model.safetensors"))
    assert [file.parent.name for file in files] == ["W2A3", "W4A4"]
    return {file.parent.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], None]) -> None:
    """Do something in the middle of the run: before the `step`-th step of all is noticed by the session."""
    after_step, left = Session.after_step, [step]

    def watched(session: Session, name: str, state: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            act()
        after_step(session, name, state)

    monkeypatch.setattr(Session, "after_step", watched)


def _interrupt(monkeypatch: pytest.MonkeyPatch, step: int, *more: str) -> None:
    """Leave the state of a run that got a signal in its `step`-th step, and of one step before."""
    with monkeypatch.context() as patch:
        patch.setattr(resume, "_COST_SHARE", float("inf"))
        _at_step(patch, step, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert main(["quantize", *FAST, "--output", "out", "--save-every", "0", *more]) == 130


@pytest.mark.parametrize(
    ("number", "code", "step"),
    [(signal.SIGINT, 130, 3), (signal.SIGTERM, 143, SYNTHESIS), (signal.SIGTERM, 143, SYNTHESIS + STEPS + 1)],
)
def test_a_signal_saves_and_says_how_to_continue(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    uninterrupted: dict[str, str],
    number: int,
    code: int,
    step: int,
) -> None:
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        _at_step(patch, step, lambda: os.kill(os.getpid(), number))
        assert main(["quantize", *FAST, "--output", "out"]) == code
    assert signal.getsignal(number) is handler
    lines = capfd.readouterr().err.strip().splitlines()
    assert lines[-2] == "clusterq: finishing this step and saving; once more stops at once"
    assert lines[-1].endswith("everything is saved; continue with: clusterq quantize --resume out")
    assert sorted(os.listdir()) == ["out.partial"]
    assert main(["quantize", "--resume", "out", "--quiet"]) == 0
    assert _students() == uninterrupted
    result = json.loads(Path("out/result.json").read_text())
    assert result["resumed"] == 1 and result["command"].startswith("clusterq quantize --model builtin:digits")
    metrics = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [*range(SYNTHESIS), *range(STEPS), *range(STEPS)]
    assert sorted(os.listdir()) == ["out"]


def test_a_second_signal_stops_at_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(resume, "_COST_SHARE", float("inf"))
    _at_step(monkeypatch, 3, twice)
    assert main(["quantize", *FAST, "--output", "out", "--save-every", "0"]) == 130
    assert "continue with: clusterq quantize --resume out" in capsys.readouterr().err
    assert states.read_state(Path("out.partial/last"))["training"]["state"]["step"] == 2


def test_the_whole_command_continues_too(monkeypatch: pytest.MonkeyPatch, uninterrupted: dict[str, str]) -> None:
    _interrupt(monkeypatch, 2)
    assert main(["quantize", *FAST, "--output", "out", "--resume"]) == 0
    assert _students() == uninterrupted


def test_requests_that_cannot_be_continued(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cases = [
        (["--resume", "out"], "out.partial holds no interrupted run to continue"),
        ([*FAST, "--output", "out", "--resume"], "out.partial holds no interrupted run to continue"),
        (["--resume"], "name the run folder"),
        ([], "give --model, or --resume RUN"),
        ([*FAST, "--save-every", "-1"], "--save-every is -1"),
        ([*FAST, "--save-every", "nan"], "--save-every is nan"),
    ]
    for words, part in cases:
        assert main(["quantize", *words]) == 2
        assert part in capsys.readouterr().err
    assert os.listdir() == []
    _interrupt(monkeypatch, 2)
    cases = [
        (
            [*FAST, "--output", "out"],
            "holds an interrupted run; continue it with --resume, or drop it with --overwrite",
        ),
        ([*FAST, "--output", "out", "--resume", "--seed", "1"], "another run: config.seed was 0 and is 1"),
        ([*FAST, "--resume", "out", "--bits", "W4A4"], "another run: widths was ['W4A4', 'W2A3'] and is ['W4A4']"),
        (["--resume", "out", "--bits", "W4A4"], "--bits beside --resume RUN: the run has its own"),
    ]
    for words, part in cases:
        capsys.readouterr()
        assert main(["quantize", *words]) == 2
        captured = capsys.readouterr().err.strip()
        assert part in captured and "\n" not in captured
    session = Session(Path("out"), every=1.0, words=[], how="")
    session._acquire()
    assert main(["quantize", "--resume", "out"]) == 2
    assert "in use by another process" in capsys.readouterr().err
    session._release()
    Path("out").mkdir()
    assert main(["quantize", "--resume", "out"]) == 2
    assert "out exists already" in capsys.readouterr().err


def test_weights_that_changed_in_between(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from clusterq.models import DIGITS_WEIGHTS, read_state_dict

    torch.save(read_state_dict(DIGITS_WEIGHTS), "weights.pt")
    _interrupt(monkeypatch, 6, "--weights", "weights.pt")
    changed = read_state_dict(DIGITS_WEIGHTS)
    next(value for value in changed.values() if value.dim() == 4)[0] += 1
    torch.save(changed, "weights.pt")
    assert main(["quantize", "--resume", "out"]) == 2
    assert "belongs to another run: model.weights_sha256 was" in capsys.readouterr().err


def test_another_environment_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _interrupt(monkeypatch, 2)
    monkeypatch.setattr("clusterq.run.environment", lambda device: {"torch": "9.9"})
    assert main(["quantize", "--resume", "out", "--quiet"]) == 0
    assert "the result can differ in its last bits" in capsys.readouterr().err


def _damaged(folder: Path) -> list[tuple[str, Callable[[Path], None]]]:
    def flip(position: float) -> Callable[[Path], None]:
        def act(file: Path) -> None:
            content = bytearray(file.read_bytes())
            content[int(position * (len(content) - 1))] ^= 1 << (len(content) % 8)
            file.write_bytes(bytes(content))

        return act

    def truncate(file: Path) -> None:
        file.write_bytes(file.read_bytes()[:-1])

    def lengthen(file: Path) -> None:
        file.write_bytes(file.read_bytes() + b" ")

    def empty(file: Path) -> None:
        file.write_bytes(b"")

    acts: list[tuple[str, Callable[[Path], None]]] = [(f"bit at {p:.2f}", flip(p)) for p in (0, 0.01, 0.3, 0.77, 1)]
    acts += [("truncated", truncate), ("lengthened", lengthen), ("emptied", empty), ("deleted", Path.unlink)]
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert names == [
        "W4A4/checkpoint.json", "W4A4/manifest.json", "W4A4/model.safetensors",
        "last/manifest.json", "last/state.json", "last/state.safetensors", "lock",
        "previous/manifest.json", "previous/state.json", "previous/state.safetensors",
        "synthesis/manifest.json", "synthesis/state.json", "synthesis/state.safetensors",
    ]  # fmt: skip
    return [(name, act) for name in names if name != "lock" for _, act in acts]


def test_every_damage_gives_the_state_before_or_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], uninterrupted: dict[str, str]
) -> None:
    _interrupt(monkeypatch, SYNTHESIS + STEPS + 2)
    folder, copy = Path("out.partial"), Path("copy")
    shutil.copytree(folder, copy)
    last, previous = (states.read_state(folder / name) for name in ("last", "previous"))
    assert last["training"]["state"]["finetuner"]["step"] == 2
    assert previous["training"]["state"]["finetuner"]["step"] == 1
    fallbacks = 0
    for name, act in _damaged(folder):
        act(folder / name)
        told: list[str] = []
        if name.startswith(("W4A4", "synthesis")):
            with pytest.raises(
                CheckpointError, match=r"holds no whole state to continue: .* is damaged|cannot be read|no"
            ):
                resume._newest(folder, told.append)
        else:
            state = resume._newest(folder, told.append)
            expected = previous if name.startswith("last") else last
            _same(state, expected)
            fallbacks += len(told)
            assert len(told) == (1 if name.startswith("last") else 0)
        shutil.copyfile(copy / name, folder / name)
    assert fallbacks == 27
    # And to the end: from the state before, and with both states gone.
    (folder / "last" / "state.safetensors").write_bytes(b"")
    assert main(["quantize", "--resume", "out", "--quiet"]) == 0
    assert "state.safetensors is damaged: its SHA-256 is not the one" in capsys.readouterr().err
    assert _students() == uninterrupted
    shutil.rmtree("out")
    copy.rename(folder)
    for name in ("last", "previous"):
        (folder / name / "state.json").unlink()
    assert main(["quantize", "--resume", "out"]) == 2
    captured = capsys.readouterr().err.strip()
    assert "\n" not in captured and "no whole state to continue" in captured
    assert folder.is_dir() and not Path("out").exists()


def _same(a: Any, b: Any) -> None:
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            _same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert type(a) is type(b) and len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            _same(x, y)
    else:
        assert type(a) is type(b) and (a == b or a != a)


def test_a_state_of_another_format(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _interrupt(monkeypatch, 2)
    for name in ("last", "previous"):
        manifest = Path("out.partial", name, "manifest.json")
        manifest.write_bytes(states._manifest(json.loads(manifest.read_bytes())["files"], 2))
    assert main(["quantize", "--resume", "out"]) == 2
    assert "has format 2 of clusterq-state; this version reads 1" in capsys.readouterr().err


@pytest.mark.parametrize("files", [{"../x": {}}, {"/etc/passwd": {}}, {".hidden": {}}, {"a/b": {}}])
def test_names_in_a_manifest_stay_in_its_folder(tmp_path: Path, files: dict[str, Any]) -> None:
    (tmp_path / "manifest.json").write_bytes(states._manifest(files))
    with pytest.raises(states.DamagedError, match="is not the name of a file"):
        states.verify(tmp_path)


def test_a_state_that_names_another_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    _interrupt(monkeypatch, SYNTHESIS + 1)
    state = states.read_state(Path("out.partial/last"))
    state["folders"] = {"../elsewhere": "0" * 64}
    for name in ("last", "previous"):
        states.write_state(Path("out.partial", name), state)
        states.seal(Path("out.partial", name))
    with pytest.raises(CheckpointError, match=r"it names '\.\./elsewhere'"):
        resume.recorded_words(Path("out"))


def test_a_disk_that_fills_up_while_saving(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], uninterrupted: dict[str, str]
) -> None:
    fsync, calls = os.fsync, [0]

    def full(descriptor: int) -> None:
        calls[0] += 1
        # Flushes of one save: three files, the folder, and the folder around it.
        if calls[0] > 3 * 5 + 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        patch.setattr(resume, "_COST_SHARE", float("inf"))
        assert main(["quantize", *FAST, "--output", "out", "--save-every", "0"]) == 2
    captured = capsys.readouterr().err.strip()
    assert "No space left on device; continue with: clusterq quantize --resume out" in captured and "\n" not in captured
    assert [name for name in os.listdir("out.partial") if name.startswith(".")] == []
    assert main(["quantize", "--resume", "out", "--quiet"]) == 0
    assert _students() == uninterrupted


def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    # Not by permissions, which do not stop root.
    mkdir = Path.mkdir

    def read_only(path: Path, *arguments: Any, **settings: Any) -> None:
        if path.name == "out.partial":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        mkdir(path, *arguments, **settings)

    monkeypatch.setattr(Path, "mkdir", read_only)
    assert main(["quantize", *FAST, "--output", "out"]) == 2
    captured = capsys.readouterr().err.strip()
    assert captured == "clusterq: error: out.partial cannot be written: Read-only file system"
    assert os.listdir() == []


def test_a_recorded_file_needs_trust(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Path("net.py").write_text(
        "import pathlib\nfrom clusterq.models import load_model\n"
        "def make():\n    pathlib.Path('ran').touch()\n    return load_model('builtin:digits').model\n"
    )
    words = [*FAST, "--model", "net.py:make", "--input-size", "16", "--mean", "0.3", "--std", "0.3"]
    with monkeypatch.context() as patch:
        _at_step(patch, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert main(["quantize", *words, "--output", "out"]) == 130
    assert "continue with: clusterq quantize --resume out --trust" in capsys.readouterr().err
    Path("ran").unlink()
    assert main(["quantize", "--resume", "out"]) == 2
    assert "--model net.py:make, a file that would be run: give --trust" in capsys.readouterr().err
    assert not Path("ran").exists()
    assert main(["quantize", "--resume", "out", "--trust", "--quiet"]) == 0
    assert Path("ran").exists()
    Path("ran").unlink()
    evaluate = ["evaluate", "out/checkpoints/W4A4", "--data", "digits", "--quiet", "--limit", "2", "--device", "cpu"]
    assert main(evaluate) == 2
    assert "--trust runs the file it names" in capsys.readouterr().err
    assert not Path("ran").exists()
    assert main([*evaluate, "--trust"]) == 0
    assert Path("ran").exists()


def test_a_state_with_a_hostile_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _interrupt(monkeypatch, 2)
    capsys.readouterr()
    for words in (["bench"], ["quantize", "--nonsense"], ["quantize", "--resume", "x"], ["--version"], ["--help"]):
        state = states.read_state(Path("out.partial/last"))
        state["words"] = words
        states.write_state(Path("out.partial/last"), state)
        states.seal(Path("out.partial/last"))
        assert main(["quantize", "--resume", "out"]) == 2
        captured = capsys.readouterr()
        assert captured.err.strip() == ("clusterq: error: out was begun by a command this version does not understand")
        assert captured.out == ""


def test_saving_takes_one_percent_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("clusterq.resume.time.perf_counter", lambda: clock[0])

    def slow(folder: Path, state: Any) -> None:
        clock[0] += 2.0
        (folder / "file").write_text("")

    monkeypatch.setattr(resume, "write_state", slow)
    with Session(Path("out"), every=10.0, words=[], how="") as session:
        session.begin({}, {}, dict, resume=False)
        times = []
        for _ in range(1000):
            clock[0] += 1.0
            before = clock[0]
            session.after_step("synthesis", dict)
            if clock[0] != before:
                times.append(before)
    assert times[0] == 10.0
    assert all(later - earlier >= 200 for earlier, later in itertools.pairwise(times))
    assert len(times) == 5


def test_a_tree_comes_back_equal(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    tree = {
        "numbers": [1, -2.5, 1e-300, float("inf"), float("-inf"), float("nan"), True, None, "text", (1, (2,))],
        "map": {0: {"step": torch.tensor(3.0)}, 1: "x", "$tensor": "a name", (1, 2): 3},
        "tensors": [
            torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
            torch.randn(3, 4).T, torch.tensor(1, dtype=torch.int64), torch.zeros(0, 3), torch.randn(3).bfloat16(),
            torch.tensor([True, False]), torch.Generator().get_state(), shared, shared, shared[2:],
        ],
    }  # fmt: skip
    states.write_state(tmp_path, tree)
    states.seal(tmp_path)
    _same(states.read_state(tmp_path), tree)
    with pytest.raises(TypeError, match=r"state\.a\.0 is a set"):
        states.write_state(tmp_path, {"a": [set()]})


def test_killed_at_random_moments_the_student_is_the_same() -> None:
    # Not about power: flushing to a disk only takes time here.
    memory = Path("/dev/shm")
    folder = Path(memory if os.access(memory, os.W_OK) else ".", f"clusterq-kills-{os.getpid()}").absolute()
    folder.mkdir()
    root = Path(__file__).resolve().parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root.parent)}
    try:
        done = subprocess.run(
            [sys.executable, str(root / "kill_harness.py"), str(folder), "50", "0"],
            env=environment, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        log = (folder / "log").read_text()[-2000:] if (folder / "log").is_file() else ""
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    assert done.returncode == 0, done.stderr[-2000:] + log
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["wrong"] == [] and found["codes"] == [] and found["left"] == [], (found, log)
    assert found["kills"] >= 50 and found["resumed"] >= 40 and found["finished"] >= 3, found
