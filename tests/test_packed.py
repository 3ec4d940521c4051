"""Packed networks: exact at every width, as small as promised, readable by the written rule alone, damage noticed."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
import struct
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import clusterq
from clusterq.config import QuantizationConfig
from clusterq.data import EvaluationSet
from clusterq.deploy import load_packed, save_packed
from clusterq.deploy._packed_record import PackedRecord, check_readable, read_record
from clusterq.deploy.packed import is_packed, theoretical_bytes
from clusterq.errors import CheckpointError, ModelError, OutputError
from clusterq.models import LoadedModel, Source
from clusterq.networks import resnet20
from clusterq.nn import ActivationQuantizer, QuantizedConv2d, QuantizedLinear, set_quantization
from clusterq.qat import calibrate

SHAPE = (3, 12, 12)


class Net(nn.Module):
    """Functions and modules as activations, one with a parameter, a shared module, odd channels, biases, a buffer."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, groups=width)
        self.norm = nn.BatchNorm2d(width, affine=False)
        self.prelu = nn.PReLU(width)
        self.act = nn.ReLU6()
        self.conv3 = nn.Conv2d(width, 7, 1)
        self.silu = nn.SiLU()
        self.fc = nn.Linear(7, 3)
        self.register_buffer("shift", torch.tensor([1, 2, 3]))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.prelu(self.norm(self.depthwise(x)))
        x = self.act(x) + self.act(-x)
        y: Tensor = self.fc(self.silu(self.conv3(x)).mean((2, 3))) + self.shift
        return y


def twin_of(network: nn.Module, shape: tuple[int, int, int] = SHAPE, **config: Any) -> nn.Module:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.2, 2)
    twin = clusterq.prepare(
        network.eval(), QuantizationConfig(**{"scheme": "paper"} | config), example_input=torch.zeros(2, *shape)
    )
    calibrate(twin, torch.randn(16, *shape))
    return twin


CONFIGS: list[dict[str, Any]] = [
    *({"weight_bits": bits, "activation_bits": bits} for bits in range(2, 9)),
    {"weight_bits": 3, "layer_bits": {"fc": 7, "conv1": 8, "silu": 2}, "weight_symmetric": True},
    {"learned_scale": False, "activation_range": "ema", "activation_symmetric": True, "activation_bits": 8},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_round_trip(config: dict[str, Any], tmp_path: Path) -> None:
    twin = twin_of(Net(), **config)
    before = {k: v.clone() for k, v in twin.state_dict().items()}
    written = save_packed(twin, tmp_path / "net", input_shape=SHAPE, mean=(0.1,) * 3, std=(0.2,) * 3)
    read = load_packed(tmp_path / "net")
    assert read.record == written.record
    assert sorted(os.listdir(tmp_path / "net")) == ["packed.json.gz", "packed.safetensors"]
    x = torch.randn(9, *SHAPE)
    network = read.network(Net())
    assert torch.equal(network(x), twin(x).detach())
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    # Plain layers, of torch's own classes.
    assert {type(m) for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.BatchNorm2d))} == {
        nn.Conv2d,
        nn.Linear,
        nn.BatchNorm2d,
    }
    assert all(torch.equal(v, before[k]) for k, v in twin.state_dict().items())
    # The same folder again has the same bytes.
    save_packed(twin, tmp_path / "again", input_shape=SHAPE, mean=(0.1,) * 3, std=(0.2,) * 3)
    for name in os.listdir(tmp_path / "net"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "net" / name).read_bytes()


class Folded(nn.Module):
    """BatchNorm behind layers with and without a bias, without gamma and beta, and before any layer; a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(6)
        self.act = nn.ReLU()
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(6, affine=False)
        self.conv3 = nn.Conv2d(6, 6, 1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.conv1(self.first(x))))
        x = functional.relu(self.conv3(x) + self.bn2(self.conv2(x)))
        y: Tensor = self.fc(functional.adaptive_avg_pool2d(x, 1).flatten(1))
        return y


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weight_bits": 8, "weight_symmetric": True},
        {"learned_scale": False},
        {"activation_bits": 8, "int8_symmetric": True},
    ],
)
def test_scheme_deploy(settings: dict[str, Any], tmp_path: Path) -> None:
    """Folded BatchNorm and biases are stored as the twin computes with them; channels that are constants as such."""
    twin = twin_of(Folded(), scheme="deploy", **settings)
    with torch.no_grad():
        twin.bn1.weight[0], twin.bn1.bias[0] = 0.0, 0.7
        twin.conv3.bias[1] = 1e12
        twin.conv3.bias[2] = 0.123
    save_packed(twin, tmp_path / "net", input_shape=SHAPE)
    packed = load_packed(tmp_path / "net")
    network = packed.network(Folded())
    x = torch.randn(9, *SHAPE)
    with torch.no_grad():
        assert torch.equal(network(x), twin(x))
    assert not bool(network.conv3.weight[1].any()) and bool(network.conv3.weight[2].any())
    assert {name: eps for name, _, eps in packed.record.batch_norms} == {"first.1": 0.0, "bn1": 0.0, "bn2": 0.0}
    assert type(network.bn2) is nn.BatchNorm2d and network.bn2.eps == 0.0
    # Whole numbers of the unit in which the products are summed.
    step = packed.numbers.activations["act"].scale * packed.numbers.weights["conv3.weight"].scale
    codes = packed.numbers.tensors["conv3.bias"] / step
    assert float((codes[2:] - codes[2:].round()).abs().max()) < 1e-3 * float(codes[2:].abs().max())


def test_scheme_deploy_with_parts_that_stay_in_floating_point(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no form in integers"):
        twin = twin_of(Net(), scheme="deploy")
    save_packed(twin, tmp_path / "net", input_shape=SHAPE)
    with pytest.warns(UserWarning, match="no form in integers"):
        network = load_packed(tmp_path / "net").network(Net())
    x = torch.randn(9, *SHAPE)
    with torch.no_grad():
        assert torch.equal(network(x), twin(x))


def test_weights_load_into_the_users_own_network(tmp_path: Path) -> None:
    twin = twin_of(Net(), weight_bits=3)
    save_packed(twin, tmp_path / "net", input_shape=SHAPE)
    network = Net()
    network.load_state_dict(load_packed(tmp_path / "net").numbers.state_dict())
    set_quantization(twin, activations=False)
    x = torch.randn(4, *SHAPE)
    assert torch.equal(network.eval()(x), twin(x))


def record_text(folder: Path) -> str:
    return gzip.decompress((folder / "packed.json.gz").read_bytes()).decode()


def write_record(folder: Path, record: dict[str, Any] | str) -> None:
    text = record if isinstance(record, str) else json.dumps(record)
    (folder / "packed.json.gz").write_bytes(gzip.compress(text.encode()))


def read_by_the_rule(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]], dict[str, Any]]:
    """Record, tensors and activations of a packed folder, by its `layout` with numpy, gzip and json alone."""
    record = json.loads(record_text(folder))
    data = (folder / "packed.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    kinds = {"U8": "u1", "I8": "i1", "F32": "<f4", "I64": "<i8"}
    raw = {
        name: np.frombuffer(body[slice(*entry["data_offsets"])], kinds[entry["dtype"]])
        for name, entry in header.items()
        if name != "__metadata__"
    }
    found: dict[str, np.ndarray[Any, Any]] = {}
    byte = channel = 0
    for name, shape, bits in record["weights"]:
        count, rows = math.prod(shape), shape[0]
        size = -(-count * bits // 8)
        stream = int.from_bytes(raw["codes"][byte : byte + size].tobytes(), "little")
        assert stream >> (count * bits) == 0
        unsigned = np.array([stream >> (j * bits) & (2**bits - 1) for j in range(count)])
        codes = np.where(unsigned >= 2 ** (bits - 1), unsigned - 2**bits, unsigned).reshape(rows, -1)
        scale = raw["scales"][channel : channel + rows, None]
        zero = raw["zero_points"][channel : channel + rows, None] if "zero_points" in raw else 0
        found[name] = ((codes - zero).astype(np.float32) * scale).reshape(shape)
        byte, channel = byte + size, channel + rows
    start = 0
    for name, channels, _ in record["batch_norms"]:
        for part in ("weight", "bias", "running_mean", "running_var"):
            found[f"{name}.{part}"] = raw["batch_norms"][start : start + channels]
            start += channels
    ends: dict[str, int] = {}
    for name, dtype, shape in record["tensors"]:
        begin = ends.get(dtype, 0)
        ends[dtype] = begin + math.prod(shape)
        found[name] = raw[f"tensors.{dtype}"][begin : ends[dtype]].reshape(shape)
    assert (byte, channel, start) == tuple(len(raw[k]) for k in ("codes", "scales", "batch_norms"))
    scales = dict(zip([name for name, *_ in record["activations"]], raw["activation_scales"], strict=True))
    return record, found, scales


@pytest.mark.parametrize("bits", range(2, 9))
def test_file_is_readable_by_its_own_layout(bits: int, tmp_path: Path) -> None:
    twin = twin_of(Net(), weight_bits=bits, activation_bits=bits, layer_bits={"conv3": 10 - bits})
    save_packed(twin, tmp_path / "net", input_shape=SHAPE)
    record, found, scales = read_by_the_rule(tmp_path / "net")
    state = {k: v.numpy() for k, v in twin.state_dict().items() if "quantizer" not in k and "num_batches" not in k}
    layers = {f"{k}.weight": m for k, m in twin.named_modules() if isinstance(m, (QuantizedConv2d, QuantizedLinear))}
    quantizers = {k: m for k, m in twin.named_modules() if isinstance(m, ActivationQuantizer)}
    own = {f"{name}.{key}" for name in quantizers for key in ("scale", "zero_point", "observations")}
    assert set(found) == set(state) - own and set(scales) == set(quantizers)
    for name, value in found.items():
        wanted = layers[name].quantized_weight().detach().numpy() if name in layers else state[name]
        assert value.dtype == wanted.dtype and np.array_equal(value, wanted), name
    for name, width, low, zero, activation in record["activations"]:
        quantizer = quantizers[name]
        assert quantizer.bits == width
        x = torch.randn(2000) * 4
        given = (x if quantizer.function is None else quantizer.function(x)).detach().numpy()
        bounds = {"relu": (0, None), "relu6": (0, 6), "none": (None, None)}[activation]
        given = given if activation == "none" else np.clip(given, *bounds)
        codes = np.clip(np.rint(given * (np.float32(1) / scales[name])) + np.float32(zero), low, low + 2**width - 1)
        assert np.array_equal((codes - np.float32(zero)) * scales[name], quantizer(x).detach().numpy()), name


def _sizes(folder: Path) -> list[int]:
    return [(folder / name).stat().st_size for name in ("packed.safetensors", "packed.json.gz")]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("scheme", ["paper", "deploy"])
def test_size_of_the_folder(bits: int, scheme: Literal["paper", "deploy"], tmp_path: Path) -> None:
    """ResNet-20 with its origin written out, in scheme deploy with a range for every tensor: within 3 %."""
    shape = (3, 32, 32)
    twin = twin_of(resnet20(), shape, weight_bits=bits, activation_bits=bits, scheme=scheme)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    source = Source("builtin:resnet20", "cifar10_resnet20.pt", hashlib.sha256(b"").hexdigest())
    written = save_packed(twin, tmp_path / "net", input_shape=shape, source=source, mean=mean, std=std)
    assert len(written.record.activations) == (30 if scheme == "deploy" else 19)
    assert sum(path.stat().st_size for path in (tmp_path / "net").iterdir()) < 1.03 * theoretical_bytes(written.numbers)


def test_record_says_what_reading_needs(tmp_path: Path) -> None:
    """Order of the entries, all that shapes the twin, and what made the numbers where it is not the default."""
    usual = {"weight_range", "activation_range", "gradient", "correct_batch_norm", "range_momentum", "range_steps"}
    fields = set(QuantizationConfig.__dataclass_fields__)
    for settings in ({}, {"learned_scale": False, "activation_range": "ema", "range_steps": 9}):
        twin = twin_of(Net(), **settings)
        save_packed(twin, tmp_path / "net", input_shape=SHAPE, overwrite=True)
        record = json.loads(record_text(tmp_path / "net"))
        assert set(record["quantization"]) == fields - usual | set(settings)
        assert set(record["versions"]) == {"clusterq", "python", "torch"}
        assert load_packed(tmp_path / "net").record.quantization == QuantizationConfig(scheme="paper", **settings)
    for entry in ("weights [name, shape, bits]", "activations [name, bits, quant_min, zero_point, function]"):
        assert entry in record["layout"]
    for entry in ("batch_norms [name, channels, eps]", "tensors [name, dtype, shape]"):
        assert entry in record["layout"]


def test_record_with_every_setting_is_read(tmp_path: Path) -> None:
    """As an earlier version wrote it."""
    twin = twin_of(Net(), weight_bits=5)
    written = save_packed(twin, tmp_path / "net", input_shape=SHAPE)
    record = json.loads(record_text(tmp_path / "net"))
    record["quantization"] = clusterq.ClusterQConfig(QuantizationConfig(weight_bits=5, scheme="paper")).to_dict()[
        "quantization"
    ]
    record["versions"]["numpy"] = "2.0"
    write_record(tmp_path / "net", record)
    assert load_packed(tmp_path / "net").record.quantization == written.record.quantization


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
def test_size(bits: int, symmetric: bool, tmp_path: Path) -> None:
    """ResNet-20: weights at their width, 4 bytes a number for the rest, a byte for each zero point, and the header."""
    shape = (3, 32, 32)
    twin = twin_of(resnet20(), shape, weight_bits=bits, weight_symmetric=symmetric)
    written = save_packed(twin, tmp_path / "net", input_shape=shape, source=Source("builtin:resnet20", "w", "0" * 64))
    # 3 -> 16, six 16 -> 16, 16 -> 32, five 32 -> 32, 32 -> 64, five 64 -> 64, and 64 -> 10.
    weights = 9 * (3 * 16 + 6 * 16**2 + 16 * 32 + 5 * 32**2 + 32 * 64 + 5 * 64**2) + 640
    channels = 7 * 16 + 6 * 32 + 6 * 64
    numbers = 4 * channels + 10 + (channels + 10) + 19
    bare = -(-weights * bits // 8) + 4 * numbers + (0 if symmetric else channels + 10)
    assert theoretical_bytes(written.numbers) == bare
    tensors, record = _sizes(tmp_path / "net")
    assert bare < tensors < 1.01 * bare
    assert record < 2000 and tensors + record < 1.03 * bare


def test_size_of_a_larger_network(tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision.models")
    shape = (3, 32, 32)
    twin = clusterq.prepare(models.resnet18(), QuantizationConfig(weight_bits=2, weight_range="minmax"))
    calibrate(twin, torch.randn(2, *shape))
    written = save_packed(twin, tmp_path / "net", input_shape=shape)
    assert sum(_sizes(tmp_path / "net")) < 1.003 * theoretical_bytes(written.numbers)


def test_resnet20_on_cifar10(cifar10: tuple[LoadedModel, EvaluationSet], tmp_path: Path) -> None:
    loaded, images = cifar10
    batches = [x for x, _ in images.batches(250, 1000)]
    twin = clusterq.prepare(loaded.model, QuantizationConfig(weight_bits=3, activation_bits=5))
    calibrate(twin, batches[0])
    save_packed(twin, tmp_path / "net", input_shape=loaded.input_shape)
    network = load_packed(tmp_path / "net").network(resnet20())
    with torch.no_grad():
        for x in batches:
            assert torch.equal(network(x), twin(x))


def test_record_is_text_packed_alike(tmp_path: Path) -> None:
    """JSON a person can read, in a gzip file of one member without a name and a time."""
    twin = twin_of(Net())
    save_packed(twin, tmp_path / "net", input_shape=SHAPE)
    data = (tmp_path / "net" / "packed.json.gz").read_bytes()
    # RFC 1952: magic, deflate, no flags (no name), no time, the slowest and best compression.
    assert data[:9] == bytes([0x1F, 0x8B, 8, 0, 0, 0, 0, 0, 2])
    lines = gzip.decompress(data).decode().splitlines()
    assert '["conv1.weight",[5,3,3,3],4],' in lines and len(lines) > 30


def test_record_that_was_unpacked(tmp_path: Path) -> None:
    save_packed(twin_of(Net()), tmp_path / "net", input_shape=SHAPE)
    (tmp_path / "net" / "packed.json").write_text(record_text(tmp_path / "net"))
    load_packed(tmp_path / "net")
    (tmp_path / "net" / "packed.json.gz").unlink()
    assert is_packed(tmp_path / "net")
    message = r"net has packed\.json unpacked; wanted packed\.json\.gz, which gzip makes of it$"
    with pytest.raises(CheckpointError, match=message):
        load_packed(tmp_path / "net")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: b"", "is damaged: its compressed data ends too early"),
        (lambda d: d[: len(d) // 2], "is damaged: its compressed data ends too early"),
        (lambda d: d[:-1], "is damaged: its compressed data ends too early"),
        (gzip.decompress, "is damaged: it cannot be unpacked by gzip: .*incorrect header check"),
        (lambda d: d[:-8] + bytes([d[-8] ^ 1]) + d[-7:], "is damaged: .*incorrect data check"),
        (lambda d: d[:-4] + bytes([d[-4] ^ 1]) + d[-3:], "is damaged: .*incorrect length check"),
        (lambda d: d + b"\0", "is damaged: 1 bytes follow its compressed data"),
        (lambda d: d + d, r"is damaged: \d+ bytes follow its compressed data"),
        (lambda d: gzip.compress(bytes(1 << 28)), r"was refused: its \d+ bytes unpack to more than 4194304"),
        (lambda d: d + bytes(1 << 22), "is damaged: it has more than 4194304 bytes"),
    ],
)
def test_record_that_gzip_did_not_make(damage: Callable[[bytes], bytes], message: str, tmp_path: Path) -> None:
    save_packed(twin_of(Net()), tmp_path / "net", input_shape=SHAPE)
    file = tmp_path / "net" / "packed.json.gz"
    file.write_bytes(damage(file.read_bytes()))
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=message) as error:
        load_packed(tmp_path / "net")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(str(error.value).splitlines()) == 1 and peak < 16 << 20


def test_record_at_its_limit(tmp_path: Path) -> None:
    """One of 4 MiB is read, one of a byte more is not; as the writer sees it."""
    written = save_packed(twin_of(Net()), tmp_path / "net", input_shape=SHAPE).record
    rest = (1 << 22) - len(replace(written, network="").to_json())
    assert load_packed(_renamed(tmp_path / "net", written, "x" * rest)).record.network == "x" * rest
    with pytest.raises(CheckpointError, match="unpack to more than 4194304"):
        load_packed(_renamed(tmp_path / "net", written, "x" * (rest + 1)))
    with pytest.raises(ModelError, match="its record has more than 4194304 bytes"):
        check_readable(replace(written, network="x" * (rest + 1)))


def _renamed(folder: Path, record: PackedRecord, name: str) -> Path:
    write_record(folder, replace(record, network=name).to_json())
    return folder


def test_every_flipped_bit_and_truncation_is_noticed(tmp_path: Path) -> None:
    save_packed(twin_of(Net()), tmp_path / "net", input_shape=SHAPE)
    file = tmp_path / "net" / "packed.safetensors"
    content = file.read_bytes()
    for position in (0, 40, len(content) // 2, len(content) - 1):
        damaged = bytearray(content)
        damaged[position] ^= 1
        file.write_bytes(bytes(damaged))
        with pytest.raises(CheckpointError, match="SHA-256"):
            load_packed(tmp_path / "net")
    for length in (0, 7, len(content) - 1, len(content) - 500):
        file.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="is damaged"):
            load_packed(tmp_path / "net")
    file.write_bytes(content + bytes(1 << 20))
    with pytest.raises(CheckpointError, match=r"is damaged: it has \d+ bytes; its record describes \d+ and a header"):
        load_packed(tmp_path / "net")
    file.unlink()
    with pytest.raises(CheckpointError, match=r"has no packed\.safetensors"):
        load_packed(tmp_path / "net")
    with pytest.raises(CheckpointError, match=r"has no packed\.json\.gz"):
        load_packed(tmp_path)


def _set(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(record: dict[str, Any]) -> None:
        place: Any = record
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return change


RECORDS: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (_set("format", value="other"), "is not the record of a packed network"),
    (_set("format_version", value=2), "is the record of a packed network in format 2; this version reads 1"),
    (lambda r: r.pop("activations"), "it has no 'activations'"),
    (_set("weights", value=[]), "it lists no weights"),
    (_set("weights", 0, 2, value=9), r"weights\[0\]: bits is 9; wanted a whole number from 2 to 8"),
    (_set("weights", 0, 2, value=True), r"weights\[0\]: bits is True"),
    (_set("weights", 0, 2, value=5), "its record describes"),
    (_set("weights", 1, 1, 0, value=0), r"weights\[1\]: a size is 0"),
    (_set("weights", 1, 1, 0, value=-4), r"weights\[1\]: a size is -4"),
    (_set("weights", 1, 1, value=[1 << 30] * 8), "its record describes"),
    (_set("weights", 1, 1, value=[1 << 40]), r"weights\[1\]: a size is"),
    (_set("weights", 1, 1, value=[1] * 9), r"weights\[1\]: weight 'depthwise.weight' has 9 dimensions"),
    (_set("weights", 1, value=["x"]), r"weights\[1\]: \['x'\] is not a list of 3"),
    (_set("weights", 1, 0, value="conv1.weight"), r"it lists conv1\.weight twice"),
    (_set("activations", 0, 1, value=1), r"activations\[0\]: bits is 1"),
    (_set("activations", 0, 3, value=16), r"activations\[0\]: zero_point is 16"),
    (_set("activations", 0, 4, value="exec"), r"activations\[0\]: activation is 'exec'"),
    (_set("batch_norms", 0, 1, value=1 << 31), "its record describes"),
    (_set("batch_norms", 0, 2, value=float("nan")), "it holds NaN where a number is wanted"),
    (_set("batch_norms", 0, 2, value=10**400), "a whole number of more than 64 bits"),
    (_set("batch_norms", 0, 2, value="x"), r"batch_norms\[0\]: eps is 'x'"),
    (_set("tensors", 0, 1, value="complex64"), r"tensors\[0\]: dtype of 'shift' is 'complex64'"),
    (_set("input_shape", value=[3, 1 << 20, 1 << 20]), "input_shape is"),
    (_set("num_classes", value=10**9), "num_classes is 1000000000; wanted a whole number from 2 to 1048576"),
    (_set("quantization", value={"weight_bits": 99}), "weight_bits is 99"),
    (_set("source", value={"model": 5, "weights": None, "weights_sha256": "0"}), "source.model is 5"),
    (_set("quantization", value=[]), "is damaged"),
    (_set("source", value=["a"]), "is damaged"),
    (_set("versions", value=3), "is damaged"),
]


@pytest.mark.parametrize(("change", "message"), RECORDS, ids=[message for _, message in RECORDS])
def test_malformed_record(change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path) -> None:
    save_packed(twin_of(Net()), tmp_path / "net", input_shape=SHAPE)
    record = json.loads(record_text(tmp_path / "net"))
    change(record)
    write_record(tmp_path / "net", record)
    with pytest.raises(CheckpointError, match=message) as error:
        load_packed(tmp_path / "net")
    assert len(str(error.value).splitlines()) == 1


def test_names_are_compared_once(tmp_path: Path) -> None:
    """Of 60,000 entries the last is there twice: comparing all with all takes half a minute."""
    written = save_packed(twin_of(Net()), tmp_path / "net", input_shape=SHAPE)
    entries = [(f"a{i}", "int8", (0,)) for i in range(60_000)]
    record = replace(written.record, tensors=(*entries, entries[-1]))
    write_record(tmp_path / "net", record.to_json())
    begin = time.process_time()
    with pytest.raises(CheckpointError, match="it lists a59999 twice"):
        load_packed(tmp_path / "net")
    assert time.process_time() - begin < 5


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "[]", "\xff", '"packed"'])
def test_record_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "packed.json.gz").write_bytes(gzip.compress(text.encode("latin-1")))
    with pytest.raises(CheckpointError, match=r"damaged|not the record"):
        load_packed(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("scales", 0.0, "scales holds a number that is not positive and normal"),
        ("scales", float("inf"), "scales holds a NaN or infinite value"),
        ("activation_scales", -1.0, "activation_scales holds a number that is not positive"),
        ("batch_norms", float("nan"), "batch_norms holds a NaN"),
        ("zero_points", 100, "a zero point of conv1.weight lies outside its 4-bit codes"),
        ("scales", None, r"holds \['activation_scales', .*; its record describes"),
        ("codes", "short", r"codes is torch\.uint8 \[\d+\]; its record describes torch\.uint8 \[\d+\]"),
        ("scales", "double", r"scales is torch\.float16"),
    ],
)
def test_numbers_that_no_quantizer_has(name: str, value: Any, message: str, tmp_path: Path) -> None:
    """A tensor file that is well-formed and hashed anew."""
    safetensors = pytest.importorskip("safetensors.torch")
    save_packed(twin_of(Net()), tmp_path / "net", input_shape=SHAPE)
    file = tmp_path / "net" / "packed.safetensors"
    tensors = safetensors.load_file(file)
    if value is None:
        tensors["surplus"] = tensors.pop(name)
    elif value == "short":
        tensors[name] = tensors[name][:-1]
    elif value == "double":
        tensors[name] = tensors[name].half().repeat(2)
    else:
        tensors[name][0] = value
    # What was cut is added to the header: the size of the file is right.
    data = safetensors.save(tensors, {"pad": "x" * 64})
    file.write_bytes(data)
    record = json.loads(record_text(tmp_path / "net"))
    record["tensors_sha256"] = hashlib.sha256(data).hexdigest()
    write_record(tmp_path / "net", record)
    with pytest.raises(CheckpointError, match=message):
        load_packed(tmp_path / "net")


def test_network_that_does_not_fit(tmp_path: Path) -> None:
    save_packed(twin_of(Net()), tmp_path / "net", input_shape=SHAPE)
    packed = load_packed(tmp_path / "net")
    with pytest.raises(CheckpointError, match="came from a module: hand over the network itself"):
        packed.network()
    with pytest.raises(CheckpointError, match=r"conv1\.weight is \[5, 3, 3, 3\]; wanted \[6, 3, 3, 3\]"):
        packed.network(Net(6))
    with pytest.raises(CheckpointError, match=r"does not fit the network: weight 0\.weight is missing in the file"):
        packed.network(nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU()))
    other = Net()
    other.bn1.eps = 1e-3
    with pytest.raises(CheckpointError, match=r"bn1 has eps 0\.001; wanted 1e-05"):
        packed.network(other)
    other = Net()
    other.act = nn.ReLU()
    with pytest.raises(CheckpointError, match="act computes relu6"):
        packed.network(other)


def test_code_named_by_a_file_is_never_run(tmp_path: Path) -> None:
    touched, evil = tmp_path / "touched", tmp_path / "evil.py"
    evil.write_text(f"import pathlib\npathlib.Path({str(touched)!r}).touch()\ndef make():\n    return None\n")
    save_packed(twin_of(Net()), tmp_path / "net", input_shape=SHAPE, source=Source(f"{evil}:make", None, "0" * 64))
    with pytest.raises(CheckpointError, match="hand over the network itself"):
        load_packed(tmp_path / "net").network()
    assert not touched.exists()


class Mapped(nn.Module):
    """Untraceable; its output, a flat map of features, is longer than any layer has rows. Buffers of three kinds."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.act = nn.ReLU()
        self.fc = nn.Linear(144, 7)
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(x))
        if bool((x.detach() < -1).any()):
            return x
        rows = self.fc(x.flatten(2)).masked_fill(self.mask.real == float("-inf"), 0.0)
        return rows.flatten(1)


def test_what_is_saved_can_be_loaded(tmp_path: Path) -> None:
    mask = torch.zeros(7)
    mask[2] = float("-inf")
    twin = twin_of(Mapped(mask))
    written = save_packed(twin, tmp_path / "net", input_shape=SHAPE)
    assert written.record.num_classes == 28
    read = load_packed(tmp_path / "net")
    x = torch.randn(5, *SHAPE)
    assert torch.equal(read.network(Mapped(torch.zeros(7)))(x), twin(x).detach())
    # The images of the record are such as it does not take.
    with pytest.raises(CheckpointError, match="the packed file does not fit the network"):
        replace(read, record=replace(read.record, input_shape=(3, 8, 8))).network(Mapped(mask))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(7, dtype=torch.complex64), "dtype of 'mask' is 'complex64'"),
        (torch.full((7,), float("nan")), r"tensors\.float32 holds a NaN"),
        (torch.zeros([1] * 8 + [7]), "tensor 'mask' has 9 dimensions"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(mask: Tensor, message: str, tmp_path: Path) -> None:
    twin = twin_of(Mapped(torch.zeros(7)))
    twin.mask = mask
    twin.forward = lambda x: x.flatten(1)
    with pytest.raises(ModelError, match=f"the network cannot be packed: .*{message}"):
        save_packed(twin, tmp_path / "net", input_shape=SHAPE)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "is_readable"),
    [
        ({"input_shape": (1, 1 << 13, 1 << 12)}, True),
        ({"input_shape": (1, 1 << 14, 1 << 14)}, False),
        ({"num_classes": 1 << 20}, True),
        ({"num_classes": (1 << 20) + 1}, False),
        ({"mean": (float("inf"),)}, False),
    ],
)
def test_one_rule_for_writing_and_reading(changes: dict[str, Any], is_readable: bool, tmp_path: Path) -> None:
    written = save_packed(twin_of(Net()), tmp_path / "net", input_shape=SHAPE).record
    record = replace(written, **changes)
    write_record(tmp_path / "net", record.to_json())
    if is_readable:
        check_readable(record)
        assert read_record(tmp_path / "net") == record
    else:
        with pytest.raises(ModelError, match=r"cannot be packed|its record is damaged"):
            check_readable(record)
        with pytest.raises(CheckpointError, match="is damaged"):
            read_record(tmp_path / "net")


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    twin = twin_of(Net())
    with pytest.raises(TypeError, match="input_shape"):
        save_packed(twin, tmp_path / "net")
    with pytest.raises(ValueError, match="does not come from clusterq"):
        save_packed(Net(), tmp_path / "net", input_shape=SHAPE)
    with pytest.raises(ModelError, match="has no range yet"):
        save_packed(clusterq.prepare(Net(), QuantizationConfig(scheme="paper")), tmp_path / "net", input_shape=SHAPE)
    set_quantization(twin, weights=False)
    with pytest.raises(ModelError, match="conv1: quantization of its weight is switched off"):
        save_packed(twin, tmp_path / "net", input_shape=SHAPE)
    set_quantization(twin)
    save_packed(twin, tmp_path / "net", input_shape=SHAPE)
    with pytest.raises(OutputError, match="exists already"):
        save_packed(twin, tmp_path / "net", input_shape=SHAPE)
    assert os.listdir(tmp_path) == ["net"]
