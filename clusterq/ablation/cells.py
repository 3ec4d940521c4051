"""One cell of an ablation, a row with one seed at one width, and the images it shares with others.

Every function here runs in any process and leaves its result as a file that is there whole or not at all. The name of
the file is a hash of what the numbers depend on: the network (its specification, the Python file it comes from, its
tensors, the size and normalisation of its images), settings, seed, threads, device, versions of this package and of
torch, processor or GPU, and the code; of a cell the data's name, size and labels and the sections as well. So what is
there is not made again, and what has changed is. Other libraries' versions stand in a cell and not in its key.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clusterq import bank
from clusterq.ablation.table import SECTIONS
from clusterq.allocator import keep_freed_memory
from clusterq.config import ClusterQConfig
from clusterq.data import EvaluationSet, evaluate, open_for
from clusterq.errors import DataError, ModelError
from clusterq.folders import write_file
from clusterq.method import ClusterQ
from clusterq.models import LoadedModel, file_sha256, load_model, runs_code
from clusterq.readers import read_record
from clusterq.records import NUMBER, TEXT_OR_NONE, first_wrong
from clusterq.synthesis import Teacher
from clusterq.versions import code_identity, machine, now, versions
from clusterq.widths import Width

FORMAT, FORMAT_VERSION = "clusterq-ablation-cell", 1
CELLS, IMAGES = "cells", "synthesis"
_KEY_LENGTH = 20
SAMPLES = ("synthesis", "finetune")
SECONDS = ("synthesis", "calibration", "finetune", "total", "evaluation")
# Of a cell: what results, page and picture rely on.
_FIELDS: dict[str, Any] = {
    "key": str, "bits": str, "seed": int, **{f"accuracy.{name}": NUMBER for name in SECTIONS},
    "label_accuracy": NUMBER, "agreement": NUMBER, "images": int,
    **{f"samples_seen.{name}": int for name in SAMPLES}, **{f"seconds.{name}": NUMBER for name in SECONDS},
    "synthesis": TEXT_OR_NONE, "command": str, "created": str, "code.sha256": str, "code.commit": TEXT_OR_NONE,
    **{f"versions.{name}": str for name in ("clusterq", "python", "torch")}, "machine.processor": str,
    "machine.cpu_capability": str, "machine.cores": (int, type(None)),
    "machine.threads": int, "machine.jobs": int, "machine.device": str, "machine.gpu": TEXT_OR_NONE,
}  # fmt: skip


@dataclass(frozen=True)
class Shared:
    """What all cells of a table have in common. Hashable, and sent to every process.

    Attributes:
        model, weights, data: variables replaced.
        inputs: items for `load_model`.
        sections: name -> (first image, one past the last).
        network: what identifies the network and its input, see `network_identity`; compared in every process.
        data_sha256: of the set's name, size and labels.
        environment: `clusterq.versions.environment` at this number of threads.
        threads, jobs, device: where it is computed; `jobs` processes at a time share the machine.
        folder: of the ablation.
        command: as typed.
        code: see `clusterq.versions.code_identity`.
    """

    model: str
    weights: str | None
    data: str
    inputs: tuple[tuple[str, Any], ...]
    sections: tuple[tuple[str, tuple[int, int]], ...]
    network: tuple[tuple[str, Any], ...]
    data_sha256: str
    environment: tuple[tuple[str, Any], ...]
    threads: int
    jobs: int
    device: str
    folder: Path
    command: str
    code: tuple[tuple[str, str | None], ...]

    @property
    def numbers_depend_on(self) -> dict[str, Any]:
        """Part of every key."""
        return {
            "network": dict(self.network),
            "environment": dict(self.environment),
            "threads": self.threads,
            "device": self.device,
            "code": dict(self.code)["sha256"],
        }


@dataclass(frozen=True)
class SynthesisWork:
    """Images for every cell with these synthesis settings and this seed."""

    shared: Shared
    config: ClusterQConfig

    @property
    def key(self) -> str:
        """Name of the bank."""
        settings = asdict(self.config.synthesis)
        return _key({**self.shared.numbers_depend_on, "synthesis": settings, "seed": self.config.seed})


@dataclass(frozen=True)
class StudentWork:
    """The students of one row and seed that take their images from one place.

    Attributes:
        config: settings with the seed.
        widths: one cell each.
        images: section of the data whose images are used, None: synthesised ones.
    """

    shared: Shared
    config: ClusterQConfig
    widths: tuple[Width, ...]
    images: tuple[int, int] | None

    @property
    def synthesis(self) -> SynthesisWork | None:
        """Whose images it needs; None for real images and for a generator that trains beside the student."""
        streams = self.config.finetune.images == "stream"
        return None if streams or self.images is not None else SynthesisWork(self.shared, self.config)

    def key(self, width: Width) -> str:
        """Name of a cell."""
        settings = _at(self.config, width).to_dict()
        # The name of a preset makes no difference once its settings are there.
        settings.pop("preset")
        content = {**self.shared.numbers_depend_on, "data": self.shared.data_sha256, "images": self.images}
        return _key({**content, "sections": dict(self.shared.sections), "config": settings})


Work = SynthesisWork | StudentWork


def carry_out(work: Work) -> None:
    """Do one piece of work and write its files; what is there already is left alone.

    Raises:
        ClusterQError, RuntimeError and others that a run may raise; nothing half-written stays behind.
    """
    # A process started later would put new code's numbers under the old code's name.
    if dict(code_identity())["sha256"] != dict(work.shared.code)["sha256"]:
        raise ModelError("the code changed while the ablation was running; run the same command again")
    keep_freed_memory()
    torch.set_num_threads(work.shared.threads)
    loaded, data = _opened_for(work.shared)
    if isinstance(work, SynthesisWork):
        _synthesise(work, loaded)
    else:
        _train(work, loaded, data)


def cell_path(folder: Path, key: str) -> Path:
    """File of a cell."""
    return folder / CELLS / f"{key}.json"


def bank_path(folder: Path, key: str) -> Path:
    """Folder of shared images."""
    return folder / IMAGES / key


def read_cell(folder: Path, key: str) -> dict[str, Any] | None:
    """A finished cell, None where there is none. Raises DataError for a damaged file and one of something else."""
    path = cell_path(folder, key)
    if not path.is_file():
        return None
    try:
        cell = read_record(path, DataError, format=FORMAT, version=FORMAT_VERSION, what="a cell of an ablation")
        wrong = first_wrong(cell, _FIELDS)
        if wrong is not None or cell["key"] != key:
            raise DataError(f"{path} is damaged: {wrong or 'key'} is absent or not what it should be")
    except DataError as error:
        raise DataError(f"{error}; remove it to have it made again") from error
    return cell


def accuracy_by_section(
    model: nn.Module, data: EvaluationSet, sections: Mapping[str, tuple[int, int]], *, device: str
) -> dict[str, float]:
    """Top-1 in percent on every section, each image run once however many sections it is in."""
    ends = sorted({end for section in sections.values() for end in section})
    hits: dict[int, int] = {}
    for start, stop in itertools.pairwise(ends):
        if any(first <= start and stop <= last for first, last in sections.values()):
            result = evaluate(model, part_of(data, start, stop), device=device)
            hits[start] = round(result.top1 * result.count / 100)
    return {
        name: 100 * sum(count for start, count in hits.items() if first <= start < last) / (last - first)
        for name, (first, last) in sections.items()
    }


def part_of(data: EvaluationSet, start: int, stop: int) -> EvaluationSet:
    """Images `start` to `stop` of a set."""
    return EvaluationSet(data.name, lambda index: data[start + index][0], data.labels[start:stop], data.num_classes)


def data_identity(data: EvaluationSet) -> str:
    """SHA-256 of a set's name, size and labels."""
    labels = data.labels.to(torch.int64).contiguous().numpy().tobytes()
    return hashlib.sha256(f"{data.name} {len(data)}\n".encode() + labels).hexdigest()


def _key(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:_KEY_LENGTH]


def _at(config: ClusterQConfig, width: Width) -> ClusterQConfig:
    return replace(config, quantization=width.of(config.quantization))


def opened(
    model: str, weights: str | None, data: str, inputs: tuple[tuple[str, Any], ...]
) -> tuple[LoadedModel, EvaluationSet]:
    """Network and data, read once per process until `forget`; arguments as the attributes of `Shared`."""
    return _opened(model, weights, data, inputs)


def forget() -> None:
    """What an earlier ablation of this process has read: its files may have changed since."""
    _opened.cache_clear()
    _read_bank.cache_clear()


def network_identity(loaded: LoadedModel) -> tuple[tuple[str, Any], ...]:
    """What numbers depend on of a network: specification, the Python file it comes from, tensors, input."""
    file = loaded.source.model.rsplit(":", 1)[0] if runs_code(loaded.source.model) else None
    facts: dict[str, Any] = {
        "model": loaded.source.model,
        "file_sha256": None if file is None else file_sha256(file),
        "tensors_sha256": loaded.tensors_sha256,
        "input_shape": loaded.input_shape,
        "mean": loaded.mean,
        "std": loaded.std,
    }
    return tuple(facts.items())


@functools.lru_cache(maxsize=1)
def _opened(
    model: str, weights: str | None, data: str, inputs: tuple[tuple[str, Any], ...]
) -> tuple[LoadedModel, EvaluationSet]:
    loaded = load_model(model, weights, **dict(inputs))
    return loaded, open_for(loaded, data)


def _opened_for(shared: Shared) -> tuple[LoadedModel, EvaluationSet]:
    loaded, data = opened(shared.model, shared.weights, shared.data, shared.inputs)
    if network_identity(loaded) != shared.network or data_identity(data) != shared.data_sha256:
        raise ModelError("the network or the data changed while the ablation was running")
    return loaded, data


@functools.lru_cache(maxsize=1)
def _read_bank(folder: Path) -> bank.Bank:
    """Students of one row and seed come one after the other and differ in their width alone."""
    return bank.read(folder)


def _synthesise(work: SynthesisWork, loaded: LoadedModel) -> None:
    shared, folder = work.shared, bank_path(work.shared.folder, work.key)
    if folder.exists():
        return
    images, labels, part = bank.make_part(loaded, work.config, device=shared.device, command=shared.command)
    bank.write(folder, loaded, images, labels, [part])


def _train(work: StudentWork, loaded: LoadedModel, data: EvaluationSet) -> None:
    shared = work.shared
    left = [width for width in work.widths if read_cell(shared.folder, work.key(width)) is None]
    if not left:
        return
    method = ClusterQ(
        loaded.model,
        _at(work.config, left[0]),
        input_shape=loaded.input_shape,
        num_classes=loaded.num_classes,
        device=shared.device,
    )
    synthesis = work.synthesis
    part: Mapping[str, Any] | None = None
    if work.images is not None:
        method.use_images(*_unlabelled(method.teacher, data, *work.images))
    elif synthesis is not None:
        stored = _read_bank(bank_path(shared.folder, synthesis.key))
        method.use_images(stored.images, stored.labels)
        part = stored.record["parts"][0]
    else:
        method.synthesize()
    for width in left:
        result = method.finetune(_at(work.config, width).quantization)
        start = time.perf_counter()
        accuracy = accuracy_by_section(result.student, data, dict(shared.sections), device=shared.device)
        spent = {name: result.seconds[name] for name in ("synthesis", "calibration", "finetune")}
        if part is not None:
            spent["synthesis"] = part["seconds"]
        cell = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "key": work.key(width),
            "bits": str(width),
            "seed": work.config.seed,
            "accuracy": accuracy,
            "label_accuracy": 100 * result.label_accuracy,
            "agreement": _agreement(result.student, method.teacher, result.images),
            "images": len(result.images),
            "samples_seen": {
                "synthesis": result.samples_seen["synthesis"] if part is None else part["samples_seen"],
                "finetune": result.samples_seen["finetune"],
            },
            "seconds": {**spent, "total": sum(spent.values()), "evaluation": time.perf_counter() - start},
            "synthesis": None if synthesis is None else synthesis.key,
            "command": shared.command,
            "created": now(),
            "code": dict(shared.code),
            "versions": versions(),
            "machine": {**machine(shared.device), "device": shared.device, "jobs": shared.jobs},
        }
        write_file(cell_path(shared.folder, work.key(width)), (json.dumps(cell, indent=2) + "\n").encode())


def _unlabelled(teacher: Teacher, data: EvaluationSet, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Real images of a section with the classes that the network gives them: their own labels stay unused."""
    images, labels = [], []
    for part, _ in part_of(data, start, stop).batches(256):
        images.append(part.to(teacher.dtype))
        with torch.no_grad():
            labels.append(teacher.model(part.to(teacher.device, teacher.dtype)).argmax(1).cpu())
    return torch.cat(images), torch.cat(labels)


@torch.no_grad()
def _agreement(student: nn.Module, teacher: Teacher, images: Tensor) -> float:
    """Percent of images [N, C, H, W] to which both networks give the same class."""
    same = 0
    for part in torch.split(images, 256):
        part = part.to(teacher.device)
        same += int((student(part).argmax(1) == teacher.model(part).argmax(1)).sum())
    return 100 * same / len(images)
