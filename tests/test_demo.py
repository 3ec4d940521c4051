"""The demo from the command to the run folder, with a reduced budget: rounding fails, the method repairs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from clusterq.checkpoint import load, read_record
from clusterq.cli import main
from clusterq.data import evaluate, open_data
from clusterq.models import DIGITS_MEAN, DIGITS_STD, load_model

BUDGET = [
    "synthesis.num_images=192",
    "synthesis.batch_size=96",
    "synthesis.image_steps=100",
    "finetune.steps=100",
    "finetune.batch_size=64",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    path = tmp_path_factory.mktemp("demo") / "run"
    assert main(["demo", "--output", str(path), "--quiet", "--device", "cpu", "--set", *BUDGET]) == 0
    return path


def test_network_is_as_accurate_as_its_file_says() -> None:
    pytest.importorskip("sklearn")
    from safetensors import safe_open

    from clusterq.models import DIGITS_WEIGHTS

    with safe_open(DIGITS_WEIGHTS, "pt") as file:
        metadata = file.metadata()
    loaded = load_model("builtin:digits")
    data = open_data("digits", input_shape=(1, 16, 16), mean=DIGITS_MEAN, std=DIGITS_STD)
    top1 = evaluate(loaded.model, data).top1
    # One image of the 500 may fall the other way on another machine.
    assert top1 == pytest.approx(float(metadata["top1_held_out"]), abs=0.21)
    assert top1 > 97


def test_gap_opens_by_rounding_and_closes_by_the_method(folder: Path) -> None:
    result = json.loads((folder / "result.json").read_text())
    full = result["float"]["top1"]
    assert [row["bits"] for row in result["widths"]] == ["W4A4", "W3A3"]
    for row, least_gap, closed in zip(result["widths"], (10, 40), (0.6, 0.6), strict=True):
        rounded, quantized = row["rounded_minmax"]["top1"], row["clusterq"]["top1"]
        assert full - rounded > least_gap, row["bits"]
        assert quantized - rounded > closed * (full - rounded), (row["bits"], rounded, quantized, full)
    assert result["data"]["images"] == 500
    assert result["images"]["label_accuracy"] > 80


def test_run_folder_is_complete(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {
        "accuracy.png",
        "checkpoints",
        "curves.png",
        "images.png",
        "metrics.jsonl",
        "report.html",
        "result.json",
        "separability.png",
    }
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    phases = [json.loads(line)["phase"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert phases.count("synthesis") == 200 and phases.count("finetune") == 200


def test_checkpoints_load_and_repeat_their_accuracy(folder: Path) -> None:
    data = open_data("digits", input_shape=(1, 16, 16), mean=DIGITS_MEAN, std=DIGITS_STD)
    result = json.loads((folder / "result.json").read_text())
    for row in result["widths"]:
        path = folder / row["checkpoint"]
        model = load(path)
        assert evaluate(model, data).top1 == pytest.approx(row["clusterq"]["top1"], abs=0.21)
        assert read_record(path).config.quantization.weight_bits == row["weight_bits"]
        weight = dict(model.named_modules())["stem.0"].quantized_weight()  # type: ignore[operator]
        levels = max(len(torch.unique(channel)) for channel in weight)
        assert levels <= 2 ** row["weight_bits"]


def test_demo_replaces_an_earlier_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = folder.parent / "again"
    small = ["synthesis.num_images=20", "synthesis.image_steps=1", "finetune.steps=1", "finetune.batch_size=10"]
    for seed in ("1", "2"):
        words = ["demo", "--output", str(target), "--bits", "W4A4", "--seed", seed, "--limit", "20", "--quiet"]
        assert main([*words, "--set", *small]) == 0
    assert json.loads((target / "result.json").read_text())["seed"] == 2
    assert "ClusterQ" in capsys.readouterr().out
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]
