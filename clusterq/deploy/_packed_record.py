"""The record of a packed network, `packed.json.gz`: written, read, and checked before anything is allocated."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor

from clusterq import readers
from clusterq.config import ClusterQConfig, QuantizationConfig
from clusterq.errors import CheckpointError, ModelError
from clusterq.network_record import NetworkRecord, shared_fields
from clusterq.nn.folding import NORM_PARTS
from clusterq.nn.quantizers import Fused
from clusterq.records import fields_checked, items, number, text, whole

FORMAT, FORMAT_VERSION = "clusterq-packed", 1
TENSORS, RECORD = "packed.safetensors", "packed.json.gz"
_UNPACKED_RECORD = RECORD.removesuffix(".gz")
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
}
# Settings that made the numbers and are not needed to read them: left out where they have their default.
_TRAINED_WITH = ("weight_range", "activation_range", "gradient", "correct_batch_norm", "range_momentum", "range_steps")
# Groups whose numbers enter products: what is infinite there would make NaN.
_FINITE = ("scales", "activation_scales", "batch_norms")
LAYOUT = (
    "packed.safetensors, little-endian: one tensor per kind, entries one after another. "
    "weights [name, shape, bits]: codes, ceil(elements*bits/8) bytes each; element j, row-major, is bits j*bits to "
    "(j+1)*bits-1, lowest first, two's complement, bit i being bit i%8 (0: lowest) of byte i//8; scales, zero_points "
    "(absent: 0), shape[0] each; (code-zero_point)*scale per entry of axis 0. "
    "activations [name, bits, quant_min, zero_point, function]: activation_scales; in float32, y = function(x): "
    "(clamp(round_half_even(y*(1/scale))+zero_point, quant_min, quant_min+2^bits-1)-zero_point)*scale. "
    "batch_norms [name, channels, eps]: gamma, beta, mean, variance. "
    "tensors [name, dtype, shape]: tensors.DTYPE, row-major."
)
# A record is a line per layer, 40,000 of them at least: what a few kB of gzip can ask for stays small, also as JSON
# values, which take up to 30 times as much memory as their text. A header has its limit too.
_MAX_RECORD, _MAX_HEADER = 1 << 22, 1 << 16
_MAX_SIZE, _MAX_NAME, _MAX_DIMENSIONS = 1 << 31, 1024, 8

WeightEntry = tuple[str, tuple[int, ...], int]
ActivationEntry = tuple[str, int, int, int, str]
NormEntry = tuple[str, int, float]
TensorEntry = tuple[str, str, tuple[int, ...]]
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class PackedRecord(NetworkRecord):
    """What `packed.json.gz` says, beside what every record does.

    Attributes:
        network: class of the network; a label.
        quantization: settings it was prepared with. The file leaves out what only training reads and has its default.
        weights, activations, batch_norms, tensors: the entries, see `clusterq.deploy.packed`.
    """

    network: str
    quantization: QuantizationConfig
    weights: tuple[WeightEntry, ...]
    activations: tuple[ActivationEntry, ...]
    batch_norms: tuple[NormEntry, ...]
    tensors: tuple[TensorEntry, ...]

    def to_json(self) -> str:
        """One entry a line, nothing else between them: of a small network the record is a part of the bytes."""
        quantization = ClusterQConfig(quantization=self.quantization).to_dict()["quantization"]
        usual = ClusterQConfig().to_dict()["quantization"]
        quantization = {k: v for k, v in quantization.items() if k not in _TRAINED_WITH or v != usual[k]}
        head = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "layout": LAYOUT,
            "network": self.network,
            **self.shared_json(),
            "quantization": quantization,
        }
        lines = [f"{json.dumps(key)}:{_compact(value)}" for key, value in head.items()]
        for key in ("weights", "activations", "batch_norms", "tensors"):
            entries = ",\n".join(_compact(entry) for entry in getattr(self, key))
            lines.append(f'"{key}":[\n{entries}]' if entries else f'"{key}":[]')
        return "{" + ",\n".join(lines) + "}\n"

    def expected(self) -> dict[str, tuple[torch.dtype, int]]:
        """Dtype and length of every tensor of the file; `zero_points` may be left out of it."""
        channels = sum(shape[0] for _, shape, _ in self.weights)
        found = {
            "codes": (torch.uint8, sum(code_bytes(shape, bits) for _, shape, bits in self.weights)),
            "scales": (torch.float32, channels),
            "zero_points": (torch.int8, channels),
            "activation_scales": (torch.float32, len(self.activations)),
            "batch_norms": (torch.float32, 4 * sum(count for _, count, _ in self.batch_norms)),
        }
        for _, dtype, shape in self.tensors:
            name = f"tensors.{dtype}"
            found[name] = DTYPES[dtype], found.get(name, (None, 0))[1] + math.prod(shape)
        return found

    def check_file_size(self, size: int, file: Path) -> None:
        """Raises CheckpointError for a file that cannot be the one described."""
        expected = self.expected()
        payload = sum(dtype.itemsize * count for dtype, count in expected.values())
        least = payload - expected["zero_points"][1]
        if not least <= size <= payload + _MAX_HEADER:
            raise CheckpointError(
                f"{file} is damaged: it has {size} bytes; its record describes {payload} and a header"
            )


def dtype_name(dtype: torch.dtype) -> str:
    """`"float32"` and so on, as entries have it."""
    return str(dtype).removeprefix("torch.")


def code_bytes(shape: Iterable[int], bits: int) -> int:
    """Bytes of the codes of one weight."""
    return (math.prod(shape) * bits + 7) // 8


def has_record(folder: Path) -> bool:
    """Whether a folder says that it is a packed network; one whose record was unpacked says so too."""
    return any((folder / name).is_file() for name in (RECORD, _UNPACKED_RECORD))


def read_record(folder: Path) -> PackedRecord:
    """The record of a packed network, every field checked.

    Raises:
        CheckpointError: not such a record, of an unknown format, or with a field that is absent or malformed.
        OSError: it cannot be read.
    """
    file = folder / RECORD
    if not file.is_file():
        if (folder / _UNPACKED_RECORD).is_file():
            raise CheckpointError(f"{folder} has {_UNPACKED_RECORD} unpacked; wanted {RECORD}, which gzip makes of it")
        raise CheckpointError(f"{folder} is not a packed network: it has no {RECORD}")
    what = "the record of a packed network"
    data = readers.read_record(
        file, CheckpointError, format=FORMAT, version=FORMAT_VERSION, what=what, limit=_MAX_RECORD
    )
    with fields_checked(f"{file} is damaged", CheckpointError):
        return _record(data)


def check_readable(record: PackedRecord) -> bytes:
    """The bytes of the record's file, which `read_record` takes. Raises ModelError where it would not."""
    data, problem = record.to_json().encode(), "the network cannot be packed"
    if len(data) > _MAX_RECORD:
        raise ModelError(f"{problem}: its record has more than {_MAX_RECORD} bytes")
    with fields_checked(problem, ModelError):
        _record(readers.parse_json(data, "its record", ModelError))
    return readers.gzipped(data)


def check_numbers(tensors: Mapping[str, Tensor], where: str, failure: readers.Failure) -> None:
    """Raises `failure` for numbers in the tensors of a file that no network has: NaN, and unusable steps.

    Buffers may be infinite, as masks are.
    """
    for name, value in tensors.items():
        if not value.is_floating_point():
            continue
        if bool(value.isnan().any()) or (name in _FINITE and bool(value.isinf().any())):
            raise failure(f"{where}: {name} holds a NaN{' or infinite value' if name in _FINITE else ''}")
    for name in ("scales", "activation_scales"):
        if bool((tensors[name] < torch.finfo(torch.float32).tiny).any()):
            raise failure(f"{where}: {name} holds a number that is not positive and normal")


def _record(data: Mapping[str, Any]) -> PackedRecord:
    record = PackedRecord(
        **shared_fields(data),
        network=text(data["network"], "network"),
        quantization=ClusterQConfig.from_dict({"quantization": data["quantization"]}).quantization,
        weights=_entries(data, "weights", _weight),
        activations=_entries(data, "activations", _activation),
        batch_norms=_entries(data, "batch_norms", _norm),
        tensors=_entries(data, "tensors", _tensor),
    )
    if not record.weights:
        raise ValueError("it lists no weights")
    _check_names(record)
    return record


def _weight(entry: Any) -> WeightEntry:
    name, shape, bits = items(entry, 3)
    sizes = tuple(whole(size, "a size", 1, _MAX_SIZE) for size in items(shape))
    if not 1 <= len(sizes) <= _MAX_DIMENSIONS:
        raise ValueError(f"weight {name!r} has {len(sizes)} dimensions")
    return _name(name), sizes, whole(bits, "bits", 2, 8)


def _activation(entry: Any) -> ActivationEntry:
    name, bits, quant_min, zero_point, activation = items(entry, 5)
    bits = whole(bits, "bits", 2, 8)
    quant_min = whole(quant_min, "quant_min", -(1 << (bits - 1)), 0)
    zero_point = whole(zero_point, "zero_point", quant_min, quant_min + (1 << bits) - 1)
    if activation not in get_args(Fused):
        raise ValueError(f"activation is {activation!r}; wanted one of {', '.join(get_args(Fused))}")
    return _name(name), bits, quant_min, zero_point, activation


def _norm(entry: Any) -> NormEntry:
    name, channels, eps = items(entry, 3)
    return _name(name), whole(channels, "channels", 1, _MAX_SIZE), number(eps, "eps")


def _tensor(entry: Any) -> TensorEntry:
    name, dtype, shape = items(entry, 3)
    if dtype not in DTYPES:
        raise ValueError(f"dtype of {name!r} is {dtype!r}; wanted one of {', '.join(DTYPES)}")
    sizes = tuple(whole(size, "a size", 0, _MAX_SIZE) for size in items(shape))
    if len(sizes) > _MAX_DIMENSIONS:
        raise ValueError(f"tensor {name!r} has {len(sizes)} dimensions")
    return _name(name), dtype, sizes


def _check_names(record: PackedRecord) -> None:
    names = [name for name, _, _ in record.weights] + [name for name, _, _ in record.tensors]
    names += [f"{name}.{part}" for name, _, _ in record.batch_norms for part in NORM_PARTS]
    for found in (names, [name for name, *_ in record.activations]):
        twice = next((name for name, count in Counter(found).items() if count > 1), None)
        if twice is not None:
            raise ValueError(f"it lists {twice} twice")


def _entries(data: Mapping[str, Any], key: str, read: Callable[[Any], _T]) -> tuple[_T, ...]:
    found: list[_T] = []
    for index, entry in enumerate(items(data[key])):
        try:
            found.append(read(entry))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{key}[{index}]: {error}") from error
    return tuple(found)


def _name(value: Any) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= _MAX_NAME:
        raise ValueError(f"a name is not a text of 1 to {_MAX_NAME} characters")
    return value


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
