"""An exported network in OpenVINO on the CPU: which layers it multiplies in integers, and how to run it.

Any ONNX file of this package will do. Floating point is float32 here: where a processor has bfloat16, OpenVINO takes
that by itself.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clusterq.deploy._onnx_runtime import Run
from clusterq.deploy.onnx import OnnxExport
from clusterq.errors import require

# What multiplies by weights, in OpenVINO's words for what it runs, and the 8-bit types it names.
_PRODUCTS = ("Convolution", "FullyConnected", "MatMul", "Deconvolution")
_EIGHT_BITS = ("u8", "i8")


@dataclass(frozen=True)
class Products:
    """What OpenVINO's CPU plugin makes of the layers of a file.

    Attributes:
        integer: number of products of two 8-bit operands by kind.
        floating: number of all other products by kind.
        weights: names of the 8-bit weights in integer products.
    """

    integer: dict[str, int]
    floating: dict[str, int]
    weights: frozenset[str]

    def layers(self, export: OnnxExport) -> list[str]:
        """Names of the quantized layers of the file that are computed in integers."""
        return [layer.name for layer in export.layers if layer.codes in self.weights]


def is_installed() -> bool:
    return importlib.util.find_spec("openvino") is not None


def compiled(model: bytes | str | Path, *, threads: int = 1, batch: int | None = None) -> Any:
    """The `CompiledModel` of an ONNX file or its bytes; `batch` fixes the size of the batch.

    Raises MissingPackageError when openvino is not installed.
    """
    openvino = require("openvino", purpose="running a network in OpenVINO", extra="openvino")
    core = openvino.Core()
    read = core.read_model(model=model, weights=b"") if isinstance(model, bytes) else core.read_model(str(model))
    if batch is not None:
        read.reshape([batch, *list(read.input(0).partial_shape)[1:]])
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
        # Beside other work a pinned thread waits for its core while another core is idle.
        "ENABLE_CPU_PINNING": False,
    }
    return core.compile_model(read, "CPU", settings)


def products(model: Any) -> Products:
    """Integer and other products of a `CompiledModel`, from the types of the operands of what it really runs."""
    integer: Counter[str] = Counter()
    floating: Counter[str] = Counter()
    weights: set[str] = set()
    for op in model.get_runtime_model().get_ordered_ops():
        kind = op.get_rt_info()["layerType"].astype(str)
        if kind not in _PRODUCTS:
            continue
        types = [operand.get_element_type().get_type_name() for operand in op.input_values()[:2]]
        if all(name in _EIGHT_BITS for name in types):
            integer[kind] += 1
            weights.add(op.input_value(1).get_node().get_friendly_name())
        else:
            floating[kind] += 1
    return Products(dict(integer), dict(floating), frozenset(weights))


def runner(model: Any) -> Run:
    """A function from an input to the first output of a `CompiledModel`, which the next call overwrites."""
    request = model.create_infer_request()

    def run(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        found: np.ndarray[Any, Any] = request.infer([x], share_inputs=True, share_outputs=True)[0]
        return found

    return run
