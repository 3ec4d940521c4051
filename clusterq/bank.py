"""Banks: images made once from a network alone, kept as a folder, made larger later, used at every bit width.

The folder holds `images.safetensors` (images [N, C, H, W] in the network's input space and labels [N]), `bank.json`
(the network with its hashes, and for every part, one per run of the synthesis, settings, seed, label accuracy, loss
terms, seconds and versions) and `images.png`, a contact sheet. It appears whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clusterq import figures, readers
from clusterq.config import ClusterQConfig, SynthesisConfig
from clusterq.errors import DataError, MissingPackageError
from clusterq.folders import check_writable, new_folder
from clusterq.method import ClusterQ
from clusterq.models import DIGITS_WEIGHTS, LoadedModel, file_sha256
from clusterq.readers import read_images, write_images
from clusterq.records import NUMBER, TEXT_OR_NONE, first_wrong
from clusterq.synthesis import StoredImages
from clusterq.versions import machine, now, versions

FORMAT, FORMAT_VERSION = "clusterq-bank", 1
IMAGES, RECORD, SHEET = "images.safetensors", "bank.json", "images.png"
# Of the record and of each of its parts: what other code relies on.
_FIELDS: dict[str, Any] = {
    "network.tensors_sha256": str, "network.model": str, "network.weights": TEXT_OR_NONE, "network.input_shape": [int],
    "network.mean": [NUMBER], "network.std": [NUMBER], "images.sha256": str, "images.count": int,
    "label_accuracy": NUMBER, "parts": list,
}  # fmt: skip
_PART_FIELDS: dict[str, Any] = {
    "count": int, "seed": int, "settings": dict, "preset": str, "label_accuracy": NUMBER, "seconds": NUMBER,
    "samples_seen": int, "command": str,
}  # fmt: skip
# Loss terms are told as averages over so large a part of the steps, at the start and at the end.
_TERM_SHARE = 20

Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class Bank:
    """A bank read from its folder.

    Attributes:
        images: [N, C, H, W] in the network's input space.
        labels: [N] int64.
        record: content of `bank.json`.
    """

    images: Tensor
    labels: Tensor
    record: Mapping[str, Any]

    @property
    def seeds(self) -> list[int]:
        """Of all parts, in their order."""
        return [part["seed"] for part in self.record["parts"]]


def settings_for_bank(config: ClusterQConfig) -> ClusterQConfig:
    """The same settings with stored images: a generator that would stream is trained to its end and then sampled.

    Raises:
        ValueError: the generator would not be trained at all.
    """
    return replace(config, finetune=replace(config.finetune, images="bank"))


def make_part(
    loaded: LoadedModel, config: ClusterQConfig, *, device: str, command: str, progress: Progress | None = None
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Synthesise images for a network.

    Args:
        loaded: the network.
        config: settings and seed; see `settings_for_bank`.
        device: where to compute.
        command: as typed, for the record.
        progress: called with (phase, done, total).

    Returns:
        Images [N, C, H, W] and labels [N] on the CPU, and what `bank.json` says of them.

    Raises:
        DivergenceError: a loss term became NaN or infinite.
    """
    method = ClusterQ(
        loaded.model,
        settings_for_bank(config),
        input_shape=loaded.input_shape,
        num_classes=loaded.num_classes,
        device=device,
        progress=False if progress is None else progress,
    )
    source = method.synthesize()
    # Neither streams, see `settings_for_bank`, nor is made of stored images.
    assert method.label_accuracy is not None and not isinstance(source, StoredImages)
    images, labels = source.images().detach().cpu(), source.labels().cpu()
    part = {
        "seed": config.seed,
        "count": len(images),
        "settings": asdict(config.synthesis),
        "preset": config.preset,
        "label_accuracy": 100 * method.label_accuracy,
        "terms": _terms(source.metrics),
        "samples_seen": method.samples_synthesised(),
        "seconds": method.seconds["synthesis"],
        "command": command,
        "created": now(),
        "versions": versions(),
        "machine": {**machine(device), "device": device},
    }
    return images, labels, part


def make(
    loaded: LoadedModel,
    config: ClusterQConfig,
    output: Path,
    *,
    overwrite: bool = False,
    device: str = "cpu",
    command: str = "",
    progress: Progress | None = None,
) -> Bank:
    """Make a bank and write its folder; arguments as `make_part` and `clusterq.folders.new_folder`.

    Raises:
        OutputError: the folder exists or cannot be written.
        DivergenceError: see `make_part`.
    """
    check_writable(output, overwrite=overwrite)
    images, labels, part = make_part(loaded, config, device=device, command=command, progress=progress)
    return write(output, loaded, images, labels, [part], overwrite=overwrite)


def extend(
    folder: Path,
    loaded: LoadedModel,
    config: ClusterQConfig,
    *,
    device: str = "cpu",
    command: str = "",
    progress: Progress | None = None,
) -> Bank:
    """Add images to a bank: those there are stay as they are, in front.

    Args:
        folder: of the bank, replaced when the new images are made.
        loaded: the network the bank was made for.
        config: settings of the new part; its seed is not that of another part.
        device, command, progress: see `make_part`.

    Raises:
        DataError: not a bank, a damaged one, one of another network, or one whose images have another size or
            normalisation than the network is loaded for.
        ValueError: the seed is in use: the same seed makes the same images.
        OutputError: the folder cannot be written.
    """
    bank = read(folder)
    require_network(folder, bank.record, loaded)
    _require_input(folder, bank.record, loaded)
    if config.seed in bank.seeds:
        raise ValueError(f"--seed {config.seed}: a part of {folder} has this seed; the same images would come twice")
    check_writable(folder, overwrite=True)
    images, labels, part = make_part(loaded, config, device=device, command=command, progress=progress)
    together = torch.cat([bank.images, images.to(bank.images.dtype)]), torch.cat([bank.labels, labels])
    return write(folder, loaded, *together, [*bank.record["parts"], part], overwrite=True)


def write(
    folder: Path,
    loaded: LoadedModel,
    images: Tensor,
    labels: Tensor,
    parts: Sequence[Mapping[str, Any]],
    *,
    overwrite: bool = False,
) -> Bank:
    """Write a bank; `parts` as `make_part` describes them, in the order of their images."""
    counts = [part["count"] for part in parts]
    record: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "network": loaded.facts(),
        "label_accuracy": sum(part["label_accuracy"] * part["count"] for part in parts) / sum(counts),
        "parts": list(parts),
    }
    with new_folder(folder, overwrite=overwrite) as work:
        write_images(work / IMAGES, images, labels)
        record["images"] = {
            "count": len(images),
            "shape": list(images.shape[1:]),
            "sha256": file_sha256(work / IMAGES),
        }
        record["contact_sheet"] = _draw_sheet(work / SHEET, images, labels)
        (work / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    return Bank(images, labels, record)


def read(folder: Path) -> Bank:
    """A bank from its folder.

    Raises:
        DataError: not a bank, an unknown format version, images that are not those of the record, or a field of the
            record that is absent or malformed.
    """
    record = read_record(folder)
    digest = record["images"]["sha256"]
    if not (folder / IMAGES).is_file() or file_sha256(folder / IMAGES) != digest:
        raise DataError(f"{folder / IMAGES} is absent or damaged: its SHA-256 is not the one in {RECORD}")
    images, labels = read_images(folder / IMAGES)
    if sum(part["count"] for part in record["parts"]) != len(images):
        raise DataError(f"{folder / RECORD} is damaged: its parts do not add up to the {len(images)} images")
    if list(images.shape[1:]) != record["network"]["input_shape"]:
        raise DataError(f"{folder / RECORD} is damaged: network.input_shape is not that of its images")
    return Bank(images, labels, record)


def read_record(folder: Path) -> dict[str, Any]:
    """What a bank's folder says of it, without a look at its images. Raises DataError as `read`."""
    file = folder / RECORD
    if not file.is_file():
        raise DataError(f"{folder} is not a bank of images: it has no {RECORD}")
    record = readers.read_record(file, DataError, format=FORMAT, version=FORMAT_VERSION, what="the record of a bank")
    wrong = first_wrong(record, _FIELDS)
    if wrong is None and not record["parts"]:
        wrong = "parts"
    for part in [] if wrong else record["parts"]:
        wrong = wrong or first_wrong(part, _PART_FIELDS)
    if wrong is not None:
        raise DataError(f"{file} is damaged: {wrong} is absent or of another type than it should be")
    return record


def open_images(path: Path, loaded: LoadedModel, *, any_network: bool = False) -> tuple[Tensor, Tensor]:
    """Images [N, C, H, W] and labels [N] for a network: a bank's folder, the file in it, or a file of a run.

    Args:
        path: folder or file.
        loaded: the network they are for.
        any_network: accept a bank that was made for another network. A file that belongs to no bank does not say.

    Raises:
        DataError: damaged, something else, or a bank of another network.
    """
    if path.is_dir():
        folder = path
    elif path.name == IMAGES and (path.parent / RECORD).is_file():
        folder = path.parent
    else:
        return read_images(path)
    bank = read(folder)
    if not any_network:
        require_network(folder, bank.record, loaded)
    return bank.images, bank.labels


def images_file(path: Path) -> Path:
    """The file with the images of what `open_images` takes."""
    return path / IMAGES if path.is_dir() else path


def require_network(folder: Path, record: Mapping[str, Any], loaded: LoadedModel) -> None:
    """Raises DataError where a bank was made for a network with other tensors."""
    made, here = record["network"]["tensors_sha256"], loaded.tensors_sha256
    if made != here:
        raise DataError(
            f"{folder} was made for another network ({record['network']['model']}, tensors {made[:12]}) than this one "
            f"(tensors {here[:12]}); --any-network uses it all the same"
        )


def _require_input(folder: Path, record: Mapping[str, Any], loaded: LoadedModel) -> None:
    """Raises DataError where a bank's images have another size or normalisation than those of the network's input."""
    made, here = record["network"], loaded.facts()
    for name, options in (("input_shape", "--input-size"), ("mean", "--mean and --std"), ("std", "--mean and --std")):
        if made[name] != here[name]:
            raise DataError(
                f"{folder} was made with {name} {made[name]}; the network is loaded with {here[name]}: give {options} "
                "as for the bank"
            )


def recorded_weights(network: Mapping[str, Any]) -> str | None:
    """For `load_model`, from a record's `network`: a library's own name, or a file's, which may lie elsewhere now."""
    own = network["model"] == "builtin:digits" and network["weights"] == DIGITS_WEIGHTS.name
    weights: str | None = None if own else network["weights"]
    return weights


def last_settings(bank: Bank) -> SynthesisConfig:
    """Settings of the newest part. Raises DataError for a setting that this version does not know."""
    settings = bank.record["parts"][-1]["settings"]
    try:
        return ClusterQConfig.from_dict({"synthesis": settings}).synthesis
    except ValueError as error:
        raise DataError(f"the bank's own settings cannot be used: {error}") from error


def _terms(steps: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Loss term -> its average over the first and over the last steps that have it."""
    terms: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(key for step in steps for key in step if key != "step"):
        values = [step[name] for step in steps if name in step]
        few = max(1, len(values) // _TERM_SHARE)
        terms[name] = {"first": sum(values[:few]) / few, "last": sum(values[-few:]) / few}
    return terms


def _draw_sheet(path: Path, images: Tensor, labels: Tensor) -> str:
    """Name of the contact sheet, or why there is none."""
    try:
        figures.contact_sheet(path, images, labels)
    except MissingPackageError as error:
        return f"not drawn: {error}"
    return path.name
