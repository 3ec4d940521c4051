"""`clusterq export`: a checkpoint as a file for other runtimes, and what the runtime makes of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
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
        threads: of onnxruntime.

    Returns:
        Plain values: `path`, `opset`, `operators`, `file_bytes`, `float_file_bytes`, `layers`, `activation_bits`,
        `kernels`, `threads`, `milliseconds` by batch size (`float` and `exported`), `agreement` (`same`, `of`,
        `images`).

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
    times = {
        batch: runtime.milliseconds_per_image([full, target], image, batch=batch, threads=threads) for batch in (1, 32)
    }
    batches = _random(record.input_shape) if images is None else (x for x, _ in images.batches(batch_size, limit))
    same, count = runtime.agreement(twin, target, batches, threads=threads)
    layers = [asdict(layer) | {"integer_kernel": layer.name in kernels.layers} for layer in written.layers]
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
        "milliseconds": {str(batch): {"float": full, "exported": own} for batch, (full, own) in times.items()},
        "agreement": {"same": same, "of": count, "images": "random" if images is None else images.name},
    }


def describe(result: dict[str, Any]) -> str:
    """The table of layers and three lines below it."""
    rows = [["layer", "kind", "bits", "stored", "float", "in onnxruntime"]]
    for layer in result["layers"]:
        kernel = "integer" if layer["integer_kernel"] else "float"
        stored = f"{layer['container']} {_bytes(layer['stored_bytes'])}"
        rows.append([layer["name"], layer["kind"], str(layer["bits"]), stored, _bytes(layer["float_bytes"]), kernel])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * w for w in widths))
    integer = sum(layer["integer_kernel"] for layer in result["layers"])
    kernels = ", ".join(f"{count} {name}" for name, count in sorted(result["kernels"].items())) or "none"
    same = result["agreement"]
    lines += [
        "",
        f"{result['path']}: opset {result['opset']}, {_bytes(result['file_bytes'])}; in floating point "
        f"{_bytes(result['float_file_bytes'])}",
        f"integer kernels: {kernels}; {integer} of {len(result['layers'])} layers",
        "time per image: "
        + "; ".join(
            f"batch {batch}: {t['exported']:.3f} ms, in floating point {t['float']:.3f} ms"
            for batch, t in result["milliseconds"].items()
        )
        + f" (threads: {result['threads']})",
        f"same class as the quantized network in PyTorch: {same['same']} of {same['of']} images ({same['images']})",
    ]
    if integer == 0 and not any(layer["container"] == "INT4" for layer in result["layers"]):
        lines.append(
            "BatchNorm and sums in floating point keep layers from integer kernels; --operators integer and "
            "--fold-batch-norm are the ways out, see clusterq.export_onnx for what they cost"
        )
    return "\n".join(lines)


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
