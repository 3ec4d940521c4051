"""Stored networks opened again: by folder, for whichever form they are to be written in next."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from clusterq import checkpoint, data
from clusterq.deploy._packed_record import PackedRecord
from clusterq.deploy.packed import is_packed, load_packed
from clusterq.errors import CheckpointError, OutputError
from clusterq.models import build_model, own_transform
from clusterq.trust import network_source

Record = checkpoint.CheckpointRecord | PackedRecord

_RANDOM_IMAGES = 256


@dataclass(frozen=True)
class ExportRequest:
    """What is asked of every form of export.

    Attributes:
        path, bits: see `find_checkpoint`.
        output: what to write; by default under a name of the form's own in the folder that is read.
        model: specification of the network, when the folder cannot rebuild it.
        trust: without `model`, run the Python file that the folder names as its network.
        evaluation: evaluation set to compare on; default: random images.
        limit, batch_size: of that set.
        overwrite: replace what is there.
    """

    path: Path
    bits: str | None = None
    output: Path | None = None
    model: str | None = None
    trust: bool = False
    evaluation: str | None = None
    limit: int | None = None
    batch_size: int = 128
    overwrite: bool = False

    def open(self, name: str, *, is_packed_taken: bool = False) -> Opened:
        """What it names.

        Args:
            name: of the output in the folder.
            is_packed_taken: whether the folder may be a packed network.

        Raises:
            OutputError: the output exists and is not to be replaced.
            ClusterQError: see `find_checkpoint`, `open_quantized` and `clusterq.data.open_data`.
        """
        packed = is_packed(self.path)
        if packed and not is_packed_taken:
            raise CheckpointError(
                f"{self.path} is a packed network, of which only --format pt2 is written; "
                "name the checkpoint that it came from"
            )
        folder = self.path if packed else find_checkpoint(self.path, self.bits)
        target = folder / name if self.output is None else self.output
        if target.exists() and not self.overwrite:
            raise OutputError(f"{target} exists already; choose another --output or give --overwrite")
        network, record = open_quantized(folder, self.model, trust=self.trust)
        if self.evaluation is None:
            return Opened(target, network, record, "random", lambda: _random_images(record.input_shape))
        images = open_images(self.evaluation, record, network)

        def batches() -> Iterator[Tensor]:
            return (x for x, _ in images.batches(self.batch_size, self.limit))

        return Opened(target, network, record, images.name, batches)


@dataclass(frozen=True)
class Opened:
    """A stored network, where its other form goes, and images to compare both on.

    Attributes:
        target: what to write.
        network, record: see `open_quantized`.
        images: name of the images.
        batches: gives them anew, [N, C, H, W] each.
    """

    target: Path
    network: nn.Module
    record: Record
    images: str
    batches: Callable[[], Iterable[Tensor]]


def find_checkpoint(path: Path, bits: str | None) -> Path:
    """The checkpoint folder that `path` is, or the one of width `bits` in the run folder that it is.

    Raises CheckpointError when there is none, or several and `bits` chooses none.
    """
    if (path / checkpoint.RECORD).is_file():
        return path
    found = sorted(folder.parent for folder in path.glob(f"checkpoints/*/{checkpoint.RECORD}"))
    if not found:
        raise CheckpointError(f"{path} is neither a checkpoint nor a run folder with checkpoints")
    chosen = [folder for folder in found if bits is None or folder.name == bits.upper()]
    if len(chosen) != 1:
        names = ", ".join(folder.name for folder in found)
        raise CheckpointError(f"{path} holds the checkpoints {names}; choose one by --bits")
    return chosen[0]


def open_quantized(path: Path, model: str | None = None, *, trust: bool = False) -> tuple[nn.Module, Record]:
    """The network of a checkpoint or of a packed folder, in evaluation mode on the CPU, and its record.

    Args:
        path: the folder.
        model: specification of the network, when the folder cannot rebuild it.
        trust: without `model`, run the Python file that the folder names as its network.

    Raises:
        ClusterQError: see `clusterq.load` and `clusterq.deploy.load_packed`.
    """
    packed = load_packed(path) if is_packed(path) else None
    record = checkpoint.read_record(path) if packed is None else packed.record
    recorded = None if record.source is None else record.source.model
    spec = network_source(model, recorded, trust=trust)
    given = None if spec is None else build_model(spec, record.num_classes)
    return checkpoint.load(path, given) if packed is None else packed.network(given), record


def open_images(spec: str, record: Record, network: nn.Module) -> data.EvaluationSet:
    """An evaluation set as a stored network wants its images; raises as `clusterq.data.open_data`."""
    transform = None
    if record.source is not None:
        transform = own_transform(record.source, network, record.input_shape, record.mean, record.std)
    images = data.open_data(spec, input_shape=record.input_shape, mean=record.mean, std=record.std, transform=transform)
    data.check_fits(images, record.num_classes)
    return images


def _random_images(shape: tuple[int, int, int]) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(_RANDOM_IMAGES // 32):
        yield torch.randn(32, *shape, generator=generator)
