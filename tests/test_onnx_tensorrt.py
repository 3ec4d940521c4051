"""Files for TensorRT: node by node what its explicit quantization takes, and in onnxruntime the integers' codes."""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import clusterq
from clusterq.cli import main
from clusterq.config import QuantizationConfig
from clusterq.data import EvaluationSet
from clusterq.deploy import load_packed, run_integer, save_packed
from clusterq.deploy.onnx import export_onnx
from clusterq.errors import ModelError
from clusterq.models import LoadedModel, load_model
from clusterq.networks import resnet20
from clusterq.nn.layers import quantized_weights_kept
from clusterq.qat.calibrate import calibrate
from clusterq.qat.prepare import prepare, report, unreached

sys.path.insert(0, os.path.dirname(__file__))
from deploy_cases import Dense, Gated, Inverted, Residual, randomise
from integer_checks import check_codes
from onnx_deploy_checks import made, onnx, run

INT8 = onnx.TensorProto.INT8
# What TensorRT fuses with its neighbours in INT8, by the inputs that have to be dequantized.
READS_CODES = {
    **{"Conv": 2, "Gemm": 2, "Add": 2},
    **dict.fromkeys(
        ("GlobalAveragePool", "AveragePool", "MaxPool", "Slice", "Pad", "Flatten", "Reshape", "Squeeze"), 1
    ),
}


def export(twin: nn.Module, x: Tensor, folder: Path) -> Any:
    return export_onnx(twin, folder / "model.onnx", example_input=x[:2], target="tensorrt", overwrite=True)


def check_structure(path: Path) -> Counter[str]:
    """Every node and initializer against the rules of TensorRT's parser; returns the operators."""
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    made_by = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)
    values = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    types = {v.name: v.type.tensor_type.elem_type for v in [*graph.value_info, *graph.output, *graph.input]}

    def kind(name: str) -> str:
        return made_by[name].op_type if name in made_by else "constant" if name in values else "input"

    for node in graph.node:
        attributes = {a.name: a.i for a in node.attribute}
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert all(name in values for name in node.input[1:]) and (values[node.input[1]] > 0).all(), node.name
            zeros = [values[name] for name in node.input[2:]]
            # Without one, QuantizeLinear makes UINT8.
            assert all(z.dtype == np.int8 and not z.any() for z in zeros), node.name
            assert zeros or node.op_type == "DequantizeLinear", node.name
        if node.op_type == "QuantizeLinear":
            assert values[node.input[1]].shape == () and types[node.output[0]] == INT8, node.name
            assert set(readers[node.output[0]]) == {"DequantizeLinear"}, node.name
        elif node.op_type == "DequantizeLinear" and kind(node.input[0]) == "constant":
            weight, scale = (values[name] for name in node.input[:2])
            # The channels of the output: axis 0 of Conv and Gemm, which is turned.
            assert weight.dtype == np.int8 and scale.shape == (len(weight),) and attributes["axis"] == 0, node.name
            assert set(readers[node.output[0]]) <= {"Conv", "Gemm"}, node.name
        elif node.op_type == "DequantizeLinear":
            assert kind(node.input[0]) == "QuantizeLinear", node.name
        else:
            assert all(types[name] == onnx.TensorProto.FLOAT for name in node.output), node.name
        if node.op_type == "Clip":
            assert [values[name].dtype for name in node.input[1:]] == [np.float32] * 2, node.name
        if node.op_type in ("Clip", "Relu"):
            assert readers[node.output[0]] == ["QuantizeLinear"], node.name
        is_last = all(op == "Identity" for name in node.output for op in readers.get(name, []))
        if node.op_type in READS_CODES and not (is_last and kind(node.input[0]) == "Conv"):
            reads = node.input[: READS_CODES[node.op_type]]
            assert [kind(name) for name in reads] == ["DequantizeLinear"] * len(reads), node.name
        if node.op_type in ("Conv", "Gemm"):
            assert kind(made_by[node.input[1]].input[0]) == "constant", node.name
            assert all(values[name].dtype == np.float32 for name in node.input[2:]), node.name
        if node.op_type == "Gemm":
            assert attributes["transB"] == 1, node.name
    return Counter(node.op_type for node in graph.node)


def check_numbers(twin: nn.Module, x: Tensor, folder: Path) -> Any:
    """Codes and logits in onnxruntime against the integers; returns the logits."""
    written = export(twin, x, folder)
    logits, found, _ = run(written, x, folder)
    quantizers: Any = dict(twin.named_modules())
    codes = {
        name: [torch.from_numpy(c).long() + quantizers[name].qparams()[1].long() for c in calls]
        for name, calls in found.items()
    }
    wanted = check_codes(twin, x, codes).numpy()
    np.testing.assert_allclose(logits, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
    return logits


@pytest.mark.parametrize("network", [Residual, Inverted, Dense])
@pytest.mark.parametrize("bits", [(4, 4), (8, 8), (2, 3), (6, 7)])
def test_codes(network: type[nn.Module], bits: tuple[int, int], tmp_path: Path) -> None:
    """Also of images far outside the range, where every limit of codes is met."""
    x = torch.randn(8, 3, 16, 16)
    twin = made(randomise(network()), x, weight_bits=bits[0], activation_bits=bits[1], int8_symmetric=True)
    check_numbers(twin, x, tmp_path)
    check_numbers(twin, 30 * x, tmp_path)


def test_codes_at_their_limits(tmp_path: Path) -> None:
    """The largest codes of every width are there, those beyond it are not."""
    x = torch.randn(8, 3, 16, 16)
    twin = made(randomise(Inverted()), x, activation_bits=3, sum_bits=5, int8_symmetric=True)
    _, found, _ = run(export(twin, x, tmp_path), 1000 * x, tmp_path)
    ends = {name: (int(calls[0].min()), int(calls[0].max())) for name, calls in found.items()}
    assert ends["input_quantizer"] == (-128, 127) and ends["stem.2"] == (0, 7)
    grids = {row.name: row.activation_bits for row in report(twin) if row.activation_bits is not None}
    signed = {name for name, (low, _) in ends.items() if low < 0}
    for name, (low, high) in ends.items():
        half = 2 ** (grids[name] - 1)
        allowed = (-half, half - 1) if name in signed else (0, 2 * half - 1)
        assert allowed[0] <= low and high <= allowed[1], name
    assert {grids[name] for name in signed} == {3, 5, 8}


@pytest.mark.parametrize("network", [Residual, Inverted, Dense, Gated])
def test_structure(network: type[nn.Module], tmp_path: Path) -> None:
    x = torch.randn(4, 3, 16, 16)
    for bits in (4, 8):
        twin = made(randomise(network()), x, weight_bits=bits, activation_bits=bits, int8_symmetric=True)
        operators = check_structure(export(twin, x, tmp_path).path)
        assert (operators["Clip"] > 0) == (bits == 4)


def test_relu6(tmp_path: Path) -> None:
    """Its limit is the code of 6 where the range goes on, and the largest code where it does not."""
    x = 100 * torch.randn(8, 3, 16, 16)
    twin: Any = made(randomise(Inverted()), x, activation_bits=8, int8_symmetric=True)
    with torch.no_grad():
        twin.stem[2].scale.fill_(0.1)
    check_numbers(twin, x, tmp_path)
    graph = onnx.load(tmp_path / "model.onnx").graph
    values = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    clips = [node for node in graph.node if node.name == "stem.2/clip"]
    assert [[values[name] for name in node.input[1:]] for node in clips] == [[np.float32(0), np.float32(6)]]
    _, found, _ = run(export(twin, x, tmp_path), x, tmp_path)
    assert int(found["stem.2"][0].max()) == 60


def test_structure_of_resnet20(tmp_path: Path) -> None:
    """19 convolutions, each with its quantizer, 9 sums, the image and the mean: 30 quantizers, and what moves codes."""
    x = torch.randn(4, 3, 32, 32)
    for bits in (4, 8):
        twin = made(randomise(resnet20()), x, weight_bits=bits, activation_bits=bits, int8_symmetric=True)
        operators = check_structure(export(twin, x, tmp_path).path)
        moving = sum(operators[op] for op in ("Slice", "Pad", "Reshape", "Flatten", "Squeeze"))
        assert operators == Counter(
            {
                **{"Conv": 19, "Add": 9, "GlobalAveragePool": 1, "Gemm": 1, "Identity": 1, "Slice": 4, "Pad": 2},
                **{"QuantizeLinear": 30 + moving, "DequantizeLinear": 30 + moving + 20},
                **{"Clip" if bits == 4 else "Relu": 20 if bits == 4 else 19, "Reshape": 1},
            }
        )


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
@pytest.mark.parametrize("bits", [4, 8])
def test_torchvision(name: str, bits: int, data_dir: Path, tmp_path: Path) -> None:
    """Most of a minute of torch.export each: only where CLUSTERQ_DATA asks for real networks."""
    models = pytest.importorskip("torchvision.models")
    x = torch.randn(2, 3, 64, 64)
    twin = made(
        randomise(getattr(models, name)(weights=None)), x, weight_bits=bits, activation_bits=bits, int8_symmetric=True
    )
    assert unreached(twin) == []
    check_numbers(twin, x, tmp_path)
    operators = check_structure(tmp_path / "model.onnx")
    counts = {op: operators[op] for op in ("Conv", "Gemm", "Add", "MaxPool", "GlobalAveragePool")}
    assert tuple(counts.values()) == ((20, 1, 8, 1, 1) if name == "resnet18" else (52, 1, 10, 0, 1))


def test_numbers_are_those_of_the_other_file(tmp_path: Path) -> None:
    """Same weights and steps as for onnxruntime; biases are its int32 times their step."""
    x = torch.randn(4, 3, 16, 16)
    twin = made(randomise(Inverted()), x, int8_symmetric=True)
    export(twin, x, tmp_path)
    export_onnx(twin, tmp_path / "other.onnx", example_input=x[:2])
    layers = []
    for name in ("model.onnx", "other.onnx"):
        graph = onnx.load(tmp_path / name).graph
        values = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
        made_by = {name: node for node in graph.node for name in node.output}
        layers.append({})
        for node in graph.node:
            if node.op_type in ("Conv", "Gemm"):
                weight = [values[name] for name in made_by[node.input[1]].input[:2]]
                bias = node.input[2]
                held = [values[bias]] if bias in values else [values[name] for name in made_by[bias].input]
                layers[-1][node.name] = (*weight, *held)
    ours, theirs = layers
    assert list(ours) == list(theirs) and len(ours) == 9
    for name, (codes, scale, bias) in ours.items():
        other_codes, other_scale, bias_codes, unit = theirs[name]
        assert np.array_equal(codes, other_codes) and np.array_equal(scale, other_scale)
        assert bias_codes.dtype == np.int32 and np.array_equal(bias, (bias_codes * np.float64(unit)).astype(np.float32))


def test_zero_points_of_narrow_tensors_are_taken_off(tmp_path: Path) -> None:
    """Up to 7 bits any codes fit: less their zero points, weights as well as activations."""
    x = torch.randn(8, 3, 16, 16) + 0.5
    twin = made(randomise(Inverted()), x, input_bits=7, sum_bits=7, activation_bits=5)
    quantizers = [m for m in twin.modules() if isinstance(m, clusterq.nn.ActivationQuantizer)]
    assert sum(bool(q.zero_point) for q in quantizers) > 3
    check_numbers(twin, x, tmp_path)
    check_numbers(twin, 30 * x, tmp_path)
    check_structure(tmp_path / "model.onnx")


def test_weights_with_zero_points(tmp_path: Path) -> None:
    """The settings that fit without `int8_symmetric`: 8 bits for the image alone, around 0."""
    x = torch.randn(8, 3, 16, 16)
    for network in (Residual, Inverted, Dense):
        twin = made(randomise(network()), x, weight_bits=3, activation_bits=3, sum_bits=7, activation_symmetric=True)
        assert any(bool(m.zero_point.any()) for m in twin.modules() if isinstance(m, clusterq.nn.WeightQuantizer))
        check_numbers(twin, x, tmp_path)
        check_structure(tmp_path / "model.onnx")


def test_a_range_that_began_at_zero(tmp_path: Path) -> None:
    """Calibrated on what was never negative, with zero point 0, a tensor of both signs is cut off at 0 all the same."""
    x = torch.rand(8, 3, 16, 16)
    twin = made(randomise(Residual()), x, input_bits=7, sum_bits=7)
    assert int(twin.input_quantizer.zero_point) == 0 and twin.input_quantizer.quant_max == 127
    check_numbers(twin, -x, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"those of input_quantizer \(-\d+ to \d+\), .*: quantize with --set quantization\.int8_symmetric=true$"),
        (
            {"activation_symmetric": True, "activation_bits": 8},
            r"those of relu \(0 to 255\), .* and \d+ more: quantize",
        ),
        ({"activation_symmetric": True, "layer_bits": {"relu": 8}}, r"room for those of relu \(0 to 255\): quantize"),
    ],
)
def test_codes_that_do_not_fit(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    x = torch.randn(4, 3, 16, 16) - 0.3
    twin = made(randomise(Residual()), x, **settings)
    with pytest.raises(ModelError, match=message) as error:
        export(twin, x, tmp_path)
    assert len(str(error.value).splitlines()) == 1 and os.listdir(tmp_path) == []


def test_what_belongs_elsewhere(tmp_path: Path) -> None:
    x = torch.randn(4, 3, 16, 16)
    twin = made(randomise(Residual()), x, int8_symmetric=True)
    paper = prepare(randomise(Residual()), QuantizationConfig(scheme="paper", int8_symmetric=True))
    calibrate(paper, x)
    cases: list[tuple[nn.Module, dict[str, Any], str]] = [
        (twin, {"target": "tensorflow"}, "target is 'tensorflow'; wanted onnxruntime or tensorrt"),
        (twin, {"target": "tensorrt", "packed": True}, 'packed is given with target "tensorrt"'),
        (twin, {"target": "tensorrt", "operators": "integer"}, "scheme paper"),
        (paper, {"target": "tensorrt"}, 'target "tensorrt" is for scheme deploy'),
    ]
    for network, settings, message in cases:
        with pytest.raises(ValueError, match=re.escape(message)):
            export_onnx(network, tmp_path / "model.onnx", example_input=x, **settings)
    assert os.listdir(tmp_path) == []


def _checkpoint(folder: Path, **settings: Any) -> None:
    loaded = load_model("builtin:digits")
    config = QuantizationConfig(scheme="deploy", **settings)
    twin = prepare(loaded.model, config)
    calibrate(twin, torch.rand(16, *loaded.input_shape))
    known = {"input_shape": loaded.input_shape, "source": loaded.source, "mean": loaded.mean, "std": loaded.std}
    clusterq.save(twin, folder, config=clusterq.ClusterQConfig(quantization=config), **known)


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint, its packed form and its file for TensorRT; and one that does not fit."""
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    _checkpoint(tmp_path / "fits", weight_bits=8, activation_bits=8, int8_symmetric=True)
    _checkpoint(tmp_path / "wide", weight_bits=8, activation_bits=8)
    words = ["--threads", "1", "--device", "cpu"]
    data = ["--data", "digits", "--limit", "64", *words]
    assert main(["export", "fits", "--target", "tensorrt", "--json", *data]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["target"] == "tensorrt" and result["agreement"] == {
        "same": 64,
        "of": 64,
        "images": "digits (held-out)",
    }
    assert set(result["activation_bits"].values()) == {7, 8}
    check_structure(tmp_path / "fits" / "model.onnx")
    metadata = {p.key: p.value for p in onnx.load(tmp_path / "fits" / "model.onnx").metadata_props}
    assert metadata["clusterq_target"] == "tensorrt"
    assert main(["export", "fits", "--target", "tensorrt", "--overwrite", *words]) == 0
    assert "for TensorRT, which was not run" in capsys.readouterr().out
    assert main(["export", "fits", "--format", "safetensors", *words]) == 0
    assert "bit for bit: 256 of 256" in capsys.readouterr().out
    found = []
    for form in ("fits", "fits/packed"):
        assert main(["evaluate", form, "--json", "--quiet", *data]) == 0
        found.append(json.loads(capsys.readouterr().out)["top1"])
    assert found[0] == found[1]
    for arguments, message in (
        (["export", "wide", "--target", "tensorrt"], "quantization.int8_symmetric=true"),
        (["export", "fits", "--target", "tensorrt", "--format", "pt2"], "--target is given with --format pt2"),
    ):
        assert main([*arguments, *words]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "wide" / "model.onnx").exists()


@pytest.mark.parametrize("settings", [{}, {"learned_scale": False, "activation_range": "ema"}])
def test_other_forms(settings: dict[str, Any], tmp_path: Path) -> None:
    """In integers and packed, as without the setting."""
    x = torch.randn(8, 3, 16, 16)
    twin = made(randomise(Inverted()), x, weight_bits=8, activation_bits=8, int8_symmetric=True, **settings)
    save_packed(twin, tmp_path / "packed", input_shape=(3, 16, 16))
    with torch.no_grad():
        wanted = twin(x)
        assert torch.equal(load_packed(tmp_path / "packed").network(Inverted())(x), wanted)
    torch.testing.assert_close(run_integer(twin, x), wanted, rtol=0, atol=0.02 * float(wanted.abs().max()))


@pytest.mark.parametrize("bits", [4, 8])
def test_resnet20_on_real_images(bits: int, cifar10: tuple[LoadedModel, EvaluationSet], tmp_path: Path) -> None:
    """The class of the twin for 300 images of CIFAR-10, and the logits of the integers.

    onnxruntime computes these files in floating point, where a code on a rounding boundary may fall on its other side.
    """
    loaded, images = cifar10
    x, labels = next(iter(images.batches(300, 300)))
    twin = made(loaded.model, x[:128], weight_bits=bits, activation_bits=bits, int8_symmetric=True)
    logits = torch.from_numpy(check_numbers(twin, x, tmp_path))
    check_structure(tmp_path / "model.onnx")
    with torch.no_grad(), quantized_weights_kept(twin):
        wanted = twin(x)
    assert int((logits.argmax(1) == wanted.argmax(1)).sum()) >= 298
    # Where no code fell on the other side of a rounding boundary the logits are the twin's, too.
    size = wanted.abs().amax(1)
    assert float(((logits - wanted).abs().amax(1) <= 1e-5 * size).float().mean()) > 0.75
    assert float((logits.argmax(1) == labels).float().mean()) > 0.88
