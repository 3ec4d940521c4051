"""The command line: every documented failure is one sentence and exit code 2, and nothing is left half-written."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import clusterq
from clusterq import run as run_module
from clusterq.cli import main
from clusterq.config import ClusterQConfig, preset
from clusterq.errors import DivergenceError
from clusterq.networks import resnet20
from clusterq.nn.quantizers import WeightQuantizer
from clusterq.progress import ConsoleProgress
from clusterq.settings import describe, override

NETWORK = """
import torch.nn as nn

def make(classes=4, norm=True):
    layers = [nn.Conv2d(1, 4, 3, padding=1, bias=False)]
    if norm:
        layers.append(nn.BatchNorm2d(4))
    layers += [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes)]
    return nn.Sequential(*layers)

def plain():
    return make(norm=False)
"""
FAST = [
    "--set",
    "synthesis.num_images=8",
    "synthesis.batch_size=8",
    "synthesis.image_steps=2",
    "finetune.steps=2",
    "finetune.batch_size=4",
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a network, its weights and an evaluation set of four classes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NETWORK)
    scope: dict[str, object] = {}
    exec(NETWORK, scope)
    torch.manual_seed(0)
    model: nn.Module = scope["make"]()  # type: ignore[operator]
    torch.save(model.state_dict(), "weights.pt")
    _write_set("set.npz", [0, 1, 2, 3] * 3)
    return tmp_path


def _write_set(path: str, labels: list[int], classes: int = 4, channels: int = 1) -> None:
    images = np.random.default_rng(0).integers(0, 256, (len(labels), 8, 8, channels), dtype=np.uint8)
    np.savez(path, images=images, labels=np.array(labels), classes=np.array([str(c) for c in range(classes)]))


def _quantize(*more: str, model: str = "net.py:make", weights: str = "weights.pt", data: str = "set.npz") -> int:
    words = ["quantize", "--model", model, "--weights", weights, "--data", data, "--input-size", "8", "--device", "cpu"]
    return main([*words, "--output", "out", "--quiet", *FAST, *more])


def _refused(capsys: pytest.CaptureFixture[str], code: int, *parts: str, kept: bool = False) -> None:
    """Exit code 2, one line on standard error with all `parts`, no run folder and no remains of one.

    `kept`: synthesis was done, and its state stays to be continued from, as the line says.
    """
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("clusterq: error: ")
    for part in parts:
        assert part in lines[0]
    assert ("; continue with: clusterq quantize --resume out" in lines[0]) == kept
    left = [name for name in os.listdir() if name.startswith((".out", "out"))]
    assert left == (["out.partial"] if kept else [])


def test_quantize_writes_a_run_folder(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _quantize("--bits", "W4A4", "W3A5", "--seed", "5", "--save-images") == 0
    text = capsys.readouterr().out
    assert "W4A4" in text and "W3A5" in text and "rounded min/max" in text
    result = json.loads((place / "out" / "result.json").read_text())
    assert result["seed"] == 5 and result["config"]["seed"] == 5
    assert [row["bits"] for row in result["widths"]] == ["W4A4", "W3A5"]
    assert result["data"]["images"] == 12
    for row in result["widths"]:
        for key in ("rounded_minmax", "rounded_mse", "clusterq"):
            # Twelve images: every accuracy is a multiple of 1/12.
            assert row[key]["top1"] * 12 / 100 == pytest.approx(round(row[key]["top1"] * 12 / 100))
        assert (row["first_layer_bits"], row["last_layer_bits"]) == (row["weight_bits"], row["weight_bits"])
        assert row["samples_seen"] == {"synthesis": 16, "finetune": 8}
    assert result["model"]["weights_sha256"] == hashlib.sha256((place / "weights.pt").read_bytes()).hexdigest()
    assert result["versions"]["torch"] == torch.__version__
    assert result["command"].startswith("clusterq quantize --model net.py:make")
    assert {"load", "synthesis", "calibration", "finetune", "evaluation", "total"} <= set(result["seconds"])
    lines = [json.loads(line) for line in (place / "out" / "metrics.jsonl").read_text().splitlines()]
    assert sum(line["phase"] == "synthesis" for line in lines) == 2
    assert sum(line["phase"] == "finetune" for line in lines) == 4
    assert {*os.listdir()} - {"__pycache__"} == {"net.py", "out", "set.npz", "weights.pt"}


def test_checkpoint_of_a_run_gives_the_same_accuracy(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _quantize() == 0
    result = json.loads((place / "out" / "result.json").read_text())
    capsys.readouterr()
    words = ["evaluate", "out/checkpoints/W4A4", "--model", "net.py:make", "--data", "set.npz", "--json", "--quiet"]
    assert main([*words, "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["top1"] == result["widths"][0]["clusterq"]["top1"]
    assert main([*words, "--input-size", "8"]) == 2
    assert "leave out" in capsys.readouterr().err
    # Without the network: a checkpoint never runs a Python file by itself.
    assert main(["evaluate", "out/checkpoints/W4A4", "--data", "set.npz"]) == 2
    assert "hand over the network itself" in capsys.readouterr().err


def test_same_seed_same_result_and_images_can_be_used_again(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _quantize("--save-images") == 0
    first = (place / "out" / "checkpoints" / "W4A4" / "model.safetensors").read_bytes()
    assert _quantize("--overwrite") == 0
    assert (place / "out" / "checkpoints" / "W4A4" / "model.safetensors").read_bytes() == first
    assert _quantize("--save-images", "--overwrite") == 0
    (place / "out" / "images.safetensors").rename(place / "images.safetensors")
    assert _quantize("--images", "images.safetensors", "--overwrite") == 0
    assert (place / "out" / "checkpoints" / "W4A4" / "model.safetensors").read_bytes() == first
    assert not (place / "out" / "images.safetensors").exists()


def test_json_result_on_standard_output(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _quantize("--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads((place / "out" / "result.json").read_text())


def test_network_without_batch_norm(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scope: dict[str, object] = {}
    exec(NETWORK, scope)
    torch.save(scope["plain"]().state_dict(), "plain.pt")  # type: ignore[operator]
    _refused(capsys, _quantize(model="net.py:plain", weights="plain.pt"), "no BatchNorm layer")


def test_class_count_mismatch(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write_set("ten.npz", [0, 1], classes=10)
    _refused(capsys, _quantize(data="ten.npz"), "ten.npz has 10 classes; the network has 4")


def test_label_out_of_range(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write_set("bad.npz", [0, 1, 4], classes=4)
    _refused(capsys, _quantize(data="bad.npz"), "label 4 is out of range")


def test_weights_of_wrong_shape(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({**resnet20().state_dict(), "bn1.bias": torch.zeros(9)}, "other.pt")
    code = _quantize(model="builtin:resnet20", weights="other.pt")
    _refused(capsys, code, "tensor bn1.bias has shape [9]; wanted [16]")


def test_built_in_network_of_a_hundred_classes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(resnet20(num_classes=100).state_dict(), "hundred.pt")
    _write_set("hundred.npz", [0, 99, 50], classes=100, channels=3)
    words = ["--normalization", "none", "--limit", "2"]
    assert _quantize(*words, model="builtin:resnet20", weights="hundred.pt", data="hundred.npz") == 0
    result = json.loads((place / "out" / "result.json").read_text())
    assert result["model"]["num_classes"] == 100
    assert result["model"]["mean"] == [0.0] * 3 and result["model"]["std"] == [1.0] * 3
    capsys.readouterr()
    words = ["evaluate", "out/checkpoints/W4A4", "--data", "hundred.npz", "--json", "--quiet", "--device", "cpu"]
    for more in ([], ["--normalization", "none"], ["--model", "builtin:resnet20"]):
        assert main([*words, "--limit", "2", *more]) == 0
        assert json.loads(capsys.readouterr().out)["top1"] == result["widths"][0]["clusterq"]["top1"]


def test_evaluate_a_checkpoint_of_unknown_normalization(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scope: dict[str, object] = {}
    exec(NETWORK, scope)
    config = ClusterQConfig()
    student = clusterq.prepare(scope["make"](), config.quantization)  # type: ignore[operator]
    clusterq.qat.calibrate(student, torch.randn(4, 1, 8, 8), config.quantization)
    clusterq.save(student, "bare", config=config, input_shape=(1, 8, 8))
    words = ["evaluate", "bare", "--model", "net.py:make", "--data", "set.npz", "--quiet", "--device", "cpu"]
    _refused(capsys, main(words), "mean has 0 values; the network takes 1 channels: give --normalization")
    assert main([*words, "--normalization", "none"]) == 0


def test_baselines_are_the_same_for_every_preset(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _quantize("--save-images") == 0
    (place / "out" / "images.safetensors").rename(place / "images.safetensors")
    real = torch.randn(5, 1, 8, 8)
    measured: list[tuple[bool | None, torch.Tensor]] = []
    evaluate = run_module.evaluate

    def watched(model: nn.Module, *arguments: object, **settings: object) -> object:
        quantizers = [m for m in model.modules() if isinstance(m, WeightQuantizer)]
        with torch.no_grad():
            measured.append((quantizers[0].symmetric if quantizers else None, model(real)))
        return evaluate(model, *arguments, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(run_module, "evaluate", watched)
    described = []
    for name in ("default", "paper", "gdfq"):
        words = ["--images", "images.safetensors", "--overwrite", "--bits", "W3A3", "--preset", name]
        assert _quantize(*words, "--set", "quantization.scheme=paper") == 0
        described.append(json.loads((place / "out" / "result.json").read_text())["baselines"])
    # FP32, both roundings, calibrated, trained.
    assert len(measured) == 15
    for call in (1, 2):
        runs = [measured[5 * index + call] for index in range(3)]
        assert [symmetric for symmetric, _ in runs] == [False] * 3
        assert all(torch.equal(output, runs[0][1]) for _, output in runs)
    assert not torch.equal(measured[1][1], measured[2][1])
    assert described[0] == described[1] == described[2]
    assert described[0]["rounded_minmax"]["calibration_images"] == 8
    assert described[0]["rounded_minmax"]["scheme"] == "paper"
    assert described[0]["rounded_minmax"]["weights"] == "per output channel, asymmetric"
    assert described[0]["rounded_mse"]["weights"] == "per output channel, asymmetric"


def test_widths_of_the_ends_are_those_used(place: Path) -> None:
    code = _quantize("--set", 'quantization.layer_bits={"0": 6}', "quantization.last_layer_bits=7")
    assert code == 0
    row = json.loads((place / "out" / "result.json").read_text())["widths"][0]
    assert (row["first_layer_bits"], row["last_layer_bits"]) == (6, 7)


def test_run_on_one_image(place: Path) -> None:
    assert _quantize("--set", "synthesis.num_images=1", "synthesis.batch_size=1") == 0
    assert json.loads((place / "out" / "result.json").read_text())["images"]["count"] == 1


def test_stored_images_are_checked_before_anything_is_measured(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*arguments: object, **settings: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(run_module, "evaluate", forbidden)
    good = {"images": torch.randn(2, 1, 8, 8), "labels": torch.tensor([0, 3])}
    cases = [
        ({"images": good["images"]}, "wanted images and labels"),
        ({**good, "images": torch.randn(2, 3, 8, 8)}, "wanted [N, (1, 8, 8)]"),
        ({**good, "images": torch.full((2, 1, 8, 8), torch.nan)}, "images hold a NaN"),
        ({**good, "labels": torch.tensor([0, 4])}, "wanted 0 to 3"),
        ({**good, "labels": torch.tensor([0.0, 1.0])}, "int64 labels"),
        ({**good, "labels": torch.tensor([0])}, "one label for each"),
        ({"images": torch.zeros(0, 1, 8, 8), "labels": torch.zeros(0, dtype=torch.int64)}, "images [N, C, H, W]"),
    ]
    for tensors, part in cases:
        save_file(tensors, "images.safetensors")
        _refused(capsys, _quantize("--images", "images.safetensors"), part)


def test_weight_file_that_runs_code(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return Path.touch, (Path("touched"),)

    (place / "evil.pt").write_bytes(pickle.dumps({"a": Evil()}, protocol=2))
    _refused(capsys, _quantize(weights="evil.pt"), "evil.pt", "refused")
    assert not (place / "touched").exists()


def test_object_array_in_the_evaluation_set(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("objects.npz", images=np.zeros((1, 8, 8, 1), np.uint8), labels=np.array([{}], dtype=object))
    _refused(capsys, _quantize(data="objects.npz"), "Python objects")


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (["--bits", "W9A4"], "wanted WxAy"),
        (["--bits", "W4A4", "W4A4"], "twice"),
        (["--set", "synthesis.nothing=1"], "no setting 'nothing'"),
        (["--set", "synthesis.num_images=many"], "whole number"),
        (["--set", "synthesis.decay=2"], "synthesis.decay is 2; wanted number at least 0 and below 1"),
        (["--threads", "0"], "--threads is 0"),
        (["--mean", "0.5"], "belong together"),
        (["--mean", "0.5", "0.5", "--std", "1", "1"], "mean has 2 values; the network takes 1 channels"),
        (["--images", "absent.safetensors"], "absent.safetensors"),
        (["--limit", "-1"], "--limit is -1"),
        (["--device", "foo"], "--device foo: wanted cpu, cuda or cuda:NUMBER"),
        (["--device", "cuda:99"], "--device cuda:99: this PyTorch finds"),
        (["--set", 'quantization.layer_bits={"5": "four"}'], "layer_bits"),
        (["--set", 'quantization.layer_bits={"5": 4.5}'], "layer_bits"),
        (["--normalization", "none", "--mean", "0", "--std", "1"], "both given"),
    ],
)
def test_bad_options(place: Path, capsys: pytest.CaptureFixture[str], more: list[str], part: str) -> None:
    _refused(capsys, _quantize(*more), part)


@pytest.mark.parametrize(
    ("model", "weights", "data", "part"),
    [
        ("net.py:absent", "weights.pt", "set.npz", "has no function 'absent'"),
        ("other.py:make", "weights.pt", "set.npz", "no such Python file"),
        ("net.py:make", "absent.pt", "set.npz", "no such file"),
        ("net.py:make", "weights.pt", "absent.npz", "was not found"),
        ("builtin:nothing", "weights.pt", "set.npz", "no built-in network"),
    ],
)
def test_absent_inputs(
    place: Path, capsys: pytest.CaptureFixture[str], model: str, weights: str, data: str, part: str
) -> None:
    _refused(capsys, _quantize(model=model, weights=weights, data=data), part)


def test_existing_output_is_not_touched(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "out").mkdir()
    (place / "out" / "mine").write_text("mine")
    assert _quantize() == 2
    assert "exists already" in capsys.readouterr().err
    assert os.listdir(place / "out") == ["mine"]
    assert main(["demo", "--output", "out"]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    assert os.listdir(place / "out") == ["mine"]


def test_output_below_a_file(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _refused(capsys, _quantize("--output", "weights.pt/run"), "cannot be written")


def test_full_disk(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def write(path: Path, data: object) -> None:
        Path("/dev/full").write_text(json.dumps(data) * 1000)

    monkeypatch.setattr(run_module, "write_json", write)
    _refused(capsys, _quantize(), "No space left on device", kept=True)


def test_nan_loss(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = _quantize("--set", "synthesis.ce_weight=1e39", "synthesis.image_steps=3")
    _refused(capsys, code, "image synthesis diverged", "became nan at step")


def test_divergence_of_the_student(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*arguments: object, **settings: object) -> None:
        raise DivergenceError("fine-tuning diverged: the loss term 'kd' became nan at step 3")

    monkeypatch.setattr("clusterq.qat.finetune", diverge)
    _refused(capsys, _quantize(), "'kd' became nan at step 3")


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"), "OutOfMemoryError: CUDA out of memory. ("),
        (RuntimeError("no kernel\nstack"), "RuntimeError: no kernel (CLUSTERQ_TRACEBACK=1"),
        (MemoryError(), "MemoryError: no message"),
    ],
)
def test_error_of_torch_in_a_run(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception, part: str
) -> None:
    def fail(*arguments: object, **settings: object) -> None:
        raise error

    monkeypatch.setattr("clusterq.qat.finetune", fail)
    _refused(capsys, _quantize(), part, kept=True)


def test_factory_that_raises(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "bad.py").write_text("def make():\n    return 1 / 0\n")
    _refused(capsys, _quantize(model="bad.py:make"), "bad.py: ZeroDivisionError: division by zero")


def test_interrupt(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object, **settings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("clusterq.qat.finetune", interrupt)
    assert _quantize() == 130
    assert "interrupted, continue with: clusterq quantize --resume out --trust" in capsys.readouterr().err
    monkeypatch.setattr("clusterq.run._Run.make_images", interrupt)
    assert _quantize("--overwrite") == 130
    assert capsys.readouterr().err == "clusterq: interrupted, nothing was written\n"
    assert not [name for name in os.listdir() if name.startswith((".out", "out"))]


def test_traceback_on_request(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLUSTERQ_TRACEBACK", "1")
    with pytest.raises(ValueError, match="twice"):
        _quantize("--bits", "W4A4", "W4A4")


@pytest.mark.parametrize("command", ["demo", "quantize", "evaluate", "bench", "doctor"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: clusterq {command}")
    if command == "quantize":
        for name in ("synthesis.num_images=", "finetune.temperature=", "quantization.weight_bits="):
            assert name in text


def test_unknown_command_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["dance"])
    assert ended.value.code == 2


def test_bench_names_its_suites(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "no_such_suite"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_settings_are_parsed_by_type() -> None:
    config = override(
        preset("default"),
        [
            "synthesis.source=generator",
            "synthesis.steps=5",
            "finetune.lr=1",
            "quantization.first_layer_bits=8",
            "finetune.augment=false",
            "quantization.last_layer_bits=null",
            'quantization.layer_bits={"fc": 8}',
            "synthesis.generator_betas=[0.1, 0.2]",
        ],
    )
    assert config.synthesis.source == "generator"
    assert config.finetune.lr == 1.0 and isinstance(config.finetune.lr, float)
    assert config.quantization.first_layer_bits == 8 and config.quantization.last_layer_bits is None
    assert config.finetune.augment is False
    assert config.quantization.layer_bits == {"fc": 8}
    assert config.synthesis.generator_betas == (0.1, 0.2)
    for bad in ("lr=1", "finetune.lr", "finetune.augment=1", "finetune.steps=1.5", "finetune.steps=true",
                "synthesis.source=camera", "synthesis.generator_betas=[1]", "finetune.steps=null"):  # fmt: skip
        with pytest.raises(ValueError):
            override(ClusterQConfig(), [bad])


def test_settings_are_described_with_their_values() -> None:
    lines = list(describe(preset("default")))
    assert any(line.startswith(f"finetune.lr={preset('default').finetune.lr}") for line in lines)
    assert any("mse | minmax" in line for line in lines)


def test_progress_lines_away_from_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 20.0, 40.0, 41.0])
    monkeypatch.setattr("clusterq.progress.time.perf_counter", lambda: next(clock))
    stream = io.StringIO()
    with ConsoleProgress(stream) as progress:
        for done in (0, 1, 25, 100):
            progress("synthesis", done, 100)
        progress("evaluate", 7, None)
    assert stream.getvalue().splitlines() == [
        "synthesis: 25/100, 20 s, about 60 s left",
        "synthesis: 100/100, 40 s",
    ]


def test_progress_begins_anew_for_the_next_width(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 20.0, 100.0, 120.0])
    monkeypatch.setattr("clusterq.progress.time.perf_counter", lambda: next(clock))
    stream = io.StringIO()
    with ConsoleProgress(stream) as progress:
        for done in (0, 10, 0, 5):
            progress("finetune", done, 10)
    assert stream.getvalue().splitlines() == ["finetune: 10/10, 20 s", "finetune: 5/10, 20 s, about 20 s left"]


def test_progress_bar_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with ConsoleProgress(stream) as progress:
        progress("synthesis", 0, 10)
        progress("synthesis", 10, 10)
    assert "synthesis" in stream.getvalue() and "10/10" in stream.getvalue()
    silent = Terminal()
    with ConsoleProgress(silent, quiet=True) as progress:
        progress("synthesis", 10, 10)
    assert silent.getvalue() == ""
