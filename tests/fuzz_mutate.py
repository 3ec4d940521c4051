"""Deterministic mutations of files: bits, bytes, integers, numbers in text, and the members of zip archives."""

from __future__ import annotations

import io
import random
import re
import struct
import zipfile

_INTEGERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1,
             1 << 63, (1 << 64) - 1)  # fmt: skip
_NUMBERS = (b"-1", b"0", b"1", b"255", b"65536", b"2147483648", b"9223372036854775807", b"-9223372036854775808",
            b"18446744073709551616", b"1" + b"0" * 400, b"9" * 5000, b"1e999", b"-1e308", b"0.5", b"NaN", b"-Infinity",
            b"1e400")  # fmt: skip
_TOKENS = (b"null", b"true", b"[]", b"{}", b'""', b'"x"', b"[1, 2, 3]", b'{"a": 1}', b"[" * 40 + b"]" * 40,
           b"[" * 20000, b'{"a":' * 5000, b'"\\ud800"', b"(" * 300, b"-" * 3000, b"\x00", b"\xff", b"O")  # fmt: skip


def mutate(draw: random.Random, seeds: list[bytes]) -> bytes:
    """One mutated input; a third of those made of archives have a changed member and a directory that fits it."""
    data = draw.choice(seeds)
    if data.startswith(b"PK") and draw.random() < 0.5:
        return _in_archive(draw, data)
    for _ in range(draw.choice((1, 1, 1, 2, 4, 12))):
        data = _once(draw, data, seeds)
    return data


def _once(draw: random.Random, data: bytes, seeds: list[bytes]) -> bytes:
    out = bytearray(data)
    at = draw.randrange(len(out) + 1)
    kind = draw.randrange(11)
    if not out or kind == 0:
        return bytes(out[:at]) + bytes(draw.randbytes(draw.randint(1, 16))) + bytes(out[at:])
    at = min(at, len(out) - 1)
    # Headers are short and decide most: half of all changes go there.
    if draw.random() < 0.5:
        at = draw.randrange(min(len(out), 256))
    if kind in (1, 2):
        out[at] ^= 1 << draw.randrange(8)
    elif kind == 3:
        out[at] = draw.choice((0, 1, 0x7F, 0x80, 0xFE, 0xFF, draw.randrange(256)))
    elif kind == 4:
        del out[at : at + draw.choice((1, 2, 8, 64, 1000))]
    elif kind == 5:
        part = out[at : at + draw.choice((1, 4, 32, 256))]
        out[at:at] = part * draw.choice((1, 1, 2, 50))
    elif kind == 6:
        size = draw.choice((1, 2, 4, 8))
        value = draw.choice(_INTEGERS) & ((1 << 8 * size) - 1)
        out[at : at + size] = value.to_bytes(size, draw.choice(("little", "big")))
    elif kind == 7:
        del out[at:]
    elif kind == 8:
        other = draw.choice(seeds)
        begin = draw.randrange(len(other))
        out[at : at + draw.randint(0, 64)] = other[begin : begin + draw.randint(1, 64)]
    else:
        pattern = rb"-?\d+(?:\.\d+)?(?:e-?\d+)?" if kind == 9 else rb'"[^"]*"|\[[^\[\]]*\]|\w+'
        found = list(re.finditer(pattern, bytes(out[:20000])))
        if found:
            chosen = draw.choice(found)
            out[chosen.start() : chosen.end()] = draw.choice(_NUMBERS if kind == 9 else _TOKENS)
    return bytes(out)


def _in_archive(draw: random.Random, data: bytes) -> bytes:
    """The archive with one member changed, missing, twice, packed otherwise or announced with another size."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(stream, "w") as new:
        members = old.infolist()
        chosen = draw.choice(members)
        act = draw.choice(("change", "change", "change", "drop", "twice", "rename", "pack", "bomb"))
        for info in members:
            content, name, packing = old.read(info), info.filename, zipfile.ZIP_STORED
            if info is chosen:
                if act == "drop":
                    continue
                if act in ("change", "twice"):
                    content = mutate(draw, [content]) if content else draw.randbytes(4)
                if act == "twice":
                    new.writestr(zipfile.ZipInfo(name), old.read(info))
                if act == "rename":
                    name = draw.choice(("../" + name, "/etc/passwd", name + "/", "", name.upper(), "a" * 3000))
                if act == "pack":
                    packing = draw.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
                if act == "bomb":
                    content, packing = bytes(1 << 20), zipfile.ZIP_DEFLATED
            entry = zipfile.ZipInfo(name)
            entry.compress_type = packing
            new.writestr(entry, content)
    out = bytearray(stream.getvalue())
    if draw.random() < 0.2:
        # The size in the directory alone.
        at = out.rfind(b"PK\x01\x02")
        out[at + 24 : at + 28] = struct.pack("<I", draw.choice(_INTEGERS) & 0xFFFFFFFF)
    return bytes(out)
