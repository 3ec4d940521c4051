"""Files nobody should trust: bombs, lies about sizes, code, names that lead elsewhere; a short fuzz of every reader."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import pickletools
import re
import struct
import subprocess
import sys
import types
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import clusterq
from clusterq.checkpoint import read_record
from clusterq.data import open_data
from clusterq.errors import CheckpointError, DataError, ModelError
from clusterq.models import build_model, read_state_dict
from clusterq.readers import parse_json, read_images

INPUT = {"input_shape": (3, 4, 4), "mean": (0.5,) * 3, "std": (0.1,) * 3}


def _peak(*, anew: bool = False) -> int:
    """Largest resident memory of this process so far, or with `anew` from now on."""
    if anew:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


def _refused(path: Path, match: str, read: Any = read_state_dict, error: type[Exception] = ModelError) -> None:
    """In one line, and without taking memory."""
    before = _peak(anew=True)
    with pytest.raises(error, match=match) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert _peak() - before < 64 << 20


def test_a_tensor_that_announces_more_than_it_stores(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1).expand(10**12)}, tmp_path / "w.pt")
    assert (tmp_path / "w.pt").stat().st_size < 4096
    _refused(tmp_path / "w.pt", r"tensor w announces \[1000000000000\] elements; 4 bytes are stored")


@pytest.mark.parametrize(
    ("tensor", "match"),
    [
        (torch.zeros(3).to_sparse(), "tensor w is not a plain tensor"),
        (torch.zeros(3, device="meta"), "tensor w is not a plain tensor"),
        (torch.zeros(3, dtype=torch.complex64), "tensor w is not a plain tensor"),
        (torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8), "tensor w is not a plain tensor"),
        (torch.zeros([1] * 9), "tensor w has 9 dimensions"),
        (torch.tensor([1.0, torch.nan]), "tensor w holds a NaN"),
    ],
)
def test_a_tensor_of_another_kind(tmp_path: Path, tensor: torch.Tensor, match: str) -> None:
    torch.save({"w": tensor}, tmp_path / "w.pt")
    _refused(tmp_path / "w.pt", match)


def test_a_packed_weight_file(tmp_path: Path) -> None:
    stream = io.BytesIO()
    torch.save({"w": torch.zeros(1 << 26)}, stream)
    with zipfile.ZipFile(stream) as old, zipfile.ZipFile(tmp_path / "w.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    del stream
    assert (tmp_path / "w.pt").stat().st_size < 1 << 20
    _refused(tmp_path / "w.pt", "its parts are compressed, which torch.save never does")


@pytest.mark.parametrize("modern", [True, False])
def test_a_pickle_with_a_name_without_end(tmp_path: Path, modern: bool) -> None:
    # Found by fuzzing: torch 2.14 needs the square of the length, 8 s for 20,000 characters, to say that it refuses.
    stream = io.BytesIO()
    torch.save({"w": torch.zeros(2)}, stream, _use_new_zipfile_serialization=modern)
    stream.seek(0)
    if modern:
        with zipfile.ZipFile(stream) as old, zipfile.ZipFile(tmp_path / "w.pt", "w") as new:
            for info in old.infolist():
                new.writestr(info.filename, _with_long_name(old.read(info)))
    else:
        (tmp_path / "w.pt").write_bytes(_with_long_name(stream.getvalue()))
    _refused(tmp_path / "w.pt", "it holds a name of 1000011 characters")


def _saved(path: Path, content: bytes, *, modern: bool) -> None:
    """A file of `torch.save` with another pickle of tensors."""
    stream = io.BytesIO()
    torch.save({"w": torch.zeros(2)}, stream, _use_new_zipfile_serialization=modern)
    if not modern:
        stream.seek(0)
        ends = []
        for _ in range(4):
            list(pickletools.genops(stream))
            ends.append(stream.tell())
        data = stream.getvalue()
        path.write_bytes(data[: ends[2]] + content + data[ends[3] :])
        return
    with zipfile.ZipFile(stream) as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, content if info.filename.endswith("data.pkl") else old.read(info))


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def _number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def _storage(key: str, elements: int) -> bytes:
    """Pickle of a storage of torch's old format."""
    return b"(" + _text("storage") + b"ctorch\nFloatStorage\n" + _text(key) + _text("cpu") + _number(elements) + b"NtQ"


def _old_file(path: Path, storages: dict[str, int], listed: list[str], data: bytes) -> Path:
    """torch's old format with one tensor per storage, and a list of those that are stored."""
    stream = io.BytesIO()
    torch.save({}, stream, _use_new_zipfile_serialization=False)
    stream.seek(0)
    for _ in range(3):
        list(pickletools.genops(stream))
    tensors = b"\x80\x02}"
    for key, elements in storages.items():
        rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n(" + _storage(key, elements) + _number(0)
        rebuilt += _number(elements) + b"\x85" + _number(1) + b"\x85\x89ccollections\nOrderedDict\n)RtR"
        tensors += _text(f"tensor {key}") + rebuilt + b"s"
    keys = b"\x80\x02](" + b"".join(_text(key) for key in listed) + b"e."
    path.write_bytes(stream.getvalue()[: stream.tell()] + tensors + b"." + keys + data)
    return path


def test_an_old_file_that_announces_more_than_it_stores(tmp_path: Path) -> None:
    path, stored = tmp_path / "w.pt", struct.pack("<q2f", 2, 1.5, -2.0)
    _old_file(path, {"1": 2}, ["1"], stored)
    assert read_state_dict(path)["tensor 1"].tolist() == [1.5, -2.0]
    # torch alone gives 512 MB of whatever was in that memory for the first of these.
    _old_file(path, {"1": 1 << 27}, [], b"")
    assert path.stat().st_size < 400
    _refused(path, "its tensors announce 536870912 bytes; 0 are stored")
    _refused(_old_file(path, {"1": 2, "2": 2}, ["1"], stored + bytes(8)), "announces tensors that are not stored")
    _refused(_old_file(path, {"1": 2, "2": 1 << 27}, ["1", "2"], stored), "announce 536870920 bytes; 16 are stored")
    _refused(_old_file(path, {"1": 2, "2": -2}, ["1", "2"], stored), "cannot be read as a weight file")
    _refused(_old_file(path, {"1": 2, "2": 1}, ["1", "1"], stored * 2), "announces tensors that are not stored")


@pytest.mark.parametrize("modern", [True, False])
@pytest.mark.parametrize(
    "called",
    ["torch\nTensor", "torch\nFloatTensor", "torch.storage\nUntypedStorage", "builtins\nbytearray"],
)
def test_an_object_made_by_its_size_alone(tmp_path: Path, modern: bool, called: str) -> None:
    # torch alone gives 512 MB for a file of 900 bytes.
    function, size = b"c" + called.encode() + b"\n", _number(1 << 27) + b"\x85"
    for make in (
        function + size + b"R",
        function + size + b"\x81",
        function + b"q\x00h\x00" + size + b"R",
        b"ctorch._tensor\n_rebuild_from_type_v2\n(" + function + b"ctorch\nTensor\n" + size + b"}tR",
        b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._tensor\n_rebuild_from_type_v2\nctorch\nTensor\n("
        + function + b"ctorch\nTensor\n" + size + b"}t}tR",
    ):  # fmt: skip
        _saved(tmp_path / "w.pt", b"\x80\x02}" + _text("w") + make + b"s.", modern=modern)
        _refused(tmp_path / "w.pt", "was refused: it makes")


def test_a_call_of_an_unknown_thing(tmp_path: Path) -> None:
    _saved(tmp_path / "w.pt", b"\x80\x02}" + _text("w") + b"}" + _number(1 << 27) + b"\x85Rs.", modern=True)
    _refused(tmp_path / "w.pt", "holds more than plain tensors and was refused")


def test_a_member_that_is_many_storages(tmp_path: Path) -> None:
    # torch finds the members of an archive in any case of their letters, and reads one for each.
    stream = io.BytesIO()
    torch.save({"w": torch.zeros(1 << 16)}, stream)
    storage = b"(" + _text("storage") + b"ctorch\nFloatStorage\n%s" + _text("cpu") + _number(1 << 16) + b"tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + _number(0) + _number(1 << 16) + b"\x85" + _number(1)
    tensor += b"\x85\x89ccollections\nOrderedDict\n)RtRs"
    content = b"".join(_text(key) + tensor % _text(key) for key in ("aa", "aA", "Aa", "AA"))
    with zipfile.ZipFile(stream) as old, zipfile.ZipFile(tmp_path / "w.pt", "w") as new:
        for info in old.infolist():
            name = info.filename.replace("data/0", "data/aa")
            changed = b"\x80\x02}" + content + b"."
            new.writestr(name, changed if name.endswith("data.pkl") else old.read(info))
    _refused(tmp_path / "w.pt", r"its tensors announce 1048576 bytes; \d+ are stored")


def _with_long_name(data: bytes) -> bytes:
    return data.replace(b"ctorch\nFloatStorage\n", b"ctorch\n" + b"[" * 1_000_000 + b"Float\n")


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"b":{"dtype":"F32","shape":[4],"data_offsets":[8,24]}}',
        b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}',
        b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,24]}}',
        b'{"a":{"dtype":"F33","shape":[6],"data_offsets":[0,24]}}',
        b'{"a":{"dtype":"F32","shape":[6],"data_offsets":[24,0]}}',
        b"[" * 100_000,
    ],
)
def test_safetensors_headers_that_lie(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "w.safetensors"
    for length in (len(header), (1 << 63) + 5, 1 << 40, len(header) + 1000):
        path.write_bytes(struct.pack("<Q", length) + header + bytes(24))
        _refused(path, "cannot be read as a safetensors file")
        _refused(path, "cannot be read as a safetensors file", read_images, DataError)


def test_json_that_is_refused(tmp_path: Path) -> None:
    cases = [
        (b"[" * 1_000_000, "nested too deeply"),
        (b"[" * 200 + b"]" * 200, "nested too deeply"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
        (b'{"a": NaN}', "it holds NaN where a number is wanted"),
        (b"[-Infinity]", "it holds -Infinity"),
        (b"[1e999]", "a number that is too large"),
        (b"[" + b"9" * 100_000 + b"]", "a whole number of more than 64 bits"),
        (b"[9223372036854775808]", "a whole number of more than 64 bits"),
        (b"\xff\xfe{}", "is damaged"),
        (b"", "is damaged"),
    ]
    for data, match in cases:
        with pytest.raises(CheckpointError, match=match):
            parse_json(data, "file", CheckpointError)
    assert parse_json(b'{"a": [1, -2.5e3, null, "\\u00e9"]}', "file", CheckpointError) == {"a": [1, -2500.0, None, "é"]}
    (tmp_path / "checkpoint.json").write_bytes(b" " * (17 << 20))
    _refused(tmp_path, "it has more than 16777216 bytes", read_record, CheckpointError)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"input_shape": [1 << 20, 1 << 20, 3]}, "wanted up to 134217728 positive pixels"),
        ({"input_shape": [3, -32, -32]}, "positive pixels"),
        ({"num_classes": 1 << 40}, "num_classes is 1099511627776"),
        ({"source": {"model": 3, "weights": None, "weights_sha256": ""}}, "wanted text"),
        ({"source": {"model": "builtin:digits", "weights": None, "weights_sha256": "", "more": 1}}, "damaged"),
        ({"config": {"quantization": {"layer_bits": {"fc": 99}}}}, "layer_bits"),
        ({"mean": ["x"]}, "damaged"),
    ],
)
def test_records_that_ask_for_too_much(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    record = {
        "format": "clusterq-checkpoint", "format_version": 1, "tensors_sha256": "0", "config": {}, "source": None,
        "input_shape": [3, 8, 8], "num_classes": 10, "mean": [], "std": [], "versions": {}, "extra": {},
    }  # fmt: skip
    (tmp_path / "checkpoint.json").write_text(json.dumps(record))
    assert read_record(tmp_path).num_classes == 10
    (tmp_path / "checkpoint.json").write_text(json.dumps({**record, **change}))
    _refused(tmp_path, match, read_record, CheckpointError)


def _open(path: Path) -> Any:
    return open_data(str(path), **INPUT)[0]  # type: ignore[arg-type]


def test_an_npz_that_unpacks_to_far_more_than_it_is(tmp_path: Path) -> None:
    header = io.BytesIO()
    shape = (6_000_000, 4, 4, 3)
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    with (
        zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("images.npy", "w", force_zip64=True) as file,
    ):
        file.write(header.getvalue())
        for _ in range(6):
            file.write(bytes(48_000_000))
    assert (tmp_path / "bomb.npz").stat().st_size < 1 << 20
    _refused(tmp_path / "bomb.npz", r"was refused: its \d+ bytes unpack to 288000128", _open, DataError)


@pytest.mark.parametrize("shape", [(-2, -4, 4, 3), (2, 4, 4, -3), (0, 1 << 62, 1 << 62, 3)])
def test_an_npz_of_impossible_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    data = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()
    labels = io.BytesIO()
    np.save(labels, np.zeros(max(shape[0], 0), int))
    with zipfile.ZipFile(tmp_path / "set.npz", "w") as archive:
        archive.writestr("images.npy", data + bytes(abs(int(np.prod(shape)))))
        archive.writestr("labels.npy", labels.getvalue())
    _refused(tmp_path / "set.npz", "set.npz", _open, DataError)


def _folder(path: Path, content: bytes, name: str = "a.png") -> Path:
    with zipfile.ZipFile(path / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    (path / "labels.csv").write_text(f"file,label\n{name},0\n")
    return path


def test_an_image_file_that_is_too_large(tmp_path: Path) -> None:
    _refused(_folder(tmp_path, bytes(70 << 20)), "has 73400320 bytes; too many for one image", _open, DataError)


def test_an_image_of_too_many_pixels(tmp_path: Path) -> None:
    pil = pytest.importorskip("PIL.Image")
    stream = io.BytesIO()
    pil.new("1", (4, 4)).save(stream, format="PNG")
    data = bytearray(stream.getvalue())
    data[16:24] = struct.pack(">II", 12_000, 12_000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    _refused(_folder(tmp_path, bytes(data)), "12000 x 12000 pixels; too many", _open, DataError)
    data[16:24] = struct.pack(">II", 1 << 30, 1 << 30)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    _refused(_folder(tmp_path, bytes(data)), "cannot be decoded|too many", _open, DataError)


@pytest.mark.parametrize("layout", ["zip", "classes"])
def test_postscript_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    # Pillow would start Ghostscript, looked up on the PATH, whatever the name of the file says.
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    pil, eps = pytest.importorskip("PIL.Image"), pytest.importorskip("PIL.EpsImagePlugin")
    pytest.importorskip("torchvision.datasets")
    monkeypatch.setattr(eps, "gs_binary", None)
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    with contextlib.suppress(OSError), pil.open(io.BytesIO(postscript)) as picture:
        picture.load()
    # So the trap works.
    (tmp_path / "ran").unlink()
    (tmp_path / "set" / "class").mkdir(parents=True)
    if layout == "zip":
        _folder(tmp_path / "set", postscript, "a.jpg")
    else:
        (tmp_path / "set" / "class" / "a.jpg").write_bytes(postscript)
    _refused(tmp_path / "set", "cannot be decoded as an image", _open, DataError)
    assert not (tmp_path / "ran").exists()


def test_names_in_archives_lead_nowhere(tmp_path: Path) -> None:
    pil = pytest.importorskip("PIL.Image")
    stream = io.BytesIO()
    pil.new("RGB", (4, 4)).save(stream, format="PNG")
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / "set").mkdir()
    for name in ("../escaped.png", "/tmp/escaped-clusterq.png", "a/../../escaped.png"):
        image, label = _open(_folder(tmp_path / "set", stream.getvalue(), name))
        assert image.shape == (3, 4, 4) and label == 0
    (tmp_path / "set" / "labels.csv").write_text("file,label\n/etc/passwd,0\n")
    _refused(tmp_path / "set", "has no file '/etc/passwd'", _open, DataError)
    made = {"set", "images.zip", "labels.csv"}
    assert {path.name for path in sorted(tmp_path.rglob("*")) if path not in before} == made
    assert not Path("/tmp/escaped-clusterq.png").exists()


@pytest.mark.parametrize("label", ["99999999999", "9" * 30, "-1", "9" * 5000, "1.5", "nan"])
def test_labels_that_are_no_classes(tmp_path: Path, label: str) -> None:
    _folder(tmp_path, b"")
    (tmp_path / "labels.csv").write_text(f"file,label\na.png,{label}\n")
    _refused(tmp_path, "label", _open, DataError)


@pytest.mark.parametrize("packing", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_archives_of_other_packings_are_refused(tmp_path: Path, packing: int) -> None:
    _folder(tmp_path, b"")
    with zipfile.ZipFile(tmp_path / "images.zip", "w", packing) as archive:
        archive.writestr("a.png", b"x" * 1000)
    _refused(tmp_path, "packed by another method than deflate", _open, DataError)


@pytest.mark.parametrize("name", ["hf-hub:someone/model", "local-dir:/tmp/model", "a/b"])
def test_names_of_networks_do_not_reach_elsewhere(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    library = types.ModuleType("timm")
    library.is_model = lambda name: True  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", library)
    with pytest.raises(ModelError, match="timm has no network"):
        build_model(f"timm:{name}")


def test_no_unsafe_loader_is_used() -> None:
    package = Path(clusterq.__file__).resolve().parent
    loads = 0
    for path in package.rglob("*.py"):
        text = path.read_text()
        for forbidden in ("pickle.load", "yaml.load", "allow_pickle=True", "np.load(", "extractall", "eval(", "exec("):
            assert re.search(rf"(?<![\w.]){re.escape(forbidden)}", text) is None, (path, forbidden)
        for call in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)):
            if ast.unparse(call.func) == "torch.load":
                loads += 1
                assert {k.arg: ast.unparse(k.value) for k in call.keywords}["weights_only"] == "True", path
    assert loads == 1


@pytest.mark.checkout("bench")
def test_every_reader_stands_mutated_input() -> None:
    root = Path(__file__).resolve().parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root.parent)}
    # Another seed than `make fuzz`, so that both together see more.
    words = [sys.executable, str(root / "fuzz_readers.py"), "--count", "500", "--seed", "1"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600, check=False)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, [result for result in results if result["findings"]] or done.stderr[-2000:]
    assert len(results) == 22 and all(result["inputs"] == 500 for result in results)
    # A reader that refuses everything would pass as well: only the manifest has to.
    assert {result["reader"] for result in results if result["accepted"] == 0} == {"state_manifest"}
