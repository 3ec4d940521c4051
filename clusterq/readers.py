"""Reading files that may come from anyone: JSON, tensors, zip archives, images.

Nothing here runs code from a file, and no amount of memory that a file announces is taken before it is compared with
what the file holds. Every function raises the error class it is given, with one sentence; a file that passes has plain
values in it and nothing else.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from clusterq.errors import ClusterQError, DataError, require

Failure = type[ClusterQError]

JSON_BYTES = 16 << 20
_JSON_DEPTH = 32
_INT64_DIGITS = 19
# No layer of a network has more dimensions; torch's own kernels fail in many ways beyond 64.
_DIMENSIONS = 8
# A file of torch's old format begins with five pickles; names of tensors and classes are much shorter than this.
_PICKLES, _PICKLED_TEXT = 5, 1000
# Deflate packs up to 1,030 to 1. Archives that unpack to more than both of these are taken for bombs.
_UNPACKED_BYTES, _UNPACKED_RATIO = 256 << 20, 20
# One image file of an archive, and one decoded image; the same number of pixels as Pillow warns of.
IMAGE_BYTES, IMAGE_PIXELS = 64 << 20, 89_478_485
# Pillow reads PostScript by running Ghostscript, and dozens of formats that nobody stores images of a test set in.
_IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP")
# What zipfile raises for archives that are damaged, encrypted (RuntimeError) or packed in an unknown way.
BROKEN_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, UnicodeError)
# What the unpickler raises for a damaged file beside UnpicklingError: Python documents "and others, not limited to".
_BROKEN_PICKLE = (
    OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError,
    OverflowError, MemoryError, ImportError, UnicodeError, struct.error,
)  # fmt: skip


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
    """The value of a JSON file of at most `limit` bytes, as `parse_json`. Raises OSError when it cannot be read."""
    return parse_json(read_limited(path, failure, limit=limit), str(path), failure)


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


def read_pickled_tensors(path: Path, failure: Failure) -> Any:
    """Content of a file of `torch.save` by the one safe way to read it; tensors in it are not checked yet.

    Raises:
        failure: damaged, packed (which torch never does), or holding more than what `weights_only=True` admits.
    """
    with open(path, "rb") as file:
        packed = file.read(2) == b"PK"
    try:
        if packed:
            with zipfile.ZipFile(path) as archive:
                if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                    raise failure(f"{path.name} was refused: its parts are compressed, which torch.save never does")
                for info in archive.infolist():
                    if info.filename.endswith("data.pkl"):
                        _scan_pickles(io.BytesIO(archive.read(info)), path.name, failure)
        else:
            with open(path, "rb") as file:
                _scan_pickles(file, path.name, failure)
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


def _scan_pickles(file: IO[bytes], name: str, failure: Failure) -> None:
    """Raises `failure` for very long texts in the pickles that a file begins with, ValueError for damaged ones.

    torch looks for names in its own error message by a regular expression that takes the square of their length.
    """
    for _ in range(_PICKLES):
        if not file.read(1):
            return
        file.seek(-1, io.SEEK_CUR)
        for _, argument, _ in pickletools.genops(file):
            if isinstance(argument, (str, bytes)) and len(argument) > _PICKLED_TEXT:
                raise failure(f"{name} was refused: it holds a name of {len(argument)} characters")


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
