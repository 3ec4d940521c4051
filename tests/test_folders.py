"""Folders that appear whole or not at all, and whose errors are told apart from those of other files."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from clusterq.errors import OutputError
from clusterq.folders import new_folder, write_file


def _fill(path: Path, text: str) -> None:
    with new_folder(path, overwrite=True) as folder:
        (folder / "file").write_text(text)


def test_error_about_another_file_keeps_its_message(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent_image") as caught, new_folder(tmp_path / "run"):
        (tmp_path / "absent_image").read_bytes()
    assert not isinstance(caught.value, OutputError)
    with pytest.raises(PermissionError) as denied, new_folder(tmp_path / "run"):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "other"))
    assert not isinstance(denied.value, OutputError)
    with pytest.raises(OSError, match="undecodable image"), new_folder(tmp_path / "run"):
        raise OSError("undecodable image")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_disk_that_cannot_be_written(tmp_path: Path, code: int) -> None:
    with pytest.raises(OutputError, match=f"run cannot be written: {os.strerror(code)}"), new_folder(tmp_path / "run"):
        raise OSError(code, os.strerror(code))
    assert os.listdir(tmp_path) == []


def test_error_inside_the_folder(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="run cannot be written: Is a directory"),
        new_folder(tmp_path / "run") as folder,
    ):
        (folder / "taken").mkdir()
        (folder / "taken").write_text("x")


def test_old_folder_returns_when_the_new_one_cannot_take_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fill(tmp_path / "run", "old")
    rename = Path.rename

    def failing(path: Path, target: Path) -> Path:
        if path.name.endswith(".tmp"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OutputError, match="Input/output error"):
        _fill(tmp_path / "run", "new")
    assert os.listdir(tmp_path) == ["run"]
    assert (tmp_path / "run" / "file").read_text() == "old"


def test_old_folder_that_cannot_be_removed_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fill(tmp_path / "run", "old")
    unlink = os.unlink

    def stubborn(path: str, **settings: object) -> None:
        if path == "file":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        unlink(path, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "unlink", stubborn)
    _fill(tmp_path / "run", "new")
    assert (tmp_path / "run" / "file").read_text() == "new"


def test_file_appears_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "deeper" / "model.onnx"
    write_file(target, b"old")
    write_file(target, b"new")
    assert target.read_bytes() == b"new" and os.listdir(target.parent) == ["model.onnx"]

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="cannot be written: No space left"):
        write_file(target, b"newer")
    assert target.read_bytes() == b"new" and os.listdir(target.parent) == ["model.onnx"]


def test_file_under_the_name_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written: Is a directory"):
        write_file(tmp_path, b"")
    assert os.listdir(tmp_path) == [] and list(tmp_path.parent.glob(f".{tmp_path.name}.*")) == []
