"""An exported network in onnxruntime on the CPU: integer kernels, time, agreement with its twin."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clusterq.deploy.onnx import OnnxExport, build
from clusterq.errors import require
from clusterq.nn.layers import quantized_weights_kept

Run = Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]

# Operators that multiply integers, of ONNX and of onnxruntime's own domain.
_INTEGER = (
    "QLinearConv",
    "ConvInteger",
    "QLinearMatMul",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
    "QGemm",
)


@dataclass(frozen=True)
class Kernels:
    """What onnxruntime makes of a file.

    Attributes:
        counts: number of integer operators by type.
        layers: names of the quantized layers that they compute.
    """

    counts: dict[str, int]
    layers: frozenset[str]


def session(model: bytes | str | Path, *, threads: int = 1, optimized: Path | None = None) -> Any:
    """An InferenceSession on the CPU; `optimized`: file for the graph it really runs.

    Raises MissingPackageError when onnxruntime is not installed.
    """
    onnxruntime = require("onnxruntime", purpose="running an ONNX file", extra="export")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def integer_kernels(export: OnnxExport) -> Kernels:
    """Integer operators in the graph that onnxruntime runs, by its own account."""
    onnx = require("onnx", purpose="ONNX export", extra="export")
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder, "optimized.onnx")
        session(export.path, optimized=optimized)
        nodes = [node for node in onnx.load(optimized).graph.node if node.op_type in _INTEGER]
    read = {name for node in nodes for name in node.input}
    # Kernels that store a weight in another order append to its name.
    layers = {
        layer.name
        for layer in export.layers
        if layer.codes in read or any(name.startswith(f"{layer.codes}_") for name in read)
    }
    return Kernels(dict(Counter(node.op_type for node in nodes)), frozenset(layers))


def interleaved(calls: Sequence[Callable[[], object]], *, seconds: float = 0.5) -> list[list[float]]:
    """Seconds of each call in turn, round after round, after one that is not counted.

    Rounds go on for as many seconds per call, and for 5 at least: what a shared machine slows down, it slows down for
    all calls alike.
    """
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    end = time.perf_counter() + seconds * len(calls)
    while time.perf_counter() < end or len(times[0]) < 5:
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return times


def runner(model: bytes | str | Path, *, threads: int = 1) -> Run:
    """A function from an input to the first output of a file."""
    run = session(model, threads=threads)

    def call(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        found: np.ndarray[Any, Any] = run.run(["output"], {"input": x})[0]
        return found

    return call


def float_model(model: nn.Module, example_input: Tensor) -> bytes:
    """The same network in floating point, as an ONNX file in memory: what the integer one is to be compared with."""
    data: bytes = build(model, example_input, quantized=False)[0].SerializeToString()
    return data


def same_classes(
    model: nn.Module,
    run: Run,
    batches: Iterable[Tensor],
) -> tuple[int, int]:
    """How many images get the same class from the twin and from a runtime, and of how many."""
    same = count = 0
    with torch.inference_mode(), quantized_weights_kept(model):
        for images in batches:
            wanted = model(images).argmax(1).numpy()
            same += int((wanted == np.argmax(run(images.numpy()), axis=1)).sum())
            count += len(images)
    return same, count
