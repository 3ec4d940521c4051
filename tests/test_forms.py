"""`clusterq export --format safetensors|pt2` and `clusterq evaluate` of what they write."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch

import clusterq
from clusterq.cli import main
from clusterq.config import QuantizationConfig
from clusterq.models import Source, load_model
from clusterq.qat import calibrate


@pytest.fixture
def digits_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder with two checkpoints of the built-in network."""
    monkeypatch.chdir(tmp_path)
    loaded = load_model("builtin:digits")
    for bits in (3, 4):
        config = QuantizationConfig(weight_bits=bits, activation_bits=4)
        twin = clusterq.prepare(loaded.model, config)
        calibrate(twin, torch.rand(16, *loaded.input_shape))
        clusterq.save(
            twin,
            Path(f"run/checkpoints/W{bits}A4"),
            config=clusterq.ClusterQConfig(quantization=config),
            input_shape=loaded.input_shape,
            source=loaded.source,
            mean=loaded.mean,
            std=loaded.std,
        )
    return Path("run")


def test_commands(digits_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    words = ["--threads", "1", "--device", "cpu"]
    export = ["export", "run", "--bits", "W3A4", "--format"]
    assert main([*export, "safetensors", *words]) == 0
    text = capsys.readouterr().out
    assert "same outputs as the checkpoint, bit for bit: 256 of 256 images (random)" in text
    assert main([*export, "safetensors", *words, "--json", "--overwrite"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["tensor_bytes"] == (digits_run / "checkpoints/W3A4/packed/packed.safetensors").stat().st_size
    assert {layer["bits"] for layer in result["layers"]} == {3}
    assert main([*export, "pt2", *words, "--data", "digits", "--limit", "64"]) == 0
    assert "bit for bit: 64 of 64 images (digits (held-out))" in capsys.readouterr().out
    assert main(["export", "run/checkpoints/W3A4/packed", "--format", "pt2", "--output", "own.pt2", *words]) == 0
    capsys.readouterr()
    results = []
    for form in ("run/checkpoints/W3A4", "run/checkpoints/W3A4/packed"):
        assert main(["evaluate", form, "--data", "digits", "--json", "--quiet", *words]) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert results[0] | {"model": ""} == results[1] | {"model": ""} and results[0]["count"] == 500


def test_commands_refuse(digits_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*words: str) -> str:
        assert main(list(words)) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and len(captured.err.strip().splitlines()) == 1
        return captured.err

    assert "W3A4, W4A4; choose one by --bits" in refused("export", "run", "--format", "safetensors")
    form = ("export", "run", "--bits", "W3A4", "--format")
    assert "--packed is given with --format safetensors" in refused(*form, "safetensors", "--packed")
    assert "--operators is given with --format pt2" in refused(*form, "pt2", "--operators", "integer")
    Path("there").write_text("mine")
    for kind in ("safetensors", "pt2"):
        assert "exists already" in refused(*form, kind, "--output", "there")
    folder = digits_run / "checkpoints/W3A4"
    assert sorted(os.listdir(folder)) == ["checkpoint.json", "model.safetensors"]
    assert main([*form, "safetensors", "--device", "cpu"]) == 0
    capsys.readouterr()
    file = folder / "packed" / "packed.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "is damaged" in refused("evaluate", str(folder / "packed"), "--data", "digits")


def test_a_recorded_file_needs_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Of a checkpoint and of a packed folder, in every form; read back from what was written, too."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(
        "import pathlib\nfrom clusterq.networks import DigitsConvNet\n"
        "def make():\n    pathlib.Path('ran').touch()\n    return DigitsConvNet()\n"
    )
    config = clusterq.ClusterQConfig()
    twin = clusterq.prepare(load_model("builtin:digits").model, config.quantization)
    calibrate(twin, torch.rand(16, 1, 16, 16))
    source = Source("net.py:make", None, "0" * 64)
    clusterq.save(twin, "net", config=config, input_shape=(1, 16, 16), source=source)
    forms = [["net", "--format", "safetensors"], ["net", "--format", "pt2"], ["net/packed", "--format", "pt2"]]
    if importlib.util.find_spec("onnxruntime") is not None:
        forms.append(["net"])
    for words in forms:
        assert main(["export", *words, "--device", "cpu"]) == 2
        assert "--trust runs the file it names" in capsys.readouterr().err
        assert not Path("ran").exists()
        assert main(["export", *words, "--trust", "--device", "cpu"]) == 0
        assert "256 of 256" in capsys.readouterr().out
        Path("ran").unlink()
    assert Path("net/packed/model.pt2").is_file()
