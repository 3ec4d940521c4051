"""Folders that are there whole or not at all: written beside their place, flushed to disk, then renamed."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clusterq.errors import OutputError


@contextmanager
def new_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill that takes the name `path` when the block ends, and vanishes when the block raises.

    Args:
        path: final name; its parent is made when absent.
        overwrite: replace a folder of that name. The old one stays in place until the new one is complete.

    Raises:
        OutputError: the name is taken, or writing failed (no permission, disk full).
    """
    final = Path(path).absolute()
    check_writable(final, overwrite=overwrite)
    mark = uuid.uuid4().hex[:8]
    work = final.with_name(f".{final.name}.{mark}.tmp")
    try:
        work.mkdir()
        yield work
        _flush(work)
        if final.exists():
            old = final.with_name(f".{final.name}.{mark}.old")
            final.rename(old)
            work.rename(final)
            shutil.rmtree(old)
        else:
            work.rename(final)
        _flush_directory(final.parent)
    except OSError as error:
        if isinstance(error, OutputError) or error.errno is None:
            raise
        raise _cannot_write(final, error) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def check_writable(path: str | Path, *, overwrite: bool = False) -> None:
    """Raises OutputError when `new_folder(path)` could not be made: asked before hours of work, not after."""
    final = Path(path).absolute()
    if final.exists() and not overwrite:
        raise OutputError(f"{path} exists already; choose another name or give --overwrite")
    if final.exists() and not final.is_dir():
        raise OutputError(f"{path} is a file; wanted the name of a folder")
    probe = final.parent / f".{final.name}.{uuid.uuid4().hex[:8]}.probe"
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise _cannot_write(final, error) from error


def _cannot_write(path: Path, error: OSError) -> OutputError:
    return OutputError(f"{path} cannot be written: {error.strerror or error}")


def _flush(folder: Path) -> None:
    for entry in sorted(folder.rglob("*")):
        if entry.is_dir():
            _flush_directory(entry)
        else:
            with open(entry, "rb+") as file:
                os.fsync(file.fileno())
    _flush_directory(folder)


def _flush_directory(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
