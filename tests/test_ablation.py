"""`clusterq ablate` from the table to the folder: numbers, shared images, resuming, failures, interrupts."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from clusterq.ablation import cells
from clusterq.ablation import run as run_module
from clusterq.ablation.results import read_results
from clusterq.ablation.rows import mean_and_spread
from clusterq.cli import main
from clusterq.data import EvaluationSet
from clusterq.synthesis import Teacher

sys.path.insert(0, os.path.dirname(__file__))
from small_network import FAST, MODEL, write_place

ROOT = Path(__file__).resolve().parent.parent
BASE = f"""
[base]
model = "net.py:make"
weights = "weights.pt"
data = "set.npz"
input_size = 8
normalization = "none"
bits = ["W4A4", "W3A3"]
seeds = [0, 1]
evaluate = {{ choose = "0:8", report = "8:24" }}
settings = {json.dumps(FAST)}

[[row]]
name = "default"

[[row]]
name = "slower"
settings = ["finetune.lr=0.001"]
"""
OTHER_IMAGES = "[[row]]\nname = 'other images'\nsettings = ['synthesis.image_lr=0.2']\nbits = ['W4A4']\n"
CEILING = "[[row]]\nname = 'ceiling'\nimages = 'data:0:8'\nbits = ['W4A4']\n"
STREAM = """[[row]]
name = 'stream'
settings = ['synthesis.source=generator', 'synthesis.warmup_steps=1', 'synthesis.generator_width=8',
  'finetune.images=stream', 'finetune.steps=1']
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.chdir(tmp_path)
    _set_code(monkeypatch, "ab" * 32)
    return write_place(tmp_path).eval()


def _set_code(monkeypatch: pytest.MonkeyPatch, digest: str) -> None:
    for module in (cells, run_module):
        monkeypatch.setattr(module, "code_identity", lambda: (("version", "1"), ("commit", None), ("sha256", digest)))


def _ablate(text: str, *more: str) -> int:
    Path("table.toml").write_text(text)
    return main(["ablate", "table.toml", "--output", "out", "--device", "cpu", "--jobs", "1", "--quiet", *more])


def _results() -> dict[str, Any]:
    return read_results(Path("out/results.json"))


def _row(name: str) -> dict[str, Any]:
    return next(row for row in _results()["rows"] if row["name"] == name)


def _cell_files() -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in Path("out/cells").iterdir()}


def test_numbers_are_those_of_quantize(place: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    assert _ablate(BASE + STREAM) == 0
    words = ["quantize", *MODEL, "--data", "set.npz", "--bits", "W4A4", "W3A3", "--quiet", "--device", "cpu"]
    streaming = ["synthesis.source=generator", "synthesis.warmup_steps=1", "synthesis.generator_width=8"]
    streaming += ["finetune.images=stream", "finetune.steps=1"]
    for name, own in (("default", []), ("slower", ["finetune.lr=0.001"]), ("stream", streaming)):
        for seed in (0, 1):
            words_here = [*words, "--seed", str(seed), "--output", "run", "--overwrite", "--threads", "1"]
            assert main([*words_here, "--set", *FAST, *own]) == 0
            result = json.loads(Path("run/result.json").read_text())
            found = [cell for cell in _row(name)["cells"] if cell["seed"] == seed]
            for width, cell in zip(result["widths"], sorted(found, key=lambda c: c["bits"], reverse=True), strict=True):
                assert cell["bits"] == width["bits"]
                assert cell["accuracy"]["all"] == pytest.approx(width["clusterq"]["top1"])
                assert cell["label_accuracy"] == pytest.approx(width["label_accuracy"])
                assert cell["samples_seen"] == width["samples_seen"]
    results = _results()
    assert results["float"]["all"] == pytest.approx(result["float"]["top1"])
    assert results["network"]["weights_sha256"] == result["model"]["weights_sha256"]


def test_every_image_is_measured_in_its_sections(place: nn.Module) -> None:
    pictures, labels = torch.rand(24, 1, 8, 8), torch.arange(24) % 4
    calls: list[int] = []

    class Watched(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(len(x))
            return place(x)

    data = EvaluationSet("set", lambda i: pictures[i], labels, 4)
    sections = {"choose": (3, 9), "report": (9, 20), "all": (0, 24)}
    found = cells.accuracy_by_section(Watched(), data, sections, device="cpu")
    with torch.no_grad():
        right = (place(pictures).argmax(1) == labels).double()
    for name, (first, last) in sections.items():
        assert found[name] == pytest.approx(100 * float(right[first:last].mean()))
    assert sum(calls) == 24


def test_images_are_made_once_and_finished_cells_are_kept(
    place: nn.Module, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[int] = []
    real = cells.bank.make_part

    def counted(loaded: object, config: Any, **settings: Any) -> Any:
        made.append(config.seed)
        return real(loaded, config, **settings)

    monkeypatch.setattr(cells.bank, "make_part", counted)
    assert _ablate(BASE) == 0
    # Two rows, two widths: one synthesis per seed.
    assert sorted(made) == [0, 1]
    shared = {cell["synthesis"] for name in ("default", "slower") for cell in _row(name)["cells"]}
    assert len(shared) == 2 and {path.name for path in Path("out/synthesis").iterdir()} == shared
    for cell in _row("slower")["cells"]:
        record = json.loads((Path("out/synthesis") / cell["synthesis"] / "bank.json").read_text())
        assert cell["seconds"]["synthesis"] == record["parts"][0]["seconds"] > 0
        parts = [cell["seconds"][name] for name in ("synthesis", "calibration", "finetune")]
        assert cell["seconds"]["total"] == pytest.approx(sum(parts))
    before, first = _cell_files(), _results()
    assert len(before) == 9
    # Another width and another row: the old cells stay, and old images serve.
    assert _ablate(BASE.replace('"W3A3"]', '"W3A3", "W2A4"]') + OTHER_IMAGES) == 0
    after = _cell_files()
    assert {name: after[name] for name in before} == before and len(after) == 9 + 4 + 2
    assert sorted(made) == [0, 0, 1, 1]
    assert [c for c in _row("default")["cells"] if c["bits"] != "W2A4"] == first["rows"][0]["cells"]
    # A changed row runs again, the others do not. A row under another name is the same row.
    assert _ablate(BASE.replace("lr=0.001", "lr=0.002").replace('"default"', '"renamed"')) == 0
    changed = set(_cell_files()) - set(after)
    assert changed == {f"{cell['key']}.json" for cell in _row("slower")["cells"]} and len(changed) == 4
    assert _row("renamed")["cells"] == first["rows"][0]["cells"]
    # So does everything when the code changed.
    _set_code(monkeypatch, "cd" * 32)
    assert _ablate(BASE) == 0
    assert sorted(made) == [0, 0, 0, 1, 1, 1]


ONE = (
    BASE.split("[[row]]")[0].replace("seeds = [0, 1]", "seeds = [0]").replace(', "W3A3"]', "]")
    + "[[row]]\nname = 'a'\n"
)


def _with_environment(name: str) -> Callable[[pytest.MonkeyPatch], str]:
    def change(monkeypatch: pytest.MonkeyPatch) -> str:
        real = run_module.environment
        monkeypatch.setattr(run_module, "environment", lambda device: {**real(device), name: "another"})
        return ONE

    return change


def _with_table(old: str, new: str) -> Callable[[pytest.MonkeyPatch], str]:
    assert old in ONE
    return lambda monkeypatch: ONE.replace(old, new)


def _with_network(file: str) -> Callable[[pytest.MonkeyPatch], str]:
    def change(monkeypatch: pytest.MonkeyPatch) -> str:
        # The same tensors in another network.
        Path(file).write_text(Path("net.py").read_text().replace("nn.ReLU()", "nn.SiLU()"))
        return ONE.replace("net.py", file)

    return change


@pytest.mark.parametrize(
    "change",
    [
        _with_environment("torch"),
        _with_environment("processor"),
        _with_table('normalization = "none"', "mean = [0.5]\nstd = [1.0]"),
        _with_table('normalization = "none"', "mean = [0.0]\nstd = [0.5]"),
        _with_network("net.py"),
        _with_network("other.py"),
    ],
    ids=["torch", "processor", "mean", "std", "file", "model"],
)
def test_whatever_numbers_depend_on_makes_them_run_again(
    place: nn.Module, monkeypatch: pytest.MonkeyPatch, change: Callable[[pytest.MonkeyPatch], str]
) -> None:
    assert _ablate(ONE) == 0
    first = _cell_files()
    assert len(first) == 2
    assert _ablate(ONE) == 0
    assert _cell_files() == first
    text = change(monkeypatch)
    assert _ablate(text) == 0
    second = _cell_files()
    assert len(second) == 3 and len(list(Path("out/synthesis").iterdir())) == 2
    # The network in floating point is measured again too.
    assert second["float.json"] != first["float.json"]


def test_the_size_of_images_is_part_of_a_network(place: nn.Module) -> None:
    # A set has images of one size: keys of another one would need another set, and differ by it.
    small, large = (cells.load_model("net.py:make", "weights.pt", input_size=size) for size in (8, 12))
    assert small.tensors_sha256 == large.tensors_sha256
    assert cells.network_identity(small) != cells.network_identity(large)
    assert cells.network_identity(small) == cells.network_identity(
        cells.load_model("net.py:make", "weights.pt", input_size=8)
    )


def test_rows_that_share_some_widths_of_one_generator_lose_none(place: nn.Module) -> None:
    both = STREAM + "bits = ['W4A4', 'W3A3']\n"
    both += STREAM.replace("'stream'", "'more'", 1) + "bits = ['W4A4', 'W2A4']\n"
    assert _ablate(ONE + both) == 0
    assert [cell["bits"] for cell in _row("stream")["cells"]] == ["W4A4", "W3A3"]
    assert [cell["bits"] for cell in _row("more")["cells"]] == ["W4A4", "W2A4"]
    assert _row("stream")["cells"][0] == _row("more")["cells"][0] and not _results()["failed"]


def test_nothing_is_read_twice(place: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    opened: list[str] = []
    real_read, real_load = cells.bank.read, cells.load_model

    def counted_read(folder: Path) -> Any:
        read.append(folder)
        return real_read(folder)

    def counted_load(spec: str, *arguments: Any, **settings: Any) -> Any:
        opened.append(spec)
        return real_load(spec, *arguments, **settings)

    monkeypatch.setattr(cells.bank, "read", counted_read)
    monkeypatch.setattr(cells, "load_model", counted_load)
    assert _ablate(ONE.replace('["W4A4"]', '["W4A4", "W3A3", "W2A4"]')) == 0
    assert len(read) == 1 and opened == ["net.py:make"]
    # Another ablation of the same process looks at the files again.
    assert _ablate(ONE) == 0
    assert opened == ["net.py:make"] * 2


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"format": "other"}, "is not a cell of an ablation"),
        ({"format_version": 2}, "in format 2; this version reads 1"),
        ({"accuracy": {"choose": 1.0, "report": 2.0}}, "damaged: accuracy.all is"),
        ({"label_accuracy": "50"}, "damaged: label_accuracy is"),
        ({"seed": True}, "damaged: seed is"),
        ({"versions": {}}, "damaged: versions.clusterq is"),
        ({"machine": None}, "damaged: machine.processor is"),
        ({"command": "\ud800"}, "damaged: command is"),
        ({"key": "0" * 20}, "damaged: key is"),
    ],
)
def test_damaged_cell_is_named(
    place: nn.Module, capsys: pytest.CaptureFixture[str], change: dict[str, Any], part: str
) -> None:
    assert _ablate(ONE) == 0
    (name,) = [name for name in _cell_files() if name != "float.json"]
    path = Path("out/cells", name)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    capsys.readouterr()
    assert _ablate(ONE) == 2
    error = capsys.readouterr().err
    assert part in error and name in error and "remove it to have it made again" in error and error.count("\n") == 1
    path.unlink()
    assert _ablate(ONE) == 0


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"identity": {}, "accuracy": {"choose": 1, "report": "2", "all": 3}}']
)
def test_damaged_accuracy_of_the_network_is_named(
    place: nn.Module, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    Path("out/cells").mkdir(parents=True)
    Path("out/cells/float.json").write_text(content)
    assert _ablate(ONE) == 2
    error = capsys.readouterr().err
    assert "float.json is damaged: " in error and "remove it to have it made again" in error and error.count("\n") == 1


def test_a_gpu_runs_one_process_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert run_module.default_jobs(2, "cpu") == 4 and run_module.default_jobs(16, "cpu") == 1
    assert run_module.default_jobs(2, "cuda") == 1 and run_module.default_jobs(2, "cuda:1") == 1


def test_code_that_changes_meanwhile_fails_the_cells(
    place: nn.Module, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cells, "code_identity", lambda: (("version", "1"), ("commit", None), ("sha256", "new")))
    assert _ablate(BASE) == 2
    assert capsys.readouterr().err.count("the code changed while the ablation was running") == 8
    assert not [name for name in _cell_files() if name != "float.json"]


def test_failed_row_is_told_and_stops_no_other(place: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    broken = "[[row]]\nname = 'broken'\nsettings = ['synthesis.ce_weight=1e39', 'synthesis.image_steps=3']\n"
    assert _ablate(BASE.replace('[[row]]\nname = "slower"', broken + '[[row]]\nname = "slower"')) == 2
    error = capsys.readouterr().err.strip().splitlines()
    wanted = [f"broken, {bits}, seed {seed}" for seed in (0, 1) for bits in ("W4A4", "W3A3")]
    assert [line.removeprefix("clusterq: error: ").split(": ")[0] for line in error] == wanted
    assert all("image synthesis diverged" in line for line in error)
    results = _results()
    assert [(cell["row"], cell["bits"], cell["seed"]) for cell in results["failed"]] == [
        ("broken", bits, seed) for seed in (0, 1) for bits in ("W4A4", "W3A3")
    ]
    assert len(_row("slower")["cells"]) == 4 and _row("broken")["cells"] == []
    assert not [path for path in Path("out").rglob(".*")]


def test_ceiling_uses_no_label_and_is_marked_everywhere(place: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    assert _ablate(BASE + CEILING) == 0
    assert "ceiling (not data-free)" in capsys.readouterr().out
    row = _row("ceiling")
    assert (row["data_free"], row["section"], row["trained_on"]) == (False, [0, 8], ["choose", "all"])
    assert _row("default")["data_free"] and _row("default")["trained_on"] == []
    for cell in row["cells"]:
        # Every image has the class that the network gives it.
        assert (cell["label_accuracy"], cell["images"], cell["synthesis"]) == (100.0, 8, None)
        assert cell["samples_seen"]["synthesis"] == 0 and cell["seconds"]["synthesis"] == 0
    lines = list(csv.DictReader(Path("out/results.csv").read_text().splitlines()))
    for line in lines:
        real = line["row"] == "ceiling"
        assert line["data_free"] == ("NO" if real else "yes") and ("NOT DATA-FREE" in line["images"]) == real
    pictures, labels = torch.rand(24, 1, 8, 8), torch.zeros(24, dtype=torch.int64)
    data = EvaluationSet("set", lambda i: pictures[i], labels, 4)
    taken, classes = cells._unlabelled(Teacher(place, (1, 8, 8)), data, 3, 9)
    with torch.no_grad():
        assert torch.equal(taken, pictures[3:9]) and torch.equal(classes, place(pictures[3:9]).argmax(1))


def test_csv_has_every_cell_with_its_origin(place: nn.Module) -> None:
    assert _ablate(BASE) == 0
    lines = list(csv.DictReader(Path("out/results.csv").read_text().splitlines()))
    cells_by_key = {cell["key"]: cell for row in _results()["rows"] for cell in row["cells"]}
    assert len(lines) == len(cells_by_key) == 8
    for line in lines:
        cell = cells_by_key[line["key"]]
        assert float(line["top1_report"]) == cell["accuracy"]["report"]
        assert float(line["seconds_total"]) == pytest.approx(cell["seconds"]["total"], abs=1e-3)
        assert line["command"].startswith("clusterq ablate table.toml") and line["torch"] == torch.__version__
        assert (line["threads"], line["jobs"], line["images_report"]) == ("1", "1", "8:24")
        assert line["weights_sha256"] == _results()["network"]["weights_sha256"]


def test_mean_and_spread() -> None:
    assert mean_and_spread([1.0, 2.0, 6.0]) == (3.0, pytest.approx(7**0.5))
    assert mean_and_spread([4.5]) == (4.5, None)


@pytest.mark.parametrize(
    ("text", "words", "part"),
    [
        (BASE.replace("8:24", "7:24"), [], "share images"),
        (BASE.replace("8:24", "8:25"), [], "8 to 25 of 24"),
        (BASE + CEILING.replace("0:8", "0:80"), [], "0 to 80 of 24"),
        (BASE + "settings = ['synthesis.nothing=1']\n", [], "table.toml is not a TOML file"),
        (BASE + OTHER_IMAGES.replace("image_lr", "nothing"), [], "row 3 (other images): --set"),
        (BASE.replace("weights.pt", "${NO_SUCH_PLACE}/w.pt"), [], "NO_SUCH_PLACE is not set"),
        (BASE.replace("weights.pt", "absent.pt"), [], "no such file"),
        (BASE, ["--jobs", "0"], "--jobs is 0"),
        (BASE, ["--render", "results.json"], "one of them"),
    ],
)
def test_mistakes_are_found_before_anything_runs(
    place: nn.Module,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    words: list[str],
    part: str,
) -> None:
    def forbidden(*arguments: object, **settings: object) -> None:
        raise AssertionError("something ran")

    monkeypatch.setattr(run_module, "run_tasks", forbidden)
    assert _ablate(text, *words) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and part in captured.err
    assert not Path("out").exists()


def test_folder_of_something_else_is_left_alone(place: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    Path("out/mine").write_text("mine")
    assert _ablate(BASE) == 2
    assert "is not the folder of an ablation" in capsys.readouterr().err and os.listdir("out") == ["mine"]


def test_interrupt_keeps_finished_cells_and_the_same_command_continues(tmp_path: Path) -> None:
    write_place(tmp_path)
    slow = "[[row]]\nname = 'slow'\nsettings = ['finetune.steps=1000000']\nbits = ['W4A4']\n"
    (tmp_path / "table.toml").write_text(BASE.replace("seeds = [0, 1]", "seeds = [0]") + slow)
    words = [sys.executable, "-m", "clusterq", "ablate", "table.toml", "--output", "out", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [*words, "--jobs", "2"],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        # The network in floating point and four cells of the first two rows.
        while len(list((tmp_path / "out" / "cells").glob("*.json"))) < 5:
            assert time.monotonic() < deadline and child.poll() is None
            time.sleep(0.1)
        # As the terminal does it: to all processes.
        os.killpg(child.pid, signal.SIGINT)
        _, error = child.communicate(timeout=60)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
    assert child.returncode == 130
    assert "the same command continues" in error.splitlines()[-1] and "Traceback" not in error
    assert not [path for path in (tmp_path / "out").rglob(".*")]
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").iterdir()}
    done = subprocess.run(
        [*words, "--jobs", "2", "--set", "finetune.steps=2"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # The last setting makes the slow row the default: nothing was left to do.
    assert "; 0 pieces of work" in done.stderr
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").iterdir()} == before
    # Processes beside each other find what one alone finds.
    words[words.index("out")] = "alone"
    done = subprocess.run(
        [*words, "--jobs", "1", "--set", "finetune.steps=2"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in before:
        found, again = (json.loads((tmp_path / out / "cells" / name).read_text()) for out in ("out", "alone"))
        assert (found["accuracy"], found.get("agreement")) == (again["accuracy"], again.get("agreement"))


def test_processes_end_with_the_first_one_when_it_is_killed(tmp_path: Path) -> None:
    write_place(tmp_path)
    (tmp_path / "table.toml").write_text(BASE.replace("finetune.steps=2", "finetune.steps=1000000"))
    words = [sys.executable, "-m", "clusterq", "ablate", "table.toml", "--output", "out", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [*words, "--jobs", "2"], cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / "synthesis").is_dir():
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.1)
    child.kill()
    child.wait()
    # The processes are of its group, which is gone with the last of them.
    while True:
        try:
            os.killpg(child.pid, 0)
        except ProcessLookupError:
            break
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.checkout("examples")
def test_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    few = ["synthesis.num_images=20", "synthesis.batch_size=20", "synthesis.image_steps=2", "finetune.batch_size=10"]
    words = ["ablate", str(ROOT / "examples" / "ablate_digits.toml"), "--output", str(tmp_path / "out"), "--quiet"]
    assert main([*words, "--seeds", "3", "--jobs", "1", "--device", "cpu", "--set", "finetune.steps=1", *few]) == 0
    results = read_results(tmp_path / "out" / "results.json")
    assert [len(row["cells"]) for row in results["rows"]] == [2] * 5 and not results["failed"]
    assert results["sections"] == {"choose": [0, 250], "report": [250, 500], "all": [0, 500]}
    assert results["float"]["all"] > 97
    text = capsys.readouterr().out
    for row in results["rows"]:
        assert row["name"] in text
