"""`clusterq synthesize`: a bank is made, made larger, used by `quantize`, and refused where it does not belong."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from clusterq import ClusterQ, bank, bank_quality
from clusterq.cli import main
from clusterq.config import preset
from clusterq.settings import override
from clusterq.synthesis import Teacher

sys.path.insert(0, os.path.dirname(__file__))
from small_network import FAST, MODEL, write_place

SYNTHESIS = [text for text in FAST if text.startswith("synthesis.")]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.chdir(tmp_path)
    return write_place(tmp_path).eval()


def _synthesize(*more: str, model: list[str] = MODEL) -> int:
    return main(["synthesize", *model, "--quiet", "--device", "cpu", *more])


def _make(*more: str) -> None:
    assert _synthesize("--output", "bank", *more, "--set", *SYNTHESIS) == 0


def _record() -> dict[str, object]:
    return json.loads(Path("bank/bank.json").read_text())


def _refused(capsys: pytest.CaptureFixture[str], code: int, *parts: str) -> None:
    captured = capsys.readouterr()
    assert code == 2
    assert captured.err.count("\n") == 1 and captured.err.startswith("clusterq: error: ")
    for part in parts:
        assert part in captured.err
    assert not [name for name in os.listdir() if name.startswith(".")]


def test_bank_holds_what_the_method_makes(place: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    _make("--seed", "3")
    assert "8 images with seed 3" in capsys.readouterr().out
    config = override(preset("default"), FAST)
    source = ClusterQ(place, replace(config, seed=3), input_shape=(1, 8, 8)).synthesize()
    tensors = load_file("bank/images.safetensors")
    assert torch.equal(tensors["images"], source.images()) and torch.equal(tensors["labels"], source.labels())
    record = _record()
    assert record["images"] == {
        "count": 8,
        "shape": [1, 8, 8],
        "sha256": hashlib.sha256(Path("bank/images.safetensors").read_bytes()).hexdigest(),
    }
    assert record["network"]["weights_sha256"] == hashlib.sha256(Path("weights.pt").read_bytes()).hexdigest()
    with torch.no_grad():
        agreed = place(tensors["images"]).argmax(1) == tensors["labels"]
    assert record["label_accuracy"] == pytest.approx(100 * float(agreed.float().mean()))
    (part,) = record["parts"]
    assert (part["seed"], part["count"], part["settings"]["image_steps"]) == (3, 8, 2)
    assert part["samples_seen"] == 16 and part["seconds"] > 0 and part["versions"]["torch"] == torch.__version__
    # Two steps: the first and the last term are those of the log.
    steps = source.metrics
    assert part["terms"]["ce"] == {"first": pytest.approx(steps[0]["ce"]), "last": pytest.approx(steps[1]["ce"])}
    assert Path("bank/images.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(os.listdir("bank")) == ["bank.json", "images.png", "images.safetensors"]


def test_extended_bank_keeps_its_images_in_front(place: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    _make()
    first = load_file("bank/images.safetensors")
    assert _synthesize("--extend", "bank", "--set", "synthesis.num_images=5") == 0
    both = load_file("bank/images.safetensors")
    assert len(both["images"]) == 13 and len(both["labels"]) == 13
    assert torch.equal(both["images"][:8], first["images"]) and torch.equal(both["labels"][:8], first["labels"])
    parts = _record()["parts"]
    # The bank's own settings, the next seed, and what was changed.
    assert [(part["seed"], part["count"]) for part in parts] == [(0, 8), (1, 5)]
    assert parts[1]["settings"] == {**parts[0]["settings"], "num_images": 5}
    # What comes in addition is what a bank of its own would hold.
    assert _synthesize("--output", "alone", "--seed", "1", "--set", *SYNTHESIS, "synthesis.num_images=5") == 0
    assert torch.equal(both["images"][8:], load_file("alone/images.safetensors")["images"])
    weights = [part["count"] * part["label_accuracy"] for part in parts]
    assert _record()["label_accuracy"] == pytest.approx(sum(weights) / 13)
    capsys.readouterr()
    _refused(capsys, _synthesize("--extend", "bank", "--seed", "0"), "a part of bank has this seed")
    other = [*MODEL[:2], "--weights", "other.pt", *MODEL[4:]]
    _refused(capsys, _synthesize("--extend", "bank", model=other), "was made for another network")
    assert len(_record()["parts"]) == 2


def test_quantize_takes_the_folder_the_file_in_it_and_a_bare_file(place: nn.Module) -> None:
    _make()
    (Path("bare.safetensors")).write_bytes(Path("bank/images.safetensors").read_bytes())
    students = []
    for images in ("bank", "bank/images.safetensors", "bare.safetensors", None):
        words = [
            "quantize",
            *MODEL,
            "--data",
            "set.npz",
            "--output",
            "out",
            "--overwrite",
            "--quiet",
            "--device",
            "cpu",
        ]
        assert main([*words, *(["--images", images] if images else []), "--set", *FAST]) == 0
        students.append(Path("out/checkpoints/W4A4/model.safetensors").read_bytes())
    # The seed is the same: images from the bank train the student that synthesis would.
    assert students[1:] == students[:1] * 3


def test_bank_of_another_network_needs_the_users_word(place: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    _make()
    other = [*MODEL[:2], "--weights", "other.pt", *MODEL[4:]]
    words = ["quantize", *other, "--data", "set.npz", "--output", "out", "--quiet", "--device", "cpu", "--set", *FAST]
    capsys.readouterr()
    for images in ("bank", "bank/images.safetensors"):
        _refused(capsys, main([*words, "--images", images]), "bank was made for another network", "--any-network")
    assert main([*words, "--images", "bank", "--any-network"]) == 0
    # The same tensors from another file are the same network.
    save_file(torch.load("weights.pt", weights_only=True), "same.safetensors")
    words[words.index("other.pt")] = "same.safetensors"
    assert main([*words, "--images", "bank", "--overwrite"]) == 0


def test_damaged_banks_are_refused(place: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    _make()
    record = _record()
    capsys.readouterr()
    cases = [
        ({**record, "format": "other"}, "is not the record of a bank"),
        ({**record, "format_version": 9}, "is the record of a bank in format 9; this version reads 1"),
        ({**record, "parts": []}, "damaged: parts is absent"),
        ({**record, "parts": [{}]}, "damaged: count is absent"),
        ({**record, "parts": [{**record["parts"][0], "seed": True}]}, "damaged: seed is absent or of another type"),
        ({**record, "parts": [*record["parts"], 3]}, "damaged: count is absent"),
        ({**record, "network": 3}, "damaged: network.tensors_sha256 is absent"),
        ({**record, "network": {**record["network"], "mean": ["0"]}}, "damaged: network.mean is absent or of another"),
        ({**record, "network": {**record["network"], "std": 1.0}}, "damaged: network.std is absent or of another"),
        (
            {**record, "network": {**record["network"], "input_shape": [1, 8, 9]}},
            "input_shape is not that of its images",
        ),
        ({**record, "network": {**record["network"], "input_shape": []}}, "input_shape is not that of its images"),
        ({**record, "parts": record["parts"] * 2}, "do not add up to the 8 images"),
        ({**record, "images": {**record["images"], "sha256": "0" * 64}}, "its SHA-256 is not the one"),
    ]
    for content, part in cases:
        Path("bank/bank.json").write_text(json.dumps(content))
        _refused(capsys, _synthesize("--inspect", "bank"), part)
    Path("bank/bank.json").write_text("{")
    _refused(capsys, _synthesize("--inspect", "bank"), "bank.json is damaged")
    os.remove("bank/bank.json")
    _refused(capsys, _synthesize("--inspect", "bank"), "is not a bank of images: it has no bank.json")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--output", "bank"], "exists already"),
        (["--output", "new", "--set", "finetune.steps=1"], "settings of the section synthesis only"),
        (["--output", "new", "--set", "synthesis.nothing=1"], "no setting 'nothing'"),
        (["--output", "new", "--extend", "bank"], "--extend and --output are both given"),
        (["--inspect", "bank", "--seed", "1"], "--seed is of no use with --inspect"),
        (["--inspect", "bank", "--seed", "0"], "--seed is of no use with --inspect"),
        (["--output", "new", "--any-network"], "--any-network belongs to --inspect"),
        (["--output", "new", "--threads", "0"], "--threads is 0"),
    ],
)
def test_bad_requests(place: nn.Module, capsys: pytest.CaptureFixture[str], words: list[str], part: str) -> None:
    _make()
    capsys.readouterr()
    _refused(capsys, _synthesize(*words), part)
    assert not Path("new").exists()


def test_no_model_and_models_that_run_code(place: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    _make()
    capsys.readouterr()
    _refused(capsys, _synthesize(model=[]), "nothing to make images of")
    _refused(capsys, _synthesize("--inspect", "bank", model=[]), "net.py:make, a Python file: give --model")


def test_streaming_preset_is_trained_to_its_end(place: nn.Module) -> None:
    steps = ["synthesis.warmup_steps=1", "synthesis.steps=2"]
    assert _synthesize("--output", "bank", "--preset", "paper", "--set", *SYNTHESIS, *steps) == 0
    (part,) = _record()["parts"]
    assert part["settings"]["source"] == "generator" and part["samples_seen"] == 3 * 8
    assert len(load_file("bank/images.safetensors")["images"]) == 8


def test_without_matplotlib_the_record_says_so(
    place: nn.Module, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    _make()
    assert "contact sheet not drawn" in capsys.readouterr().out
    assert "needs the package 'matplotlib'" in _record()["contact_sheet"]
    assert sorted(os.listdir("bank")) == ["bank.json", "images.safetensors"]


def test_inspection_prints_what_it_found(place: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    _make()
    capsys.readouterr()
    assert _synthesize("--inspect", "bank", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    tensors = load_file("bank/images.safetensors")
    quality = bank_quality.inspect_images(
        Teacher(place, (1, 8, 8)), tensors["images"], tensors["labels"], mean=(0.0,), std=(1.0,)
    )
    assert found["quality"] == quality.to_dict() and found["bank"] == _record()
    assert _synthesize("--inspect", "bank") == 0
    text = capsys.readouterr().out
    for part in ("8 images, 4 classes, 2 to 2 images each", "0: 2  1: 2  2: 2  3: 2", "diversity", "part of 8 images"):
        assert part in text
    other = [*MODEL[:2], "--weights", "other.pt", *MODEL[4:]]
    _refused(capsys, _synthesize("--inspect", "bank", model=other), "was made for another network")
    assert _synthesize("--inspect", "bank", "--any-network", model=other) == 0


def test_inspection_opens_the_network_as_the_bank_has_it(place: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    normalised = [*MODEL[:6], "--mean", "0.25", "--std", "0.5"]
    assert _synthesize("--output", "bank", "--set", *SYNTHESIS, model=normalised) == 0
    capsys.readouterr()
    # Weights, size and normalisation are not given again; without them 224 pixels and ImageNet's mean would be taken.
    assert _synthesize("--inspect", "bank", "--json", model=MODEL[:2]) == 0
    found = json.loads(capsys.readouterr().out)["quality"]
    assert _synthesize("--inspect", "bank", "--json", model=normalised) == 0
    assert json.loads(capsys.readouterr().out)["quality"] == found
    tensors = load_file("bank/images.safetensors")
    low, high = -0.25 / 0.5, 0.75 / 0.5
    outside = ((tensors["images"] < low) | (tensors["images"] > high)).double().mean()
    assert found["pixels"]["outside"] == pytest.approx(100 * float(outside)) and 0 < outside < 1
    os.rename("weights.pt", "elsewhere.pt")
    _refused(capsys, _synthesize("--inspect", "bank", model=MODEL[:2]), "weights 'weights.pt': no such file")
    words = [*MODEL[:2], "--weights", "elsewhere.pt"]
    assert _synthesize("--inspect", "bank", model=words) == 0


def test_inspection_of_a_network_that_comes_with_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _synthesize("--output", "bank", "--set", *SYNTHESIS, model=["--model", "builtin:digits"]) == 0
    assert _synthesize("--inspect", "bank", model=[]) == 0
    assert "8 images, 10 classes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (
            ["--input-size", "10", "--normalization", "none"],
            "made with input_shape [1, 8, 8]; the network is loaded with",
        ),
        (
            ["--input-size", "8", "--mean", "0.5", "--std", "1"],
            "made with mean [0.0]; the network is loaded with [0.5]",
        ),
        (["--input-size", "8", "--mean", "0", "--std", "0.5"], "made with std [1.0]; the network is loaded with [0.5]"),
    ],
)
def test_a_bank_is_extended_at_its_own_size_and_normalisation(
    place: nn.Module, capsys: pytest.CaptureFixture[str], words: list[str], part: str
) -> None:
    _make()
    before = Path("bank/bank.json").read_bytes()
    capsys.readouterr()
    _refused(capsys, _synthesize("--extend", "bank", model=[*MODEL[:4], *words]), part)
    assert Path("bank/bank.json").read_bytes() == before


def test_labels_of_a_part_are_checked_once(place: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = Teacher.label_accuracy

    def counted(teacher: Teacher, images: torch.Tensor, labels: torch.Tensor) -> float:
        calls.append(len(images))
        return real(teacher, images, labels)

    monkeypatch.setattr(Teacher, "label_accuracy", counted)
    _make()
    assert calls == [8]


def test_read_gives_back_what_was_written(place: nn.Module) -> None:
    _make()
    found = bank.read(Path("bank"))
    assert found.seeds == [0] and found.images.shape == (8, 1, 8, 8)
    assert bank.last_settings(found) == override(preset("default"), SYNTHESIS).synthesis
