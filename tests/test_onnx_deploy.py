"""Networks of scheme deploy in onnxruntime: its codes are those of `run_integer`, from integer kernels alone."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from clusterq.deploy import run_integer
from clusterq.deploy.onnx import export_onnx
from clusterq.nn.layers import QuantizedConv2d, QuantizedLinear

sys.path.insert(0, os.path.dirname(__file__))
from deploy_cases import Dense, Gated, Inverted, Residual, randomise
from onnx_deploy_checks import INTEGER, MOVING, check, made, onnx, run


@pytest.mark.parametrize(
    "network, settings",
    [
        (Residual, {"weight_bits": 8, "activation_bits": 8}),
        (Dense, {"weight_bits": 8, "activation_bits": 6}),
        (Inverted, {"weight_bits": 3, "activation_bits": 5, "weight_symmetric": True}),
        (Gated, {"weight_bits": 2, "activation_bits": 2, "sum_bits": 4}),
        (Gated, {"activation_symmetric": True}),
    ],
)
def test_codes(network: type[nn.Module], settings: dict[str, Any], tmp_path: Path):
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


@pytest.mark.parametrize("network, bits", [(Residual, 4), (Inverted, 3)])
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


class Padded(nn.Module):
    """Padding between layers; only zeros are codes of any grid."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = settings
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.pad(nn.functional.relu(self.first(x)), (1, 2, 0, 1), **self.settings)
        return self.last(x).mean((2, 3))


@pytest.mark.parametrize("settings", [{}, {"value": 0.0}, {"value": 1.0}, {"value": -0.7}, {"mode": "reflect"}])
def test_padding(settings: dict[str, Any], tmp_path: Path):
    """By zeros it is on codes; by anything else the file has the numbers of the twin all the same."""
    x = torch.randn(4, 3, 16, 16)
    zeros = not settings.get("value") and "mode" not in settings
    with contextlib.nullcontext() if zeros else pytest.warns(UserWarning, match="pad"):
        twin = made(Padded(**settings).eval(), x, weight_bits=8, activation_bits=8)
    if zeros:
        check(twin, x, tmp_path)
    export = export_onnx(twin, tmp_path / "model.onnx", example_input=x[:2], overwrite=True)
    found, _, _ = run(export, x, tmp_path)
    with torch.no_grad():
        wanted = twin(x)
    # Of a code of 8 bits in a few places; another number in the border is ten times as much.
    assert float((torch.from_numpy(found) - wanted).norm() / wanted.norm()) < 0.01


def test_file_holds_integers(tmp_path: Path):
    """Explicit QDQ: int8 weights per channel, int32 biases of step input * weight, no BatchNorm."""
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
