"""Convolutions of a class of their own: quantized where they compute what a known convolution does, else left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import clusterq
from clusterq.config import QuantizationConfig
from clusterq.nn.layers import QuantizedConv2d
from clusterq.nn.same_padding import SamePadConv2d
from clusterq.qat import calibrate, prepare, report, unreached
from clusterq.qat.support import recognise_convolutions

SETTINGS = [
    {"kernel_size": 3, "stride": 2},
    {"kernel_size": (3, 5), "stride": (1, 2)},
    {"kernel_size": 2, "stride": 1},
    {"kernel_size": 3, "stride": 3, "dilation": 2},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 5, "stride": 2, "groups": 4, "bias": False},
]


class OwnSame(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        pads = []
        for size, kernel, stride, dilation in zip(
            x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], self.dilation[::-1], strict=True
        ):
            total = max((-(-size // stride) - 1) * stride + dilation * (kernel - 1) + 1 - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(functional.pad(x, pads))


class Before(nn.Conv2d):
    """The odd zero before the image."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(functional.pad(x, (1, 0, 1, 0)))


class Spelled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return functional.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class TwoInputs(nn.Conv2d):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return scale * super().forward(x)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("size", [(8, 8), (9, 12), (7, 11), (5, 6)], ids=str)
def test_same_padding_is_that_of_tensorflow(settings: dict[str, Any], size: tuple[int, int]) -> None:
    """Each output is the window TensorFlow takes: `total` zeros, the odd one behind; ceil(size / stride) of them."""
    torch.manual_seed(0)
    layer = SamePadConv2d(4, 8, **settings).double()
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    y = layer(x)
    (sh, sw), (dh, dw), (kh, kw) = layer.stride, layer.dilation, layer.kernel_size
    assert y.shape[2:] == (-(-size[0] // sh), -(-size[1] // sw))
    # So far beyond the image that every window is a slice.
    margin = 32
    wide = functional.pad(x, (margin,) * 4)
    before = [
        max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0) // 2
        for n, s, d, k in zip(size, layer.stride, layer.dilation, layer.kernel_size, strict=True)
    ]
    for i in range(y.shape[2]):
        for j in range(y.shape[3]):
            top, left = margin - before[0] + i * sh, margin - before[1] + j * sw
            window = wide[:, :, top : top + dh * (kh - 1) + 1 : dh, left : left + dw * (kw - 1) + 1 : dw]
            parts = window.reshape(2, layer.groups, -1)
            weight = layer.weight.reshape(layer.groups, 8 // layer.groups, -1)
            expected = torch.einsum("ngk,gok->ngo", parts, weight).reshape(2, 8)
            expected = expected if layer.bias is None else expected + layer.bias
            torch.testing.assert_close(y[:, :, i, j], expected, rtol=1e-12, atol=1e-12)


def known(layer: nn.Module) -> type[nn.Module]:
    model = nn.Sequential(layer).eval()
    recognise_convolutions(model)
    return type(model[0])


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_forms_of_known_convolutions_are_recognised(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    assert known(OwnSame(4, 8, **settings)) in (SamePadConv2d, nn.Conv2d)
    assert known(Spelled(4, 8, **settings)) is nn.Conv2d
    assert known(Spelled(4, 8, padding=1, **settings)) is nn.Conv2d
    if settings["kernel_size"] != 1:
        assert known(OwnSame(4, 8, **settings)) is SamePadConv2d


@pytest.mark.parametrize(
    "layer",
    [
        lambda: Before(4, 8, 3, 2),
        lambda: Standardised(4, 8, 3, padding=1),
        lambda: TwoInputs(4, 8, 3),
        lambda: nn.utils.parametrizations.weight_norm(OwnSame(4, 8, 3, 2)),
    ],
    ids=["odd zero before", "standardised", "two inputs", "weight norm"],
)
def test_other_convolutions_keep_their_forward(layer: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    made = layer()
    assert known(made) is type(made)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(OwnSame(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU6()),
        *(OwnSame(8, 8, 3, 2, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6()),
        *(nn.Conv2d(8, 16, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)),
    )
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(16, 3, 33, 32))
    return model.eval()


@pytest.mark.parametrize("scheme", ["paper", "deploy"])
def test_such_networks_are_quantized_throughout(scheme: Any) -> None:
    model, x = network(), torch.randn(64, 3, 33, 32)
    twin = prepare(model, QuantizationConfig(weight_bits=8, activation_bits=8, scheme=scheme))
    assert unreached(twin) == [] and isinstance(model[0], OwnSame)
    assert [(row.name, row.kind) for row in report(twin) if row.weight_bits] == [
        ("0", "SamePadConv2d"),
        ("3", "SamePadConv2d"),
        ("6", "Conv2d"),
        ("10", "Linear"),
    ]
    assert isinstance(twin.get_submodule("0"), QuantizedConv2d) and set(model.state_dict()) <= set(twin.state_dict())
    calibrate(twin, x)
    # Of another size, too, whose odd zeros lie elsewhere.
    for images in (x, torch.randn(8, 3, 20, 31)):
        with torch.no_grad():
            expected, got = model(images), twin(images)
        assert float((got - expected).abs().max()) < 0.05 * float(expected.abs().max())
        plain = clusterq.deploy.convert(twin)
        assert type(plain.get_submodule("0")) is SamePadConv2d
        torch.testing.assert_close(plain(images), got, rtol=1e-5, atol=1e-5)
        if scheme == "deploy":
            torch.testing.assert_close(clusterq.deploy.run_integer(twin, images), got, rtol=0.02, atol=0.02)
