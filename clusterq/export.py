"""`clusterq export`: a checkpoint as a file for other runtimes, and what the runtime makes of it."""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clusterq.errors import require
from clusterq.stored import ExportRequest


def export_checkpoint(
    request: ExportRequest,
    *,
    packed: bool = False,
    operators: Any = "qdq",
    fold_batch_norm: bool = False,
    target: Any = "onnxruntime",
    threads: int = 1,
) -> dict[str, Any]:
    """Write the ONNX file of a checkpoint, run it, and tell what came of it.

    The output is by default `model.onnx` in the checkpoint's folder.

    Args:
        request: what to read and write, and the images to compare classes on.
        packed, operators, fold_batch_norm, target: see `clusterq.export_onnx`.
        threads: of the runtimes.

    Returns:
        Plain values: `path`, `opset`, `operators`, `target`, `file_bytes`, `float_file_bytes`, `layers`,
        `activation_bits`, `kernels`, `threads`, `milliseconds` of an image by batch size (in onnxruntime: `float`,
        `exported`, and `ratio`, the median over rounds of the second by the first; in OpenVINO, where it is installed,
        `openvino_float` and so on), `agreement` (`same`, `of`, `images`), `openvino` (see `_openvino`).

    Raises:
        ClusterQError: see `clusterq.errors`; no file is left behind when it could not be written whole.
    """
    from clusterq.deploy.onnx import export_onnx

    require("onnx", purpose="clusterq export", extra="export")
    require("onnxruntime", purpose="clusterq export", extra="export")
    from clusterq.deploy import _onnx_runtime as runtime

    opened = request.open("model.onnx")
    twin, path, shape = opened.network, opened.target, opened.record.input_shape
    example = torch.zeros(2, *shape)
    written = export_onnx(
        twin,
        path,
        example_input=example,
        packed=packed,
        operators=operators,
        fold_batch_norm=fold_batch_norm,
        target=target,
        overwrite=request.overwrite,
    )
    kernels = runtime.integer_kernels(written)
    image = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    full = runtime.float_model(twin, example)
    same, count = runtime.same_classes(twin, runtime.runner(path, threads=threads), opened.batches())
    openvino = _openvino(written, twin, opened.batches(), threads)
    beside = openvino is not None and "error" not in openvino
    layers = [asdict(layer) | {"integer_kernel": layer.name in kernels.layers} for layer in written.layers]
    for layer in layers:
        layer["openvino_integer"] = layer["name"] in openvino["layers"] if beside and openvino is not None else None
    return {
        "path": str(path),
        "opset": written.opset,
        "operators": operators,
        "target": target,
        "file_bytes": written.file_bytes,
        "float_file_bytes": len(full),
        "layers": layers,
        "activation_bits": written.activation_bits,
        "kernels": kernels.counts,
        "threads": threads,
        "milliseconds": {
            str(batch): milliseconds(full, path, image, batch, threads=threads, openvino=beside) for batch in (1, 32)
        },
        "agreement": {"same": same, "of": count, "images": opened.images},
        "openvino": openvino,
    }


def milliseconds(
    full: bytes, exported: Path, image: Tensor, batch: int, *, threads: int, openvino: bool, seconds: float = 0.5
) -> dict[str, float]:
    """Medians of both networks in onnxruntime, and in OpenVINO, interleaved; see `export_checkpoint` for the names.

    Args:
        full, exported: the network in floating point and the exported one.
        image: [C, H, W], repeated to a batch. OpenVINO's networks are compiled for this size of the batch.
        batch, threads: of the runs.
        openvino: whether to measure there too.
        seconds: of each of the networks.
    """
    from clusterq.deploy import _onnx_runtime as runtime
    from clusterq.deploy import _openvino_runtime as other

    x = image.expand(batch, *image.shape).contiguous()
    runs = [runtime.runner(model, threads=threads) for model in (full, exported)]
    if openvino:
        runs += [other.runner(other.compiled(model, threads=threads, batch=batch)) for model in (full, exported)]
    times = runtime.interleaved([functools.partial(run, x.numpy()) for run in runs], seconds=seconds)
    found: dict[str, float] = {}
    for name, (first, second) in {"": times[:2], "openvino_": times[2:] or ([], [])}.items():
        if first:
            found[f"{name}float"] = 1000 * statistics.median(first) / batch
            found[f"{name}exported"] = 1000 * statistics.median(second) / batch
            found[f"{name}ratio"] = statistics.median(b / a for a, b in zip(first, second, strict=True))
    return found


def _openvino(written: Any, twin: nn.Module, batches: Iterable[Tensor], threads: int) -> dict[str, Any] | None:
    """What OpenVINO makes of a file; None where it is not installed.

    `version`, `integer` and `floating` (products by kind), `layers` (names of those in integers), `same` and `of`
    (images with the twin's class); or `version` and `error` where it cannot run the file.
    """
    from clusterq.deploy import _onnx_runtime as runtime
    from clusterq.deploy import _openvino_runtime as other

    if not other.is_installed():
        return None
    version = str(require("openvino", purpose="running a network in OpenVINO").__version__)
    try:
        model = other.compiled(written.path, threads=threads)
    # What it raises for a file that it cannot take, such as one with a type that it does not know.
    except RuntimeError as error:
        return {"version": version, "error": (str(error).strip().splitlines() or ["no message"])[-1]}
    found = other.products(model)
    same, count = runtime.same_classes(twin, other.runner(model), batches)
    layers = found.layers(written)
    return {
        "version": version,
        "integer": found.integer,
        "floating": found.floating,
        "layers": layers,
        "same": same,
        "of": count,
    }


def describe(result: dict[str, Any]) -> str:
    """The table of layers, a line on the file, and the table of runtimes."""
    openvino = result["openvino"]
    beside = openvino is not None and "error" not in openvino
    rows = [["layer", "kind", "bits", "stored", "float", "in onnxruntime"] + ["in openvino"] * beside]
    for layer in result["layers"]:
        kernels = ["integer" if layer["integer_kernel"] else "float"]
        if beside:
            kernels.append("integer" if layer["openvino_integer"] else "float")
        stored = f"{layer['container']} {size_text(layer['stored_bytes'])}"
        rows.append(
            [layer["name"], layer["kind"], str(layer["bits"]), stored, size_text(layer["float_bytes"]), *kernels]
        )
    integer, same = sum(layer["integer_kernel"] for layer in result["layers"]), result["agreement"]
    of = f"of {len(result['layers'])}"
    runtimes = [["runtime", "integer kernels", "layers", *(f"batch {b}" for b in result["milliseconds"]), "same class"]]
    alike = f"{same['same']} of {same['of']}"
    runtimes.append(["onnxruntime", _counts(result["kernels"]), f"{integer} {of}", *_times(result, ""), alike])
    if beside:
        alike, layers = f"{openvino['same']} of {openvino['of']}", f"{len(openvino['layers'])} {of}"
        runtimes.append(["openvino", _counts(openvino["integer"]), layers, *_times(result, "openvino_"), alike])
    lines = [
        table(rows),
        "",
        f"{result['path']}: opset {result['opset']}, {size_text(result['file_bytes'])}; in floating point "
        f"{size_text(result['float_file_bytes'])}",
        "",
        table(runtimes),
        "",
        f"time per image (threads: {result['threads']}), of that in floating point in the same runtime; same class as "
        f"the quantized network in PyTorch, images: {same['images']}",
    ]
    if openvino is not None and not beside:
        lines.append(f"openvino cannot run this file: {openvino['error']}")
    if result["target"] == "tensorrt":
        lines.append("the file is for TensorRT, which was not run: kernels, times and classes are those of onnxruntime")
    elif integer == 0 and not any(layer["container"] == "INT4" for layer in result["layers"]):
        lines.append(
            "BatchNorm and sums in floating point keep layers from onnxruntime's integer kernels: quantize with "
            "--set quantization.scheme=deploy; for this network --operators integer and --fold-batch-norm are the ways "
            "out, see clusterq.export_onnx for what they cost"
        )
    return "\n".join(lines)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Padded columns with a rule below the first row."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def _counts(kernels: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(kernels.items())) or "none"


def _times(result: dict[str, Any], runtime: str) -> list[str]:
    exported, full, ratio = (f"{runtime}{kind}" for kind in ("exported", "float", "ratio"))
    return [f"{t[exported]:.3f} of {t[full]:.3f} ms ({t[ratio]:.2f}x)" for t in result["milliseconds"].values()]


def as_json(result: dict[str, Any]) -> str:
    return json.dumps(result, indent=2)


def size_text(count: int) -> str:
    """A number of bytes, for people."""
    if count < 10_000:
        return f"{count} B"
    return f"{count / 1000:.0f} kB" if count < 10_000_000 else f"{count / 1e6:.1f} MB"
