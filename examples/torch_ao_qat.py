"""clusterq's fake-quantization inside torch.ao.quantization: swap the classes, keep the rest.

    python examples/torch_ao_qat.py

Trains a small network twice, with torch's modules and with clusterq's: the losses, the ranges and the converted integer
networks have to be equal. Then prints how long a training step of the fake-quantizers takes in each.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.ao import quantization as ao

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


def train(network: nn.Module, kind: type[nn.Module]) -> tuple[list[float], nn.Module]:
    network = copy.deepcopy(network).train()
    network.qconfig = ao.QConfig(activation=kind.with_args(**PER_TENSOR), weight=kind.with_args(**PER_CHANNEL))
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


def main() -> None:
    torch.manual_seed(0)
    network = Network()
    losses, ours = train(network, clusterq.nn.FakeQuantize)
    expected, theirs = train(network, ao.FakeQuantize)
    assert losses == expected, (losses, expected)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    if "fbgemm" in torch.backends.quantized.supported_engines:
        torch.backends.quantized.engine = "fbgemm"
        x = torch.randn(4, 3, 16, 16)
        assert torch.equal(ao.convert(ours)(x), ao.convert(theirs)(x))
    print(f"5 losses and {len(theirs.state_dict())} entries of the state are equal")

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
