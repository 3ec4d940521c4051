"""An exported network of scheme deploy against `run_integer`, tensor by tensor."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn

from clusterq.config import QuantizationConfig
from clusterq.deploy import run_integer
from clusterq.deploy._onnx_runtime import session
from clusterq.deploy.onnx import OnnxExport, export_onnx
from clusterq.qat.calibrate import calibrate
from clusterq.qat.prepare import prepare

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
