"""Checkpoints: exact round trip, damage noticed, nothing half-written, no code run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from clusterq.checkpoint import load, read_record, save
from clusterq.config import ClusterQConfig, QuantizationConfig
from clusterq.errors import CheckpointError, OutputError
from clusterq.folders import new_folder
from clusterq.method import Result
from clusterq.models import Source
from clusterq.qat.prepare import prepare

SHAPE = (3, 8, 8)


class Tiny(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.act = nn.ReLU()
        self.fc = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.fc(self.act(self.bn(self.conv(x))).mean((2, 3)))
        return y


def _config(**settings: object) -> ClusterQConfig:
    return ClusterQConfig(QuantizationConfig(scheme="paper", **settings), seed=7)  # type: ignore[arg-type]


def _twin(config: ClusterQConfig) -> nn.Module:
    torch.manual_seed(0)
    twin = prepare(Tiny(), config.quantization, example_input=torch.zeros(1, *SHAPE))
    twin.train()
    twin(torch.randn(16, *SHAPE))
    return twin.eval()


def _save(path: Path, config: ClusterQConfig, **settings: object) -> nn.Module:
    twin = _twin(config)
    save(twin, path, config=config, input_shape=SHAPE, **settings)  # type: ignore[arg-type]
    return twin


@pytest.mark.parametrize(
    "settings",
    [
        {"weight_bits": 3, "activation_bits": 5, "last_layer_bits": 8},
        {"learned_scale": False, "activation_range": "ema", "weight_range": "minmax", "gradient": "pass_through"},
        {"layer_bits": {"fc": 2}},
    ],
)
def test_round_trip_is_bit_exact(tmp_path: Path, settings: dict[str, object]) -> None:
    config = _config(**settings)
    twin = _save(tmp_path / "run", config)
    loaded = load(tmp_path / "run", Tiny())
    x = torch.randn(9, *SHAPE, generator=torch.Generator().manual_seed(1))
    assert torch.equal(loaded(x), twin(x))
    assert not loaded.training
    for name, value in twin.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_record_holds_config_and_source(tmp_path: Path) -> None:
    config = _config(weight_bits=3)
    source = Source("builtin:resnet20", "w.pt", "ab" * 32)
    _save(tmp_path / "run", config, source=source, mean=(0.1,) * 3, std=(0.2,) * 3, extra={"note": 1})
    record = read_record(tmp_path / "run")
    assert record.config == config
    assert record.source == source
    assert (record.input_shape, record.num_classes) == (SHAPE, 5)
    assert record.mean == (0.1,) * 3 and record.extra == {"note": 1}
    assert record.versions["torch"] == torch.__version__
    assert sorted(os.listdir(tmp_path / "run")) == ["checkpoint.json", "model.safetensors"]


def test_result_of_the_method_brings_its_settings(tmp_path: Path) -> None:
    config = _config(weight_bits=5)
    twin = _twin(config)
    result = Result(twin, config, 1.0, torch.zeros(2, *SHAPE), torch.zeros(2, dtype=torch.int64), {}, {}, {})
    save(result, tmp_path / "run")
    record = read_record(tmp_path / "run")
    assert (record.config, record.input_shape, record.num_classes) == (config, SHAPE, 5)
    x = torch.randn(3, *SHAPE)
    assert torch.equal(load(tmp_path / "run", Tiny())(x), twin(x))
    with pytest.raises(TypeError, match="config and input_shape"):
        save(twin, tmp_path / "other", config=config)


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    _save(tmp_path / "run", _config())
    file = tmp_path / "run" / "model.safetensors"
    content = file.read_bytes()
    # Header length, header, first tensor, last byte.
    for position in (0, 40, len(content) // 2, len(content) - 1):
        damaged = bytearray(content)
        damaged[position] ^= 1
        file.write_bytes(bytes(damaged))
        with pytest.raises(CheckpointError, match="SHA-256"):
            load(tmp_path / "run", Tiny())
    file.write_bytes(content[:-5])
    with pytest.raises(CheckpointError, match="SHA-256"):
        load(tmp_path / "run", Tiny())
    file.write_bytes(content)
    load(tmp_path / "run", Tiny())


def test_missing_parts(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no checkpoint\.json"):
        load(tmp_path, Tiny())
    _save(tmp_path / "run", _config())
    (tmp_path / "run" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        load(tmp_path / "run", Tiny())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format", "other", "not the record of a checkpoint"),
        ("format_version", 99, "is the record of a checkpoint in format 99; this version reads 1"),
        ("input_shape", [3, 8], "damaged"),
        ("config", {"quantization": {"weight_bits": 99}}, "weight_bits is 99; wanted whole number"),
        ("config", {"unknown": 1}, "unknown setting"),
    ],
)
def test_malformed_record(tmp_path: Path, field: str, value: object, message: str) -> None:
    _save(tmp_path / "run", _config())
    file = tmp_path / "run" / "checkpoint.json"
    record = json.loads(file.read_text())
    record[field] = value
    file.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "run", Tiny())


def test_record_that_is_not_json(tmp_path: Path) -> None:
    _save(tmp_path / "run", _config())
    (tmp_path / "run" / "checkpoint.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        read_record(tmp_path / "run")


def test_network_of_other_shape(tmp_path: Path) -> None:
    _save(tmp_path / "run", _config())
    with pytest.raises(CheckpointError, match=r"tensor conv\.weight is torch\.float32 \[4, 3, 3, 3\]; wanted .*\[6, 3"):
        load(tmp_path / "run", Tiny(width=6))


def test_code_named_by_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    evil = tmp_path / "evil.py"
    evil.write_text(f"import pathlib\npathlib.Path({str(touched)!r}).touch()\ndef make():\n    return None\n")
    _save(tmp_path / "run", _config(), source=Source(f"{evil}:make", None, "0" * 64))
    with pytest.raises(CheckpointError, match="hand over the network itself"):
        load(tmp_path / "run")
    assert not touched.exists()
    assert isinstance(load(tmp_path / "run", Tiny()), Tiny)


def test_existing_folder_is_kept_unless_asked(tmp_path: Path) -> None:
    _save(tmp_path / "run", _config())
    with pytest.raises(OutputError, match="exists already"):
        _save(tmp_path / "run", _config(weight_bits=2))
    assert read_record(tmp_path / "run").config.quantization.weight_bits == 4
    _save(tmp_path / "run", _config(weight_bits=2), overwrite=True)
    assert read_record(tmp_path / "run").config.quantization.weight_bits == 2
    assert os.listdir(tmp_path) == ["run"]


def test_failure_while_writing_leaves_nothing_behind(tmp_path: Path) -> None:
    _save(tmp_path / "run", _config())
    before = (tmp_path / "run" / "checkpoint.json").read_bytes()

    class Stop(Exception):
        pass

    with pytest.raises(Stop), new_folder(tmp_path / "run", overwrite=True) as folder:
        (folder / "half").write_text("half")
        raise Stop
    assert os.listdir(tmp_path) == ["run"]
    assert (tmp_path / "run" / "checkpoint.json").read_bytes() == before


def test_full_disk_is_one_sentence(tmp_path: Path) -> None:
    full = Path("/dev/full")
    with pytest.raises(OutputError, match="cannot be written: No space left on device"), new_folder(tmp_path / "run"):
        full.write_text("x" * 100_000)
    assert os.listdir(tmp_path) == []


def test_folder_under_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"), new_folder(tmp_path / "file" / "run"):
        raise AssertionError("the block must not run")
    with pytest.raises(OutputError, match="is a file"), new_folder(tmp_path / "file", overwrite=True):
        raise AssertionError("the block must not run")
