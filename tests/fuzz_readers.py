"""Every reader of foreign files on mutated inputs: `python tests/fuzz_readers.py [--count N] [READER ...]`.

A reader gives a value or raises one of its documented errors, within seconds and without taking much memory. Each is
run in a child of its own, so that a crash is found and told with the number of its input; `--input N` repeats one input
with its traceback. Prints one JSON object per reader; the exit code is 1 when anything was found.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import mmap
import os
import random
import re
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
from fuzz_mutate import mutate
from safetensors.torch import save
from torch import nn

from clusterq import bank, checkpoint, partial, states
from clusterq.ablation import cells, page
from clusterq.ablation.results import as_csv, read_results
from clusterq.ablation.table import read_table
from clusterq.config import ClusterQConfig, QuantizationConfig
from clusterq.data import open_data
from clusterq.deploy import load_packed, save_packed
from clusterq.deploy._packed_record import RECORD as PACKED_RECORD
from clusterq.deploy._packed_record import TENSORS as PACKED_TENSORS
from clusterq.errors import ClusterQError
from clusterq.models import LoadedModel, Source, file_sha256, read_state_dict
from clusterq.networks import DigitsConvNet
from clusterq.qat import calibrate, prepare
from clusterq.readers import parse_json, read_images
from clusterq.settings import override

_SECONDS, _MEMORY = 5, 512 << 20
# Formats of images that no reader takes are among the valid inputs too.
_REFUSED = (b"GIF8", b"%!PS")
Reader = Callable[[bytes], Any]


class Hang(BaseException):
    """An input took too long."""


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(2)
        self.act = nn.ReLU()
        self.fc = nn.Linear(2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc(self.act(self.bn(self.conv(x))).mean((2, 3)))
        return out


def _torch_files() -> list[bytes]:
    state = {"conv.weight": torch.randn(2, 1, 3, 3), "fc.bias": torch.arange(3), "half": torch.randn(4).half()}
    found = []
    for content in (state, {"state_dict": state, "epoch": 3}, {"w": torch.randn(3, 4).T[1:], "v": torch.zeros(2)}):
        stream = io.BytesIO()
        torch.save(content, stream)
        found.append(stream.getvalue())
    # The old format calls storages by their address and sorts by it: one of a fixed name, so that inputs stay the same.
    for content in ({"w": torch.randn(3, 4).T[1:]}, {"state_dict": {"w": torch.randn(5)}, "epoch": 3}):
        stream = io.BytesIO()
        torch.save(content, stream, _use_new_zipfile_serialization=False)
        address = re.search(rb"X[\x08-\x10]\x00\x00\x00(\d{8,16})", stream.getvalue())
        assert address is not None
        found.append(stream.getvalue().replace(_text(address[1]), _text(b"1000")))
    return found


def _text(value: bytes) -> bytes:
    """The pickle opcode of a short text."""
    return b"X" + struct.pack("<I", len(value)) + value


def _npz_files() -> list[bytes]:
    found = []
    images = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    for write in (np.savez, np.savez_compressed):
        for classes in ({}, {"classes": np.array(["a", "b"])}):
            stream = io.BytesIO()
            write(stream, images=images, labels=np.array([0, 1]), **classes)
            found.append(stream.getvalue())
    stream = io.BytesIO()
    np.savez(stream, images=np.asfortranarray(images), labels=np.array([0, 1], np.uint64))
    return [*found, stream.getvalue()]


def _pictures() -> list[bytes]:
    from PIL import Image

    draw, found = np.random.default_rng(0), []
    for mode in ("RGB", "L", "P", "1", "RGBA"):
        picture = Image.fromarray(draw.integers(0, 256, (9, 11, 3), dtype=np.uint8)).convert(mode)
        for kind in ("PNG", "JPEG", "BMP", "PPM", "TIFF", "WEBP", "GIF"):
            stream = io.BytesIO()
            try:
                picture.save(stream, format=kind, **({"compression": "tiff_lzw"} if kind == "TIFF" else {}))
            except (OSError, KeyError):
                continue
            found.append(stream.getvalue())
    stream = io.BytesIO()
    Image.new("RGB", (16, 16)).save(stream, format="JPEG", progressive=True)
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(x) print showpage\n"
    return [*found, stream.getvalue(), postscript]


def _zipped(files: dict[str, bytes], packing: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", packing) as archive:
        for name, content in files.items():
            # With a date that does not change.
            entry = zipfile.ZipInfo(name)
            entry.compress_type = packing
            archive.writestr(entry, content)
    return stream.getvalue()


def _open(spec: Path) -> None:
    data = open_data(str(spec), input_shape=(3, 4, 4), mean=(0.5,) * 3, std=(0.1,) * 3)
    image, label = data[len(data) - 1]
    assert image.shape == (3, 4, 4) and image.dtype == torch.float32 and 0 <= label < 1 << 31


def readers(place: Path) -> dict[str, tuple[list[bytes], Reader, tuple[type[Exception], ...]]]:
    """Name -> (valid inputs, what reads one, errors it documents)."""
    torch.manual_seed(0)
    ours = (ClusterQError,)

    def file(name: str, read: Callable[[Path], Any]) -> Reader:
        path = place / name

        def run(data: bytes) -> Any:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
            return read(path)

        return run

    pictures = _pictures()
    safe = [
        save({"a": torch.randn(2, 3), "b": torch.arange(4)}),
        save({"x": torch.zeros(3).bfloat16()}, {"format": "pt"}),
    ]
    images = [save({"images": torch.randn(2, 1, 4, 4), "labels": torch.tensor([0, 1])})]

    table: dict[str, tuple[list[bytes], Reader, tuple[type[Exception], ...]]] = {
        "weights_torch": (_torch_files(), file("w.pt", read_state_dict), ours),
        "weights_safetensors": (safe, file("w.safetensors", read_state_dict), ours),
        "images_safetensors": (images, file("i.safetensors", read_images), ours),
        "npz": (_npz_files(), file("set.npz", _open), ours),
    }
    labels = b"file,label\na.png,0\nb.png,1\n"
    archives = [_zipped({"a.png": pictures[0], "b.png": pictures[1]}, packing) for packing in (0, zipfile.ZIP_DEFLATED)]

    def archive(data: bytes) -> None:
        (place / "zip").mkdir(exist_ok=True)
        (place / "zip" / "labels.csv").write_bytes(labels)
        file("zip/images.zip", lambda path: _open(path.parent))(data)

    def labels_csv(data: bytes) -> None:
        (place / "csv").mkdir(exist_ok=True)
        (place / "csv" / "images.zip").write_bytes(archives[0])
        file("csv/labels.csv", lambda path: _open(path.parent))(data)

    def picture(data: bytes) -> None:
        (place / "pic").mkdir(exist_ok=True)
        (place / "pic" / "labels.csv").write_bytes(b"file,label\na,0\n")
        file("pic/images.zip", lambda path: _open(path.parent))(_zipped({"a": data}))

    table["images_zip"] = (archives, archive, ours)
    table["labels_csv"] = ([labels], labels_csv, ours)
    table["image_files"] = (pictures, picture, ours)

    config = ClusterQConfig(QuantizationConfig(weight_bits=3, layer_bits={"fc": 4}), seed=3)
    folder = place / "checkpoint"
    student = prepare(Tiny(), config.quantization, example_input=torch.zeros(1, 1, 4, 4)).eval()
    calibrate(student, torch.randn(8, 1, 4, 4), config.quantization)
    checkpoint.save(student, folder, config=config, input_shape=(1, 4, 4), mean=(0.5,), std=(0.5,))
    record, tensors = ((folder / name).read_bytes() for name in (checkpoint.RECORD, checkpoint.TENSORS))
    # One that is rebuilt from its own record.
    config = ClusterQConfig(QuantizationConfig(weight_bits=3, layer_bits={"stem.0": 4}), seed=3)
    digits = prepare(DigitsConvNet(), config.quantization, example_input=torch.zeros(1, 1, 16, 16)).eval()
    calibrate(digits, torch.randn(8, 1, 16, 16), config.quantization)
    known = {"config": config, "input_shape": (1, 16, 16), "mean": (0.5,), "std": (0.5,)}
    checkpoint.save(digits, place / "digits", source=Source("builtin:digits", "w", "0" * 64), **known)
    own = (place / "digits" / checkpoint.RECORD).read_bytes()

    def checkpoint_tensors(data: bytes) -> None:
        # By an author who knows how to compute a SHA-256.
        (folder / checkpoint.TENSORS).write_bytes(data)
        honest = json.loads(record)
        honest["tensors_sha256"] = file_sha256(folder / checkpoint.TENSORS)
        (folder / checkpoint.RECORD).write_text(json.dumps(honest))
        output = checkpoint.load(folder, Tiny())(torch.ones(1, 1, 4, 4))
        assert output.shape == (1, 3)

    def checkpoint_record(data: bytes) -> None:
        (place / "digits" / checkpoint.RECORD).write_bytes(data)
        checkpoint.load(place / "digits")

    table["checkpoint_tensors"] = ([tensors], checkpoint_tensors, ours)
    table["checkpoint_record"] = ([own], checkpoint_record, ours)

    save_packed(student, place / "packed", input_shape=(1, 4, 4), mean=(0.5,), std=(0.5,))
    described, packed = ((place / "packed" / name).read_bytes() for name in (PACKED_RECORD, PACKED_TENSORS))
    known = {"input_shape": (1, 16, 16), "mean": (0.5,), "std": (0.5,), "source": Source("builtin:digits", "w", "0")}
    save_packed(digits, place / "packed_digits", **known)

    def packed_tensors(data: bytes) -> None:
        (place / "packed" / PACKED_TENSORS).write_bytes(data)
        honest = json.loads(gzip.decompress(described)) | {"tensors_sha256": hashlib.sha256(data).hexdigest()}
        (place / "packed" / PACKED_RECORD).write_bytes(gzip.compress(json.dumps(honest).encode()))
        output = load_packed(place / "packed").network(Tiny())(torch.ones(1, 1, 4, 4))
        assert output.shape == (1, 3)

    def packed_record(data: bytes) -> None:
        (place / "packed_digits" / PACKED_RECORD).write_bytes(data)
        load_packed(place / "packed_digits").network()

    record_file = (place / "packed_digits" / PACKED_RECORD).read_bytes()
    table["packed_tensors"] = ([packed], packed_tensors, ours)
    # Changed outside, where the checksum notices nearly all of it, and inside, as an author would.
    table["packed_record"] = ([record_file], packed_record, ours)
    inside = [gzip.decompress(record_file)]
    table["packed_record_text"] = (inside, lambda text: packed_record(gzip.compress(text)), ours)

    state = {
        "words": ["quantize", "--model", "x"], "identity": {"a": 1.5}, "environment": {"torch": "2"},
        "done": {"f": None}, "folders": {}, "resumed": 0, "extra": {"seconds": {"load": 1.0}, "total": 2},
        "training": {"name": "W4A4", "state": {"step": 3, "optimizer": {0: {"m": torch.randn(2, 3).T}}, "b": (1, 2)}},
    }  # fmt: skip
    run = place / "run.partial" / "last"
    run.mkdir(parents=True)
    states.write_state(run, state)
    states.seal(run)
    parts = {path.name: path.read_bytes() for path in run.iterdir()}

    def state_file(name: str, *, sealed: bool) -> Reader:
        def read(data: bytes) -> None:
            for part, content in {**parts, name: data}.items():
                (run / part).write_bytes(content)
            if sealed:
                states.seal(run)
            partial.recorded_words(place / "run")

        return read

    table["state_values"] = ([parts[states.VALUES]], state_file(states.VALUES, sealed=True), ours)
    table["state_tensors"] = ([parts[states.TENSORS]], state_file(states.TENSORS, sealed=True), ours)
    table["state_manifest"] = ([parts[states.MANIFEST]], state_file(states.MANIFEST, sealed=False), ours)

    plain = json.dumps(ClusterQConfig().to_dict()).encode()

    def config_json(data: bytes) -> None:
        made = ClusterQConfig.from_dict(parse_json(data, "config", ClusterQError))
        assert ClusterQConfig.from_dict(json.loads(json.dumps(made.to_dict()))) == made

    settings = [b"finetune.lr=0.1", b'quantization.layer_bits={"fc": 4}', b"synthesis.generator_betas=[0.5, 0.9]"]
    table["config_json"] = ([plain], config_json, (ClusterQError, ValueError))
    table["settings"] = (
        settings,
        lambda data: override(ClusterQConfig(), [data.decode("utf-8", "surrogateescape")]),
        (ValueError,),
    )
    return table | _of_banks_and_ablations(place, file)


def _of_banks_and_ablations(place: Path, file: Callable[[str, Callable[[Path], Any]], Reader]) -> dict[str, Any]:
    """Rows of `readers` on a bank's record, tables, cells and results; `file` makes a reader of a path one of bytes."""
    ours, root = (ClusterQError,), Path(__file__).resolve().parent.parent
    loaded = LoadedModel(Tiny().eval(), Source("builtin:digits", "w", "0" * 64), (1, 4, 4), 3, (0.5,), (0.5,))
    part = {
        "count": 2, "seed": 0, "settings": ClusterQConfig().to_dict()["synthesis"], "preset": "default",
        "label_accuracy": 50.0, "seconds": 1.5, "samples_seen": 8, "command": "c",
    }  # fmt: skip
    bank.write(place / "bank", loaded, torch.randn(2, 1, 4, 4), torch.tensor([0, 1]), [part])
    record = (place / "bank" / bank.RECORD).read_bytes()

    def bank_record(path: Path) -> None:
        found = bank.read(path.parent)
        bank.recorded_weights(found.record["network"])
        bank.last_settings(found)

    toml = [path.read_bytes() for path in sorted([*root.glob("examples/*.toml"), *root.glob("bench/ablations/*.toml")])]
    yml = b"""
base: {model: "builtin:digits", data: digits, mean: [0], std: [1], evaluate: {choose: "0:2", report: "2:4"}}
row:
  - {name: a, settings: {finetune: {steps: 3}}, bits: [W3A3]}
  - {name: b, images: data:0:2}
"""
    results = (root / "bench" / "results" / "ablations" / "digits.json").read_bytes()
    whole = json.loads(results)
    cell = {"format": cells.FORMAT, "format_version": cells.FORMAT_VERSION, **whole["rows"][0]["cells"][0]}

    def ablation_cell(path: Path) -> None:
        found = cells.read_cell(path.parent.parent, path.stem)
        shown = {**whole, "rows": [{**whole["rows"][0], "cells": [found]}]}
        as_csv(shown).encode()
        page.render([("r.json", shown)], "c")
        page.terminal(shown)

    return {
        "bank_record": ([record], file(f"bank/{bank.RECORD}", bank_record), ours),
        "table_toml": (toml, file("t.toml", read_table), ours),
        # Where PyYAML is installed; where not, every input is refused.
        "table_yaml": ([yml], file("t.yaml", read_table), ours),
        "ablation_cell": ([json.dumps(cell).encode()], file(f"{cells.CELLS}/{cell['key']}.json", ablation_cell), ours),
        "ablation_results": (
            [results], file("r.json", lambda path: page.render([("r", read_results(path))], "c").encode()), ours
        ),
    }  # fmt: skip


def make_input(reader: str, seeds: list[bytes], number: int, seed: int) -> bytes:
    return mutate(random.Random(f"{seed}/{reader}/{number}"), seeds)


def _timed_out(number: int, frame: Any) -> None:
    raise Hang


def fuzz(name: str, count: int, seed: int, position: mmap.mmap) -> dict[str, Any]:
    """Run one reader on `count` inputs in this process."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    signal.signal(signal.SIGALRM, _timed_out)
    found: dict[str, Any] = {}
    accepted, refused, slowest = 0, 0, 0.0
    with tempfile.TemporaryDirectory(dir=_memory_folder()) as place:
        seeds, read, documented = readers(Path(place))[name]
        for number, valid in enumerate(seeds):
            try:
                read(valid)
            except documented as error:
                if not valid.startswith(_REFUSED):
                    found[f"valid input {number} was refused: {str(error)[:150]}"] = number
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        for number in range(count):
            position[:8] = struct.pack("<q", number)
            data = make_input(name, seeds, number, seed)
            signal.setitimer(signal.ITIMER_REAL, _SECONDS)
            start = time.perf_counter()
            try:
                read(data)
                accepted += 1
            except documented as error:
                refused += 1
                if "\n" in str(error) and isinstance(error, ClusterQError):
                    found.setdefault("more than one line", number)
            except Hang:
                found.setdefault("hang", number)
            # Whatever else a reader raises is what this is looking for.
            except Exception as error:
                found.setdefault(f"{type(error).__name__}: {str(error)[:150]}", number)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            slowest = max(slowest, time.perf_counter() - start)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before
    if grown > _MEMORY:
        found["memory"] = grown
    return {
        "reader": name, "inputs": count, "accepted": accepted, "refused": refused, "findings": found,
        "slowest_ms": round(1000 * slowest, 1), "grown_mb": grown >> 20,
    }  # fmt: skip


def _memory_folder() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def fuzz_in_child(name: str, count: int, seed: int) -> dict[str, Any]:
    """`fuzz` in a child: a crash is a finding like any other."""
    position = mmap.mmap(-1, 8)
    begin = time.perf_counter()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        with os.fdopen(writing, "w") as pipe:
            pipe.write(json.dumps(fuzz(name, count, seed, position)))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code != 0 or not answer:
        number = struct.unpack("<q", position[:8])[0]
        result = {"reader": name, "inputs": number, "findings": {f"the process ended with {code}": number}}
    else:
        result = json.loads(answer)
    return {**result, "seconds": round(time.perf_counter() - begin, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reader", nargs="*")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--input", type=int, help="repeat this one input of one reader and show what happens")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=_memory_folder()) as place:
        table = readers(Path(place))
        if options.input is not None:
            seeds, read, _ = table[options.reader[0]]
            data = make_input(options.reader[0], seeds, options.input, options.seed)
            print(data[:2000])
            try:
                print(read(data))
            except Exception:
                traceback.print_exc()
            return 0
    failed = False
    for name in options.reader or table:
        result = fuzz_in_child(name, options.count, options.seed)
        print(json.dumps(result), flush=True)
        failed |= bool(result["findings"])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
