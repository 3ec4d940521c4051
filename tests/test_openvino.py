"""OpenVINO as a second consumer of our ONNX files: the twin's classes, integer kernels by its own account."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import clusterq
from clusterq.cli import main
from clusterq.config import QuantizationConfig
from clusterq.data import EvaluationSet
from clusterq.deploy import _openvino_runtime as openvino
from clusterq.deploy._onnx_runtime import float_model, same_classes
from clusterq.deploy.integer import run_integer
from clusterq.deploy.onnx import export_onnx
from clusterq.export import milliseconds
from clusterq.models import LoadedModel, load_model
from clusterq.qat import calibrate

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("openvino", reason="openvino is not installed: pip install 'clusterq[openvino]'")

SHAPE = (3, 16, 16)


def network() -> nn.Module:
    """Two layers that read codes, the second with BatchNorm and a quantizer behind it, between two that do not."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    ).eval()


def twin_of(**config: Any) -> nn.Module:
    twin = clusterq.prepare(
        network(), QuantizationConfig(scheme="paper", **config), example_input=torch.zeros(2, *SHAPE)
    )
    calibrate(twin, torch.randn(32, *SHAPE))
    return twin


@pytest.mark.parametrize("bits", [2, 4, 7, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_layers_that_read_codes_run_in_integers(bits: int, symmetric: bool, tmp_path: Path) -> None:
    twin = twin_of(weight_bits=bits, activation_bits=bits, weight_symmetric=symmetric)
    export = export_onnx(twin, tmp_path / "net.onnx", example_input=torch.zeros(2, *SHAPE))
    model = openvino.compiled(export.path)
    found = openvino.products(model)
    assert sum(found.integer.values()) + sum(found.floating.values()) == 4
    assert "0/weight_codes" not in found.weights
    # Zero points per channel, which only weights of 8 bits keep, are arithmetic in floating point to OpenVINO.
    if bits < 8 or symmetric:
        assert found.weights == {"3/weight_codes", "5/weight_codes"} and found.integer == {"Convolution": 2}
    x = torch.randn(64, *SHAPE)
    values = torch.from_numpy(openvino.runner(model)(x.numpy()).copy())
    wanted = twin(x).detach()
    # A code that another order of a sum moves across a rounding boundary moves its image a little.
    error = (values - wanted).abs().amax(1) / wanted.abs().max()
    assert float(error.median()) < 1e-5 and float(error.max()) < 0.1


def test_one_batch_and_bytes() -> None:
    twin = twin_of()
    model = openvino.compiled(float_model(twin, torch.zeros(2, *SHAPE)), batch=3)
    assert openvino.products(model).integer == {}
    x = torch.randn(3, *SHAPE)
    assert openvino.runner(model)(x.numpy()).shape == (3, 5)


def test_times_beside_each_other(tmp_path: Path) -> None:
    twin, x = twin_of(), torch.randn(2, *SHAPE)
    export = export_onnx(twin, tmp_path / "net.onnx", example_input=x)
    found = milliseconds(float_model(twin, x), export.path, x[0], 2, threads=1, openvino=True, seconds=0.01)
    assert set(found) == {f"{a}{b}" for a in ("", "openvino_") for b in ("float", "exported", "ratio")}
    assert all(value > 0 for value in found.values())


def test_command_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = load_model("builtin:digits")
    config = QuantizationConfig()
    twin = clusterq.prepare(loaded.model, config)
    calibrate(twin, torch.rand(16, *loaded.input_shape))
    settings = clusterq.ClusterQConfig(quantization=config)
    clusterq.save(twin, Path("net"), config=settings, input_shape=loaded.input_shape, source=loaded.source)
    words = ["export", "net", "--threads", "1", "--device", "cpu"]
    assert main(words) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    row = next(row for row in rows if row[:1] == ["openvino"])
    assert row[-3] in ("255", "256") and row[-2:] == ["of", "256"]
    assert main([*words, "--json", "--overwrite"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["openvino"]["of"] == 256
    names = [layer["name"] for layer in result["layers"] if layer["openvino_integer"]]
    assert names == result["openvino"]["layers"] != []


def test_scheme_deploy_on_cifar10(cifar10: tuple[LoadedModel, EvaluationSet], tmp_path: Path) -> None:
    """All layers in integers; the codes of `run_integer` up to the first residual sum, close to them after it.

    OpenVINO computes a sum in the convolution before it, without rounding that operand to its codes first.
    """
    openvino_itself = pytest.importorskip("openvino")
    loaded, images = cifar10
    batches = [x for x, _ in images.batches(100, 600)]
    twin = clusterq.prepare(loaded.model, QuantizationConfig(scheme="deploy"))
    calibrate(twin, batches[0])
    export = export_onnx(twin, tmp_path / "net.onnx", example_input=batches[0][:2])
    model = openvino.compiled(export.path)
    found = openvino.products(model)
    assert (
        found.floating == {} and found.weights == {layer.codes for layer in export.layers} and len(found.weights) == 20
    )
    same, count = same_classes(twin, openvino.runner(model), batches[1:])
    assert count == 500 and same >= 0.95 * count
    _, wanted = run_integer(twin, batches[1], return_codes=True)
    for name in ("input_quantizer", "relu", "layer1.0.relu1", "layer1.0.relu2"):
        # One at a time: an output keeps the runtime from computing it together with what follows.
        read = openvino_itself.Core().read_model(str(export.path))
        read.add_outputs(export.activations[name][0])
        one = openvino_itself.Core().compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        codes = torch.from_numpy(one(batches[1].numpy())[1].astype("int32"))
        difference = (codes - wanted[name][0].int()).abs()
        assert int(difference.max()) <= (name == "layer1.0.relu2")
        assert float((difference > 0).float().mean()) < 0.05


@pytest.mark.parametrize("folded", [False, True])
def test_resnet20_on_cifar10(cifar10: tuple[LoadedModel, EvaluationSet], tmp_path: Path, folded: bool) -> None:
    loaded, images = cifar10
    batches = [x for x, _ in images.batches(250, 1250)]
    twin = clusterq.prepare(loaded.model, QuantizationConfig(scheme="paper"))
    calibrate(twin, batches[0][:128])
    export = export_onnx(twin, tmp_path / "net.onnx", example_input=batches[0][:2], fold_batch_norm=folded)
    model = openvino.compiled(export.path)
    found = openvino.products(model)
    # All but the first layer, which reads the image, and the last, which reads averages.
    names = [layer.name for layer in export.layers]
    assert found.weights == {f"{name}/weight_codes" for name in names[1:-1]}
    assert found.integer == {"Convolution": 18}
    same, count = same_classes(twin, openvino.runner(model), batches[1:])
    assert count == 1000 and same >= 0.999 * count
