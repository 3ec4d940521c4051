"""clusterq inside Brevitas, against Brevitas's own quantizers; skipped where Brevitas is not installed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("brevitas", reason="brevitas is not installed (pip install clusterq[peers])")

import brevitas.nn as qnn
from brevitas.core.function_wrapper import FloorSte, Identity, TensorClamp, TensorClampSte
from brevitas.core.quant.int_base import IntQuant
from brevitas.quant import scaled_int, shifted_scaled_int

from clusterq.deploy import brevitas as ours

pytestmark = pytest.mark.filterwarnings("ignore")

# Scales are powers of two: dividing by one and multiplying by its reciprocal are the same, so are the codes of ties.
LAYOUTS = [((), ()), ((1,), ()), ((6, 1, 1, 1), ()), ((6, 1, 1, 1), (6, 1, 1, 1)), ((5, 1, 1), ()), ((6, 5, 1, 1), ())]


def steps(module: nn.Module, x: Tensor, slope: Tensor, scale: Tensor, zero: Tensor, bits: int) -> list[Tensor | None]:
    x, scale, zero = (tensor.clone().requires_grad_(tensor.requires_grad) for tensor in (x, scale, zero))
    y = module(scale, zero, torch.tensor(float(bits)), x)
    leaves = [tensor for tensor in (x, scale, zero) if tensor.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, leaves, slope, allow_unused=True)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("clamp", [TensorClamp, TensorClampSte])
@pytest.mark.parametrize("trained", ["x", "x, scale", "x, scale, zero point"])
@pytest.mark.parametrize(("signed", "narrow", "bits"), [(True, True, 4), (True, False, 3), (False, False, 8)])
def test_quantizer(layout: Any, clamp: Any, trained: str, signed: bool, narrow: bool, bits: int) -> None:
    torch.manual_seed(2)
    x, slope = torch.randn(6, 5, 4, 4, requires_grad=True), torch.randn(6, 5, 4, 4)
    x.data.mul_(2.0 ** (bits - 3))
    scale = torch.randint(-3, 1, layout[0]).float().exp2().requires_grad_("scale" in trained)
    # Even: Brevitas adds the zero point before rounding, ATen after.
    zero = (2 * torch.randint(-1 if signed else 0, 2, layout[1])).float().requires_grad_("zero" in trained)
    args = (narrow, signed, Identity())
    mine, theirs = (
        steps(quantizer(*args, tensor_clamp_impl=clamp()), x, slope, scale, zero, bits)
        for quantizer in (ours.IntQuant, IntQuant)
    )
    assert torch.equal(mine[0], theirs[0])
    for got, want in zip(mine[1:], theirs[1:], strict=True):
        if got is None or want is None:
            assert (want is None or not want.any()) and got is None
        else:
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


class Weight(scaled_int.Int8WeightPerChannelFloat):
    bit_width = 4


class Input(shifted_scaled_int.ShiftedUint8ActPerTensorFloat):
    bit_width = 4


class OurWeight(Weight):
    int_quant = ours.IntQuant


class OurInput(Input):
    int_quant = ours.IntQuant


def network(weight: Any, act: Any) -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(
        qnn.QuantConv2d(3, 8, 3, weight_quant=weight, input_quant=act),
        nn.ReLU(),
        qnn.QuantConv2d(8, 8, 3, groups=8, weight_quant=weight, input_quant=act),
    )


@pytest.mark.parametrize("way", ["injector", "replaced"])
def test_layers_train_alike(way: str) -> None:
    theirs = network(Weight, Input)
    mine = network(OurWeight, OurInput) if way == "injector" else ours.replace_int_quant(copy.deepcopy(theirs))
    assert sum(isinstance(module, ours.IntQuant) for module in mine.modules()) == 4
    assert list(mine.state_dict()) == list(theirs.state_dict())
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01) for model in (mine, theirs)]
    for number in range(3):
        x = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(number))
        losses = []
        for model, optimizer in zip((mine, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=0)
    for (name, got), want in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5, msg=name)


def test_what_it_does_not_do() -> None:
    with pytest.raises(NotImplementedError, match="FloorSte"):
        ours.IntQuant(False, True, Identity(), FloorSte())
    with pytest.raises(NotImplementedError, match="quant_delay_steps"):
        ours.IntQuant(False, True, Identity(), quant_delay_steps=3)
    quantizer, one = ours.IntQuant(False, True, Identity()), torch.ones(())
    with pytest.raises(NotImplementedError, match="learn bit_width"):
        quantizer(one, one, torch.tensor(4.0, requires_grad=True), torch.ones(3))
    with pytest.raises(NotImplementedError, match="whole number"):
        quantizer(one, one, torch.tensor(4.5), torch.ones(3))
    with pytest.raises(NotImplementedError, match="one per channel"):
        quantizer(torch.ones(2, 1, 3), one, torch.tensor(4.0), torch.ones(2, 4, 3))
    with pytest.raises(ValueError, match="no IntQuant"):
        ours.replace_int_quant(nn.Sequential(nn.ReLU()))


def test_a_model_that_cannot_be_replaced_is_left_alone() -> None:
    class Floored(Weight):
        float_to_int_impl_type = "floor"

    model = nn.Sequential(network(Weight, None), qnn.QuantLinear(4, 4, weight_quant=Floored))
    before = dict(model.named_modules())
    with pytest.raises(NotImplementedError, match=r"^1\.weight_quant.*FloorSte"):
        ours.replace_int_quant(model)
    assert dict(model.named_modules()) == before


def test_a_bias_of_32_bits_stays_brevitas_own() -> None:
    from brevitas.quant import Int8ActPerTensorFloat, Int32Bias

    torch.manual_seed(0)
    layer = qnn.QuantConv2d(
        3,
        8,
        3,
        weight_quant=scaled_int.Int8WeightPerChannelFloat,
        input_quant=Int8ActPerTensorFloat,
        bias_quant=Int32Bias,
    )
    theirs = nn.Sequential(layer)
    mine = ours.replace_int_quant(copy.deepcopy(theirs))
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(mine(x), theirs(x), rtol=1e-4, atol=1e-4)
