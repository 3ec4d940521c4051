"""`torch.export` of quantized twins and of their plain form: same bits, any batch, also where there is no clusterq."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import clusterq
from clusterq.config import ClusterQConfig, QuantizationConfig
from clusterq.deploy import convert, load_packed, save_packed
from clusterq.errors import ModelError
from clusterq.nn import set_quantization
from clusterq.qat import calibrate

SHAPE = (3, 10, 10)
# Scheme paper; its twin keeps BatchNorm and biases in floating point.
PAPER: dict[str, Any] = {"scheme": "paper"}
CONFIGS: dict[str, dict[str, Any]] = {
    "learned": PAPER,
    "deploy": {"scheme": "deploy", "sum_bits": 6},
    "fixed": PAPER | {"learned_scale": False, "weight_range": "minmax", "weight_bits": 2, "activation_symmetric": True},
    "ema": PAPER
    | {"learned_scale": False, "activation_range": "ema", "gradient": "pass_through", "activation_bits": 8},
}


class Net(nn.Module):
    """Fused, in-place and functional activations, a residual sum, one module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.act = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.swish = nn.SiLU()
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.conv1(x)))
        x = self.act(x + self.swish(self.conv2(x)))
        y: Tensor = self.fc(functional.relu6(x).mean((2, 3)))
        return y


@pytest.fixture(params=CONFIGS)
def twin(request: pytest.FixtureRequest) -> nn.Module:
    twin = clusterq.prepare(Net().eval(), QuantizationConfig(**CONFIGS[request.param]))
    calibrate(twin, torch.randn(32, *SHAPE))
    return twin


def captured(network: nn.Module, *, strict: bool) -> Any:
    with torch.no_grad():
        batch = torch.export.Dim("batch", min=1, max=1 << 20)
        x = torch.randn(2, *SHAPE)
        return torch.export.export(network, (x,), dynamic_shapes=({0: batch},), strict=strict)


def operators(program: Any) -> set[str]:
    """Names of the operators of a program and of the graphs inside it."""
    return {
        str(node.target)
        for module in program.graph_module.modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
        if node.op == "call_function"
    }


def check(program: Any, twin: nn.Module) -> None:
    module = program.module()
    for count in (1, 2, 5):
        x = torch.randn(count, *SHAPE)
        assert torch.equal(module(x), twin(x).detach()), count


@pytest.mark.parametrize("strict", [False, True])
def test_twin(twin: nn.Module, strict: bool, tmp_path: Path) -> None:
    """Each quantizer is an operator of this package, which loading needs."""
    program = captured(twin, strict=strict)
    check(program, twin)
    assert any(name.startswith("clusterq.") for name in operators(program))
    torch.export.save(program, tmp_path / "twin.pt2")
    check(torch.export.load(tmp_path / "twin.pt2"), twin)


@pytest.mark.parametrize("strict", [False, True])
def test_converted(twin: nn.Module, strict: bool, tmp_path: Path) -> None:
    converted = convert(twin)
    x = torch.randn(7, *SHAPE)
    assert torch.equal(converted(x), twin(x).detach())
    program = captured(converted, strict=strict)
    check(program, twin)
    assert {name.split(".")[0] for name in operators(program)} == {"aten"}
    assert not any("clusterq" in type(m).__module__ for m in program.module().modules())
    torch.export.save(program, tmp_path / "net.pt2")
    check(torch.export.load(tmp_path / "net.pt2"), twin)


@pytest.mark.parametrize("strict", [False, True])
def test_loaded_from_packed_form(twin: nn.Module, strict: bool, tmp_path: Path) -> None:
    save_packed(twin, tmp_path / "net", input_shape=SHAPE)
    program = captured(load_packed(tmp_path / "net").network(Net()), strict=strict)
    check(program, twin)


PROGRAM = """
import sys
sys.modules["clusterq"] = None
import torch
x, wanted = torch.load(sys.argv[2], weights_only=True)
assert torch.equal(torch.export.load(sys.argv[1]).module()(x), wanted)
print("equal", [name for name in sys.modules if name.startswith("clusterq.")])
"""


def test_converted_runs_where_there_is_no_clusterq(twin: nn.Module, tmp_path: Path) -> None:
    torch.export.save(captured(convert(twin), strict=False), tmp_path / "net.pt2")
    x = torch.randn(5, *SHAPE)
    torch.save((x, twin(x).detach()), tmp_path / "wanted.pt")
    words = [sys.executable, "-c", PROGRAM, str(tmp_path / "net.pt2"), str(tmp_path / "wanted.pt")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "equal []"


def test_converted_is_plain(twin: nn.Module) -> None:
    before = {k: v.clone() for k, v in twin.state_dict().items()}
    result = clusterq.Result(twin, ClusterQConfig(), 1.0, torch.zeros(1, *SHAPE), torch.zeros(1), {}, {}, {})
    converted = convert(result)
    assert all(torch.equal(v, before[k]) for k, v in twin.state_dict().items())
    assert type(converted.conv1) is nn.Conv2d and type(converted.fc) is nn.Linear
    assert type(converted.bn1) is nn.BatchNorm2d and isinstance(converted, Net)
    # At most 2^bits values to a channel, those of the twin.
    assert torch.equal(converted.conv1.weight, twin.conv1.quantized_weight())
    converted.conv1.weight.zero_()
    assert torch.equal(twin.conv1.weight, before["conv1.weight"])
    with pytest.raises(ValueError, match="does not come from clusterq"):
        clusterq.qat.report(converted)
    x = torch.randn(3, *SHAPE)
    wide = convert(twin).to(torch.float64)
    assert wide(x.double()).dtype == torch.float64


def test_what_cannot_be_converted(twin: nn.Module) -> None:
    with pytest.raises(ModelError, match="Net is not quantized"):
        convert(Net())
    with pytest.raises(ModelError, match="has no range yet"):
        convert(clusterq.prepare(Net(), QuantizationConfig(scheme="paper")))
    set_quantization(twin, activations=False)
    with pytest.raises(ModelError, match="quantization is switched off"):
        convert(twin)
