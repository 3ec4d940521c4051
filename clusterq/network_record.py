"""What the records of stored networks share: image, classes, origin and hash, and how a network is built from them.

Checkpoints and packed networks add what is their own, see `clusterq.checkpoint` and `clusterq.deploy.packed`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn

from clusterq.config import QuantizationConfig
from clusterq.errors import CheckpointError
from clusterq.models import Source, build_model, runs_code
from clusterq.records import items, number, text, whole

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
        # A Python file named by a record is never run.
        if record.source is None or runs_code(record.source.model):
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
