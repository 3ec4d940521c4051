"""The forms of a quantized network on disk that PyTorch reads: checkpoint, packed tensors, exported program.

A checkpoint can be trained on and exported; packed tensors and programs are for inference and need none of the training
code: see `clusterq.deploy.packed` and `clusterq.deploy.plain`.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from clusterq.deploy._capture import capture
from clusterq.deploy._packed_record import RECORD, TENSORS, PackedRecord
from clusterq.deploy.packed import PackedNetwork, save_packed, theoretical_bytes
from clusterq.deploy.plain import convert
from clusterq.export import size_text, table
from clusterq.folders import write_file
from clusterq.nn.layers import quantized_weights_kept
from clusterq.stored import ExportRequest, Opened, open_quantized


def export_torch(
    request: ExportRequest,
    kind: str,
    *,
    packed: bool = False,
    operators: str = "qdq",
    fold_batch_norm: bool = False,
    target: str = "onnxruntime",
) -> dict[str, Any]:
    """`export_packed` (kind `"safetensors"`) or `export_program` (`"pt2"`).

    Raises ValueError for options of ONNX files.
    """
    unused = {
        "packed": packed,
        "operators": operators != "qdq",
        "fold-batch-norm": fold_batch_norm,
        "target": target != "onnxruntime",
    }
    for name, is_given in unused.items():
        if is_given:
            raise ValueError(f"--{name} is given with --format {kind}; it belongs to onnx")
    return export_packed(request) if kind == "safetensors" else export_program(request)


def export_packed(request: ExportRequest) -> dict[str, Any]:
    """Write the packed folder of a checkpoint, read it back, and compare its outputs with the checkpoint's.

    The output is by default `packed` in the checkpoint's folder.

    Returns:
        Plain values: `path`, `layers` (`name`, `bits`, `stored_bytes`, `float_bytes`), `activation_bits`,
        `tensor_bytes`, `record_bytes`, `theoretical_bytes`, `float_bytes`, `agreement` (`same`, `of`, `images`; the
        same means every bit of the outputs).

    Raises:
        ClusterQError: see `clusterq.errors`; no folder is left behind when it could not be written whole.
    """
    opened = request.open("packed")
    record, target = opened.record, opened.target
    written = save_packed(
        opened.network,
        target,
        input_shape=record.input_shape,
        source=record.source,
        mean=record.mean,
        std=record.std,
        overwrite=request.overwrite,
    )
    network, _ = open_quantized(target, request.model, trust=request.trust)
    tensor_bytes, record_bytes = ((target / name).stat().st_size for name in (TENSORS, RECORD))
    return {
        "path": str(target),
        "layers": _layers(written),
        "activation_bits": {name: bits for name, bits, *_ in written.record.activations},
        "tensor_bytes": tensor_bytes,
        "record_bytes": record_bytes,
        "theoretical_bytes": theoretical_bytes(written.numbers),
        "float_bytes": sum(4 * v.numel() for v in written.numbers.state_dict().values()),
        "agreement": _agreement(opened, network),
    }


def export_program(request: ExportRequest) -> dict[str, Any]:
    """Write a checkpoint or packed folder as a `torch.export` program of PyTorch's own operators.

    The output is a file, by default `model.pt2` in the folder. The program takes batches of any size where the network
    allows it, and its weights are float32.

    Returns:
        Plain values: `path`, `file_bytes`, `operators` (number of calls), `agreement` as in `export_packed`.

    Raises:
        ClusterQError: see `clusterq.errors`; no file is left behind when it could not be written whole.
    """
    opened = request.open("model.pt2", is_packed_taken=True)
    plain = opened.network if isinstance(opened.record, PackedRecord) else convert(opened.network)
    program = capture(plain, torch.zeros(2, *opened.record.input_shape))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    write_file(opened.target, buffer.getvalue())
    buffer.seek(0)
    return {
        "path": str(opened.target),
        "file_bytes": opened.target.stat().st_size,
        "operators": sum(node.op == "call_function" for node in program.graph.nodes),
        "agreement": _agreement(opened, torch.export.load(buffer).module()),
    }


def _agreement(opened: Opened, other: nn.Module) -> dict[str, Any]:
    same, count = equal_outputs(opened.network, other, opened.batches())
    return {"same": same, "of": count, "images": opened.images}


def equal_outputs(first: nn.Module, second: nn.Module, batches: Iterable[Tensor]) -> tuple[int, int]:
    """For how many images two networks give the same bits, and of how many."""
    same = count = 0
    with torch.no_grad(), quantized_weights_kept(first):
        for images in batches:
            same += int((first(images) == second(images)).flatten(1).all(1).sum())
            count += len(images)
    return same, count


def describe(result: dict[str, Any]) -> str:
    """What `export_packed` or `export_program` returned, for people."""
    same = result["agreement"]
    agreement = f"same outputs as the checkpoint, bit for bit: {same['same']} of {same['of']} images ({same['images']})"
    if "layers" not in result:
        size = size_text(result["file_bytes"])
        return f"{result['path']}: {size}, {result['operators']} calls of PyTorch's own operators\n{agreement}"
    rows = [["layer", "bits", "stored", "float"]]
    rows += [
        [layer["name"], str(layer["bits"]), size_text(layer["stored_bytes"]), size_text(layer["float_bytes"])]
        for layer in result["layers"]
    ]
    lines = [table(rows)]
    tensors, theory = result["tensor_bytes"], result["theoretical_bytes"]
    above = f"{100 * (tensors / theory - 1):.1f} % above the {theory} B of its numbers"
    lines += [
        "",
        f"{result['path']}: tensors {tensors} B, {above}; record {result['record_bytes']} B; in floating point "
        f"{size_text(result['float_bytes'])}",
        agreement,
    ]
    return "\n".join(lines)


def _layers(packed: PackedNetwork) -> list[dict[str, Any]]:
    # Zero points are in the file for all weights or for none.
    byte = int(any(bool(w.zero_point.any()) for w in packed.numbers.weights.values()))
    return [
        {
            "name": name.removesuffix(".weight"),
            "bits": weight.bits,
            "stored_bytes": (weight.codes.numel() * weight.bits + 7) // 8 + (4 + byte) * len(weight.scale),
            "float_bytes": 4 * weight.codes.numel(),
        }
        for name, weight in packed.numbers.weights.items()
    ]
