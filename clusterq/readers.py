"""Reading files of earlier runs: images and JSON records. Nothing here runs code from a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clusterq.errors import ClusterQError, DataError, require


def read_json(path: Path, failure: type[ClusterQError]) -> Any:
    """The value of a JSON file. Raises `failure` for a damaged one and OSError when it cannot be read."""
    try:
        return json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise failure(f"{path} is damaged: {error}") from error


def read_images(path: Path) -> tuple[Tensor, Tensor]:
    """Images [N, C, H, W] and labels [N] of an earlier run. Raises DataError for a file that holds anything else."""
    safetensors = require("safetensors", purpose="reading images")
    try:
        tensors = require("safetensors.torch", purpose="reading images").load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise DataError(f"{path} cannot be read as stored images: {error}") from error
    if set(tensors) != {"images", "labels"}:
        raise DataError(f"{path} holds {sorted(tensors)}; wanted images and labels")
    images, labels = tensors["images"], tensors["labels"]
    if images.dim() != 4 or not images.is_floating_point() or labels.dtype != torch.int64 or not len(images):
        found = f"images {images.dtype} {list(images.shape)} and labels {labels.dtype} {list(labels.shape)}"
        raise DataError(f"{path} holds {found}; wanted floating-point images [N, C, H, W] and int64 labels [N]")
    if not bool(torch.isfinite(images).all()):
        raise DataError(f"{path}: images hold a NaN or infinite value")
    return images, labels


def write_images(path: Path, images: Tensor, labels: Tensor) -> None:
    """Store images [N, C, H, W] and labels [N] for `read_images`."""
    safetensors = require("safetensors.torch", purpose="storing images")
    path.write_bytes(safetensors.save({"images": images.cpu().contiguous(), "labels": labels.cpu().contiguous()}))
