"""clusterq's fake-quantization inside torch.ao.quantization: swap the classes, keep the rest.

    python examples/torch_ao_qat.py

Trains a small network with torch's modules and with clusterq's, in the eager and the FX flow, with the plain and the
fused class: the losses, the ranges and the converted integer networks have to be equal, and the state of one loads into
the other. Then prints how long a training step of the fake-quantizers takes in each.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.ao import quantization as ao
from torch.ao.quantization import quantize_fx

import clusterq
from clusterq.testing import interleave

PER_TENSOR = {"observer": ao.MovingAverageMinMaxObserver, "quant_min": 0, "quant_max": 127, "dtype": torch.quint8}
PER_CHANNEL = {
    "observer": ao.MovingAveragePerChannelMinMaxObserver,
    "quant_min": -128,
    "quant_max": 127,
    "dtype": torch.qint8,
    "qscheme": torch.per_channel_symmetric,
}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = ao.QuantStub(), ao.DeQuantStub()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU()
        self.linear = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv(self.quant(x))))
        return self.dequant(self.linear(x.mean((2, 3))))


def train(network: nn.Module, kind: type[nn.Module], flow: str) -> tuple[list[float], nn.Module]:
    network = copy.deepcopy(network).train()
    qconfig = ao.QConfig(activation=kind.with_args(**PER_TENSOR), weight=kind.with_args(**PER_CHANNEL))
    if flow == "fx":
        mapping = ao.QConfigMapping().set_global(qconfig)
        network = quantize_fx.prepare_qat_fx(network, mapping, torch.randn(8, 3, 16, 16))
    else:
        network.qconfig = qconfig
        ao.fuse_modules_qat(network, [["conv", "norm", "relu"]], inplace=True)
        network = ao.prepare_qat(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(5):
        x, labels = torch.randn(8, 3, 16, 16, generator=generator), torch.randint(10, (8,), generator=generator)
        loss = nn.functional.cross_entropy(network(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, network.eval()


def compare(network: nn.Module, name: str, flow: str) -> None:
    losses, ours = train(network, getattr(clusterq.nn, name), flow)
    expected, theirs = train(network, getattr(ao, name), flow)
    assert losses == expected, (losses, expected)
    state = theirs.state_dict()
    assert list(ours.state_dict()) == list(state)
    for key, value in state.items():
        assert torch.equal(ours.state_dict()[key], value), key
    ours.load_state_dict(state)
    theirs.load_state_dict(ours.state_dict())
    if "fbgemm" in torch.backends.quantized.supported_engines:
        torch.backends.quantized.engine = "fbgemm"
        x = torch.randn(4, 3, 16, 16)
        if name == "FusedMovingAvgObsFakeQuantize":
            # torch's class converts with other parameters than it trains with; clusterq's does so when told to.
            for module in ours.modules():
                module.export = "observer"
        convert = quantize_fx.convert_fx if flow == "fx" else ao.convert
        assert torch.equal(convert(ours)(x), convert(theirs)(x))
    print(f"{flow}, {name}: 5 losses and {len(state)} entries of the state are equal")


def main() -> None:
    torch.manual_seed(0)
    network = Network()
    for flow in ("eager", "fx"):
        for name in ("FakeQuantize", "FusedMovingAvgObsFakeQuantize"):
            compare(network, name, flow)

    x = torch.randn(32, 64, 28, 28, requires_grad=True)
    modules = {
        "clusterq": clusterq.nn.FakeQuantize(**PER_TENSOR),
        "torch.ao": ao.FakeQuantize(**PER_TENSOR),
        "clusterq fused": clusterq.nn.FusedMovingAvgObsFakeQuantize(**PER_TENSOR),
        "torch.ao fused": ao.FusedMovingAvgObsFakeQuantize(**PER_TENSOR),
    }
    grad = torch.ones_like(x)
    times = interleave(
        {name: lambda m=module: torch.autograd.grad(m(x), x, grad) for name, module in modules.items()}, rounds=7
    )
    for kind in ("", " fused"):
        ratio = times[f"torch.ao{kind}"].ratio_to(times[f"clusterq{kind}"])
        print(f"forward and backward{kind}, {list(x.shape)}: {ratio:.1f} times as fast as torch.ao")


if __name__ == "__main__":
    main()
