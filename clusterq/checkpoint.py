"""Quantized networks on disk: a folder with `model.safetensors` (plain tensors) and `checkpoint.json`.

No pickle anywhere. The folder appears whole or not at all. Loading compares the SHA-256 of the tensor file before a
tensor is built, then rebuilds the network with `clusterq.prepare` and fills in the tensors by name, dtype and shape.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clusterq.config import ClusterQConfig
from clusterq.errors import CheckpointError, ModelError, require
from clusterq.folders import new_folder
from clusterq.models import Source, file_sha256, output_classes
from clusterq.network_record import NetworkRecord, rebuilt_twin, shared_fields
from clusterq.qat.prepare import prepared_with
from clusterq.readers import read_record as read_json_record
from clusterq.readers import read_safetensors
from clusterq.records import fields_checked

if TYPE_CHECKING:
    from clusterq.method import Result

FORMAT = "clusterq-checkpoint"
FORMAT_VERSION = 1
TENSORS, RECORD = "model.safetensors", "checkpoint.json"


@dataclass(frozen=True, kw_only=True)
class CheckpointRecord(NetworkRecord):
    """What `checkpoint.json` says, beside what every record does.

    Attributes:
        config: all settings, with the seed; its quantization is what the network was prepared with.
        extra: anything else the caller stored; plain JSON values.
    """

    config: ClusterQConfig
    extra: Mapping[str, Any] = field(default_factory=dict)


def save(
    model: nn.Module | Result,
    path: str | Path,
    *,
    config: ClusterQConfig | None = None,
    input_shape: tuple[int, int, int] | None = None,
    source: Source | None = None,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
    extra: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a quantized network: a result of the method, or what `clusterq.prepare(network, config.quantization)` made.

    Args:
        model: a `Result`, which brings `config` and `input_shape`, or the quantized network on any device.
        path: folder to make.
        config, input_shape, source, mean, std, extra: see `CheckpointRecord`.
        overwrite: replace a folder of that name.

    Raises:
        TypeError: a network without `config` or `input_shape`.
        ModelError: a network that cannot run on such images, or that `load` would refuse.
        OutputError: the folder exists or cannot be written.
    """
    from clusterq.method import Result

    if isinstance(model, Result):
        config = config or model.config
        channels, height, width = model.images.shape[1:]
        input_shape = input_shape or (channels, height, width)
        model = model.student
    if config is None or input_shape is None:
        raise TypeError("config and input_shape are needed to save a network; only a Result brings them along")
    with new_folder(path, overwrite=overwrite) as folder:
        write_checkpoint(
            model,
            folder,
            config=config,
            input_shape=input_shape,
            num_classes=output_classes(model, input_shape),
            source=source,
            mean=mean,
            std=std,
            extra=extra,
        )


def write_checkpoint(
    model: nn.Module,
    folder: Path,
    *,
    config: ClusterQConfig,
    input_shape: tuple[int, int, int],
    num_classes: int,
    source: Source | None = None,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
    extra: Mapping[str, Any] | None = None,
) -> None:
    """The two files of a checkpoint into an existing folder; arguments as `save` and `CheckpointRecord`."""
    from clusterq.versions import versions

    # Copies: safetensors refuses tensors that share memory, and tied weights do.
    state = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    safetensors = require("safetensors.torch", purpose="saving a network")
    # Bytes written by Python: a full disk is then an OSError like everywhere else.
    # One entry of metadata: several would be written in random order, and the same network shall give the same bytes.
    (folder / TENSORS).write_bytes(safetensors.save(state, {"format": f"{FORMAT} {FORMAT_VERSION}"}))
    record = CheckpointRecord(
        input_shape=input_shape,
        num_classes=num_classes,
        source=source,
        mean=mean,
        std=std,
        tensors_sha256=file_sha256(folder / TENSORS),
        versions=versions(),
        config=replace(config, quantization=prepared_with(model)),
        extra=dict(extra or {}),
    )
    data = record.shared_json() | {"config": record.config.to_dict(), "extra": record.extra}
    head = {"format": FORMAT, "format_version": FORMAT_VERSION}
    with fields_checked("the network cannot be saved", ModelError):
        shared_fields(json.loads(json.dumps(data)))
    (folder / RECORD).write_text(json.dumps(head | data, indent=2) + "\n")


def read_record(path: str | Path) -> CheckpointRecord:
    """What a checkpoint says about itself, without its tensors.

    Raises:
        CheckpointError: not a checkpoint, an unknown format version, or a field that is absent or malformed.
    """
    file = Path(path) / RECORD
    if not file.is_file():
        raise CheckpointError(f"{path} is not a checkpoint: it has no {RECORD}")
    what = "the record of a checkpoint"
    data = read_json_record(file, CheckpointError, format=FORMAT, version=FORMAT_VERSION, what=what)
    with fields_checked(f"{file} is damaged", CheckpointError):
        return CheckpointRecord(
            **shared_fields(data), config=ClusterQConfig.from_dict(data["config"]), extra=dict(data["extra"])
        )


def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The quantized network of a checkpoint, in evaluation mode on the CPU.

    Args:
        path: folder written by `save`.
        model: the network in floating point; only its architecture is used. Needed when the checkpoint's network came
            from a Python file or was handed over as a module: code that a checkpoint names is never run.

    Raises:
        CheckpointError: damaged (a single flipped bit is noticed), of an unknown format, made of a network that cannot
            be rebuilt, or not fitting `model`.
        ModelError, MissingPackageError: see `clusterq.network_record.rebuilt_twin`.
    """
    record = read_record(path)
    file = Path(path) / TENSORS
    if not file.is_file():
        raise CheckpointError(f"{path} is incomplete: it has no {TENSORS}")
    if file_sha256(file) != record.tensors_sha256:
        raise CheckpointError(f"{file} is damaged: its SHA-256 is not the one in {RECORD}")
    twin = rebuilt_twin(record, record.config.quantization, model, str(path))
    state = read_safetensors(file, CheckpointError)
    _fill(twin, state, path)
    if record.config.quantization.correct_batch_norm:
        for module in twin.modules():
            if isinstance(module, _BatchNorm):
                module.statistics_corrected = True  # type: ignore[assignment]
    return twin.eval()


def _fill(twin: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    own = twin.state_dict()
    for name, value in own.items():
        if name not in state:
            raise CheckpointError(f"{path} does not fit the network: tensor {name} is missing")
        got = state[name]
        if got.shape != value.shape or got.dtype != value.dtype:
            raise CheckpointError(
                f"{path} does not fit the network: tensor {name} is {got.dtype} {list(got.shape)}; "
                f"wanted {value.dtype} {list(value.shape)}"
            )
        if got.is_floating_point() and bool(got.isnan().any()):
            raise CheckpointError(f"{path}: tensor {name} holds NaN")
    surplus = next((name for name in state if name not in own), None)
    if surplus is not None:
        raise CheckpointError(f"{path} does not fit the network: the network has no tensor {surplus}")
    twin.load_state_dict(state)
