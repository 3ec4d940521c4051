"""The record of a packed network, `packed.json`: written, read, and checked before anything is allocated."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch

from clusterq.config import ClusterQConfig, QuantizationConfig
from clusterq.errors import CheckpointError
from clusterq.models import Source
from clusterq.nn.quantizers import Fused

FORMAT, FORMAT_VERSION = "clusterq-packed", 1
TENSORS, RECORD = "packed.safetensors", "packed.json"
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
}
NORM_PARTS = ("weight", "bias", "running_mean", "running_var")
LAYOUT = (
    "packed.safetensors holds, little-endian, one tensor of each kind with the entries listed here one after another. "
    "codes: per weight ceil(elements*bits/8) bytes; bit i of them is bit i%8 of byte i//8, bit 0 the lowest; element j "
    "in row-major order takes bits j*bits to (j+1)*bits-1, lowest first, two's complement. "
    "scales, zero_points (absent: all 0): shape[0] each. activation_scales: one each. batch_norms: gamma, beta, mean, "
    "variance, channels each. tensors.DTYPE: elements in row-major order. "
    "weight = (code-zero_point)*scale per entry of axis 0. activation: first relu, relu6 or none, then "
    "(clamp(round_half_even(x*(1/scale))+zero_point, quant_min, quant_min+2^bits-1)-zero_point)*scale, in float32."
)
# A record is a line per layer; an image and a header have their limits too, so that a file cannot ask for more.
_MAX_RECORD, _MAX_HEADER = 1 << 26, 1 << 16
_MAX_SIZE, _MAX_PIXELS = 1 << 31, 1 << 24

WeightEntry = tuple[str, tuple[int, ...], int]
ActivationEntry = tuple[str, int, int, int, str]
NormEntry = tuple[str, int, float]
TensorEntry = tuple[str, str, tuple[int, ...]]
_T = TypeVar("_T")


@dataclass(frozen=True)
class PackedRecord:
    """What `packed.json` says.

    Attributes:
        network: class of the network; a label.
        quantization: settings it was prepared with.
        input_shape: channels, height, width of one image.
        num_classes: length of the output.
        source: where the network in floating point came from; None when it was handed over as a module.
        mean, std: normalisation of pixels in 0..1.
        tensors_sha256: of `packed.safetensors`.
        versions: of Python, torch and this package at the time of saving.
        weights, activations, batch_norms, tensors: the entries, see `clusterq.deploy.packed`.
    """

    network: str
    quantization: QuantizationConfig
    input_shape: tuple[int, int, int]
    num_classes: int
    source: Source | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    tensors_sha256: str
    versions: Mapping[str, str]
    weights: tuple[WeightEntry, ...]
    activations: tuple[ActivationEntry, ...]
    batch_norms: tuple[NormEntry, ...]
    tensors: tuple[TensorEntry, ...]

    def to_json(self) -> str:
        """One entry a line, nothing else between them: of a small network the record is a good part of the bytes."""
        quantization = ClusterQConfig(quantization=self.quantization).to_dict()["quantization"]
        head = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "tensors_sha256": self.tensors_sha256,
            "layout": LAYOUT,
            "network": self.network,
            "input_shape": self.input_shape,
            "num_classes": self.num_classes,
            "mean": self.mean,
            "std": self.std,
            "source": asdict(self.source) if self.source is not None else None,
            "versions": dict(self.versions),
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


def read_record(folder: Path) -> PackedRecord:
    """The record of a packed network, every field checked.

    Raises:
        CheckpointError: not such a record, of an unknown format, or with a field that is absent or malformed.
    """
    file = folder / RECORD
    if not file.is_file():
        raise CheckpointError(f"{folder} is not a packed network: it has no {RECORD}")
    if file.stat().st_size > _MAX_RECORD:
        raise CheckpointError(f"{file} is damaged: a record has less than {_MAX_RECORD} bytes")
    try:
        data = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise CheckpointError(f"{file} is not the record of a packed network")
    if data.get("format_version") != FORMAT_VERSION:
        version = data.get("format_version")
        raise CheckpointError(f"{folder} has packed format {version!r}; this version reads {FORMAT_VERSION}")
    try:
        record = _record(data)
        _check_names(record)
    except KeyError as error:
        raise CheckpointError(f"{file} is damaged: it has no {error}") from error
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    return record


def _record(data: Mapping[str, Any]) -> PackedRecord:
    weights = _entries(data, "weights", _weight)
    tensors = _entries(data, "tensors", _tensor)
    channels, height, width = (_whole(v, "input_shape", 1, _MAX_PIXELS) for v in _items(data["input_shape"], 3))
    if channels * height * width > _MAX_PIXELS:
        raise ValueError(f"input_shape is {[channels, height, width]}; wanted at most {_MAX_PIXELS} numbers")
    if not weights:
        raise ValueError("it lists no weights")
    # Some layer has a row for every class: a network for more of them than the file has rows is not built.
    rows = max([shape[0] for _, shape, _ in weights] + [shape[0] for _, _, shape in tensors if shape])
    return PackedRecord(
        network=_text(data["network"], "network"),
        quantization=ClusterQConfig.from_dict({"quantization": data["quantization"]}).quantization,
        input_shape=(channels, height, width),
        num_classes=_whole(data["num_classes"], "num_classes", 1, rows),
        source=None if data["source"] is None else _source(data["source"]),
        mean=tuple(_number(v, "mean") for v in _items(data["mean"])),
        std=tuple(_number(v, "std") for v in _items(data["std"])),
        tensors_sha256=_text(data["tensors_sha256"], "tensors_sha256"),
        versions={_text(k, "versions"): _text(v, "versions") for k, v in dict(data["versions"]).items()},
        weights=weights,
        activations=_entries(data, "activations", _activation),
        batch_norms=_entries(data, "batch_norms", _norm),
        tensors=tensors,
    )


def _source(value: Any) -> Source:
    source = Source(**value)
    weights = None if source.weights is None else _text(source.weights, "source.weights")
    return Source(_text(source.model, "source.model"), weights, _text(source.weights_sha256, "source.weights_sha256"))


def _weight(entry: Any) -> WeightEntry:
    name, shape, bits = _items(entry, 3)
    sizes = tuple(_whole(size, "a size", 1, _MAX_SIZE) for size in _items(shape))
    if not 1 <= len(sizes) <= 8:
        raise ValueError(f"weight {name!r} has {len(sizes)} dimensions")
    return _text(name, "a name"), sizes, _whole(bits, "bits", 2, 8)


def _activation(entry: Any) -> ActivationEntry:
    name, bits, quant_min, zero_point, activation = _items(entry, 5)
    bits = _whole(bits, "bits", 2, 8)
    quant_min = _whole(quant_min, "quant_min", -(1 << (bits - 1)), 0)
    zero_point = _whole(zero_point, "zero_point", quant_min, quant_min + (1 << bits) - 1)
    if activation not in get_args(Fused):
        raise ValueError(f"activation is {activation!r}; wanted one of {', '.join(get_args(Fused))}")
    return _text(name, "a name"), bits, quant_min, zero_point, activation


def _norm(entry: Any) -> NormEntry:
    name, channels, eps = _items(entry, 3)
    return _text(name, "a name"), _whole(channels, "channels", 1, _MAX_SIZE), _number(eps, "eps")


def _tensor(entry: Any) -> TensorEntry:
    name, dtype, shape = _items(entry, 3)
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; wanted one of {', '.join(DTYPES)}")
    return _text(name, "a name"), dtype, tuple(_whole(size, "a size", 0, _MAX_SIZE) for size in _items(shape))


def _check_names(record: PackedRecord) -> None:
    names = [name for name, _, _ in record.weights] + [name for name, _, _ in record.tensors]
    names += [f"{name}.{part}" for name, _, _ in record.batch_norms for part in NORM_PARTS]
    for found in (names, [name for name, *_ in record.activations]):
        if len(set(found)) != len(found):
            raise ValueError(f"it lists {next(name for name in found if found.count(name) > 1)} twice")


def _entries(data: Mapping[str, Any], key: str, read: Callable[[Any], _T]) -> tuple[_T, ...]:
    found: list[_T] = []
    for index, entry in enumerate(_items(data[key])):
        try:
            found.append(read(entry))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{key}[{index}]: {error}") from error
    return tuple(found)


def _items(value: Any, count: int | None = None) -> list[Any]:
    if not isinstance(value, list) or count not in (None, len(value)):
        raise ValueError(f"{_shown(value)} is not a list{'' if count is None else f' of {count}'}")
    return value


def _whole(value: Any, name: str, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} is {_shown(value)}; wanted a whole number from {least} to {most}")
    return value


def _number(value: Any, name: str) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{name} is {_shown(value)}; wanted a number")
    return float(value)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= 1024:
        raise ValueError(f"{name} is {_shown(value)}; wanted a text")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
