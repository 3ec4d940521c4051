"""Networks of scheme deploy in onnxruntime: its codes are those of `run_integer`, from integer kernels alone."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clusterq.config import QuantizationConfig
from clusterq.deploy import run_integer
from clusterq.deploy._onnx_runtime import integer_kernels, session
from clusterq.deploy.onnx import OnnxExport, export_onnx
from clusterq.nn.layers import QuantizedConv2d, QuantizedLinear, quantized_weights_kept
from clusterq.qat.calibrate import calibrate
from clusterq.qat.prepare import prepare, unreached

sys.path.insert(0, os.path.dirname(__file__))
from deploy_cases import NETWORKS, Dense, Gated, Inverted, Residual, randomise

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

# What may be left beside integer kernels: one quantization of the image, clips of codes, and codes that move.
MOVING = {
    "QuantizeLinear",
    "Clip",
    "Transpose",
    "MaxPool",
    "NhwcMaxPool",
    "Slice",
    "Pad",
    "Reshape",
    "Squeeze",
    "Flatten",
}
INTEGER = {
    *("QLinearConv", "QGemm", "QLinearAdd", "QLinearMul", "QLinearConcat", "QLinearGlobalAveragePool"),
    *("QLinearAveragePool", "QLinearSigmoid"),
}


def made(network: nn.Module, x: Tensor, **settings: Any) -> nn.Module:
    twin = prepare(network, QuantizationConfig(scheme="deploy", **settings))
    calibrate(twin, x)
    return twin


def run(export: OnnxExport, x: Tensor, folder: Path) -> tuple[np.ndarray, dict[str, list[np.ndarray]], Counter[str]]:
    """Logits, codes of every quantizer, and the operators that onnxruntime really runs."""
    model = onnx.load(export.path)
    names = [name for tensors in export.activations.values() for name in tensors]
    inferred = onnx.shape_inference.infer_shapes(model)
    types = {v.name: v for v in inferred.graph.value_info}
    model.graph.output.extend(types[name] for name in names)
    optimized = folder / "optimized.onnx"
    logits, *found = session(model.SerializeToString(), optimized=optimized).run(None, {"input": x.numpy()})
    codes = dict(zip(names, found, strict=True))
    by_quantizer = {q: [codes[name] for name in tensors] for q, tensors in export.activations.items()}
    return logits, by_quantizer, Counter(node.op_type for node in onnx.load(optimized).graph.node)


def check(twin: nn.Module, x: Tensor, folder: Path, **settings: Any) -> Counter[str]:
    """Codes of onnxruntime and of `run_integer` are equal bit for bit, tensor by tensor; returns the operators."""
    export = export_onnx(twin, folder / "model.onnx", example_input=x[:2], overwrite=True, **settings)
    onnx.checker.check_model(str(export.path), full_check=True)
    wanted, codes = run_integer(twin, x, return_codes=True)
    logits, found, operators = run(export, x, folder)
    assert list(found) == list(codes)
    for name, calls in codes.items():
        for own, other in zip(found[name], calls, strict=True):
            assert np.array_equal(own.astype(np.int64), other.numpy().astype(np.int64)), name
    np.testing.assert_allclose(logits, wanted.numpy(), rtol=1e-6, atol=1e-6 * float(wanted.abs().max()))
    return operators


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("bits", [(4, 4), (3, 5), (8, 8), (2, 2)])
def test_codes(network: type[nn.Module], bits: tuple[int, int], tmp_path: Path):
    x = torch.randn(8, 3, 16, 16)
    check(made(randomise(network()), x, weight_bits=bits[0], activation_bits=bits[1]), x, tmp_path)


@pytest.mark.parametrize("settings", [{"weight_symmetric": True}, {"activation_symmetric": True}, {"sum_bits": 4}])
@pytest.mark.parametrize("network", NETWORKS)
def test_codes_of_other_settings(network: type[nn.Module], settings: dict[str, Any], tmp_path: Path):
    x = torch.randn(8, 3, 16, 16)
    check(made(randomise(network()), x, **settings), x, tmp_path)


@pytest.mark.parametrize(
    "network, kernels",
    [
        (Residual, {"QLinearConv": 5, "QLinearAdd": 2, "QLinearGlobalAveragePool": 1, "QGemm": 2}),
        (Inverted, {"QLinearConv": 8, "QLinearAdd": 2, "QLinearGlobalAveragePool": 1, "QGemm": 1}),
        # Its last layer is a convolution, whose sums no kernel of onnxruntime puts out.
        (Dense, {"QLinearConv": 6, "QLinearConcat": 2, "QLinearAveragePool": 1, "QLinearGlobalAveragePool": 1}),
    ],
)
def test_everything_is_an_integer_kernel(network: type[nn.Module], kernels: dict[str, int], tmp_path: Path):
    x = torch.randn(4, 3, 16, 16)
    operators = check(made(randomise(network()), x), x, tmp_path)
    assert {op: count for op, count in operators.items() if op in INTEGER} == kernels
    rest = {"Conv", "DequantizeLinear"} if network is Dense else set()
    assert set(operators) - INTEGER - MOVING == rest
    assert operators["QuantizeLinear"] == 1


def test_gates_and_tables(tmp_path: Path):
    """Hardswish and SiLU have no integer kernel in onnxruntime; around them all is in integers."""
    x = torch.randn(4, 3, 16, 16)
    operators = check(made(randomise(Gated()), x), x, tmp_path)
    assert operators["QLinearConv"] == 5 and operators["QGemm"] == 1 and operators["QLinearMul"] == 1
    assert "Conv" not in operators and "Gemm" not in operators


@pytest.mark.parametrize("network", [Residual, Inverted])
@pytest.mark.parametrize("bits", [4, 3])
def test_packed(network: type[nn.Module], bits: int, tmp_path: Path):
    """INT4 weights with the twin's own codes and zero points: same values, computed in floating point."""
    x = torch.randn(8, 3, 16, 16)
    twin = made(randomise(network()), x, weight_bits=bits)
    with pytest.warns(UserWarning, match="smaller, not faster"):
        export = export_onnx(twin, tmp_path / "packed.onnx", example_input=x[:2], packed=True)
    assert all(layer.container == "INT4" for layer in export.layers)
    logits, found, _ = run(export, x, tmp_path)
    wanted, codes = run_integer(twin, x, return_codes=True)
    for name, calls in codes.items():
        for own, other in zip(found[name], calls, strict=True):
            assert np.array_equal(own.astype(np.int64), other.numpy().astype(np.int64)), name
    np.testing.assert_allclose(logits, wanted.numpy(), rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_file_holds_integers(tmp_path: Path):
    """Explicit QDQ: int8 weights per channel, int32 biases of step input * weight, no BatchNorm, nothing else in float."""
    x = torch.randn(4, 3, 16, 16)
    twin = made(randomise(Residual()), x)
    export = export_onnx(twin, tmp_path / "model.onnx", example_input=x[:2])
    graph = onnx.load(export.path).graph
    made_by = {name: node for node in graph.node for name in node.output}
    values = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(layers) == 7 and not any(node.op_type == "BatchNormalization" for node in graph.node)
    for node in layers:
        data, weight, bias = (made_by[name] for name in node.input)
        assert {n.op_type for n in (data, weight, bias)} == {"DequantizeLinear"}
        codes, scale = (values[name] for name in weight.input[:2])
        bias_codes, unit = (values[name] for name in bias.input)
        assert codes.dtype == np.int8 and np.abs(codes).max() <= 15 and scale.shape == (len(codes),)
        assert bias_codes.dtype == np.int32 and np.array_equal(unit, values[data.input[1]] * scale)
    modules = [m for m in twin.modules() if isinstance(m, (QuantizedConv2d, QuantizedLinear))]
    assert [layer.multiplier for layer in export.layers] == [1] * len(modules)
    assert {layer.batch_norm_folded for layer in export.layers} == {True, False}


def test_integer_operators_are_for_scheme_paper(tmp_path: Path):
    x = torch.randn(2, 3, 16, 16)
    twin = made(randomise(Residual()), x)
    with pytest.raises(ValueError, match="scheme deploy"):
        export_onnx(twin, tmp_path / "model.onnx", example_input=x, operators="integer")
    with pytest.raises(ValueError, match="scheme deploy"):
        export_onnx(twin, tmp_path / "model.onnx", example_input=x, fold_batch_norm=True)


def _torchvision(name: str) -> nn.Module:
    models = pytest.importorskip("torchvision.models")
    model = getattr(models, name)(weights=None)
    if name == "vgg16_bn":
        # Its own classifier has 120 million weights.
        model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Sequential(nn.Linear(512, 64), nn.Linear(64, 10))
    return model


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2", "vgg16_bn"])
def test_torchvision(name: str, tmp_path: Path):
    model, x = randomise(_torchvision(name)), torch.randn(2, 3, 32, 32)
    twin = made(model, x)
    assert unreached(twin) == []
    operators = check(twin, x, tmp_path)
    assert set(operators) <= INTEGER | MOVING and operators["QuantizeLinear"] == 1


def test_regnet_of_timm(tmp_path: Path):
    timm = pytest.importorskip("timm")
    for name in ("efficientnet_lite0", "regnetx_002"):
        model, x = randomise(timm.create_model(name)), torch.randn(2, 3, 32, 32)
        twin = made(model, x)
        assert unreached(twin) == []
        operators = check(twin, x, tmp_path)
        assert set(operators) <= INTEGER | MOVING


def test_resnet20_on_real_images(data_dir: Path, tmp_path: Path):
    """Layer by layer on images of CIFAR-10: onnxruntime, the integers, and the class of the twin."""
    from clusterq.data import open_for
    from clusterq.models import load_model

    loaded = load_model("builtin:resnet20", data_dir / "networks" / "cifar10_resnet20.pt")
    images = open_for(data_dir / "cifar10" / "cifar10_test.npz", loaded)
    x, labels = next(iter(images.batches(512, 512)))
    twin = made(loaded.model, x[:128])
    operators = check(twin, x, tmp_path)
    assert set(operators) <= INTEGER | MOVING
    assert operators["QLinearConv"] == 19 and operators["QLinearAdd"] == 9 and operators["QGemm"] == 1
    with torch.no_grad(), quantized_weights_kept(twin):
        wanted = twin(x).argmax(1)
    found = run_integer(twin, x).argmax(1)
    assert int((wanted != found).sum()) <= 0.001 * len(x) + 1
    assert float((found == labels).float().mean()) > 0.88
    assert len(integer_kernels(export_onnx(twin, tmp_path / "k.onnx", example_input=x[:2])).layers) == 20


def test_mobilenet_v1_on_real_images(data_dir: Path, tmp_path: Path):
    from clusterq.models import load_model

    folder = data_dir / "networks"
    loaded = load_model(
        f"{folder / 'networks.py'}:mobilenet_v1_025", folder / "imagenet_mobilenetv1_025.pt", input_size=64
    )
    x = torch.randn(8, 3, 64, 64)
    twin = made(loaded.model, x, weight_bits=8, activation_bits=8)
    operators = check(twin, x, tmp_path)
    assert set(operators) <= INTEGER | MOVING
