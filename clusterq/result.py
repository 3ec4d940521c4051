"""What a run folder says of its run: the content of `result.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clusterq import ops
from clusterq.config import ClusterQConfig, WeightRange
from clusterq.data import EvaluationSet, content_sha256
from clusterq.models import LoadedModel
from clusterq.qat import Row
from clusterq.request import RunRequest
from clusterq.versions import machine, now, versions

FORMAT, FORMAT_VERSION = "clusterq-result", 1
# What rounding alone costs, the same for every preset of a scheme: kind of all ranges, symmetry of the weights.
BASELINES: dict[str, WeightRange] = {"rounded_minmax": "minmax", "rounded_mse": "mse"}


def content(
    request: RunRequest,
    loaded: LoadedModel,
    config: ClusterQConfig,
    *,
    data: Mapping[str, Any] | None,
    full: Mapping[str, float | None] | None,
    rows: Sequence[Mapping[str, Any]],
    images: Tensor,
    calibration_images: int,
    resumed: int,
    seconds: Mapping[str, float],
    processes: int,
) -> dict[str, Any]:
    """The content of `result.json`.

    Args:
        request: what was asked for.
        loaded: the network.
        config: settings with the first width.
        data: see `data_facts`.
        full: top-1 and top-5 in percent of the network in floating point.
        rows: one per width.
        images: [N, C, H, W] that students were trained on.
        calibration_images: how many of them the ranges of the baselines were set on.
        resumed: how often the run was continued.
        seconds: by phase.
        processes: that shared the run.
    """
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "command": request.command,
        "created": now(),
        "preset": request.config.preset,
        "seed": request.config.seed,
        "model": loaded.facts(),
        "data": data,
        "float": full,
        "images": {
            "count": len(images),
            "shape": list(images.shape[1:]),
            "source": str(request.images) if request.images is not None else request.config.synthesis.source,
            "label_accuracy": rows[-1]["label_accuracy"],
        },
        "baselines": _baselines(calibration_images, rows[-1]["scheme"]),
        "widths": list(rows),
        "resumed": resumed,
        "seconds": dict(seconds),
        "config": config.to_dict(),
        "versions": versions(),
        "machine": {**machine(request.device), "device": request.device, "processes": processes},
        "backends": kernels(request.device),
    }


def data_facts(data: EvaluationSet, spec: str, limit: int | None) -> dict[str, Any]:
    """Of an evaluation set: name, images measured on, images in all, SHA-256 (`content_sha256`)."""
    count = len(data) if limit is None else min(limit, len(data))
    return {"name": data.name, "images": count, "of": len(data), "sha256": content_sha256(spec)}


def kernels(device: str) -> dict[str, str]:
    """Op -> the kernel in use on a device."""
    kind = torch.device(device).type
    return {backend.op: backend.kernel for backend in ops.backends() if backend.device == kind}


def end_bits(layers: Sequence[Row]) -> tuple[int | None, int | None]:
    """Weight width of the first and of the last layer as they were quantized; None when no layer was."""
    weights = [layer for layer in layers if layer.weight_bits is not None]
    if not weights:
        return None, None
    # A layer called several times is listed at its first call and may still be the last one.
    last = next((layer for layer in weights if layer.note.startswith("last layer")), weights[-1])
    return weights[0].weight_bits, last.weight_bits


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Indented, with a newline at the end."""
    path.write_text(json.dumps(data, indent=2) + "\n")


def _baselines(calibration_images: int, scheme: str) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "training": "none",
            "scheme": scheme,
            "ranges": ranges,
            "weights": "per output channel, asymmetric",
            "activations": "per tensor, asymmetric",
            "calibration_images": calibration_images,
        }
        for name, ranges in BASELINES.items()
    }
