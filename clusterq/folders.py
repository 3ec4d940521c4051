"""Folders and files that are there whole or not at all: written beside their place, flushed to disk, renamed."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clusterq.errors import OutputError


@contextmanager
def new_folder(path: str | Path, *, overwrite: bool = False, keep: str | None = None) -> Iterator[Path]:
    """A folder to fill that takes the name `path` when the block ends, and vanishes when the block raises.

    Args:
        path: final name; its parent is made when absent.
        overwrite: replace a folder of that name. The old one stays in place until the new one is complete.
        keep: name beside it under which the replaced folder stays, so that a whole one is there at every moment, even
            when the process is killed between the two renames.

    Raises:
        OutputError: the name is taken, or writing into the folder failed (no permission, disk full). Other errors of
            the block pass unchanged, those of the operating system about other files too.
    """
    final = Path(path).absolute()
    check_writable(final, overwrite=overwrite)
    mark = uuid.uuid4().hex[:8]
    work = final.with_name(f".{final.name}.{mark}.tmp")
    try:
        with _writing(final):
            work.mkdir()
        try:
            yield work
        except OSError as error:
            if isinstance(error, OutputError) or not _concerns(error, work):
                raise
            raise _cannot_write(final, error) from error
        with _writing(final):
            _flush(work)
            old = final.with_name(f".{final.name}.{mark}.old")
            _put(work, final, old, None if keep is None else final.with_name(keep))
            _flush_directory(final.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_file(path: str | Path, data: bytes) -> None:
    """A file of these bytes under the name `path`, in place of one of that name; its parent is made when absent.

    Raises:
        OutputError: it cannot be written (no permission, disk full, a folder of that name).
    """
    final = Path(path).absolute()
    work = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.tmp")
    with _writing(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(work, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(work, final)
        finally:
            work.unlink(missing_ok=True)
        _flush_directory(final.parent)


def check_writable(path: str | Path, *, overwrite: bool = False) -> None:
    """Raises OutputError when `new_folder(path)` could not be made: asked before hours of work, not after."""
    final = Path(path).absolute()
    if final.exists() and not overwrite:
        raise OutputError(f"{path} exists already; choose another name or give --overwrite")
    if final.exists() and not final.is_dir():
        raise OutputError(f"{path} is a file; wanted the name of a folder")
    probe = final.parent / f".{final.name}.{uuid.uuid4().hex[:8]}.probe"
    with _writing(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        probe.mkdir()
        probe.rmdir()


def _put(work: Path, final: Path, old: Path, keep: Path | None) -> None:
    """Give `work` the name `final`; a folder of that name is moved away first and back again when that fails.

    It is moved to `keep`, whose folder is removed after that by the way of `old`; without `keep` it is itself removed.
    """
    if not final.exists():
        work.rename(final)
        return
    if keep is not None and keep.exists():
        keep.rename(old)
    aside = keep or old
    final.rename(aside)
    try:
        work.rename(final)
    except OSError:
        aside.rename(final)
        raise
    # The new folder is in place: a remainder of the old one is no reason to report failure.
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _writing(final: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _cannot_write(final, error) from error


def _concerns(error: OSError, work: Path) -> bool:
    """Whether an error is about a file in `work`, or, naming no file, about a disk that cannot be written."""
    if isinstance(error.filename, (str, bytes, os.PathLike)):
        return Path(os.fsdecode(error.filename)).absolute().is_relative_to(work)
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)


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
