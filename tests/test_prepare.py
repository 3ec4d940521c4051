"""Conversion of networks: everything is reached wherever it sits, or named."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from clusterq.config import QuantizationConfig
from clusterq.errors import ModelError
from clusterq.networks import resnet20
from clusterq.nn.layers import QuantizedConv2d, QuantizedLinear
from clusterq.nn.quantizers import ActivationQuantizer, WeightQuantizer, set_quantization
from clusterq.qat.calibrate import calibrate
from clusterq.qat.prepare import freeze_batch_norm_statistics, prepare, report, unreached

# What every scheme does; what scheme deploy adds is in test_deployable.py.
CONFIG = QuantizationConfig(scheme="paper")
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Stage(nn.Sequential):
    pass


class Scattered(nn.Module):
    """Layers where conversions by attribute name miss them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)])
        self.stage = Stage(OrderedDict(conv=nn.Conv2d(4, 4, 1), act=nn.ReLU6()))
        self.norm_conv = nn.Conv2d(4, 4, 1)
        self.table = nn.ModuleDict({"7": nn.Conv2d(4, 4, 1)})
        self.add_module("0", nn.Hardswish(inplace=True))
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        x = self.table["7"](self.norm_conv(self.stage(x)))
        return self.head(self.get_submodule("0")(x).mean((2, 3)))


class Functional(nn.Module):
    """Activation functions called every way there is."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(7))
        self.prelu = nn.PReLU()
        for conv in self.convs:
            nn.init.dirac_(conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        c = self.convs
        x = functional.relu(c[0](x), inplace=True)
        x = torch.relu(c[1](x))
        x = c[2](x).relu()
        x = functional.relu6(c[3](x))
        x = functional.hardswish(c[4](x))
        x = c[5](x).relu_()
        x = functional.gelu(c[6](x))
        return self.prelu(x).mean((2, 3))


class Shared(nn.Module):
    """One ReLU at two places, as in torchvision's residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(20 * self.bn2(self.conv2(x)) + x)
        return self.fc(x.mean((2, 3)))


class Untraceable(Shared):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() == 12345:
            return x
        x = functional.relu(super().forward(x))
        return functional.conv2d(x[:, :, None, None], self.conv2.weight[:3, :3, :1, :1]).flatten(1)


def names(network: nn.Module, kind: type[nn.Module]) -> set[str]:
    return {name for name, module in network.named_modules() if isinstance(module, kind)}


def same_without_quantization(network: nn.Module, student: nn.Module, x: Tensor = IMAGES) -> bool:
    set_quantization(student, weights=False, activations=False)
    with torch.no_grad():
        equal = torch.equal(network.eval()(x.clone()), student(x.clone()))
    set_quantization(student)
    return equal


def test_layers_are_reached_wherever_they_sit() -> None:
    network = Scattered()
    student = prepare(network, CONFIG)
    assert names(student, QuantizedConv2d) == {"blocks.0", "blocks.1", "stage.conv", "norm_conv", "table.7"}
    assert names(student, QuantizedLinear) == {"head"}
    assert names(student, ActivationQuantizer) == {"stage.act", "0"}
    assert unreached(student) == []
    assert type(student) is Scattered and type(student.stage) is Stage
    assert same_without_quantization(network, student)
    assert [row.name for row in report(student)] == [
        "blocks.0", "blocks.1", "stage.conv", "stage.act", "norm_conv", "table.7", "0", "head",
    ]  # fmt: skip


def test_the_network_itself_stays_as_it_was() -> None:
    network = Shared().train().requires_grad_(False)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    student = prepare(network, CONFIG)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert network.training and not any(p.requires_grad for p in network.parameters())
    assert not names(network, WeightQuantizer)
    assert not student.training and all(p.requires_grad for p in student.parameters())


def test_functions_get_quantizers() -> None:
    network = Functional()
    student = prepare(network, CONFIG)
    quantizers = names(student, ActivationQuantizer)
    assert quantizers == {
        "relu", "relu_1", "relu_2", "relu_3", "relu6", "hardswish", "gelu", "prelu_quantizer",
    }  # fmt: skip
    assert unreached(student) == [] and isinstance(student, Functional)
    assert same_without_quantization(network, student)
    calibrate(student, IMAGES)
    seen: dict[str, int] = {}
    for name in quantizers:
        student.get_submodule(name).register_forward_hook(
            lambda m, args, y, name=name: seen.update({name: len(torch.unique(y))})
        )
    student(IMAGES)
    assert set(seen) == quantizers and all(1 < count <= 16 for count in seen.values())
    assert set(network.state_dict()) <= set(student.state_dict())


class Clamped(nn.Module):
    """Activation functions written as clamps, some of them in place, and less common ones."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(4))
        for conv in self.convs:
            nn.init.dirac_(conv.weight)
        self.last = nn.Sequential(nn.Softsign(), nn.GLU(1))

    def forward(self, x: Tensor) -> Tensor:
        c = self.convs
        x = c[0](x.repeat(1, 2, 1, 1)[:, :4])
        x.clamp_(min=0)
        x = torch.clamp(c[1](x) * 8, 0, 6)
        x = functional.threshold(c[2](x), 0.1, 0.0)
        x = functional.glu(torch.cat([c[3](x), x], 1), 1)
        return self.last(functional.logsigmoid(x)).clamp(-1, 1).mean((2, 3))


def test_clamps_and_less_common_functions() -> None:
    network = Clamped()
    with pytest.warns(UserWarning, match=r"network clamp \(no quantizer for these bounds\)"):
        student = prepare(network, CONFIG)
    assert [(row.name, row.kind) for row in report(student) if row.activation_bits] == [
        ("relu", "relu"), ("relu6", "relu6"), ("threshold", "threshold"), ("glu", "glu"), ("logsigmoid", "logsigmoid"),
        ("last.0", "Softsign"), ("last.1", "GLU"),
    ]  # fmt: skip
    assert student.relu.activation == "relu" and student.relu6.activation == "relu6"
    assert [(row.name, row.kind) for row in unreached(student)] == [("", "clamp")]
    assert same_without_quantization(network, student)
    calibrate(student, IMAGES)
    student(IMAGES).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in student.parameters())


def test_every_call_of_a_shared_activation_has_its_own_range() -> None:
    network = Shared()
    student = prepare(network, CONFIG)
    assert names(student, ActivationQuantizer) == {"relu", "relu_1"}
    assert same_without_quantization(network, student)
    calibrate(student, IMAGES)
    assert student.relu.qparams()[0] < 0.5 * student.relu_1.qparams()[0]
    twin = copy.deepcopy(student)
    with torch.no_grad():
        assert torch.equal(twin(IMAGES), student(IMAGES))
        twin.relu.scale.mul_(2)
        assert not torch.equal(twin(IMAGES), student(IMAGES))


def test_prepared_networks_load_the_weights_of_the_network() -> None:
    for network in (Shared(), Functional(), Scattered()):
        student = prepare(network, CONFIG)
        loaded = student.load_state_dict(network.state_dict(), strict=False)
        assert loaded.unexpected_keys == []
        assert all("quantizer" in k or k.split(".")[-1] in OWN_STATE for k in loaded.missing_keys)


OWN_STATE = {"scale", "zero_point", "observations"}


class InPlace(nn.Module):
    """Reads what an in-place activation left in its input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = self.act(y)
        return (y + z).mean((2, 3))


def test_later_readers_of_an_in_place_activation_see_its_output() -> None:
    network = InPlace()
    student = prepare(network, CONFIG)
    assert same_without_quantization(network, student)


class SumInPlace(InPlace):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = y
        y = y.add_(functional.silu(y))
        y *= 2.0
        return (y + self.conv(functional.silu(z))).mean((2, 3))


def test_later_readers_of_a_sum_in_place_see_the_sum() -> None:
    network = SumInPlace()
    with pytest.warns(UserWarning, match="never called"):
        assert same_without_quantization(network, prepare(network, CONFIG))


class Listed(nn.Module):
    """Calls its layers through a plain list, which a module swap does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.order = [self.b, self.a]
        self.look = False

    def forward(self, x: Tensor) -> Tensor:
        if self.look and x.sum() == 12345:
            return x
        for layer in self.order:
            x = layer(x)
        return x.mean((2, 3))


def test_layers_in_plain_lists_are_called_quantized_or_named() -> None:
    student = prepare(Listed(), CONFIG)
    assert [row.name for row in report(student)] == ["b", "a"]
    called: list[str] = []
    student.a.register_forward_hook(lambda *_: called.append("a"))
    student(IMAGES)
    assert called == ["a"]
    network = Listed()
    network.look = True
    with pytest.warns(UserWarning, match="not a submodule"):
        student = prepare(network, CONFIG, example_input=IMAGES)
    assert report(student) == [] and {row.name for row in unreached(student)} == {"a", "b"}


def test_an_untraceable_network_falls_back_to_module_swap_and_names_the_rest() -> None:
    with pytest.warns(UserWarning, match="stay in floating point"):
        student = prepare(Untraceable(), CONFIG, example_input=IMAGES)
    assert names(student, QuantizedConv2d) == {"conv1", "conv2"} and names(student, QuantizedLinear) == {"fc"}
    assert names(student, ActivationQuantizer) == {"relu"}
    left = {(row.name, row.kind) for row in unreached(student)}
    assert left == {("", "relu"), ("", "conv2d")}
    note = next(row.note for row in report(student) if row.name == "relu")
    assert "one quantizer for 2 calls" in note and "cannot be traced" in note
    student = prepare(Untraceable(), CONFIG)
    assert names(student, QuantizedConv2d) == {"conv1", "conv2"}


class OwnConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.own = OwnConv(3, 3, 1)
        self.up = nn.ConvTranspose2d(3, 3, 2)
        self.unused = nn.Linear(3, 3)
        self.idle = nn.ReLU()
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1))
        self.kernel = nn.Parameter(torch.randn(3, 3, 1, 1))
        self.softmax = nn.Softmax(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.normed(self.up(self.own(self.conv(x))))
        x = functional.conv2d(x, self.kernel).mean((2, 3))
        return self.softmax(x @ x.T)


def test_what_stays_in_floating_point_is_named() -> None:
    with pytest.warns(UserWarning, match="own OwnConv.*unused Linear"):
        student = prepare(Odd(), CONFIG)
    notes = {(row.name, row.kind): row.note for row in unreached(student)}
    assert notes[("own", "OwnConv")] == "has a forward of its own"
    assert notes[("up", "ConvTranspose2d")] == "no quantized form of this layer"
    assert notes[("unused", "Linear")] == notes[("idle", "ReLU")] == "never called"
    assert notes[("normed", "ParametrizedConv2d")] == "its weight is computed from other parameters"
    assert notes[("softmax", "Softmax")] == "no quantizer for this activation function"
    assert notes[("", "conv2d")] == notes[("", "matmul")] == "called as a function"
    assert len(notes) == 8
    assert [row.name for row in report(student)] == ["conv"]


def test_subclasses_without_a_forward_of_their_own_are_quantized() -> None:
    class Named(nn.Conv2d):
        pass

    student = prepare(nn.Sequential(Named(3, 4, 1), nn.ReLU()), CONFIG)
    assert [(row.name, row.kind) for row in report(student)] == [("0", "Named"), ("1", "ReLU")]


def test_bits_by_layer_and_at_both_ends() -> None:
    config = QuantizationConfig(
        weight_bits=4,
        activation_bits=8,
        first_layer_bits=8,
        last_layer_bits=6,
        layer_bits={"stage.conv": 2, "stage.act": 3, "head": 5},
    )
    rows = {row.name: row for row in report(prepare(Scattered(), config))}
    assert {k: r.weight_bits for k, r in rows.items() if r.weight_bits} == {
        "blocks.0": 8, "blocks.1": 4, "stage.conv": 2, "norm_conv": 4, "table.7": 4, "head": 5,
    }  # fmt: skip
    assert rows["stage.act"].activation_bits == 3 and rows["0"].activation_bits == 8
    assert rows["blocks.0"].note == "first layer" and rows["head"].note == "last layer"
    rows = {row.name: row for row in report(prepare(Scattered(), replace(config, layer_bits={})))}
    assert rows["head"].weight_bits == 6


def test_first_and_last_follow_execution_not_definition() -> None:
    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x))

    rows = {r.name: r.weight_bits for r in report(prepare(Reversed(), replace(CONFIG, first_layer_bits=8)))}
    assert rows == {"first": 8, "last": 4}


def test_an_unknown_layer_name_lists_close_matches() -> None:
    with pytest.raises(ValueError, match=r"layer_bits names 'stage.cnv'.*stage.conv"):
        prepare(Scattered(), replace(CONFIG, layer_bits={"stage.cnv": 3}))


def test_shared_layers_and_tied_weights_stay_shared() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight
            self.alias = self.a

        def forward(self, x: Tensor) -> Tensor:
            return self.alias(self.b(self.a(x)))

    student = prepare(Tied(), CONFIG)
    assert student.a is student.alias and student.a.weight is student.b.weight
    assert [row.name for row in report(student)] == ["a", "b"]


def test_batch_norm_statistics_stay_frozen() -> None:
    student = prepare(Shared(), CONFIG).train()
    calibrate(student, IMAGES)
    before = student.bn1.running_mean.clone(), student.bn1.num_batches_tracked.clone()
    student.train()(IMAGES).sum().backward()
    assert not student.bn1.training and isinstance(student.bn1, nn.BatchNorm2d)
    assert torch.equal(student.bn1.running_mean, before[0]) and torch.equal(student.bn1.num_batches_tracked, before[1])
    assert student.bn1.weight.grad is not None
    assert not copy.deepcopy(student).train().bn1.training
    network = Shared()
    freeze_batch_norm_statistics(network)
    freeze_batch_norm_statistics(network)
    assert network.train().training and not network.bn2.training


class BatchNormAct2d(nn.BatchNorm2d):
    """BatchNorm that applies the activation function it holds, built like timm's class of this name."""

    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
        training = self.training or not self.track_running_stats
        x = functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training, self.momentum or 0.0, self.eps
        )
        return self.act(self.drop(x))


class Fused(nn.Module):
    def __init__(self, *acts: nn.Module, look: bool = False) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in acts)
        self.bns = nn.ModuleList(BatchNormAct2d(3, act) for act in acts)
        self.fc = nn.Linear(3, 2)
        self.look = look

    def forward(self, x: Tensor) -> Tensor:
        if self.look and x.sum() == 12345:
            return x
        for conv, bn in zip(self.convs, self.bns, strict=True):
            x = bn(conv(x))
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("look", [False, True], ids=["traced", "watched"])
@pytest.mark.filterwarnings("error::UserWarning")
def test_activations_inside_batch_norm_are_quantized(look: bool) -> None:
    network = Fused(nn.ReLU(inplace=True), nn.SiLU(), nn.ReLU6(), nn.Identity(), look=look)
    student = prepare(network, CONFIG, example_input=IMAGES)
    quantizers = names(student, ActivationQuantizer)
    assert quantizers == {"bns.0.act", "bns.1.act", "bns.2.act"} and unreached(student) == []
    assert [row.name for row in report(student) if row.activation_bits] == ["bns.0.act", "bns.1.act", "bns.2.act"]
    assert [student.bns[i].act.non_negative for i in range(3)] == [True, False, True]
    assert same_without_quantization(network, student)
    calibrate(student, IMAGES)
    seen: dict[str, Tensor] = {}
    for name in quantizers:
        student.get_submodule(name).register_forward_hook(lambda m, args, y, name=name: seen.update({name: y}))
    student(IMAGES)
    assert seen.keys() == quantizers and all(1 < len(y.unique()) <= 16 for y in seen.values())
    assert seen["bns.0.act"].min() == 0 and seen["bns.1.act"].min() < 0
    # In training the statistics stay frozen, and the quantizer inside follows the mode.
    before = student.bns[0].running_mean.clone()
    student.train()(IMAGES).sum().backward()
    assert not student.bns[0].training and student.bns[0].act.training and student.bns[0].act.scale.grad is not None
    assert torch.equal(student.bns[0].running_mean, before)
    assert not student.eval().bns[0].act.training


def test_what_cannot_be_quantized_inside_batch_norm_is_named() -> None:
    with pytest.warns(UserWarning, match=r"bns\.0\.act PReLU \(called inside a BatchNorm layer\)"):
        student = prepare(Fused(nn.PReLU(), nn.ReLU()), CONFIG)
    assert names(student, ActivationQuantizer) == {"bns.1.act"}
    act = nn.ReLU()
    rows = {row.name: row for row in report(prepare(Fused(act, act), CONFIG))}
    assert rows["bns.0.act"].note == "one quantizer for 2 calls: called inside a BatchNorm layer"


def test_networks_that_cannot_be_prepared() -> None:
    with pytest.raises(ModelError, match="no Conv2d or Linear"):
        prepare(nn.Sequential(nn.ReLU()), CONFIG)
    with pytest.raises(ModelError, match="quantized already"):
        prepare(prepare(Shared(), CONFIG), CONFIG)
    with pytest.raises(ValueError, match="does not come from"):
        report(Shared())


def test_modes_follow_the_settings() -> None:
    ema = replace(CONFIG, learned_scale=False, activation_range="ema", weight_range="minmax")
    student = prepare(Shared(), ema)
    assert student.relu.mode == "ema" and student.conv1.weight_quantizer.mode == "live"
    assert not any("scale" in name for name, _ in student.named_parameters())
    assert prepare(Shared(), replace(CONFIG, learned_scale=False)).relu.mode == "fixed"
    assert prepare(Shared(), CONFIG).relu.mode == "learned"


def test_resnet20_is_quantized_throughout() -> None:
    network = resnet20()
    student = prepare(network, CONFIG)
    rows = report(student)
    assert sum(row.weight_bits == 4 for row in rows) == 20 and sum(row.activation_bits == 4 for row in rows) == 19
    assert unreached(student) == [] and type(student) is type(network)


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")
@pytest.mark.parametrize(("name", "layers", "activations"), [("resnet18", 21, 17), ("mobilenet_v2", 53, 35)])
def test_torchvision_networks(name: str, layers: int, activations: int) -> None:
    import torchvision

    network = getattr(torchvision.models, name)(weights=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        student = prepare(network, CONFIG)
    assert len(names(student, WeightQuantizer)) == layers
    assert len(names(student, ActivationQuantizer)) == activations
    assert same_without_quantization(network, student, torch.randn(1, 3, 64, 64))
