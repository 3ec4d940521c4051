"""State of a run on disk: folders of plain files with the SHA-256 of each in a manifest, and trees of values in them.

A sealed folder holds files and `manifest.json`, which has size and SHA-256 of every file and a SHA-256 of itself, so
that one changed bit anywhere is noticed before anything is used. A tree of dictionaries, lists, tuples, numbers, text
and tensors becomes `state.json` and `state.safetensors`; it comes back equal bit for bit, tensors with their order of
dimensions in memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from clusterq.errors import CheckpointError, require
from clusterq.models import file_sha256
from clusterq.readers import parse_json, read_json, read_limited, read_safetensors

FORMAT, FORMAT_VERSION = "clusterq-state", 1
MANIFEST, VALUES, TENSORS = "manifest.json", "state.json", "state.safetensors"
# Loss terms of every step are in it: 100 bytes a step.
_VALUES_BYTES = 1 << 30
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


class DamagedError(CheckpointError):
    """A sealed folder with a file that is absent, incomplete or changed."""


def seal(folder: Path) -> str:
    """Write the manifest over all files of a folder; returns its SHA-256, which stands for the whole content."""
    files = {path.name: _entry(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}
    data = _manifest(files)
    (folder / MANIFEST).write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def verify(folder: Path) -> str:
    """Compare every file with the manifest; returns the manifest's SHA-256.

    Raises:
        DamagedError: a file is absent, incomplete, changed, a link, or not in the manifest.
        CheckpointError: the folder is whole and of another format version.
    """
    path = folder / MANIFEST
    try:
        data = read_limited(path, DamagedError)
    except OSError as error:
        raise DamagedError(f"{folder} has no readable {MANIFEST}: {error.strerror}") from error
    content = parse_json(data, str(path), DamagedError)
    files = content.get("files") if isinstance(content, dict) else None
    version = content.get("format_version") if isinstance(content, dict) else None
    if not isinstance(files, dict) or data != _manifest(files, version):
        raise DamagedError(f"{path} is damaged: it does not have the SHA-256 it names")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{folder} has format {version!r} of {FORMAT}; this version reads {FORMAT_VERSION}")
    for name, entry in files.items():
        if _NAME.fullmatch(name) is None:
            raise DamagedError(f"{path} is damaged: {name!r} is not the name of a file")
        if (folder / name).is_symlink():
            raise DamagedError(f"{folder / name} is damaged: it is a link")
        try:
            found = _entry(folder / name)
        except OSError as error:
            raise DamagedError(f"{folder / name} cannot be read: {error.strerror}") from error
        if found != entry:
            raise DamagedError(f"{folder / name} is damaged: its SHA-256 is not the one in {MANIFEST}")
    surplus = sorted({path.name for path in folder.iterdir()} - {*files, MANIFEST})
    if surplus:
        raise DamagedError(f"{folder / surplus[0]} is not in {MANIFEST}")
    return hashlib.sha256(data).hexdigest()


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Store a tree in an existing folder, to be sealed with whatever else is in it.

    Raises:
        TypeError: a value of another kind in the tree.
    """
    tensors: dict[str, Tensor] = {}
    values = _encode(state, "", tensors)
    (folder / VALUES).write_text(json.dumps(values, allow_nan=False))
    safetensors = require("safetensors.torch", purpose="saving the state of a run")
    (folder / TENSORS).write_bytes(safetensors.save(tensors))


def read_state(folder: Path, *, verified: bool = False) -> Any:
    """The tree in a sealed folder, tensors on the CPU in memory of their own. Raises as `verify`, which it begins with.

    Args:
        folder: with the tree.
        verified: `verify` has been called before.
    """
    if not verified:
        verify(folder)
    values = read_json(folder / VALUES, DamagedError, limit=_VALUES_BYTES)
    return _decode(values, read_safetensors(folder / TENSORS, DamagedError))


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _manifest(files: Mapping[str, Any], version: Any = FORMAT_VERSION) -> bytes:
    """The only bytes a manifest of these files may have."""
    content = {"format": FORMAT, "format_version": version, "files": files}
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return (json.dumps({**content, "sha256": digest}, indent=1) + "\n").encode()


def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        # Elementwise kernels may round differently in another memory order: a resumed run would lose its bits.
        order = sorted(range(value.dim()), key=value.stride, reverse=True)
        stored = value.detach().cpu().permute(order)
        name = f"{len(tensors)}{path}"
        # A copy of its own: safetensors refuses tensors that share memory.
        tensors[name] = stored.contiguous().clone()
        return {"$tensor": name, "order": order}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: _encode(part, f"{path}.{key}", tensors) for key, part in value.items()}
        pairs = [[_encode(key, path, tensors), _encode(part, f"{path}.{key}", tensors)] for key, part in value.items()]
        return {"$map": pairs}
    if isinstance(value, (list, tuple)):
        parts = [_encode(part, f"{path}.{i}", tensors) for i, part in enumerate(value)]
        return parts if isinstance(value, list) else {"$tuple": parts}
    if type(value) is float and not math.isfinite(value):
        return {"$float": str(value)}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"state{path} is a {type(value).__name__}; wanted plain values and tensors")


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(part, tensors) for part in value]
    if not isinstance(value, dict):
        return value
    marks = [key for key in value if key.startswith("$")]
    if not marks:
        return {key: _decode(part, tensors) for key, part in value.items()}
    try:
        if marks == ["$tensor"]:
            order = value["order"]
            inverse = sorted(range(len(order)), key=order.__getitem__)
            # Cloned before it is turned: memory of its own, aligned as torch aligns it.
            return tensors[value["$tensor"]].clone().permute(inverse)
        if marks == ["$tuple"]:
            return tuple(_decode(part, tensors) for part in value["$tuple"])
        if marks == ["$map"]:
            return {_decode(key, tensors): _decode(part, tensors) for key, part in value["$map"]}
        if marks == ["$float"] and value["$float"] in ("inf", "-inf", "nan"):
            return float(value["$float"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DamagedError(f"{VALUES} is damaged: {type(error).__name__} {error}") from error
    raise DamagedError(f"{VALUES} is damaged: it holds {marks[0]!r}")
