"""The forms of a quantized network on disk that PyTorch reads: checkpoint, packed tensors, exported program.

A checkpoint can be trained on and exported; packed tensors and programs are for inference and need none of the training
code: see `clusterq.deploy.packed` and `clusterq.deploy.plain`.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clusterq import checkpoint
from clusterq.deploy._capture import capture
from clusterq.deploy._packed_record import PackedRecord
from clusterq.deploy.packed import PackedNetwork, is_packed, load_packed, save_packed, theoretical_bytes
from clusterq.deploy.plain import convert
from clusterq.errors import OutputError
from clusterq.export import _bytes, _open, _random, find_checkpoint, table
from clusterq.folders import write_file
from clusterq.models import build_model
from clusterq.nn.layers import quantized_weights_kept
from clusterq.trust import network_source

Record = checkpoint.CheckpointRecord | PackedRecord


def open_quantized(path: Path, model: str | None = None, *, trust: bool = False) -> tuple[nn.Module, Record]:
    """The network of a checkpoint or of a packed folder, in evaluation mode on the CPU, and its record.

    Args:
        path: the folder.
        model: specification of the network, when the folder cannot rebuild it.
        trust: without `model`, run the Python file that the folder names as its network.

    Raises:
        CheckpointError: see `clusterq.load` and `clusterq.deploy.load_packed`.
    """
    packed = load_packed(path) if is_packed(path) else None
    record = checkpoint.read_record(path) if packed is None else packed.record
    recorded = None if record.source is None else record.source.model
    spec = network_source(model, recorded, trust=trust)
    given = None if spec is None else build_model(spec, record.num_classes)
    return checkpoint.load(path, given) if packed is None else packed.network(given), record


def export_torch(
    path: Path,
    kind: str,
    *,
    packed: bool = False,
    operators: str = "qdq",
    fold_batch_norm: bool = False,
    **given: Any,
) -> dict[str, Any]:
    """`export_packed` (kind `"safetensors"`) or `export_program` (`"pt2"`).

    Raises ValueError for options of ONNX files.
    """
    unused = {"packed": packed, "operators": operators != "qdq", "fold-batch-norm": fold_batch_norm}
    for name, is_given in unused.items():
        if is_given:
            raise ValueError(f"--{name} is given with --format {kind}; it belongs to onnx")
    return export_packed(path, **given) if kind == "safetensors" else export_program(path, **given)


def export_packed(
    path: Path,
    *,
    output: Path | None = None,
    bits: str | None = None,
    model: str | None = None,
    evaluation: str | None = None,
    limit: int | None = None,
    batch_size: int = 128,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the packed folder of a checkpoint, read it back, and compare its outputs with the checkpoint's.

    Args:
        path, bits: see `clusterq.export.find_checkpoint`.
        output: folder to make; default: `packed` in the checkpoint's folder.
        model: specification of the network, when the checkpoint cannot rebuild it.
        evaluation: evaluation set to compare outputs on; default: random images.
        limit, batch_size: of that set.
        overwrite: replace a folder of that name.

    Returns:
        Plain values: `path`, `layers` (`name`, `bits`, `stored_bytes`, `float_bytes`), `activation_bits`,
        `tensor_bytes`, `record_bytes`, `theoretical_bytes`, `float_bytes`, `agreement` (`same`, `of`, `images`; the
        same means every bit of the outputs).

    Raises:
        ClusterQError: see `clusterq.errors`; no folder is left behind when it could not be written whole.
    """
    folder = find_checkpoint(path, bits)
    target = folder / "packed" if output is None else output
    twin, record = open_quantized(folder, model)
    images = None if evaluation is None else _open(evaluation, record, twin)
    written = save_packed(
        twin,
        target,
        input_shape=record.input_shape,
        source=record.source,
        mean=record.mean,
        std=record.std,
        overwrite=overwrite,
    )
    read = load_packed(target)
    network = read.network(None if model is None else build_model(model, record.num_classes))
    batches = _random(record.input_shape) if images is None else (x for x, _ in images.batches(batch_size, limit))
    same, count = equal_outputs(twin, network, batches)
    files = [file.stat().st_size for file in (target / "packed.safetensors", target / "packed.json")]
    return {
        "path": str(target),
        "layers": _layers(written),
        "activation_bits": {name: bits for name, bits, *_ in written.record.activations},
        "tensor_bytes": files[0],
        "record_bytes": files[1],
        "theoretical_bytes": theoretical_bytes(written.numbers),
        "float_bytes": sum(4 * v.numel() for v in written.numbers.state_dict().values()),
        "agreement": {"same": same, "of": count, "images": "random" if images is None else images.name},
    }


def export_program(
    path: Path,
    *,
    output: Path | None = None,
    bits: str | None = None,
    model: str | None = None,
    evaluation: str | None = None,
    limit: int | None = None,
    batch_size: int = 128,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a checkpoint or packed folder as a `torch.export` program of PyTorch's own operators.

    Arguments as in `export_packed`; `output` is a file, by default `model.pt2` in the folder. The program takes batches
    of any size where the network allows it, and its weights are float32.

    Returns:
        Plain values: `path`, `file_bytes`, `operators` (number of calls), `agreement` as in `export_packed`.

    Raises:
        ClusterQError: see `clusterq.errors`; no file is left behind when it could not be written whole.
    """
    folder = path if is_packed(path) else find_checkpoint(path, bits)
    target = folder / "model.pt2" if output is None else output
    if target.exists() and not overwrite:
        raise OutputError(f"{target} exists already; choose another --output or give --overwrite")
    network, record = open_quantized(folder, model)
    images = None if evaluation is None else _open(evaluation, record, network)
    plain = network if isinstance(record, PackedRecord) else convert(network)
    program = capture(plain, torch.zeros(2, *record.input_shape))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    write_file(target, buffer.getvalue())
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    batches = _random(record.input_shape) if images is None else (x for x, _ in images.batches(batch_size, limit))
    same, count = equal_outputs(network, loaded, batches)
    return {
        "path": str(target),
        "file_bytes": target.stat().st_size,
        "operators": sum(node.op == "call_function" for node in program.graph.nodes),
        "agreement": {"same": same, "of": count, "images": "random" if images is None else images.name},
    }


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
        size = _bytes(result["file_bytes"])
        return f"{result['path']}: {size}, {result['operators']} calls of PyTorch's own operators\n{agreement}"
    rows = [["layer", "bits", "stored", "float"]]
    rows += [
        [layer["name"], str(layer["bits"]), _bytes(layer["stored_bytes"]), _bytes(layer["float_bytes"])]
        for layer in result["layers"]
    ]
    lines = [table(rows)]
    tensors, theory = result["tensor_bytes"], result["theoretical_bytes"]
    above = f"{100 * (tensors / theory - 1):.1f} % above the {theory} B of its numbers"
    lines += [
        "",
        f"{result['path']}: tensors {tensors} B, {above}; record {result['record_bytes']} B; in floating point "
        f"{_bytes(result['float_bytes'])}",
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
