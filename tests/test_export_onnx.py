"""ONNX export: onnxruntime gives the codes of the twin, which PyTorch computes; nothing is exported that would not."""

from __future__ import annotations

import copy
import json
import re
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import clusterq
from clusterq.cli import main
from clusterq.config import QuantizationConfig
from clusterq.data import EvaluationSet
from clusterq.deploy._grids import checked_grid
from clusterq.deploy._onnx_runtime import integer_kernels, runner, same_classes
from clusterq.deploy.onnx import OnnxExport, export_onnx
from clusterq.errors import MissingPackageError, ModelError, OutputError
from clusterq.export import export_checkpoint
from clusterq.models import LoadedModel
from clusterq.networks import ChannelPadShortcut
from clusterq.nn import ActivationQuantizer, QuantizedConv2d, QuantizedLinear, set_quantization
from clusterq.qat import calibrate
from clusterq.stored import ExportRequest

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

MODES: dict[str, dict[str, Any]] = {
    "qdq": {},
    "folded": {"fold_batch_norm": True},
    "integer": {"operators": "integer"},
}


class Net(nn.Module):
    """Residual sum, depthwise and strided convolutions, odd channels, pooling between codes and layers."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 5, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(5)
        self.act1 = activation()
        self.depthwise = nn.Conv2d(5, 5, 3, stride=2, padding=1, groups=5, bias=False)
        self.bn2 = nn.BatchNorm2d(5)
        self.act2 = nn.ReLU6()
        self.pool = nn.MaxPool2d(2)
        self.point = nn.Conv2d(5, 7, 1)
        self.act3 = activation()
        self.conv4 = nn.Conv2d(7, 9, 3, padding="same")
        self.bn4 = nn.BatchNorm2d(9)
        self.short = ChannelPadShortcut(1)
        self.act4 = nn.ReLU(inplace=True)
        self.fc1 = nn.Linear(9 * 4, 6)
        self.act5 = activation()
        self.fc2 = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.act2(self.bn2(self.depthwise(x)))
        x = self.act3(self.point(self.pool(x)))
        y = self.short(x)
        y += self.bn4(self.conv4(x))[:, :, ::2, ::2]
        y = functional.avg_pool2d(self.act4(y), 1)
        y = self.act5(self.fc1(y.view(y.size(0), -1)))
        return self.fc2(y)


def images(count: int = 16) -> Tensor:
    return torch.randn(count, 3, 16, 16)


def prepared(network: nn.Module, **config: Any) -> nn.Module:
    """A calibrated twin of scheme paper, where BatchNorms have statistics and gains of either sign."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.2, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    twin = clusterq.prepare(network.eval(), QuantizationConfig(scheme="paper", **config), example_input=images(2))
    calibrate(twin, images())
    return twin


def powers_of_two(twin: nn.Module) -> None:
    """All numbers such that float32 sums are exact in any order, and that many values lie on rounding boundaries."""
    for module in twin.modules():
        if isinstance(module, (QuantizedConv2d, QuantizedLinear)):
            quantizer = module.weight_quantizer
            half = 2 ** (quantizer.bits - 1)
            module.weight.data.copy_(torch.randint(-half, half + 1, module.weight.shape) / (2 * half))
            quantizer.scale.data.copy_(2.0 ** torch.randint(-1, 2, quantizer.scale.shape) / (2 * half))
            if not quantizer.symmetric:
                quantizer.zero_point.random_(-half // 2, half // 2)
            if module.bias is not None:
                module.bias.data.copy_(torch.randint(-8, 9, module.bias.shape) / 16)
        elif isinstance(module, ActivationQuantizer):
            steps = module.quant_max - module.quant_min
            module.scale.data.copy_(2.0 ** torch.tensor([8.0 / steps]).log2().round())
            if not (module.non_negative or module.symmetric):
                module.zero_point.fill_(steps // 3)
        elif isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0
            module.running_var.fill_(4.0)
            module.weight.data.copy_(torch.tensor([2.0, -4.0, 4.0]).repeat(3)[: len(module.weight)])
            module.running_mean.copy_(torch.randint(-4, 5, module.bias.shape) / 8)
            module.bias.data.copy_(torch.randint(0, 9, module.bias.shape) / 8)


def run(model: Any, names: list[str], x: Tensor, level: str = "ORT_ENABLE_ALL") -> list[np.ndarray[Any, Any]]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    source = model if isinstance(model, bytes) else str(model)
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return session.run(names, {"input": x.numpy()})


def codes_in_onnxruntime(export: OnnxExport, x: Tensor, level: str = "ORT_ENABLE_ALL") -> dict[str, Tensor]:
    """Codes less zero point of every activation quantizer, and `"output"`."""
    model = onnx.load(export.path)
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    names = {name: tensors[0] for name, tensors in export.activations.items()}
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names.values())
    output, *found = run(model.SerializeToString(), ["output", *names.values()], x, level)
    zero = {name: int(constants[f"{name}/zero_point"]) for name in names}
    codes = {name: torch.from_numpy(v.astype(np.int32)) - zero[name] for name, v in zip(names, found, strict=True)}
    return codes | {"output": torch.from_numpy(output)}


@torch.no_grad()
def codes_in_torch(twin: nn.Module, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same from PyTorch, by dividing the values of the twin by their scale; and what each quantizer was given."""
    found: dict[str, Tensor] = {}
    given: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        def hook(module: ActivationQuantizer, args: tuple[Tensor], output: Tensor) -> None:
            found[name] = (output / module.qparams()[0]).round().int()
            given[name] = (args[0] if module.function is None else module.function(args[0])) / module.qparams()[0]

        return hook

    named = {name: m for name, m in twin.named_modules() if isinstance(m, ActivationQuantizer)}
    handles = [module.register_forward_hook(note(name)) for name, module in named.items()]
    found["output"] = twin(x)
    for handle in handles:
        handle.remove()
    return found, given


CASES: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "W4A4": (nn.ReLU, {}),
    "W2A2": (nn.LeakyReLU, {"weight_bits": 2, "activation_bits": 2}),
    "W3A5 symmetric": (nn.LeakyReLU, {"weight_bits": 3, "activation_bits": 5, "activation_symmetric": True}),
    "W7A7": (nn.ReLU6, {"weight_bits": 7, "activation_bits": 7}),
    "W8A8": (nn.LeakyReLU, {"weight_bits": 8, "activation_bits": 8}),
    "W8A8 symmetric": (
        nn.LeakyReLU,
        {"weight_bits": 8, "activation_bits": 8, "weight_symmetric": True, "activation_symmetric": True},
    ),
    "W4A8, first and last 8": (nn.ReLU, {"activation_bits": 8, "first_layer_bits": 8, "last_layer_bits": 8}),
}


def slope_of_a_quarter(twin: nn.Module) -> None:
    for module in twin.modules():
        if isinstance(module, nn.LeakyReLU):
            module.negative_slope = 0.25


PAIRS = [(case, mode) for case in CASES for mode in MODES if mode != "folded" or case in ("W2A2", "W8A8 symmetric")]


@pytest.mark.parametrize(("case", "mode"), PAIRS)
def test_bitwise_where_sums_are_exact(case: str, mode: str, tmp_path: Path) -> None:
    activation, config = CASES[case]
    twin = prepared(Net(activation), **config)
    powers_of_two(twin)
    slope_of_a_quarter(twin)
    x = torch.randint(-32, 33, (24, 3, 16, 16)) / 16
    export = export_onnx(twin, tmp_path / "net.onnx", example_input=x, **MODES[mode])
    wanted, given = codes_in_torch(twin, x)
    # The case is worth its name: many values lie on a boundary, and codes differ.
    ties = sum(int((v.frac().abs() == 0.5).sum()) for v in given.values())
    assert ties > 300
    assert {name: len(v.unique()) for name, v in wanted.items() if len(v.unique()) < 3} == {}
    for level in ("ORT_ENABLE_ALL", "ORT_DISABLE_ALL"):
        found = codes_in_onnxruntime(export, x, level)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert torch.equal(found[name], value), (name, level)
    fc2 = export.layers[-1]
    assert (fc2.name, fc2.kind, fc2.float_bytes) == ("fc2", "Linear", 4 * 4 * 6)


def only_boundaries_differ(found: dict[str, Tensor], wanted: dict[str, Tensor], given: dict[str, Tensor]) -> Tensor:
    """Which images have equal codes throughout.

    Of those that were alike so far a code differs by one at most, and only within the error of float32 sums.
    """
    alike = torch.ones(len(found["output"]), dtype=torch.bool)
    for name, ratio in given.items():
        difference = (found[name] - wanted[name]).abs().flatten(1)
        fresh = difference[alike]
        assert int(fresh.max()) <= 1, name
        boundary = ((ratio.flatten(1)[alike] + 0.5).frac().abs() + 0.5).frac() - 0.5
        assert not bool((boundary.abs()[fresh > 0] > 1e-4).any()), name
        alike &= difference.amax(1) == 0
    return alike


def test_codes_on_a_rounding_boundary_do_differ(tmp_path: Path) -> None:
    """ONNX divides by a scale where the twin multiplies by its inverse; on boundaries, and nowhere else, codes tell."""
    network = nn.Sequential(nn.Conv2d(3, 3, 1, groups=3, bias=False), nn.LeakyReLU(), nn.Flatten())
    twin = prepared(network, weight_bits=4, activation_bits=8, weight_symmetric=True)
    with torch.no_grad():
        twin[0].weight.fill_(1.0)
        twin[0].weight_quantizer.scale.fill_(0.25)
        twin[1].scale.fill_(0.0123)
        # Within two steps of float32 of every boundary between positive codes that the grid has.
        edge = (torch.arange(192) % 96 + 0.5).repeat(4)[:768] * twin[1].scale
        x = edge * (1 + torch.arange(768).div(96, rounding_mode="floor").sub(4) * 2**-24)
        x = torch.cat([x, torch.rand(768) * 1.2]).reshape(2, 3, 16, 16)
    wanted, given = codes_in_torch(twin, x)
    export = export_onnx(twin, tmp_path / "net.onnx", example_input=x)
    found = codes_in_onnxruntime(export, x)
    assert only_boundaries_differ(found, wanted, given).tolist() == [False, True]
    differing = int((found["1"] != wanted["1"]).sum())
    assert 10 <= differing <= 400
    # The check itself: a code that is off anywhere else, or by more than one, is noticed.
    inside = int((given["1"][1].flatten().frac() - 0.25).abs().argmin())
    for place, by in ((inside, 1), (int((found["1"][0] != wanted["1"][0]).flatten().nonzero()[0]) - 768, 2)):
        wrong = {name: value.clone() for name, value in found.items()}
        wrong["1"].view(-1)[768 + place] = wanted["1"].view(-1)[768 + place] + by
        with pytest.raises(AssertionError):
            only_boundaries_differ(wrong, wanted, given)


@pytest.mark.parametrize(
    ("case", "mode"), [("W4A4", "qdq"), ("W4A4", "folded"), ("W3A5 symmetric", "integer"), ("W8A8", "qdq")]
)
def test_only_values_on_a_rounding_boundary_differ(case: str, mode: str, tmp_path: Path) -> None:
    activation, config = CASES[case]
    twin = prepared(Net(activation), **config)
    x = images(256)
    wanted, given = codes_in_torch(twin, x)
    export = export_onnx(twin, tmp_path / "net.onnx", example_input=x, **MODES[mode])
    # Optimized, onnxruntime rounds the bias of layers that it fuses.
    found = codes_in_onnxruntime(export, x, "ORT_DISABLE_ALL")
    alike = only_boundaries_differ(found, wanted, given)
    assert int((~alike).sum()) <= 8
    torch.testing.assert_close(found["output"][alike], wanted["output"][alike], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("bits", "bias"), [(2, False), (4, False), (4, True), (7, False), (8, False)])
def test_convolution_between_codes_without_batch_norm(bits: int, bias: bool, tmp_path: Path) -> None:
    """What onnxruntime fuses into an integer kernel: all but zero points per channel, which some versions refuse."""
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 11, 3, bias=bias), nn.ReLU(), nn.Flatten())
    twin = prepared(network, weight_bits=bits, activation_bits=8)
    x = images(8)
    wanted, _ = codes_in_torch(twin, x)
    export = export_onnx(twin, tmp_path / "net.onnx", example_input=x)
    assert export.layers[1].multiplier == (8 if bias else 1)
    if not bias:
        assert integer_kernels(export).layers == ({"2"} if bits < 8 else set())
    difference = (codes_in_onnxruntime(export, x)["3"] - wanted["3"]).abs()
    # A bias is rounded by the versions of onnxruntime that fuse such a layer.
    assert int(difference.max()) <= 1 and float((difference > 0).float().mean()) < (0.03 if bias else 1e-3)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_packed_weights(bits: int, symmetric: bool, tmp_path: Path) -> None:
    twin = prepared(Net(), weight_bits=bits, activation_bits=4, weight_symmetric=symmetric, layer_bits={"fc1": 6})
    powers_of_two(twin)
    x = torch.randint(-32, 33, (8, 3, 16, 16)) / 16
    with pytest.warns(UserWarning, match="smaller, not faster"):
        export = export_onnx(twin, tmp_path / "net.onnx", example_input=x, packed=True)
    wanted, _ = codes_in_torch(twin, x)
    for level in ("ORT_ENABLE_ALL", "ORT_DISABLE_ALL"):
        found = codes_in_onnxruntime(export, x, level)
        for name, value in wanted.items():
            assert torch.equal(found[name], value), (name, level)
    layers = {layer.name: layer for layer in export.layers}
    assert {name for name, layer in layers.items() if layer.container == "INT8"} == {"fc1"}
    model = onnx.load(export.path)
    types = {t.name: t.data_type for t in model.graph.initializer}
    assert types["conv4/weight_codes"] == onnx.TensorProto.INT4
    assert types["fc1/weight_codes"] == onnx.TensorProto.INT8
    assert model.opset_import[0].version == export.opset == 21
    # 9 * 7 * 9 codes, two to the byte, 9 scales, and 9 zero points where there are any.
    assert layers["conv4"].stored_bytes == (9 * 7 * 9 + 1) // 2 + 36 + (0 if symmetric else 5)


def test_weights_are_those_of_the_twin(tmp_path: Path) -> None:
    """Bit for bit, by the formula of DequantizeLinear, also where codes were multiplied or zero points subtracted."""
    twin = prepared(Net(), weight_bits=5, layer_bits={"conv1": 8, "fc2": 2})
    for packed in (False, True):
        path = tmp_path / f"{packed}.onnx"
        with pytest.warns(UserWarning) if packed else nullcontext():
            export = export_onnx(twin, path, example_input=images(2), packed=packed)
        model = onnx.load(path)
        values = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
        nodes = [n for n in model.graph.node if n.op_type == "DequantizeLinear" and "weight_codes" in n.input[0]]
        assert len(nodes) == len(export.layers) == 6
        for node, layer in zip(nodes, export.layers, strict=True):
            codes, scale, *zero = (values[name].astype(np.float32) for name in node.input)
            shape = [-1] + [1] * (codes.ndim - 1)
            weight = (codes - (zero[0].reshape(shape) if zero else np.float32(0))) * scale.reshape(shape)
            module: Any = twin.get_submodule(layer.name)
            assert np.array_equal(weight, module.quantized_weight().detach().numpy()), (layer.name, packed)
            assert int(codes.max() - codes.min()) // layer.multiplier < 2**layer.bits * (1 if zero else 2)


def test_file_says_what_it_is(tmp_path: Path) -> None:
    twin = prepared(Net(), weight_bits=3, activation_bits=5)
    before = copy.deepcopy(twin.state_dict())
    path = tmp_path / "deep" / "net.onnx"
    export = clusterq.export_onnx(twin, path, example_input=images(1))
    assert all(torch.equal(v, before[k]) for k, v in twin.state_dict().items())
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert (model.producer_name, model.producer_version) == ("clusterq", clusterq.__version__)
    assert model.opset_import[0].version == export.opset == 17 and model.ir_version == 8
    facts = {entry.key: entry.value for entry in model.metadata_props}
    bits = json.loads(facts["clusterq_bits"])
    assert bits["conv1"] == 3 and bits["act1"] == 5 and len(bits) == 6 + 5
    assert facts["clusterq_version"] == clusterq.__version__
    assert export.file_bytes == path.stat().st_size and list(path.parent.iterdir()) == [path]
    # Any batch, though it was captured with one image.
    for count in (1, 2, 5):
        assert run(path, ["output"], images(count))[0].shape == (count, 4)
    with pytest.raises(OutputError, match="exists already"):
        export_onnx(twin, path, example_input=images(1))
    export_onnx(twin, path, example_input=images(1), overwrite=True)


def test_a_result_brings_its_own_input(tmp_path: Path) -> None:
    twin, x = prepared(Net()), images(4)
    labels = torch.zeros(4, dtype=torch.int64)
    result = clusterq.Result(twin, clusterq.ClusterQConfig(), 1.0, x, labels, {}, {}, {})
    files = [tmp_path / name for name in ("result.onnx", "twin.onnx")]
    clusterq.export_onnx(result, files[0])
    clusterq.export_onnx(twin, files[1], example_input=x[:2])
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_module_called_twice_and_a_linear_on_a_sequence(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Conv2d(3, 3, 3, padding=1)
            self.act = nn.ReLU()
            self.mix = nn.Linear(16, 12)

        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.inner(self.act(self.inner(x))))
            return functional.silu(self.mix(x)).mean((2, 3))

    twin = prepared(Twice())
    for mode, settings in MODES.items():
        path = tmp_path / f"{mode}.onnx"
        export = export_onnx(twin, path, example_input=images(2), **settings)
        x = images(4)
        torch.testing.assert_close(
            torch.from_numpy(run(path, ["output"], x, "ORT_DISABLE_ALL")[0]), twin(x).detach(), rtol=1e-4, atol=1e-4
        )
        assert {layer.name for layer in export.layers} == {"inner", "mix"}


class Sorted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return torch.sort(self.part(x), dim=1)[0]


def test_what_cannot_be_exported_is_named(tmp_path: Path) -> None:
    path, x = tmp_path / "net.onnx", images(2)
    twin = prepared(Net())
    with pytest.raises(ValueError, match=r"does not come from clusterq\.prepare"):
        export_onnx(Net(), path, example_input=x)
    with pytest.raises(TypeError, match="example_input"):
        export_onnx(twin, path)
    with pytest.raises(ValueError, match="operators is 'int'"):
        export_onnx(twin, path, example_input=x, operators="int")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="packed is given"):
        export_onnx(twin, path, example_input=x, operators="integer", packed=True)
    with pytest.raises(ModelError, match="sort"):
        export_onnx(prepared(Sorted()), path, example_input=x)
    with pytest.raises(ModelError, match=r"act1: has no range yet"):
        export_onnx(clusterq.prepare(Net(), QuantizationConfig(scheme="paper")), path, example_input=x)
    with pytest.raises(ModelError, match=r"captured by torch\.export"):
        export_onnx(twin, path, example_input=images(2)[:, :2])
    set_quantization(twin, activations=False)
    with pytest.raises(ModelError, match="act1: quantization is switched off"):
        export_onnx(twin, path, example_input=x)
    set_quantization(twin)
    twin.conv4.weight_quantizer.scale.data[3] = float("inf")
    with pytest.raises(ModelError, match="conv4: a scale is not a positive normal number"):
        export_onnx(twin, path, example_input=x)
    assert not path.exists() and not list(tmp_path.iterdir())


def test_numbers_that_onnx_cannot_hold() -> None:
    one = torch.ones(1)
    with pytest.raises(ModelError, match="layer: a zero point is not a whole number"):
        checked_grid("layer", one, one * 2.5, 0, 15, None)
    with pytest.raises(ModelError, match=r"layer: a zero point lies outside the codes 0 to 15"):
        checked_grid("layer", one, one * 16, 0, 15, None)
    with pytest.raises(ModelError, match=r"layer: its scale is torch\.float64"):
        checked_grid("layer", one.double() / 3, one, 0, 15, None)
    assert checked_grid("layer", one.double() / 4, one, 0, 15, None).scale.dtype == torch.float32


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_missing_package(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Hide(package), *sys.meta_path])
    (tmp_path / "checkpoint.json").write_text("{}")
    with pytest.raises(MissingPackageError, match=rf"needs the package '{package}'.*clusterq\[export\]"):
        export_checkpoint(ExportRequest(tmp_path))


class _Hide:
    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


NETWORK = """
import torch.nn as nn

def make():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )
"""


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder with two checkpoints of a network from a Python file, which is beside it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NETWORK)
    scope: dict[str, Any] = {}
    exec(NETWORK, scope)
    for bits in (4, 8):
        config = QuantizationConfig(scheme="paper", weight_bits=bits, activation_bits=4, weight_symmetric=True)
        twin = clusterq.prepare(scope["make"](), config)
        calibrate(twin, images())
        settings = clusterq.ClusterQConfig(quantization=config)
        clusterq.save(twin, tmp_path / f"run/checkpoints/W{bits}A4", config=settings, input_shape=(3, 16, 16))
    return tmp_path / "run"


def test_command(checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", "run", "--model", "net.py:make", "--threads", "1", "--device", "cpu"]
    assert main([*words, "--bits", "W4A4"]) == 0
    text = capsys.readouterr().out
    file = checkpoints / "checkpoints/W4A4/model.onnx"
    assert file.is_file() and "BatchNorm and sums" not in text
    # Without the column on OpenVINO, where it is installed.
    rows = [line.split()[:9] for line in text.splitlines() if not line.startswith("onnxruntime")]
    assert ["0", "Conv", "4", "INT8", "124", "B", "432", "B", "float"] in rows
    # Behind a quantizer, with one behind it, and no BatchNorm in between.
    assert ["3", "Conv", "4", "INT8", "160", "B", "576", "B", "integer"] in rows
    runtime = next(line.split() for line in text.splitlines() if line.startswith("onnxruntime"))
    # Exported and in floating point, batch 1 and 32.
    line = next(line for line in text.splitlines() if line.startswith("onnxruntime"))
    assert len(re.findall(r"\d+\.\d{3} of \d+\.\d{3} ms \(\d+\.\d\dx\)", line)) == 2
    assert runtime[1:6] == ["1", "QLinearConv", "1", "of", "3"] and runtime[-3:] == ["256", "of", "256"]
    assert "images: random" in text
    assert main([*words, "--bits", "W8A4", "--output", "own.onnx", "--operators", "integer", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["kernels"] == {"ConvInteger": 1} and result["file_bytes"] == Path("own.onnx").stat().st_size
    assert [layer["integer"] for layer in result["layers"]] == [False, True, False]
    for times in result["milliseconds"].values():
        assert all(times[kind] > 0 for kind in ("float", "exported", "ratio"))
    assert list(result["milliseconds"]) == ["1", "32"]


def test_command_refuses(checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*words: str) -> str:
        assert main(["export", *words]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and len(captured.err.strip().splitlines()) == 1
        return captured.err

    assert "W4A4, W8A4; choose one by --bits" in refused("run")
    packed = ("run", "--bits", "W4A4", "--model", "net.py:make", "--format", "safetensors", "--output", "packed")
    assert main(["export", *packed]) == 0
    capsys.readouterr()
    for form in ("onnx", "safetensors"):
        assert "packed is a packed network, of which only --format pt2" in refused("packed", "--format", form)
    assert "hand over the network itself" in refused("run", "--bits", "W4A4")
    assert "neither a checkpoint nor a run folder" in refused("nowhere")
    Path("there.onnx").write_text("mine")
    words = ("run", "--bits", "W4A4", "--model", "net.py:make")
    assert "exists already" in refused(*words, "--output", "there.onnx")
    assert Path("there.onnx").read_text() == "mine"
    assert "packed is given" in refused(*words, "--packed", "--operators", "integer")
    assert not list(checkpoints.rglob("*.onnx"))


def test_resnet20_on_cifar10(cifar10: tuple[LoadedModel, EvaluationSet], tmp_path: Path) -> None:
    loaded, real = cifar10
    batches = [x for x, _ in real.batches(500, 2500)]
    twin = clusterq.prepare(loaded.model, QuantizationConfig(scheme="paper"))
    calibrate(twin, batches[0][:128])
    for mode, images_seen in (("qdq", 2000), ("integer", 1000)):
        export = export_onnx(twin, tmp_path / f"{mode}.onnx", example_input=batches[0][:2], **MODES[mode])
        same, count = same_classes(twin, runner(export.path), batches[1 : 1 + images_seen // 500])
        assert count == images_seen and same >= 0.999 * count
        integer = integer_kernels(export)
        assert integer.counts == ({"ConvInteger": 18} if mode == "integer" else {})
