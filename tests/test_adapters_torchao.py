"""clusterq inside torchao, against torchao's own modules; skipped where torchao is not installed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torchao", reason="torchao is not installed (pip install clusterq[peers])")

from torchao.quantization import PerAxis, PerGroup, PerToken, quantize_
from torchao.quantization.pt2e import fake_quantize as pt2e
from torchao.quantization.pt2e import observer
from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer, QATConfig

from clusterq.deploy import torchao as ours

pytestmark = pytest.mark.filterwarnings("ignore")

TENSOR = {"observer": observer.MovingAverageMinMaxObserver, "quant_min": 0, "quant_max": 127, "dtype": torch.uint8}
CHANNEL = {
    "observer": observer.MovingAveragePerChannelMinMaxObserver,
    "quant_min": -128,
    "quant_max": 127,
    "dtype": torch.int8,
    "qscheme": torch.per_channel_symmetric,
}


def step(module: nn.Module, x: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = module(x)
    return y.detach(), torch.autograd.grad(y, x, slope)[0]


@pytest.mark.parametrize("settings", [TENSOR, CHANNEL], ids=["tensor", "channel"])
@pytest.mark.parametrize("name", ["FakeQuantize", "FusedMovingAvgObsFakeQuantize"])
def test_modules_of_the_export_flow(name: str, settings: dict[str, Any]) -> None:
    torch.manual_seed(1)
    mine, theirs = (getattr(library, name)(**copy.deepcopy(settings)) for library in (ours, pt2e))
    for number in range(4):
        x, slope = torch.randn(6, 5, 4) * (1 + number), torch.randn(6, 5, 4)
        for got, want in zip(step(mine, x, slope), step(theirs, x, slope), strict=True):
            assert torch.equal(got, want)
        assert list(mine.state_dict()) == list(theirs.state_dict())
        for key, value in theirs.state_dict().items():
            assert torch.equal(mine.state_dict()[key], value), key
    fresh = getattr(pt2e, name)(**copy.deepcopy(settings))
    fresh.load_state_dict(mine.state_dict())
    assert torch.equal(fresh.scale, mine.scale)


@pytest.mark.parametrize(
    "config",
    [
        IntxFakeQuantizeConfig(torch.int8, PerToken(), is_symmetric=False),
        IntxFakeQuantizeConfig(torch.int4, PerToken(), is_symmetric=False),
        IntxFakeQuantizeConfig(torch.int4, PerGroup(32)),
        IntxFakeQuantizeConfig(torch.int4, PerGroup(32), is_symmetric=False),
        IntxFakeQuantizeConfig(torch.int8, PerAxis(0)),
    ],
    ids=["token8", "token4", "group", "group affine", "axis"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantizers_of_quantize(config: IntxFakeQuantizeConfig, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    x, slope = torch.randn(40, 96).to(dtype), torch.randn(40, 96).to(dtype)
    mine, theirs = ours.IntxFakeQuantizer(config), IntxFakeQuantizer(config)
    got, want = step(mine, x, slope), step(theirs, x, slope)
    assert torch.equal(mine.scale.reshape(-1), theirs.scale.reshape(-1)) and got[0].dtype == dtype
    assert torch.equal(mine.zero_point.reshape(-1), theirs.zero_point.reshape(-1))
    if dtype == torch.float32:
        assert torch.equal(got[0], want[0])
        torch.testing.assert_close(got[1], want[1], rtol=1e-6, atol=0)


def test_replacement_in_a_model_names_what_it_cannot_replace() -> None:
    network = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(ValueError, match="no fake-quantizer"):
        ours.replace_fake_quantizers(network)
    weights = IntxFakeQuantizeConfig(torch.int4, PerGroup(32), is_dynamic=False, range_learning=True)
    quantize_(network, QATConfig(weight_config=weights, step="prepare"))
    before = dict(network.named_modules())
    with pytest.raises(NotImplementedError, match=r"0\.weight_fake_quantizer: .*range_learning"):
        ours.replace_fake_quantizers(network)
    assert dict(network.named_modules()) == before


def test_scales_in_less_than_float32_are_left_to_torchao() -> None:
    config = IntxFakeQuantizeConfig(torch.int8, PerToken(), is_symmetric=False, scale_precision=torch.bfloat16)
    with pytest.raises(NotImplementedError, match="scale_precision"):
        ours.IntxFakeQuantizer(config)


@pytest.mark.parametrize("dtype", [torch.int1, torch.int2, torch.int4, torch.int8])
def test_gradient_on_the_outermost_codes(dtype: torch.dtype) -> None:
    """Whatever torch's clamp does at its bounds."""
    config = IntxFakeQuantizeConfig(dtype, PerGroup(4))
    x = torch.linspace(-3, 3, 64).reshape(2, 32)
    got, want = (step(q(config), x, torch.ones(2, 32)) for q in (ours.IntxFakeQuantizer, IntxFakeQuantizer))
    assert torch.equal(got[1] != 0, want[1] != 0) and torch.equal(got[0], want[0])


def test_second_derivative() -> None:
    """The gradient is linear in the incoming one, and its own derivative where that is wanted."""
    config = IntxFakeQuantizeConfig(torch.int4, PerGroup(4))
    x, slope = torch.linspace(-3, 3, 64).reshape(2, 32).requires_grad_(), torch.ones(2, 32, requires_grad=True)
    results = []
    for quantizer in (ours.IntxFakeQuantizer(config), IntxFakeQuantizer(config)):
        (first,) = torch.autograd.grad(quantizer(x), x, slope, create_graph=True)
        results.append(torch.autograd.grad(first.sum(), slope)[0])
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=0)
