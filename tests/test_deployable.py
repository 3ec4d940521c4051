"""Scheme deploy: what gets a range and how wide, what is folded and what is named; the rest of the library works."""

from __future__ import annotations

import copy
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import clusterq
from clusterq import checkpoint
from clusterq.config import ClusterQConfig, FinetuneConfig, QuantizationConfig, preset
from clusterq.errors import ModelError
from clusterq.nn.layers import QuantizedConv2d, QuantizedLinear
from clusterq.nn.quantizers import ActivationQuantizer, set_quantization
from clusterq.qat.calibrate import calibrate
from clusterq.qat.finetune import finetune
from clusterq.qat.prepare import is_prepared_with, prepare, prepared_with, report, unreached
from clusterq.settings import override

sys.path.insert(0, os.path.dirname(__file__))
from deploy_cases import NETWORKS, Dense, Gated, Inverted, Residual, randomise

CONFIG = QuantizationConfig(scheme="deploy")
X = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def widths(twin: nn.Module) -> dict[str, int]:
    return {row.name: row.activation_bits for row in report(twin) if row.activation_bits is not None}


def test_ranges_of_a_residual_network():
    """Operands of sums 8 bits, what layers read 4, the image 8; in execution order."""
    twin = prepare(randomise(Residual()), CONFIG)
    assert widths(twin) == {
        "input_quantizer": 8,
        "relu": 4,
        "block1.relu": 4,
        "block1.bn2_quantizer": 8,
        "block1.relu_1": 4,
        "block2.relu": 4,
        "block2.bn2_quantizer": 8,
        "block2.relu_1": 4,
        "mean_quantizer": 4,
        "relu_1": 4,
    }
    order = [row.name for row in report(twin)]
    assert order.index("block1.conv2") < order.index("block1.bn2_quantizer") < order.index("block1.relu_1")
    notes = {row.name: row.note for row in report(twin)}
    assert notes["block1.conv1"] == "block1.bn1 folded in" and notes["stem"] == "first layer"
    assert unreached(twin) == []


def test_ranges_of_linear_bottlenecks():
    """Their outputs feed sums only; the sums feed convolutions."""
    found = widths(prepare(randomise(Inverted()), CONFIG))
    assert [found[f"blocks.{i}.7_quantizer"] for i in (0, 1)] == [8, 8]
    assert [bits for name, bits in found.items() if name.startswith("add")] == [4, 4]
    assert found["classifier.0_quantizer"] == 4


def test_ranges_of_concatenations_and_tables():
    dense, gated = (widths(prepare(randomise(net()), CONFIG)) for net in (Dense, Gated))
    assert dense["relu"] == dense["relu_1"] == dense["adaptive_avg_pool2d_quantizer"] == 4
    assert {bits for name, bits in dense.items() if "relu" not in name and "adaptive" not in name} == {8}, (
        "sums, concatenations and what BatchNorm alone reads"
    )
    assert gated["stem.1_quantizer"] == 8 and gated["stem.2"] == 4
    assert gated["left.1"] == gated["silu"] == 8, "only a concatenation reads them"
    assert gated["mul_quantizer"] == gated["mean_quantizer"] == 4


def test_widths_are_settings():
    config = QuantizationConfig(scheme="deploy", input_bits=6, sum_bits=5, activation_bits=3, layer_bits={"relu": 7})
    found = widths(prepare(randomise(Residual()), config))
    assert found["input_quantizer"] == 6 and found["block1.bn2_quantizer"] == 5 and found["relu"] == 7
    assert found["block1.relu"] == 3
    own = QuantizationConfig(scheme="deploy", layer_bits={"mean_quantizer": 8})
    assert widths(prepare(randomise(Residual()), own))["mean_quantizer"] == 8
    with pytest.raises(ValueError, match=r"input_quantiser.*input_quantizer"):
        prepare(randomise(Residual()), QuantizationConfig(scheme="deploy", layer_bits={"input_quantiser": 8}))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("settings", [{}, {"learned_scale": False, "activation_range": "ema"}])
def test_symmetric_int8(network: type[nn.Module], settings: dict[str, Any]):
    """Every code has its place in an INT8 around 0; widths are those of always, except 7 for 8 of one sign."""
    for bits in (3, 8):
        config = replace(CONFIG, weight_bits=bits, activation_bits=bits, **settings)
        plain, twin = (prepare(randomise(network()), replace(config, int8_symmetric=on)) for on in (False, True))
        calibrate(twin, X)
        usual, found = widths(plain), widths(twin)
        assert list(found) == list(usual)
        signs = set()
        for name, module in twin.named_modules():
            if isinstance(module, ActivationQuantizer):
                _, zero, low, high = module.qparams()
                assert not bool(zero.any()) and low >= -128 and high <= 127, name
                assert module.bits == found[name] == min(usual[name], 7 if module.non_negative else 8), name
                half = 2 ** (module.bits - 1)
                assert (low, high) == ((0, 2 * half - 1) if module.non_negative else (-half, half - 1)), name
                signs.add(module.non_negative)
            if isinstance(module, (QuantizedConv2d, QuantizedLinear)):
                _, zero, low, high = module.weight_quantizer.qparams(module.weight)
                assert low - int(zero.max()) >= -128 and high - int(zero.min()) <= 127, name
        assert signs == {False, True}


def test_symmetric_int8_and_other_widths():
    config = replace(CONFIG, int8_symmetric=True, layer_bits={"relu": 8, "relu_1": 5, "input_quantizer": 8})
    found = widths(prepare(randomise(Residual()), config))
    assert (found["relu"], found["relu_1"], found["input_quantizer"]) == (7, 5, 8)
    paper = prepare(randomise(Residual()), QuantizationConfig(scheme="paper", activation_bits=8, int8_symmetric=True))
    assert set(widths(paper).values()) == {7}


def test_signs_are_known():
    """Averages of what ReLU gives need no zero point; the image and linear outputs do."""
    twin: Any = prepare(randomise(Residual()), CONFIG)
    assert twin.mean_quantizer.non_negative and not twin.input_quantizer.non_negative
    assert not twin.block1.bn2_quantizer.non_negative
    dense: Any = prepare(randomise(Dense()), CONFIG)
    assert not dense.cat_quantizer.non_negative


@pytest.mark.parametrize("network", NETWORKS)
def test_without_quantizers_it_is_the_network(network: type[nn.Module]):
    net = randomise(network())
    twin = prepare(net, CONFIG)
    set_quantization(twin, weights=False, activations=False)
    torch.testing.assert_close(twin(X), net(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network", NETWORKS)
def test_every_layer_reads_codes(network: type[nn.Module]):
    """Inputs of layers lie on a grid of at most 2^bits values, biases on the grid of the sums."""
    twin = prepare(randomise(network()), CONFIG)
    calibrate(twin, X)
    layers = {n: m for n, m in twin.named_modules() if hasattr(m, "weight_quantizer")}
    seen: dict[str, Tensor] = {}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda module, args, name=name: seen.__setitem__(name, args[0]))
    with torch.no_grad():
        twin(X)
    assert set(seen) == set(layers)
    for name, layer in layers.items():
        assert len(seen[name].unique()) <= 2 ** layer._source[0].bits
        if layer.bias is not None:
            _, bias = layer.weight_and_bias(layer.bias)
            unit = layer._source[0].qparams()[0].double() * layer.weight_quantizer.qparams(layer.weight)[0].double()
            ratio = bias.double() / unit
            assert bool((ratio - ratio.round()).abs().max() < 1e-4 * ratio.abs().max().clamp_min(1))


def test_eight_bit_weights_fit_int8():
    config = QuantizationConfig(scheme="deploy", weight_bits=8)
    twin = prepare(randomise(Residual()), config)
    for layer in twin.modules():
        if isinstance(layer, QuantizedConv2d):
            quantizer = layer.weight_quantizer
            assert quantizer.symmetric and (quantizer.quant_min, quantizer.quant_max) == (-127, 127)
    mixed = QuantizationConfig(scheme="deploy", layer_bits={"fc1": 8})
    twin: Any = prepare(randomise(Residual()), mixed)
    assert twin.fc1.weight_quantizer.narrow and not twin.fc2.weight_quantizer.narrow
    live = QuantizationConfig(scheme="deploy", weight_bits=8, weight_range="minmax", learned_scale=False)
    twin = prepare(randomise(Residual()), live)
    codes = twin.stem.quantized_weight() / twin.stem.weight_quantizer.qparams(twin.stem.weight)[0].reshape(-1, 1, 1, 1)
    assert int(codes.round().abs().max()) == 127


class Shared(nn.Module):
    """One convolution on two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.twice = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.twice(functional.relu(self.twice(functional.relu(self.stem(x))))).mean((2, 3))


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if bool(x.sum() > 0) else self.conv(-x)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)


class Odd(nn.Module):
    """Operations without a form in integers between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.norm = nn.GroupNorm(2, 4)
        self.last = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.sub(self.norm(self.first(x)), 1.0))


class OwnConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(functional.pad(x, (0, 1, 0, 1)))


class OwnForward(nn.Module):
    """BatchNorm behind a layer that is not quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.first = OwnConv(3, 4, 2)
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(functional.relu(self.norm(self.first(x)))).mean((2, 3))


def test_what_stays_in_floating_point_is_named():
    with pytest.warns(UserWarning, match="has a forward of its own"):
        own = prepare(randomise(OwnForward()), CONFIG)
    calibrate(own, X)
    assert isinstance(own.norm[0], QuantizedConv2d) and len(unreached(own)) == 1
    with pytest.raises(ModelError, match="first has no form in integers"):
        clusterq.deploy.run_integer(own, X)
    with pytest.warns(UserWarning, match=r"twice bias \(the layer is called on tensors of different ranges\)"):
        prepare(Shared(), CONFIG)
    with pytest.warns(UserWarning, match="no form in integers"):
        twin = prepare(Odd(), CONFIG)
    assert [(row.name, row.kind) for row in unreached(twin)] == [("norm", "GroupNorm"), ("", "sub")]
    calibrate(twin, X)
    with torch.no_grad():
        assert torch.isfinite(twin(X)).all()


class Shifted(nn.Module):
    """Parameters and buffers of both kinds beside tensors: scaled layers, a position, a shift of the result."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.gain = nn.Parameter(torch.rand(4, 1, 1))
        self.fc = nn.Linear(4, 3)
        self.register_buffer("shift", torch.tensor([1, 2, 3], dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc((functional.relu(self.stem(x)) * self.gain).mean((2, 3))) + self.shift


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_parameters_and_buffers_get_no_range(dtype: torch.dtype):
    net = Shifted(dtype).eval()
    with pytest.warns(UserWarning, match="no form in integers"):
        twin = prepare(net, CONFIG)
    assert [(row.name, row.kind) for row in unreached(twin)] == [
        ("", "gain"),
        ("", "mul"),
        ("", "shift"),
        ("", "add"),
    ]
    assert set(widths(twin)) == {"input_quantizer", "relu", "mul_quantizer", "mean_quantizer"}
    calibrate(twin, X)
    with torch.no_grad():
        assert float((twin(X) - net(X)).norm() / net(X).norm()) < 0.2
    with pytest.raises(ModelError, match="has no form in integers"):
        clusterq.deploy.run_integer(twin, X)


class StandIns(nn.Module):
    """BatchNorm in front of the first layer and behind the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.BatchNorm2d(3), nn.BatchNorm2d(4)
        self.convs = nn.ModuleList([nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for conv in self.convs:
            x = functional.relu(conv(x))
        return self.last(x).mean((2, 3))


def test_first_and_last_layer_are_layers_of_the_network():
    config = QuantizationConfig(scheme="deploy", first_layer_bits=8, last_layer_bits=7, weight_bits=3)
    rows = {row.name: row for row in report(prepare(randomise(StandIns()), config)) if row.weight_bits is not None}
    assert {name: row.weight_bits for name, row in rows.items()} == {
        "first.0": 3,
        "convs.0": 8,
        "convs.1": 3,
        "convs.2": 7,
        "last.0": 3,
    }
    assert rows["convs.0"].note == "first layer" and rows["convs.2"].note == "last layer"


def test_untraceable_networks_are_refused():
    with pytest.raises(ModelError, match=r"scheme deploy needs a graph: .*torch\.fx"):
        prepare(Branching(), CONFIG, example_input=X)
    paper = prepare(Branching(), QuantizationConfig(scheme="paper"), example_input=X)
    assert unreached(paper) == []
    with pytest.warns(UserWarning, match=r"cannot be traced by torch\.fx.*: quantized in scheme paper, not deploy"):
        auto = prepare(Branching(), QuantizationConfig(), example_input=X)
    assert prepared_with(auto) == prepared_with(paper) and report(auto) == report(paper)


def test_scheme_is_chosen_by_what_can_be_traced():
    net = randomise(Residual())
    auto, deploy = prepare(net, QuantizationConfig()), prepare(net, CONFIG)
    assert prepared_with(auto) == CONFIG and report(auto) == report(deploy)
    assert is_prepared_with(auto, QuantizationConfig()) and is_prepared_with(auto, CONFIG)
    assert not is_prepared_with(auto, QuantizationConfig(scheme="paper"))
    assert not is_prepared_with(auto, QuantizationConfig(weight_bits=5))
    for name in ("default", "paper", "gdfq"):
        assert preset(name).quantization.scheme == ("auto" if name == "default" else "paper")


def test_checkpoint_says_which_scheme_was_chosen(tmp_path):
    net = randomise(Residual())
    twin = prepare(net, QuantizationConfig())
    calibrate(twin, X)
    checkpoint.save(twin, tmp_path / "net", config=ClusterQConfig(), input_shape=tuple(X.shape[1:]))
    assert checkpoint.read_record(tmp_path / "net").config == ClusterQConfig(CONFIG)
    with torch.no_grad():
        assert torch.equal(checkpoint.load(tmp_path / "net", randomise(Residual()))(X), twin(X))


def test_correction_and_calibrating_again():
    net = randomise(Residual())
    twin = prepare(net, CONFIG)
    calibrate(twin, X)
    state = {k: v.clone() for k, v in twin.state_dict().items()}
    calibrate(twin, X)
    assert all(torch.equal(v, state[k]) for k, v in twin.state_dict().items())
    plain = prepare(net, QuantizationConfig(scheme="deploy", correct_batch_norm=False))
    calibrate(plain, X)
    seen: dict[str, Tensor] = {}

    def mean_of(model: Any) -> Tensor:
        # At once: the ReLU behind it works in place.
        handle = model.block1.bn1.register_forward_hook(lambda m, i, y: seen.__setitem__("y", y.mean((0, 2, 3))))
        with torch.no_grad():
            model(X)
        handle.remove()
        return seen["y"]

    wanted = mean_of(net)
    assert float((mean_of(twin) - wanted).abs().max()) < 0.5 * float((mean_of(plain) - wanted).abs().max())


class _Source:
    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        return X, torch.arange(8) % 5


@pytest.mark.parametrize("network", [Residual, Inverted])
@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, int8_symmetric=True)], ids=["deploy", "int8_symmetric"])
def test_fine_tuning(network: type[nn.Module], config: QuantizationConfig):
    torch.manual_seed(0)
    net = randomise(network())
    # A fresh network gives all images nearly the same class: what is to be learned would be rounding errors.
    last = [m for m in net.modules() if isinstance(m, nn.Linear)][-1]
    with torch.no_grad():
        last.weight.mul_(1 / net(X).std(0).mean())
        last.bias.sub_(net(X).mean(0))
    twin = prepare(net, config)
    calibrate(twin, X)
    before = {n: p.detach().clone() for n, p in twin.named_parameters()}
    steps = FinetuneConfig(steps=40, batch_size=8, augment=False, temperature=1.0, lr=2e-4)
    losses = [step["loss"] for step in finetune(twin, net, _Source(), steps, seed=0)]
    assert sum(losses[-10:]) < sum(losses[:10]), "the images are the same in every step"
    moved = {n for n, p in twin.named_parameters() if not torch.equal(p, before[n])}
    assert "input_quantizer.scale" in moved and {n for n in before if n.endswith("bias")} <= moved


def test_ranges_from_the_first_training_batch():
    twin = prepare(randomise(Residual()), CONFIG)
    for module in twin.modules():
        if isinstance(module, ActivationQuantizer):
            module.training = True
    twin(X).sum().backward()
    assert all(m.observations == 1 for m in twin.modules() if isinstance(m, ActivationQuantizer))


@pytest.mark.parametrize("settings", [{}, {"int8_symmetric": True, "activation_bits": 8}])
def test_checkpoint(settings: dict[str, Any], tmp_path: Path):
    config = ClusterQConfig(quantization=replace(CONFIG, **settings))
    twin = prepare(randomise(Residual()), config.quantization)
    calibrate(twin, X)
    checkpoint.save(twin, tmp_path / "net", config=config, input_shape=(3, 16, 16))
    loaded = checkpoint.load(tmp_path / "net", Residual())
    with torch.no_grad():
        assert torch.equal(loaded(X), twin(X))
        assert torch.equal(clusterq.deploy.run_integer(loaded, X), clusterq.deploy.run_integer(twin, X))
    assert report(loaded) == report(twin)


def test_command_line_setting():
    config = override(ClusterQConfig(), ["quantization.scheme=deploy", "quantization.sum_bits=6"])
    assert config.quantization.scheme == "deploy" and config.quantization.sum_bits == 6
    with pytest.raises(ValueError, match=r"auto \| deploy \| paper"):
        override(ClusterQConfig(), ["quantization.scheme=other"])


def test_compiled_and_copied():
    twin = prepare(randomise(Residual()), CONFIG)
    calibrate(twin, X)
    other = copy.deepcopy(twin)
    with torch.no_grad():
        assert torch.equal(other(X), twin(X))
        compiled = torch.compile(twin, backend="eager", fullgraph=True)
        assert torch.equal(compiled(X), twin(X))
