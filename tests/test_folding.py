"""Folded BatchNorm and int32 biases: formulas in exact arithmetic, and what happens at their limits."""

from __future__ import annotations

import copy
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from clusterq import ops
from clusterq.config import QuantizationConfig
from clusterq.deploy import run_integer
from clusterq.errors import ModelError
from clusterq.nn.folding import attach_norm, integer_offset, offset_of, on_grid
from clusterq.nn.layers import QuantizedConv2d, quantized_weights_kept
from clusterq.nn.quantizers import set_quantization
from clusterq.qat.calibrate import calibrate
from clusterq.qat.prepare import prepare

ONE = torch.ones(1)


def _numbers(gain: list[float] | None, offset: list[float], s_x: float, s_w: list[float]):
    given = None if gain is None else torch.tensor(gain)
    return integer_offset(given, torch.tensor(offset), torch.tensor([s_x]), torch.tensor(s_w))


def test_codes_are_whole_units():
    """Powers of two: every operation is exact, so exact fractions are the truth; halves go to the even code."""
    found = _numbers([2.0, -0.5, 1.0], [3.0, -0.375, 0.625], 0.25, [0.5, 1.0, 1.0])
    unit = [Fraction(1, 4) * Fraction(1, 2) * 2, Fraction(1, 4) * Fraction(1, 2), Fraction(1, 4)]
    assert found.unit.tolist() == [float(u) for u in unit]
    assert found.code.tolist() == [12.0, -3.0, 2.0]  # 0.625 / 0.25 = 2.5
    assert found.gain.tolist() == [2.0, -0.5, 1.0]
    assert found.scale.tolist() == [1.0, 0.5, 1.0]


@pytest.mark.parametrize("gain", [0.0, 1e-30, -1e-14])
def test_channels_too_small_for_int32_are_constant(gain: float):
    found = _numbers([gain, 1.0], [0.7, 0.7], 0.1, [0.01, 0.01])
    assert found.gain.tolist() == [0.0, 1.0]
    assert abs(found.code[0]) == 2**20
    assert float(found.code[0] * found.unit[0]) == pytest.approx(0.7, rel=1e-6)
    assert found.code.abs().max() <= 2**30


def test_a_dead_channel_without_offset():
    found = _numbers([0.0], [0.0], 0.1, [1.0])
    assert found.scale.tolist() == [1.0] and found.code.tolist() == [0.0] and found.gain.tolist() == [0.0]


def test_on_grid_passes_its_gradient():
    value = torch.tensor([0.3, -1.7], requires_grad=True)
    numbers = integer_offset(None, value.detach(), ONE * 0.5, torch.ones(2))
    y = on_grid(value, numbers)
    assert y.tolist() == [0.5, -1.5]
    y.sum().backward()
    assert value.grad is not None and value.grad.tolist() == [1.0, 1.0]


class _Norm(nn.Module):
    """A layer and BatchNorm with negative, tiny and zero gains."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1, bias=bias)
        self.norm = nn.BatchNorm2d(6)
        self.act = nn.ReLU()
        self.norm.running_mean = torch.randn(6)
        self.norm.running_var = torch.rand(6) + 0.5
        with torch.no_grad():
            self.norm.weight.copy_(torch.tensor([1.0, -1.0, 0.0, 1e-12, 0.5, 2.0]))
            self.norm.bias.copy_(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


@pytest.mark.parametrize("bias", [True, False])
def test_norm_is_the_folded_layer(bias: bool):
    """The twin's BatchNorm against `gain * conv + offset` in float64 with the offset on its grid."""
    net = _Norm(bias).eval()
    x = torch.randn(4, 3, 8, 8)
    twin = prepare(net, QuantizationConfig(scheme="deploy", correct_batch_norm=False))
    calibrate(twin, x)
    seen: list[Tensor] = []
    twin.norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    twin(x)
    layer, norm, source = twin.conv, net.norm, twin.input_quantizer
    s_x, s_w = source.qparams()[0].double(), layer.weight_quantizer.qparams(layer.weight)[0].double()
    gain = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    own = net.conv.bias.double() if bias else torch.zeros(6, dtype=torch.float64)
    offset = (own - norm.running_mean.double()) * gain + norm.bias.double()
    unit = s_x * s_w * gain.abs()
    on = torch.where(unit > 1e-12, (offset / unit).round() * unit, offset)
    weight = layer.weight_quantizer(layer.weight).double() * gain.reshape(-1, 1, 1, 1)
    y = torch.nn.functional.conv2d(source(x).double(), weight, on, padding=1)
    constant = unit <= 1e-12
    terms = torch.nn.functional.conv2d(source(x).double().abs(), weight.abs(), on.abs(), padding=1)
    # A constant channel's offset is 2^20 of its own units; elsewhere the bound of float32 sums of 28 terms.
    bound = torch.where(constant.reshape(-1, 1, 1), offset.abs().reshape(-1, 1, 1) * 2**-20, 44 * 2**-24 * terms)
    assert constant.tolist() == [False, False, True, True, False, False]
    assert bool(((seen[0].double() - y).abs() <= bound).all())


def test_norm_without_quantizers_is_batch_norm():
    net = _Norm().eval()
    twin = prepare(net, QuantizationConfig(scheme="deploy"))
    set_quantization(twin, weights=False, activations=False)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(twin(x), net(x))


def test_gamma_and_beta_train():
    net = _Norm().eval()
    twin = prepare(net, QuantizationConfig(scheme="deploy"))
    x = torch.randn(4, 3, 8, 8)
    calibrate(twin, x)
    twin(x).square().sum().backward()
    alive = torch.tensor([True, True, False, False, True, True])
    assert bool((twin.norm.weight.grad != 0)[alive].all()) and bool((twin.norm.bias.grad[alive] != 0).all())
    assert bool(torch.isfinite(twin.conv.weight.grad).all())
    assert bool((twin.conv.weight.grad[~alive] == 0).all())


def test_kept_weights_keep_scales():
    twin = prepare(_Norm().eval(), QuantizationConfig(scheme="deploy", learned_scale=False))
    x = torch.randn(4, 3, 8, 8)
    calibrate(twin, x)
    with torch.no_grad():
        wanted = twin(x)
        with quantized_weights_kept(twin):
            assert torch.equal(twin(x), wanted)


class _Both(nn.Module):
    """A layer with a folded BatchNorm and one with a bias."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


@pytest.mark.parametrize("method", ["mse", "minmax"])
def test_a_forward_finds_every_range_once(method, monkeypatch):
    config = QuantizationConfig(scheme="deploy", learned_scale=False, weight_range=method, weight_bits=4)
    twin, x = prepare(_Both().eval(), config), torch.randn(4, 3, 8, 8)
    calibrate(twin, x)
    wanted = run_integer(twin, x)
    found = []
    for name in ("mse_range", "fake_quantize_weight"):
        own = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda w, *a, own=own, **k: found.append(w.shape) or own(w, *a, **k))
    for run in (twin, lambda x: run_integer(twin, x)):
        torch.testing.assert_close(run(x).detach(), wanted)
        assert found == [(4, 3, 3, 3), (5, 4)]
        found.clear()
    with quantized_weights_kept(twin), torch.no_grad():
        twin(x)
        twin(x)
    assert found == [(4, 3, 3, 3), (5, 4)]


def test_a_step_is_of_the_forward_it_was_found_in():
    """A forward that ends before the BatchNorm leaves nothing to the next one."""
    twin, x = prepare(_Both().eval(), QuantizationConfig(scheme="deploy", learned_scale=False)), torch.randn(4, 3, 8, 8)
    calibrate(twin, x)
    twin.conv(twin.input_quantizer(x))
    with torch.no_grad():
        twin.conv.weight.mul_(3)
    again = copy.deepcopy(twin)
    again.conv._step = None
    assert torch.equal(twin(x), again(x))
    assert twin.conv._step is None


def test_copies_refer_to_their_own_layers():
    twin = prepare(_Norm().eval(), QuantizationConfig(scheme="deploy"))
    x = torch.randn(4, 3, 8, 8)
    calibrate(twin, x)
    other = copy.deepcopy(twin)
    wanted = other(x)
    with torch.no_grad():
        twin.conv.weight_quantizer.scale.mul_(2)
        twin.input_quantizer.scale.mul_(2)
    assert torch.equal(other(x), wanted)
    alive = [0, 1, 4, 5]
    own, copied = offset_of(twin.conv, twin.norm), offset_of(other.conv, other.norm)
    assert torch.equal(copied.scale[alive] * 2, own.scale[alive])
    assert torch.equal(copied.unit[alive] * 4, own.unit[alive])


def test_norm_without_statistics_is_named():
    layer = prepare(_Norm().eval(), QuantizationConfig(scheme="deploy")).conv
    assert isinstance(layer, QuantizedConv2d)
    with pytest.raises(ModelError, match="no running statistics"):
        attach_norm(nn.BatchNorm2d(6, track_running_stats=False), layer)
