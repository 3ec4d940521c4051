"""The record a build leaves behind, and whether csrc/ still holds what the libraries were built from.

Standard library only: `setup.py` runs this file where there is no torch yet.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent.parent
RECORD = PACKAGE / "_build.json"
# Compiled library -> its folder in csrc/. The files beside the folders belong to both.
FOLDERS = {"cpp": "cpu", "cuda": "cuda"}


def schema_digest(schemas: list[str]) -> str:
    """SHA-256 of the op schemas, order-free."""
    return hashlib.sha256("\n".join(sorted(schemas)).encode()).hexdigest()


def source_digest(csrc: Path, library: str) -> str:
    """SHA-256 of names and contents of the files that `library` (`"cpp"` or `"cuda"`) is compiled from."""
    digest = hashlib.sha256()
    for path in sorted([*csrc.glob("*.*"), *csrc.glob(f"{FOLDERS[library]}/*.*")]):
        data = path.read_bytes()
        digest.update(f"{path.relative_to(csrc).as_posix()} {len(data)}\n".encode() + data)
    return digest.hexdigest()


def build_record() -> dict[str, Any]:
    """What the last build of the extensions decided and why; empty when there was none."""
    if not RECORD.exists():
        return {}
    record: dict[str, Any] = json.loads(RECORD.read_text())
    return record


def stale_libraries() -> list[str]:
    """Libraries built from other sources than the csrc/ of this checkout; none where there are no sources."""
    csrc = PACKAGE.parent / "csrc"
    if not (csrc / "module.cpp").is_file():
        return []
    built = build_record().get("source_digest", {})
    return [library for library, digest in built.items() if digest != source_digest(csrc, library)]
