"""`clusterq export`: a checkpoint as a file for other runtimes, and what the runtime makes of it."""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clusterq import checkpoint, data
from clusterq.deploy._packed_record import PackedRecord
from clusterq.errors import CheckpointError, OutputError, require
from clusterq.models import build_model, own_transform

_RANDOM_IMAGES = 256


def find_checkpoint(path: Path, bits: str | None) -> Path:
    """The checkpoint folder that `path` is, or the one of width `bits` in the run folder that it is.

    Raises CheckpointError when there is none, or several and `bits` chooses none.
    """
    if (path / checkpoint.RECORD).is_file():
        return path
    found = sorted(folder.parent for folder in path.glob(f"checkpoints/*/{checkpoint.RECORD}"))
    if not found:
        raise CheckpointError(f"{path} is neither a checkpoint nor a run folder with checkpoints")
    chosen = [folder for folder in found if bits is None or folder.name == bits.upper()]
    if len(chosen) != 1:
        names = ", ".join(folder.name for folder in found)
        raise CheckpointError(f"{path} holds the checkpoints {names}; choose one by --bits")
    return chosen[0]


def export_checkpoint(
    path: Path,
    *,
    output: Path | None = None,
    bits: str | None = None,
    model: str | None = None,
    packed: bool = False,
    operators: Any = "qdq",
    fold_batch_norm: bool = False,
    evaluation: str | None = None,
    limit: int | None = None,
    batch_size: int = 128,
    threads: int = 1,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the ONNX file of a checkpoint, run it, and tell what came of it.

    Args:
        path, bits: see `find_checkpoint`.
        output: file to write; default: `model.onnx` in the checkpoint's folder.
        model: specification of the network, when the checkpoint cannot rebuild it.
        packed, operators, fold_batch_norm, overwrite: see `clusterq.export_onnx`.
        evaluation: evaluation set to compare classes on; default: random images.
        limit, batch_size: of that set.
        threads: of the runtimes.

    Returns:
        Plain values: `path`, `opset`, `operators`, `file_bytes`, `float_file_bytes`, `layers`, `activation_bits`,
        `kernels`, `threads`, `milliseconds` of an image by batch size (in onnxruntime: `float`, `exported`, and
        `ratio`, the median over rounds of the second by the first; in OpenVINO, where it is installed,
        `openvino_float` and so on), `agreement` (`same`, `of`, `images`), `openvino` (see `_openvino`).

    Raises:
        ClusterQError: see `clusterq.errors`; no file is left behind when it could not be written whole.
    """
    from clusterq.deploy.onnx import export_onnx

    require("onnx", purpose="clusterq export", extra="export")
    require("onnxruntime", purpose="clusterq export", extra="export")
    from clusterq.deploy import _onnx_runtime as runtime

    folder = find_checkpoint(path, bits)
    target = folder / "model.onnx" if output is None else output
    if target.exists() and not overwrite:
        raise OutputError(f"{target} exists already; choose another --output or give --overwrite")
    record = checkpoint.read_record(folder)
    network = None if model is None else build_model(model, record.num_classes)
    twin = checkpoint.load(folder, network)
    images = None if evaluation is None else _open(evaluation, record, twin)
    example = torch.zeros(2, *record.input_shape)
    written = export_onnx(
        twin,
        target,
        example_input=example,
        packed=packed,
        operators=operators,
        fold_batch_norm=fold_batch_norm,
        overwrite=overwrite,
    )
    kernels = runtime.integer_kernels(written)
    image = torch.randn(record.input_shape, generator=torch.Generator().manual_seed(0))
    full = runtime.float_model(twin, example)

    def batches() -> Iterable[Tensor]:
        return _random(record.input_shape) if images is None else (x for x, _ in images.batches(batch_size, limit))

    same, count = runtime.agreement(twin, target, batches(), threads=threads)
    openvino = _openvino(written, twin, batches(), threads)
    beside = openvino is not None and "error" not in openvino
    layers = [asdict(layer) | {"integer_kernel": layer.name in kernels.layers} for layer in written.layers]
    for layer in layers:
        layer["openvino_integer"] = layer["name"] in openvino["layers"] if beside and openvino is not None else None
    return {
        "path": str(target),
        "opset": written.opset,
        "operators": operators,
        "file_bytes": written.file_bytes,
        "float_file_bytes": len(full),
        "layers": layers,
        "activation_bits": written.activation_bits,
        "kernels": kernels.counts,
        "threads": threads,
        "milliseconds": {
            str(batch): milliseconds(full, target, image, batch, threads=threads, openvino=beside) for batch in (1, 32)
        },
        "agreement": {"same": same, "of": count, "images": "random" if images is None else images.name},
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
    calls = [runtime.runner(model, x, threads=threads) for model in (full, exported)]
    if openvino:
        for model in (full, exported):
            run = other.runner(other.compiled(model, threads=threads, batch=batch))
            calls.append(functools.partial(run, x.numpy()))
    times = runtime.interleaved(calls, seconds=seconds)
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
    layers = [layer.name for layer in written.layers if layer.codes in found.weights]
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
        stored = f"{layer['container']} {_bytes(layer['stored_bytes'])}"
        rows.append([layer["name"], layer["kind"], str(layer["bits"]), stored, _bytes(layer["float_bytes"]), *kernels])
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
        f"{result['path']}: opset {result['opset']}, {_bytes(result['file_bytes'])}; in floating point "
        f"{_bytes(result['float_file_bytes'])}",
        "",
        table(runtimes),
        "",
        f"time per image (threads: {result['threads']}), and as a multiple of that in floating point in the same "
        f"runtime; same class as the quantized network in PyTorch, images: {same['images']}",
    ]
    if openvino is not None and not beside:
        lines.append(f"openvino cannot run this file: {openvino['error']}")
    if integer == 0 and not any(layer["container"] == "INT4" for layer in result["layers"]):
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
    return [f"{t[f'{runtime}exported']:.3f} ms ({t[f'{runtime}ratio']:.2f}x)" for t in result["milliseconds"].values()]


def as_json(result: dict[str, Any]) -> str:
    return json.dumps(result, indent=2)


def _open(spec: str, record: checkpoint.CheckpointRecord | PackedRecord, twin: nn.Module) -> data.EvaluationSet:
    transform = None
    if record.source is not None:
        transform = own_transform(record.source, twin, record.input_shape, record.mean, record.std)
    images = data.open_data(spec, input_shape=record.input_shape, mean=record.mean, std=record.std, transform=transform)
    data.check_fits(images, record.num_classes)
    return images


def _random(shape: tuple[int, int, int]) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(_RANDOM_IMAGES // 32):
        yield torch.randn(32, *shape, generator=generator)


def _bytes(count: int) -> str:
    if count < 10_000:
        return f"{count} B"
    return f"{count / 1000:.0f} kB" if count < 10_000_000 else f"{count / 1e6:.1f} MB"
