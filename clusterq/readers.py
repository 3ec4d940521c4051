"""Reading files that may come from anyone: JSON, tensors, zip archives, images.

Nothing here runs code from a file, and no amount of memory that a file announces is taken before it is compared with
what the file holds. Every function raises the error class it is given, with one sentence; a file that passes has plain
values in it and nothing else.
"""

from __future__ import annotations

import csv
import json
import math
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clusterq.errors import ClusterQError, DataError, require

if TYPE_CHECKING:
    import numpy as np

Failure = type[ClusterQError]

JSON_BYTES = 16 << 20
_JSON_DEPTH = 32
_INT64_DIGITS = 19
# No layer of a network has more dimensions; torch's own kernels fail in many ways beyond 64.
_DIMENSIONS = 8
# Deflate packs up to 1,030 to 1. Archives that unpack to more than both of these are taken for bombs.
_UNPACKED_BYTES, _UNPACKED_RATIO = 256 << 20, 20
# One image file of an archive, and one decoded image; the same number of pixels as Pillow warns of.
IMAGE_BYTES, IMAGE_PIXELS = 64 << 20, 89_478_485
# Pillow reads PostScript by running Ghostscript, and dozens of formats that nobody stores images of a test set in.
_IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP")
_MAX_HEADER = 4096
# zlib's window of 32 kB, with header and trailer of gzip and nothing else.
_GZIP = 16 + zlib.MAX_WBITS
# Of labels.csv: 40 million lines.
_MAX_LABELS_BYTES = 1 << 30
# What numpy raises for a damaged header, which it evaluates as a Python literal.
_BROKEN_HEADER = (ValueError, TypeError, KeyError, SyntaxError, OverflowError, MemoryError, tokenize.TokenError)
# What zipfile raises for archives that are damaged, encrypted (RuntimeError) or packed in an unknown way.
BROKEN_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, UnicodeError)


def parse_json(data: bytes, name: str, failure: Failure) -> Any:
    """The value of a JSON text in UTF-8: numbers are finite and whole ones fit 64 bits, lists are not nested deeply.

    Raises:
        failure: anything else.
    """
    try:
        value = json.loads(
            data.decode(), parse_constant=_refused_constant, parse_float=_finite_float, parse_int=_small_int
        )
    except RecursionError:
        raise failure(f"{name} is damaged: it is nested too deeply") from None
    # JSONDecodeError and UnicodeDecodeError are among them.
    except ValueError as error:
        raise failure(f"{name} is damaged: {error}") from error
    level, depth = [value], 0
    while level:
        level = [part for outer in level if isinstance(outer, (dict, list)) for part in _parts(outer)]
        depth += 1
        if depth > _JSON_DEPTH:
            raise failure(f"{name} is damaged: it is nested too deeply")
    return value


def read_json(path: Path, failure: Failure, *, limit: int = JSON_BYTES) -> Any:
    """The value of a JSON file of at most `limit` bytes, as `parse_json`; one named .gz is unpacked by `gunzip` first.

    Raises OSError when it cannot be read.
    """
    data = read_limited(path, failure, limit=limit)
    if path.suffix == ".gz":
        data = gunzip(data, str(path), failure, limit=limit)
    return parse_json(data, str(path), failure)


def read_record(
    path: Path, failure: Failure, *, format: str, version: int, what: str, limit: int = JSON_BYTES
) -> dict[str, Any]:
    """The object of a JSON file whose `format` and `format_version` are these; its other fields are not looked at.

    Args:
        path: of the file.
        failure: error class.
        format, version: what the file has to say of itself.
        what: such as "the record of a bank", for messages.
        limit: bytes.

    Raises:
        failure: damaged, something else, or of another version.
        OSError: it cannot be read.
    """
    data = read_json(path, failure, limit=limit)
    if not isinstance(data, dict) or data.get("format") != format:
        raise failure(f"{path} is not {what}")
    if data.get("format_version") != version:
        raise failure(f"{path} is {what} in format {data.get('format_version')!r}; this version reads {version}")
    return data


def gunzip(data: bytes, name: str, failure: Failure, *, limit: int) -> bytes:
    """What the one member of a gzip file holds; memory is taken for `limit` bytes at most.

    Raises:
        failure: it is no gzip file, is cut short, does not fit its checksum, goes on behind its member, or unpacks to
            more than `limit` bytes.
    """
    unpacker = zlib.decompressobj(wbits=_GZIP)
    try:
        # One byte more tells a file of `limit` bytes from a larger one.
        unpacked = unpacker.decompress(data, limit + 1)
    except zlib.error as error:
        raise failure(f"{name} is damaged: it cannot be unpacked by gzip: {first_line(error)}") from error
    if len(unpacked) > limit:
        raise failure(f"{name} was refused: its {len(data)} bytes unpack to more than {limit}")
    if not unpacker.eof:
        raise failure(f"{name} is damaged: its compressed data ends too early")
    if unpacker.unused_data:
        raise failure(f"{name} is damaged: {len(unpacker.unused_data)} bytes follow its compressed data")
    return unpacked


def gzipped(data: bytes) -> bytes:
    """A gzip file of one member as small as zlib makes it, without name and time: equal data gives equal bytes."""
    packer = zlib.compressobj(9, zlib.DEFLATED, _GZIP, 9)
    return packer.compress(data) + packer.flush()


def read_limited(path: Path, failure: Failure, *, limit: int = JSON_BYTES) -> bytes:
    """The bytes of a file. Raises `failure` for more than `limit` of them and OSError when it cannot be read."""
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise failure(f"{path} is damaged: it has more than {limit} bytes")
    return data


def read_safetensors(path: Path, failure: Failure) -> dict[str, Tensor]:
    """Tensors of a safetensors file by name; its library compares the header's offsets with the file's size.

    Raises:
        failure: it cannot be read, is damaged, or a tensor has more than 8 dimensions.
    """
    library = require("safetensors", purpose=f"reading {path.name}")
    try:
        tensors: dict[str, Tensor] = require("safetensors.torch", purpose=f"reading {path.name}").load_file(path)
    # KeyError: a type of number that the file format knows and the library's torch half does not.
    except (OSError, library.SafetensorError, KeyError, ValueError, RuntimeError, OverflowError) as error:
        raise failure(f"{path.name} cannot be read as a safetensors file: {first_line(error)}") from error
    require_plain(tensors, path.name, failure)
    return tensors


def require_plain(tensors: Mapping[str, Tensor], name: str, failure: Failure) -> None:
    """Raises `failure` for a tensor that is not dense, on the CPU, of real numbers, and stored in full.

    A file of a few bytes can announce a tensor of any size by a stride of 0: the first operation would take its memory.
    """
    for key, value in tensors.items():
        plain = type(value) in (Tensor, torch.nn.Parameter) and value.layout == torch.strided
        if not plain or value.device.type != "cpu" or value.is_quantized or value.is_complex():
            raise failure(f"{name}: tensor {key} is not a plain tensor of numbers")
        if value.dim() > _DIMENSIONS:
            raise failure(f"{name}: tensor {key} has {value.dim()} dimensions; wanted at most {_DIMENSIONS}")
        stored = value.untyped_storage().nbytes()
        if value.numel() * value.element_size() > stored:
            raise failure(f"{name}: tensor {key} announces {list(value.shape)} elements; {stored} bytes are stored")


def require_unpacked_size(archive: zipfile.ZipFile, size: int, name: str, failure: Failure) -> None:
    """Raises `failure` for an archive of `size` bytes that unpacks to far more, or is packed by an unusual method."""
    entries = archive.infolist()
    if any(info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for info in entries):
        raise failure(f"{name} was refused: its parts are packed by another method than deflate")
    total = sum(info.file_size for info in entries)
    if total > max(_UNPACKED_BYTES, _UNPACKED_RATIO * size):
        raise failure(f"{name} was refused: its {size} bytes unpack to {total}")


def read_images(path: Path) -> tuple[Tensor, Tensor]:
    """Images [N, C, H, W] and labels [N] of an earlier run. Raises DataError for a file that holds anything else."""
    tensors = read_safetensors(path, DataError)
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


def read_array(
    name: str, archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], key: str
) -> np.ndarray[Any, Any]:
    """One array of an .npz file, its announced size compared with the stored one before memory is taken.

    Args:
        name: of the file, for messages.
        archive: the file, open.
        members: its members by name.
        key: of the array.

    Raises:
        DataError: absent, damaged, or holding Python objects.
        One of `BROKEN_ZIP`: the archive is damaged.
    """
    import numpy as np

    info = members.get(f"{key}.npy")
    if info is None:
        raise DataError(f"{name} has no array {key!r}")
    try:
        with archive.open(info) as file:
            version = np.lib.format.read_magic(file)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = header(file, max_header_size=_MAX_HEADER)
            begin = file.tell()
        if dtype.hasobject:
            raise DataError(f"{name}: array {key!r} holds Python objects and was refused: reading it could run code")
        size = dtype.itemsize
        for length in shape:
            size *= length
        if any(length < 0 for length in shape):
            raise DataError(f"{name}: array {key!r} is damaged: its shape is {list(shape)}")
        if begin + size != info.file_size:
            raise DataError(f"{name}: array {key!r} announces {size} bytes; {info.file_size - begin} are stored")
        with archive.open(info) as file:
            array: np.ndarray[Any, Any] = np.lib.format.read_array(file, allow_pickle=False)
    except _BROKEN_HEADER as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{name}: array {key!r} is damaged: {first_line(error)}") from error
    return array


def read_labels(path: Path) -> list[tuple[str, int]]:
    """(file, label) per line of a labels.csv. Raises DataError for anything else."""
    name = f"{path.parent.name}/{path.name}"
    if path.stat().st_size > _MAX_LABELS_BYTES:
        raise DataError(f"{name} has more than {_MAX_LABELS_BYTES} bytes")
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [(row["file"], int(row["label"])) for row in csv.DictReader(file)]
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        raise DataError(f"{name}: wanted the columns file,label with integer labels") from error
    if any(abs(label) >= 1 << 63 for _, label in rows):
        raise DataError(f"{name}: a label is larger than any number of classes")
    return rows


@contextmanager
def decoded_image(file: Any, name: str) -> Iterator[Any]:
    """A PIL image of an open binary file, of a common format and of at most `IMAGE_PIXELS` pixels.

    Raises:
        DataError: it is another file, too large or damaged, found at once or while the block decodes it.
    """
    pil = require("PIL.Image", purpose="reading image files", extra="vision")
    try:
        with pil.open(file, formats=_IMAGE_FORMATS) as picture:
            if picture.width * picture.height > IMAGE_PIXELS:
                raise DataError(f"{name} has {picture.width} x {picture.height} pixels; too many for one image")
            yield picture
    except DataError:
        raise
    # Pillow's decoders raise all of these for damaged files; SyntaxError and DecompressionBombError name no file.
    except (OSError, SyntaxError, ValueError, LookupError, TypeError, EOFError, OverflowError, RuntimeError,
            MemoryError, zlib.error, pil.DecompressionBombError) as error:  # fmt: skip
        raise DataError(f"{name} cannot be decoded as an image: {first_line(error)}") from error


def _parts(value: dict[str, Any] | list[Any]) -> Iterator[Any]:
    yield from value.values() if isinstance(value, dict) else value


def _refused_constant(text: str) -> float:
    raise ValueError(f"it holds {text} where a number is wanted")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("it holds a number that is too large")
    return value


def _small_int(text: str) -> int:
    if len(text.lstrip("-")) > _INT64_DIGITS or abs(int(text)) >= 1 << 63:
        raise ValueError("it holds a whole number of more than 64 bits")
    return int(text)


def first_line(error: BaseException) -> str:
    """What an error says, as part of one sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
