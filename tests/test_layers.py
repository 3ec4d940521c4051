"""Quantized Conv2d and Linear."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from clusterq.nn.layers import QuantizedConv2d, QuantizedLinear, quantized_weights_kept
from clusterq.nn.quantizers import WeightQuantizer


def conv(**settings: object) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(4, 6, 3, padding=1, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings", [{}, {"bias": False}, {"stride": 2, "groups": 2}, {"padding_mode": "reflect"}, {"dilation": 2}]
)
def test_convolution_equals_the_float_layer_with_the_quantized_weight(settings: dict[str, object]) -> None:
    layer = conv(**settings)
    quantized = QuantizedConv2d.from_float(layer, WeightQuantizer(4, 6))
    x = torch.randn(2, 4, 8, 8)
    reference = copy.deepcopy(layer)
    with torch.no_grad():
        reference.weight.copy_(quantized.quantized_weight())
    torch.testing.assert_close(quantized(x), reference(x))
    assert not torch.allclose(quantized(x), layer(x))


def test_linear_equals_the_float_layer_with_the_quantized_weight() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(7, 3)
    quantized = QuantizedLinear.from_float(layer, WeightQuantizer(3, 3))
    x = torch.randn(5, 7)
    torch.testing.assert_close(quantized(x), functional.linear(x, quantized.quantized_weight(), layer.bias))
    assert len(torch.unique(quantized.quantized_weight()[0])) <= 8


def test_parameters_are_taken_over_with_their_names() -> None:
    layer = conv()
    quantized = QuantizedConv2d.from_float(layer, WeightQuantizer(4, 6))
    assert quantized.weight is layer.weight and quantized.bias is layer.bias
    assert set(quantized.state_dict()) == {"weight", "bias", "weight_quantizer.scale", "weight_quantizer.zero_point"}
    assert "weight_quantizer" not in dict(layer.named_modules())
    assert isinstance(quantized, nn.Conv2d) and quantized.stride == layer.stride


def test_gradients_reach_weight_step_and_input() -> None:
    quantized = QuantizedConv2d.from_float(conv(), WeightQuantizer(4, 6))
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    quantized(x).square().sum().backward()
    for gradient in (x.grad, quantized.weight.grad, quantized.weight_quantizer.scale.grad):
        assert gradient is not None and gradient.abs().sum() > 0


def test_kept_weights_serve_evaluation_only_and_end_with_the_context() -> None:
    network = nn.Sequential(QuantizedConv2d.from_float(conv(), WeightQuantizer(4, 6)))
    layer = network[0]
    x = torch.randn(1, 4, 5, 5)
    with torch.no_grad():
        expected = network(x)
    with quantized_weights_kept(network):
        with torch.no_grad():
            assert layer.quantized_weight() is layer.quantized_weight()
            assert torch.equal(network(x), expected)
        assert layer.quantized_weight().requires_grad
    # A fused optimizer changes weights without telling autograd's version counter: nothing may be kept by guesswork.
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5, fused=True)
    network(x).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        assert not torch.allclose(network(x), expected)


def test_a_weight_that_is_not_a_parameter_is_refused() -> None:
    layer = nn.Linear(2, 2)
    weight = layer.weight.detach()
    del layer.weight
    layer.weight = weight
    with pytest.raises(TypeError, match="weight of the layer is a Tensor"):
        QuantizedLinear.from_float(layer, WeightQuantizer(4, 2))
