"""The executor in integers: against the same rules written out with numpy, and against the twin within its bound."""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from clusterq.config import QuantizationConfig
from clusterq.deploy import run_integer
from clusterq.deploy.integer import IntegerRun
from clusterq.errors import ModelError
from clusterq.nn.quantizers import ActivationQuantizer, set_quantization
from clusterq.qat.calibrate import calibrate
from clusterq.qat.prepare import prepare

sys.path.insert(0, os.path.dirname(__file__))
from deploy_cases import NETWORKS, Dense, Inverted, Residual, randomise
from integer_checks import check_codes

F = np.float32
MIXES = [(4, 4), (3, 5), (8, 8), (2, 2)]


def made(network: type[nn.Module], bits: tuple[int, int] = (4, 4), **settings: Any) -> tuple[nn.Module, Tensor]:
    """A calibrated twin and images."""
    config = QuantizationConfig(scheme="deploy", weight_bits=bits[0], activation_bits=bits[1], **settings)
    x = torch.randn(8, 3, 16, 16)
    twin = prepare(randomise(network()), config)
    calibrate(twin, x)
    return twin, x


def twin_codes(twin: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """Logits of the twin and the codes of its quantizers, read off their outputs."""
    found: dict[str, list[Tensor]] = {}

    def note(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Tensor) -> None:
            scale, zero_point, _, _ = module.qparams()
            found.setdefault(name, []).append((output.double() / scale.double()).round().long() + zero_point.long())

        return hook

    quantizers = [(n, m) for n, m in twin.named_modules() if isinstance(m, ActivationQuantizer)]
    handles = [m.register_forward_hook(note(n)) for n, m in quantizers]
    with torch.no_grad():
        logits = twin(x)
    for handle in handles:
        handle.remove()
    return logits, found


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 3, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(3)
        self.act1 = nn.ReLU6()
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(3, 3, 1)
        self.act2 = nn.ReLU()
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.act1(self.bn1(self.conv1(x))))
        return self.fc(self.mean(self.act2(self.conv2(x) + x)).flatten(1))


def _numpy_weight(layer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Codes less zero points, and steps, by the quantizer's formula."""
    scale, zero, low, high = layer.weight_quantizer.qparams(layer.weight)
    w, s, z = layer.weight.detach().numpy(), scale.numpy(), zero.numpy().astype(np.int64)
    shape = (-1,) + (1,) * (w.ndim - 1)
    codes = np.clip(np.rint(w * (F(1) / s).reshape(shape)).astype(np.int64) + z.reshape(shape), low, high)
    return codes - z.reshape(shape), s


def _grid(quantizer: ActivationQuantizer) -> tuple[np.float32, int, int, int]:
    scale, zero, low, high = quantizer.qparams()
    return F(scale.item()), int(zero.item()), low, high


def _requantized(t: np.ndarray, m: np.ndarray, z: int, low: int, high: int) -> np.ndarray:
    return np.clip(np.rint(t.astype(F) * m).astype(np.int64) + z, low, high)


def test_rules_written_out():
    """Every step once more, in numpy's int64 and float32."""
    net = randomise(Small())
    x = torch.randn(3, 2, 6, 6)
    twin: Any = prepare(net, QuantizationConfig(scheme="deploy"))
    calibrate(twin, x)
    logits, codes = run_integer(twin, x, return_codes=True)

    s0, z0, low, high = _grid(twin.input_quantizer)
    q0 = np.clip(np.rint(x.numpy() * (F(1) / s0)).astype(np.int64) + z0, low, high)
    assert np.array_equal(codes["input_quantizer"][0].numpy(), q0)

    w1, sw = _numpy_weight(twin.conv1)
    norm = twin.bn1
    gain = (torch.rsqrt(norm.running_var + norm.eps) * norm.weight).detach().numpy()
    offset = -norm.running_mean.numpy() * gain + norm.bias.detach().numpy()
    unit = s0 * (sw * np.abs(gain))
    b1 = np.rint(offset / unit).astype(np.int64)
    w1 = w1 * np.sign(gain).astype(np.int64).reshape(-1, 1, 1, 1)
    padded = np.pad(q0 - z0, ((0, 0), (0, 0), (1, 1), (1, 1)))
    t = np.zeros((3, 3, 6, 6), dtype=np.int64) + b1.reshape(1, -1, 1, 1)
    for i in range(3):
        for j in range(3):
            t += np.einsum("nchw,oc->nohw", padded[:, :, i : i + 6, j : j + 6], w1[:, :, i, j])
    s1, z1, low, high = _grid(twin.act1)
    six = int(np.rint(F(6) * (F(1) / s1)))
    q1 = _requantized(t, (unit / s1).reshape(1, -1, 1, 1), z1, low, min(high, six))
    assert np.array_equal(codes["act1"][0].numpy(), q1)

    pooled = q1.reshape(3, 3, 3, 2, 3, 2).max((3, 5))
    w2, sw = _numpy_weight(twin.conv2)
    unit = s1 * sw
    b2 = np.rint(twin.conv2.bias.detach().numpy() / unit).astype(np.int64)
    t = np.einsum("nchw,oc->nohw", pooled, w2[:, :, 0, 0]) + b2.reshape(1, -1, 1, 1)
    s2, z2, low, high = _grid(twin.conv2_quantizer)
    q2 = _requantized(t, (unit / s2).reshape(1, -1, 1, 1), z2, low, high)
    assert np.array_equal(codes["conv2_quantizer"][0].numpy(), q2)

    s3, z3, low, high = _grid(twin.act2)
    total = (q2 - z2).astype(F) * (s2 / s3) + pooled.astype(F) * (s1 / s3)
    q3 = np.clip(np.rint(total).astype(np.int64), 0, high)
    assert z3 == 0 and np.array_equal(codes["act2"][0].numpy(), q3)

    s4, z4, low, high = _grid(twin.mean_quantizer)
    q4 = _requantized(q3.sum((2, 3), keepdims=True), s3 / (s4 * F(9)), z4, low, high)
    assert np.array_equal(codes["mean_quantizer"][0].numpy(), q4)

    w, sw = _numpy_weight(twin.fc)
    unit = s4 * sw
    b = np.rint(twin.fc.bias.detach().numpy() / unit).astype(np.int64)
    t = (q4[:, :, 0, 0] - z4) @ w.T + b
    assert np.array_equal(logits.numpy(), t.astype(F) * unit)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("bits", MIXES)
def test_codes_of_the_twin(network: type[nn.Module], bits: tuple[int, int]):
    """With equal codes in front, only a quotient within `(n + 16) * 2^-24 * a` of k + 1/2 may round the other way."""
    twin, x = made(network, bits)
    _, wanted = twin_codes(twin, x)
    check_codes(twin, x, wanted)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    "settings",
    [
        {"learned_scale": False},
        {"learned_scale": False, "activation_range": "ema", "weight_range": "minmax"},
        {"weight_symmetric": True, "activation_symmetric": True},
        {"input_bits": 6, "sum_bits": 5},
    ],
    ids=["live", "ema", "symmetric", "widths"],
)
def test_logits_of_the_twin(network: type[nn.Module], settings: dict[str, Any]):
    """All codes equal here, so that logits differ by float32 sums only."""
    twin, x = made(network, **settings)
    logits, wanted = twin_codes(twin, x)
    found, codes = run_integer(twin, x, return_codes=True)
    for name, calls in wanted.items():
        for own, other in zip(codes[name], calls, strict=True):
            assert torch.equal(own.long(), other), name
    torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-5 * float(logits.abs().max()))
    assert torch.equal(run_integer(twin, x), found)


def test_magnitudes_bound_sums():
    """The size that the bound rests on: of a layer computed again with absolute values."""
    twin, x = made(Residual)
    run = IntegerRun(twin, sizes=True)
    run(x)
    any_twin: Any = twin
    stem, made_of = any_twin.stem, run.wide["relu"][0]
    scale = any_twin.input_quantizer.qparams()[0].double() * stem.weight_quantizer.qparams(stem.weight)[0].double()
    inputs, weight = any_twin.input_quantizer(x).double(), stem.quantized_weight().double()
    bias = (stem.bias.double() / scale).round() * scale
    wanted = functional.conv2d(inputs.abs(), weight.abs(), bias.abs(), padding=1)
    torch.testing.assert_close(made_of.size * made_of.unit.double(), wanted, rtol=1e-6, atol=0)
    assert made_of.terms == 28


def test_no_images():
    twin, x = made(Inverted)
    logits, codes = run_integer(twin, x[:0], return_codes=True)
    assert logits.shape == (0, 5) and codes["input_quantizer"][0].shape == (0, 3, 16, 16)


def test_codes_have_their_type():
    twin, x = made(Dense, activation_symmetric=True)
    _, codes = run_integer(twin, x, return_codes=True)
    assert codes["relu"][0].dtype == torch.uint8 and codes["stem_quantizer"][0].dtype == torch.int8
    assert int(codes["relu"][0].max()) <= 15


class Overwritten(nn.Module):
    """A sum and a product in place whose first operand is read again afterwards, under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 2, 1)
        self.inner = nn.Conv2d(4, 4, 3, 1, 1)
        self.gate, self.last = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))
        keep = x
        x = x.add_(self.inner(x))
        x = self.gate(x + keep)
        also = x
        x *= torch.sigmoid(self.last(x))
        return self.fc((x + also).mean((2, 3)))


def test_readers_of_an_overwritten_operand():
    """They read the sum, in integers as in the twin and in the network."""
    with torch.no_grad():
        net, x = Overwritten().eval(), torch.randn(8, 3, 16, 16)
        twin = prepare(net, QuantizationConfig(scheme="deploy", weight_bits=8, activation_bits=8))
        calibrate(twin, x)
        wanted, plain = twin(x), net(x)
        found = run_integer(twin, x)
    assert float((found - wanted).norm() / wanted.norm()) < 0.02
    assert float((found - plain).norm() / plain.norm()) < 0.1


class View(Overwritten):
    """Overwrites a part of what is read later."""

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))
        part = x[:, :, 1:]
        part += self.inner(part)
        return self.fc(self.gate(x).mean((2, 3)))


def test_a_part_that_is_overwritten_is_named():
    """Neither is the twin another network, nor is it computed in integers."""
    net, x = View().eval(), torch.randn(8, 3, 16, 16)
    with pytest.warns(UserWarning, match=r"never called.*iadd"):
        twin = prepare(net, QuantizationConfig(scheme="deploy"))
    calibrate(twin, x)
    with pytest.raises(ModelError, match="iadd has no form in integers"):
        run_integer(twin, x)
    set_quantization(twin, weights=False, activations=False)
    with torch.no_grad():
        torch.testing.assert_close(twin(x), net(x))


class Softmax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.last = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.softmax(self.conv(x), 1)).mean((2, 3))


def test_what_cannot_run_is_named():
    x = torch.randn(2, 3, 8, 8)
    paper = prepare(Small(), QuantizationConfig(scheme="paper"))
    with pytest.raises(ModelError, match="scheme paper"):
        run_integer(paper, x)
    with pytest.warns(UserWarning, match="softmax"):
        twin = prepare(Softmax(), QuantizationConfig(scheme="deploy"))
    calibrate(twin, x)
    with pytest.raises(ModelError, match=r"softmax.* no form in integers"):
        run_integer(twin, x)
    with pytest.raises(RuntimeError, match="no range yet"):
        run_integer(prepare(Small(), QuantizationConfig(scheme="deploy")), torch.randn(1, 2, 6, 6))


def test_windows_of_different_sizes_are_refused():
    class Uneven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)
            self.pool = nn.AdaptiveAvgPool2d(3)
            self.fc = nn.Linear(18, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.pool(self.conv(x)).flatten(1))

    twin = prepare(Uneven(), QuantizationConfig(scheme="deploy"))
    x = torch.randn(2, 3, 8, 8)
    calibrate(twin, x)
    with pytest.raises(ModelError, match="pool averages windows of different sizes"):
        run_integer(twin, x)
