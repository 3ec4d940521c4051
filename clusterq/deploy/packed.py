"""Quantized networks as plain tensors: a folder with `packed.safetensors` and `packed.json.gz`, for any language.

`packed.json.gz`, JSON text in gzip, says what the network is and lists, one entry a line and in this order everywhere:

- `weights`: `[name, shape, bits]`;
- `activations`: `[name, bits, quant_min, zero_point, activation]`, quant_max being `quant_min + 2^bits - 1`;
- `batch_norms`: `[name, channels, eps]`;
- `tensors`: `[name, dtype, shape]`, all that is left, biases above all.

`packed.safetensors` holds one tensor of each kind, in which the entries follow one another without gaps:

- `codes`, uint8: per weight ceil(elements * bits / 8) bytes, a stream of bits in which bit i is bit i % 8 of byte
  i // 8, bit 0 the lowest. Element j in row-major order takes bits j * bits to (j + 1) * bits - 1, its lowest bit
  first, in two's complement (-2^(bits-1) to 2^(bits-1) - 1). What the last byte has left is 0.
- `scales`, float32, and `zero_points`, int8: per weight `shape[0]` numbers. Without `zero_points` all are 0.
- `activation_scales`, float32: one per activation.
- `batch_norms`, float32: per entry gamma, beta, running mean and running variance, `channels` numbers each.
- `tensors.DTYPE`: the elements of every entry of this dtype in row-major order.

A weight is (code - zero_point) * scale per entry of axis 0. A quantizer computes its activation function (`relu`,
`relu6`, or `none`: what the network has there itself), then
(clamp(round(x * (1 / scale)) + zero_point, quant_min, quant_max) - zero_point) * scale; round is half to even, all of
it in float32. Everything is little-endian.

So the folder takes `theoretical_bytes`, half a kilobyte of header and 1-2 kB of record; the same network written again
by the same versions has the same bytes. Loading checks the record, which is never unpacked beyond its limit, the size
of the file against it, its SHA-256, and every length, before a weight is made; nothing is unpickled and no code that a
file names is run.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clusterq import ops
from clusterq.deploy._packed_record import (
    RECORD,
    TENSORS,
    PackedRecord,
    check_numbers,
    check_readable,
    code_bytes,
    dtype_name,
    has_record,
    read_record,
)
from clusterq.deploy.plain import ActivationGrid, CodedWeight, Numbers, norm_eps, numbers_of, parts_of, plain
from clusterq.errors import CheckpointError, ModelError, require
from clusterq.folders import new_folder
from clusterq.method import Result
from clusterq.models import Source, output_classes
from clusterq.network_record import rebuilt_twin
from clusterq.nn.folding import NORM_PARTS
from clusterq.qat.prepare import prepared_with

__all__ = ["PackedNetwork", "is_packed", "load_packed", "save_packed", "theoretical_bytes"]


@dataclass(frozen=True)
class PackedNetwork:
    """What a packed file holds.

    Attributes:
        record: where the network came from, its shapes and settings.
        numbers: its codes, scales and other tensors, see `clusterq.deploy.plain.Numbers`.
    """

    record: PackedRecord
    numbers: Numbers

    def network(self, model: nn.Module | None = None) -> nn.Module:
        """The network in plain PyTorch, as `clusterq.deploy.convert` makes it, on the CPU.

        Args:
            model: the network in floating point; only its architecture is used. Needed when it came from a Python file
                or was handed over as a module.

        Raises:
            CheckpointError: the network cannot be rebuilt, or does not fit.
            ModelError, MissingPackageError: see `clusterq.network_record.rebuilt_twin`.
        """
        twin = rebuilt_twin(self.record, self.record.quantization, model, "the packed file")
        self._check_names(twin)
        self._check_norms(twin)
        self._check_shapes(twin.state_dict())
        return plain(twin, self.numbers)

    def _check_names(self, twin: nn.Module) -> None:
        """That the network has a place for every entry, and the file an entry for every place."""
        numbers, parts = self.numbers, parts_of(twin)
        pairs = {
            "weight": (set(numbers.weights), set(parts.weights)),
            "quantizer": (set(numbers.activations), set(parts.activations)),
            "tensor": (set(numbers.tensors), set(parts.tensors)),
        }
        for kind, (held, wanted) in pairs.items():
            if held != wanted:
                name = min(held ^ wanted)
                what = "is missing in the file" if name in wanted else "has no place in the network"
                raise CheckpointError(f"the packed file does not fit the network: {kind} {name} {what}")
        for name, grid in numbers.activations.items():
            if parts.activations[name].activation != grid.activation:
                raise CheckpointError(f"the packed file does not fit the network: {name} computes {grid.activation}")

    def _check_norms(self, twin: nn.Module) -> None:
        for name, _, eps in self.record.batch_norms:
            own = norm_eps(twin.get_submodule(name))
            if own != eps:
                raise CheckpointError(f"the packed file does not fit the network: {name} has eps {own}; wanted {eps}")

    def _check_shapes(self, own: Mapping[str, Tensor]) -> None:
        shapes = {name: weight.codes.shape for name, weight in self.numbers.weights.items()}
        shapes |= {name: value.shape for name, value in self.numbers.tensors.items()}
        for name, shape in shapes.items():
            if name in own and own[name].shape != shape:
                raise CheckpointError(
                    f"the packed file does not fit the network: {name} is {list(shape)}; wanted {list(own[name].shape)}"
                )


def save_packed(
    model: nn.Module | Result,
    path: str | Path,
    *,
    input_shape: tuple[int, int, int] | None = None,
    source: Source | None = None,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
    overwrite: bool = False,
) -> PackedNetwork:
    """Write a quantized network as packed codes and plain tensors.

    Args:
        model: what `clusterq.prepare` made, with ranges, or a `Result`, which brings `input_shape`.
        path: folder to make; appears whole or not at all.
        input_shape: channels, height, width of one image.
        source: where the network came from; lets `load_packed(path).network()` rebuild it.
        mean, std: normalisation of pixels in 0..1.
        overwrite: replace a folder of that name.

    Returns:
        What was written.

    Raises:
        TypeError: a network without `input_shape`.
        ModelError: a network that is not quantized, has no ranges (names the layer), cannot run on such images, or
            holds what `load_packed` would refuse: complex numbers, NaN, and what is larger than a record may describe.
        OutputError: the folder exists or cannot be written.
    """
    from clusterq.versions import versions

    if isinstance(model, Result):
        channels, height, width = model.images.shape[1:]
        input_shape = input_shape or (channels, height, width)
        model = model.student
    if input_shape is None:
        raise TypeError("input_shape is needed to save a network; only a Result brings it along")
    quantization = prepared_with(model)
    numbers = numbers_of(model)
    norms = _batch_norms(model, numbers)
    tensors = _pack(numbers, norms)
    data = require("safetensors.torch", purpose="saving a network").save(tensors)
    record = PackedRecord(
        network=type(model).__name__,
        quantization=quantization,
        input_shape=input_shape,
        num_classes=output_classes(model, input_shape),
        source=source,
        mean=mean,
        std=std,
        tensors_sha256=hashlib.sha256(data).hexdigest(),
        # The rest had no part in the numbers, and the record is a good part of a small network's bytes.
        versions={name: version for name, version in versions().items() if name in ("clusterq", "python", "torch")},
        weights=tuple((name, tuple(w.codes.shape), w.bits) for name, w in numbers.weights.items()),
        activations=tuple(
            (name, (grid.quant_max - grid.quant_min).bit_length(), grid.quant_min, grid.zero_point, grid.activation)
            for name, grid in numbers.activations.items()
        ),
        batch_norms=tuple((name, len(numbers.tensors[f"{name}.weight"]), eps) for name, eps in norms.items()),
        tensors=tuple(
            (name, dtype_name(value.dtype), tuple(value.shape)) for name, value in _remaining(numbers, norms).items()
        ),
    )
    described = check_readable(record)
    check_numbers(tensors, "the network cannot be packed", ModelError)
    with new_folder(path, overwrite=overwrite) as folder:
        (folder / TENSORS).write_bytes(data)
        (folder / RECORD).write_bytes(described)
    return PackedNetwork(record, numbers)


def load_packed(path: str | Path) -> PackedNetwork:
    """Read what `save_packed` wrote, as plain tensors.

    Raises:
        CheckpointError: not a packed network, damaged (a single flipped bit is noticed), of an unknown format, with
            sizes that contradict each other, or with numbers that no quantizer has.
    """
    folder = Path(path)
    record = read_record(folder)
    file = folder / TENSORS
    return PackedNetwork(record, _unpack(_read(file, record), record, file))


def is_packed(path: str | Path) -> bool:
    """Whether a folder says that it is a packed network."""
    return has_record(Path(path))


def theoretical_bytes(numbers: Numbers) -> int:
    """What a network takes without any overhead.

    That is the sum over its weights of elements * bits / 8, rounded up once; 4 bytes for every scale of a weight or
    activation; a byte for every zero point of a weight where some are not 0; its other tensors as they are.
    """
    weights = numbers.weights.values()
    bits = sum(w.codes.numel() * w.bits for w in weights)
    scales = sum(w.scale.numel() for w in weights)
    zero_points = scales if any(bool(w.zero_point.any()) for w in weights) else 0
    rest = sum(v.numel() * v.element_size() for v in numbers.tensors.values())
    return math.ceil(bits / 8) + 4 * (scales + len(numbers.activations)) + zero_points + rest


def _batch_norms(model: nn.Module, numbers: Numbers) -> dict[str, float]:
    """eps by name of every BatchNorm that has all four of its float32 tensors."""
    return {
        name: norm_eps(module)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, _BatchNorm)
        and all(
            f"{name}.{part}" in numbers.tensors and numbers.tensors[f"{name}.{part}"].dtype == torch.float32
            for part in NORM_PARTS
        )
    }


def _remaining(numbers: Numbers, norms: Mapping[str, float]) -> dict[str, Tensor]:
    apart = {f"{name}.{part}" for name in norms for part in NORM_PARTS}
    return {name: value for name, value in numbers.tensors.items() if name not in apart}


def _pack(numbers: Numbers, norms: Mapping[str, float]) -> dict[str, Tensor]:
    """The tensors of the file, each of one dimension."""
    weights = list(numbers.weights.values())
    groups = {
        "codes": [ops.pack_codes(w.codes.flatten(), w.bits) for w in weights],
        "scales": [w.scale for w in weights],
        "activation_scales": [grid.scale for grid in numbers.activations.values()],
        "batch_norms": [numbers.tensors[f"{name}.{part}"] for name in norms for part in NORM_PARTS],
    }
    if any(bool(w.zero_point.any()) for w in weights):
        groups["zero_points"] = [w.zero_point for w in weights]
    for value in _remaining(numbers, norms).values():
        groups.setdefault(f"tensors.{dtype_name(value.dtype)}", []).append(value.flatten())
    empty = torch.zeros(0)
    return {name: torch.cat(parts) if parts else empty for name, parts in groups.items()}


def _read(file: Path, record: PackedRecord) -> dict[str, Tensor]:
    """The tensors of the file, of the dtypes and lengths that the record describes."""
    if not file.is_file():
        raise CheckpointError(f"{file.parent} is incomplete: it has no {TENSORS}")
    record.check_file_size(file.stat().st_size, file)
    # Read once: what is hashed is what is used.
    data = file.read_bytes()
    if hashlib.sha256(data).hexdigest() != record.tensors_sha256:
        raise CheckpointError(f"{file} is damaged: its SHA-256 is not the one in {RECORD}")
    error_type = require("safetensors", purpose="loading a network").SafetensorError
    try:
        tensors: dict[str, Tensor] = require("safetensors.torch", purpose="loading a network").load(data)
    # Of dtypes that it does not know safetensors says KeyError.
    except (error_type, KeyError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    expected = record.expected()
    if "zero_points" not in tensors:
        tensors["zero_points"] = torch.zeros(expected["zero_points"][1], dtype=torch.int8)
    if set(tensors) != set(expected):
        raise CheckpointError(f"{file} holds {sorted(tensors)}; its record describes {sorted(expected)}")
    for name, (dtype, length) in expected.items():
        got = tensors[name]
        if got.dtype != dtype or got.shape != (length,):
            found = f"{got.dtype} {list(got.shape)}"
            raise CheckpointError(f"{file}: {name} is {found}; its record describes {dtype} [{length}]")
    check_numbers(tensors, str(file), CheckpointError)
    return tensors


def _unpack(tensors: Mapping[str, Tensor], record: PackedRecord, file: Path) -> Numbers:
    taken = dict.fromkeys(tensors, 0)

    def take(name: str, count: int) -> Tensor:
        start = taken[name]
        taken[name] += count
        return tensors[name][start : start + count].clone()

    weights: dict[str, CodedWeight] = {}
    for name, shape, bits in record.weights:
        packed = take("codes", code_bytes(shape, bits))
        codes = ops.unpack_codes(packed, bits, math.prod(shape), signed=True).reshape(shape)
        weights[name] = CodedWeight(codes, take("scales", shape[0]), take("zero_points", shape[0]), bits)
        half, zero_points = 1 << (bits - 1), weights[name].zero_point.int()
        if bool(((zero_points < -half) | (zero_points >= half)).any()):
            raise CheckpointError(f"{file}: a zero point of {name} lies outside its {bits}-bit codes")
    activations: dict[str, ActivationGrid] = {}
    for name, bits, quant_min, zero_point, activation in record.activations:
        top = quant_min + (1 << bits) - 1
        fused: Any = activation
        activations[name] = ActivationGrid(take("activation_scales", 1), zero_point, quant_min, top, fused)
    values: dict[str, Tensor] = {}
    for name, channels, _ in record.batch_norms:
        values |= {f"{name}.{part}": take("batch_norms", channels) for part in NORM_PARTS}
    for name, dtype, shape in record.tensors:
        values[name] = take(f"tensors.{dtype}", math.prod(shape)).reshape(shape)
    return Numbers(weights, activations, values)
