"""Trained networks and real images through the command line; skipped unless CLUSTERQ_DATA names the folder with them.

Budgets are a small part of the shipped ones. Floors lie about five points below what seeds 0 to 2 measured.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from clusterq.cli import main
from clusterq.config import ClusterQConfig, preset

# Of networks/cifar10_resnet20.pt, as the folder's README gives it.
RESNET_SHA256 = "52531237b36c6173d517e1a2a2d7ea9bf746b60ce925d61956b66c346b82008e"


def quantize(data_dir: Path, output: Path, factory: str, weights: str, data: str, *more: str) -> dict[str, Any]:
    """`result.json` of one run of `clusterq quantize` on the CPU."""
    networks = data_dir / "networks"
    words = ["quantize", "--model", f"{networks / 'networks.py'}:{factory}", "--weights", str(networks / weights)]
    words += ["--data", str(data_dir / data), "--normalization", "imagenet", "--device", "cpu", "--seed", "1"]
    assert main([*words, "--output", str(output), "--quiet", *more]) == 0
    return json.loads((output / "result.json").read_text())


def top1(row: dict[str, Any]) -> dict[str, float]:
    return {key: row[key]["top1"] for key in ("rounded_minmax", "rounded_mse", "calibrated", "clusterq")}


def test_resnet20_on_cifar10(data_dir: Path, tmp_path: Path) -> None:
    settings = [
        "synthesis.num_images=64", "synthesis.batch_size=64", "synthesis.image_steps=30",
        "finetune.steps=10", "finetune.batch_size=64",
    ]  # fmt: skip
    result = quantize(
        data_dir, tmp_path / "run", "resnet20", "cifar10_resnet20.pt", "cifar10/cifar10_test.npz",
        "--input-size", "32", "--limit", "2000", "--bits", "W4A4", "W3A3", "--set", *settings,
    )  # fmt: skip
    full = result["float"]["top1"]
    w4, w3 = map(top1, result["widths"])
    assert full > 88
    for row in (w4, w3):
        assert row["rounded_minmax"] < row["rounded_mse"]
    # At W4A4 they lie half a point apart: within chance.
    assert w4["rounded_mse"] - 1 < w4["calibrated"] and w3["rounded_mse"] + 2 < w3["calibrated"]
    assert full - w4["clusterq"] < 6 and full - w4["calibrated"] < 6
    assert w3["rounded_mse"] > 70 and w3["calibrated"] > 77 and w3["clusterq"] > 77
    # What it takes to repeat the run is in the result.
    assert result["seed"] == 1 and result["preset"] == "default"
    config = ClusterQConfig.from_dict(result["config"])
    assert (config.synthesis.num_images, config.synthesis.image_steps, config.finetune.steps) == (64, 30, 10)
    assert config.finetune.lr == preset("default").finetune.lr
    assert result["model"]["weights_sha256"] == RESNET_SHA256
    assert result["versions"]["torch"] == torch.__version__ and result["versions"]["clusterq"]
    assert result["data"]["images"] == 2000 and result["data"]["of"] == 10_000
    for row in result["widths"]:
        assert row["samples_seen"] == {"synthesis": 30 * 64, "finetune": 10 * 64} and row["unreached"] == []


def test_mobilenet_with_1000_classes(data_dir: Path, tmp_path: Path) -> None:
    weights = "imagenet_mobilenetv1_025.pt"
    state = torch.load(data_dir / "networks" / weights, weights_only=True)
    assert sum(int((v < 1e-8).sum()) for k, v in state.items() if k.endswith("running_var")) == 9
    settings = [
        "synthesis.num_images=16", "synthesis.batch_size=16", "synthesis.image_steps=5",
        "finetune.steps=3", "finetune.batch_size=8",
    ]  # fmt: skip
    with warnings.catch_warnings():
        # Five steps make no images that the network knows.
        warnings.filterwarnings("ignore", message="the network assigns")
        result = quantize(
            data_dir, tmp_path / "run", "mobilenet_v1_025", weights, "ilsvrc2012-val1300",
            "--input-size", "224", "--limit", "64", "--bits", "W4A8", "--set", *settings,
        )  # fmt: skip
    assert result["model"]["num_classes"] == 1000 and result["model"]["input_shape"] == [3, 224, 224]
    assert result["float"]["top1"] > 40
    row = top1(result["widths"][0])
    assert row["calibrated"] > max(row["rounded_minmax"], row["rounded_mse"]) + 20
    assert row["clusterq"] > max(row["rounded_minmax"], row["rounded_mse"])
    tensors = load_file(next((tmp_path / "run" / result["widths"][0]["checkpoint"]).glob("*.safetensors")))
    assert tensors["fc.weight"].shape == (1000, 256)
    assert all(torch.isfinite(t).all() for t in tensors.values() if t.is_floating_point())
