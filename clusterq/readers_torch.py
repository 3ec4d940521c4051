"""Reading files of `torch.save` that may come from anyone: zip archives, and the format from before torch 1.6.

`torch.load(weights_only=True)` runs no code from a file, but takes the memory that the file announces: of tensors made
by size, `torch.Tensor(10**9)`, and in the old format of storages that are announced and not stored. So the pickles are
followed first, without making anything.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import IO, Any, cast

import torch

from clusterq.readers import Failure, first_line

# Names of tensors and classes are much shorter than this.
_TEXT = 1000
# Bytes per element of the storages that torch.save writes.
_ITEM_BYTES = {
    "Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1, "Bool": 1,
    "ComplexDouble": 16, "ComplexFloat": 8, "QInt32": 4, "QInt8": 1, "QUInt8": 1, "QUInt4x2": 1, "QUInt2x4": 1,
    "Untyped": 1,
}  # fmt: skip
# What the unpickler raises for a damaged file beside UnpicklingError: Python documents "and others, not limited to".
_BROKEN_PICKLE = (
    OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError,
    OverflowError, MemoryError, ImportError, UnicodeError, struct.error,
)  # fmt: skip
_LITERALS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE")
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


def read_pickled_tensors(path: Path, failure: Failure) -> Any:
    """Content of a file of `torch.save` by the one safe way to read it; tensors in it are not checked yet.

    Raises:
        failure: damaged, packed (which torch never does), announcing more than it stores, or holding more than what
            `weights_only=True` admits.
    """
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"PK"
            file.seek(0)
            if packed:
                _check_archive(file, path.name, failure)
            else:
                _check_old(file, path.name, failure)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise failure(
            f"{path.name} holds more than plain tensors and was refused, as loading it could run code: "
            "save the network's state_dict() instead"
        ) from None
    except (zipfile.BadZipFile, *_BROKEN_PICKLE) as error:
        if isinstance(error, failure):
            raise
        raise failure(f"{path.name} cannot be read as a weight file: {first_line(error)}") from error


def _check_archive(file: IO[bytes], name: str, failure: Failure) -> None:
    """torch compares every storage with the member it is read from, but one member can be several storages."""
    storages: dict[Any, int] = {}
    with zipfile.ZipFile(file) as archive:
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise failure(f"{name} was refused: its parts are compressed, which torch.save never does")
        for info in archive.infolist():
            # torch finds members whatever their case.
            if info.filename.lower().endswith("data.pkl"):
                _follow(io.BytesIO(archive.read(info)), storages, name, failure)
    _require_stored(storages, file.seek(0, io.SEEK_END), name, failure)


def _check_old(file: IO[bytes], name: str, failure: Failure) -> None:
    """Five pickles, the fourth with the tensors and the fifth a list of storages, whose bytes follow in its order."""
    storages: dict[Any, int] = {}
    for _ in range(3):
        _follow(file, {}, name, failure)
    _follow(file, storages, name, failure)
    listed = _follow(file, {}, name, failure)
    begin = file.tell()
    _require_stored(storages, file.seek(0, io.SEEK_END) - begin, name, failure)
    # torch fills those of the list: others would keep whatever is in the memory they are given.
    if not isinstance(listed, list) or set(storages) - set(listed):
        raise failure(f"{name} is damaged: it announces tensors that are not stored")


def _require_stored(storages: dict[Any, int], stored: int, name: str, failure: Failure) -> None:
    total = sum(storages.values())
    if total > stored:
        raise failure(f"{name} is damaged: its tensors announce {total} bytes; {stored} are stored")


class _Made:
    """An object of which nothing is known."""


class _Name(str):
    """A class or a function by its name."""


def _follow(file: IO[bytes], storages: dict[Any, int], name: str, failure: Failure) -> Any:
    """Follow one pickle as torch's reader does, with names in place of classes and functions; returns its value.

    Args:
        file: at the beginning of the pickle, and left at its end.
        storages: bytes that each storage in it announces, by key; added to.
        name: of the file.
        failure: error class.

    Raises:
        failure: a very long text, as torch looks for names in its own error message by a regular expression that takes
            the square of their length, or an object made by its size alone.
        pickle.UnpicklingError: an instruction or a call that torch's reader does not know.
        One of `_BROKEN_PICKLE`: damaged.
    """
    stack: list[Any] = []
    marked: list[list[Any]] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        nonlocal stack
        items, stack = stack, marked.pop()
        return items

    for opcode, found, _ in pickletools.genops(file):
        kind, argument = opcode.name, cast(Any, found)
        if isinstance(argument, (str, bytes)) and len(argument) > _TEXT:
            raise failure(f"{name} was refused: it holds a name of {len(argument)} characters")
        if kind in _LITERALS:
            stack.append(argument)
        elif kind == "SHORT_BINSTRING":
            stack.append(argument.encode("latin-1").decode())
        elif kind in _CONSTANTS:
            stack.append(_CONSTANTS[kind])
        elif kind == "GLOBAL":
            stack.append(_Name(argument.replace(" ", ".")))
        elif kind == "EMPTY_LIST":
            stack.append([])
        elif kind in ("EMPTY_DICT", "EMPTY_SET"):
            stack.append(_Made())
        elif kind == "MARK":
            marked.append(stack)
            stack = []
        elif kind == "TUPLE":
            items = since_mark()
            stack.append(tuple(items))
        elif kind in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(kind[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif kind in ("REDUCE", "NEWOBJ"):
            arguments, function = stack.pop(), stack.pop()
            _require_harmless(function, arguments, name, failure)
            stack.append(_Made())
        elif kind in ("APPEND", "APPENDS"):
            items = since_mark() if kind == "APPENDS" else [stack.pop()]
            stack[-1].extend(items)
        elif kind == "SETITEMS":
            since_mark()
        elif kind == "SETITEM":
            del stack[-2:]
        elif kind == "BUILD":
            stack.pop()
        elif kind in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif kind in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif kind == "BINPERSID":
            key, size = _storage(stack.pop())
            storages[key] = max(size, storages.get(key, 0))
            stack.append(_Made())
        elif kind not in ("PROTO", "STOP"):
            raise pickle.UnpicklingError(kind)
    return stack.pop()


def _require_harmless(function: Any, arguments: Any, name: str, failure: Failure) -> None:
    """Raises `failure` for a call of a class whose objects have the size that they are given.

    Of something that is not a class or a function by its name, UnpicklingError: torch's reader refuses it too.
    """
    if not isinstance(function, _Name) or not isinstance(arguments, tuple):
        raise pickle.UnpicklingError("a call of something that has no name")
    called = function
    if function.endswith("._rebuild_from_type_v2"):
        # It calls what it is given.
        called = arguments[0]
        if not isinstance(called, _Name) or not called.startswith("torch._utils._rebuild_"):
            raise failure(f"{name} was refused: it makes a tensor in a way that torch.save never does")
    if called.endswith(("Tensor", "Storage", "bytearray")):
        raise failure(f"{name} was refused: it makes an object by calling {called[:60]!r}, which stores nothing")


def _storage(identity: Any) -> tuple[Any, int]:
    """Key and bytes of a storage from its persistent id: ("storage", class, key, device, elements, ...)."""
    mark, kind, key, _, elements = identity[:5]
    if mark != "storage" or not isinstance(kind, _Name) or type(elements) is not int or elements < 0:
        raise ValueError("a storage of unknown kind")
    if type(key) not in (str, int):
        raise ValueError("a storage of unknown name")
    return key, elements * _ITEM_BYTES[kind.rsplit(".", 1)[-1].removesuffix("Storage")]
