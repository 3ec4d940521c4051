"""What a run is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clusterq.config import ClusterQConfig
from clusterq.widths import Width


@dataclass(frozen=True)
class RunRequest:
    """What `clusterq quantize` was asked to do.

    Attributes:
        model, weights, input_size, mean, std, normalization, download: see `clusterq.models.load_model`.
        data: evaluation set, see `clusterq.data.open_data`; None: nothing is measured.
        output: run folder to make; `overwrite` replaces an earlier one.
        widths: one student each, all from the same images.
        config: settings; its widths are replaced by `widths`.
        images: `images.safetensors` of an earlier run, or the folder of a bank (`clusterq.bank`), instead of synthesis.
        any_network: accept a bank that was made for another network.
        save_images: store the images in the run folder.
        limit: evaluate on the first so many images only.
        evaluation_batch: images per evaluation batch.
        device: where to compute.
        command: as typed, for the result.
        resume: continue an interrupted run of the same request, see `clusterq.resume`.
        save_every: seconds between two saves of the run's state; None: no state is kept.
        words: the command without the program's name, from which the run can be continued.
    """

    model: str
    weights: str | None
    data: str | None
    output: Path
    widths: tuple[Width, ...]
    config: ClusterQConfig
    input_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    normalization: str | None = None
    download: bool = False
    images: Path | None = None
    any_network: bool = False
    save_images: bool = False
    limit: int | None = None
    evaluation_batch: int = 128
    device: str = "cpu"
    overwrite: bool = False
    command: str = ""
    resume: bool = False
    save_every: float | None = None
    words: tuple[str, ...] = ()
