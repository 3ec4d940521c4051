"""What the records of stored networks share: image, classes, origin and hash, and how a network is built from them.

Checkpoints and packed networks add what is their own, see `clusterq.checkpoint` and `clusterq.deploy.packed`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn

from clusterq.config import QuantizationConfig
from clusterq.errors import CheckpointError
from clusterq.models import Source, build_model
from clusterq.readers import Failure

# Kinds of source whose architecture comes from an installed package. A Python file named by a record is never run.
REBUILT = ("builtin", "torchvision", "timm", "pytorchcv")
# Of one image and of a network: larger ones would take gigabytes before the first tensor is compared.
MAX_PIXELS, MAX_CLASSES = 1 << 27, 1 << 20


@dataclass(frozen=True)
class NetworkRecord:
    """What every record of a stored network says.

    Attributes:
        input_shape: channels, height, width of one image.
        num_classes: length of the output.
        source: where the network in floating point came from; None when it was handed over as a module.
        mean, std: normalisation of pixels in 0..1.
        tensors_sha256: of the file of tensors beside the record.
        versions: of Python, torch and this package at the time of saving.
    """

    input_shape: tuple[int, int, int]
    num_classes: int
    source: Source | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    tensors_sha256: str
    versions: Mapping[str, str]

    def shared_json(self) -> dict[str, Any]:
        """These fields as JSON values, for `shared_fields`."""
        values = {field.name: getattr(self, field.name) for field in fields(NetworkRecord)}
        source = None if self.source is None else asdict(self.source)
        return values | {"source": source, "versions": dict(self.versions)}


def shared_fields(data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `NetworkRecord` from JSON values; for use within `fields_checked`."""
    channels, height, width = (whole(size, "a size of input_shape") for size in items(data["input_shape"], 3))
    if min(channels, height, width) < 1 or channels * height * width > MAX_PIXELS:
        raise ValueError(f"input_shape is {data['input_shape']}; wanted up to {MAX_PIXELS} positive pixels")
    return {
        "input_shape": (channels, height, width),
        "num_classes": whole(data["num_classes"], "num_classes", 2, MAX_CLASSES),
        "source": None if data["source"] is None else _source(data["source"]),
        "mean": tuple(number(value, "mean") for value in items(data["mean"])),
        "std": tuple(number(value, "std") for value in items(data["std"])),
        "tensors_sha256": text(data["tensors_sha256"], "tensors_sha256"),
        "versions": {name: text(value, f"versions.{name}") for name, value in dict(data["versions"]).items()},
    }


def _source(data: Any) -> Source:
    source = Source(**data)
    for name, value in asdict(source).items():
        if name != "weights" or value is not None:
            text(value, f"source.{name}")
    return source


@contextmanager
def fields_checked(problem: str, failure: Failure) -> Iterator[None]:
    """Within it, what Python raises for JSON values that are absent or of another kind becomes `failure`.

    Args:
        problem: what that means, such as "FILE is damaged".
        failure: error class.
    """
    try:
        yield
    except KeyError as error:
        raise failure(f"{problem}: it has no {error}") from error
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise failure(f"{problem}: {error}") from error


def items(value: Any, count: int | None = None) -> list[Any]:
    """A list, of `count` entries where given. Raises ValueError for anything else."""
    if not isinstance(value, list) or count not in (None, len(value)):
        raise ValueError(f"{_shown(value)} is not a list{'' if count is None else f' of {count}'}")
    return value


def whole(value: Any, name: str, least: int = -(1 << 63), most: int = (1 << 63) - 1) -> int:
    """A whole number within these bounds. Raises ValueError for anything else."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} is {_shown(value)}; wanted a whole number from {least} to {most}")
    return value


def number(value: Any, name: str) -> float:
    """A finite number. Raises ValueError for anything else."""
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{name} is {_shown(value)}; wanted a number")
    return float(value)


def text(value: Any, name: str) -> str:
    """A text. Raises ValueError for anything else."""
    if not isinstance(value, str):
        raise ValueError(f"{name} is {_shown(value)}; wanted text")
    return value


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}..."


def rebuilt_twin(
    record: NetworkRecord, quantization: QuantizationConfig, model: nn.Module | None, name: str
) -> nn.Module:
    """The quantized twin of a record's network, without its numbers, on the CPU.

    Args:
        record, quantization: what the network is and was prepared with.
        model: the network in floating point, which is moved to the CPU; without it a network of an installed package
            is built.
        name: of what is loaded, for messages.

    Raises:
        CheckpointError: the network came from elsewhere, or does not take these settings or images.
        ModelError, MissingPackageError: its package does not know it, or is not installed.
    """
    from clusterq.qat.prepare import prepare

    if model is None:
        if record.source is None or record.source.model.split(":", 1)[0] not in REBUILT:
            origin = record.source.model if record.source is not None else "a module"
            raise CheckpointError(
                f"the network of {name} came from {origin}: hand over the network itself to load it (--model; "
                "--trust runs the file it names)"
            )
        model = build_model(record.source.model, record.num_classes)
    try:
        return prepare(model.cpu(), quantization, example_input=torch.zeros(1, *record.input_shape))
    # Settings and image size come from the record: layers that the network does not have, images it cannot take.
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{name} does not fit the network: {error}") from error
