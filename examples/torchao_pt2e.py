"""clusterq's fake-quantization inside torchao's PT2E training flow: another constructor in each QuantizationSpec.

    python examples/torchao_pt2e.py

Exports a small network, prepares it with torchao's modules and with clusterq's, and trains both: the losses, the state
and the outputs of the converted networks have to be equal. Then the time of a training step in each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from torchao.quantization.pt2e import FakeQuantize, MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer

from clusterq.deploy import torchao as adapters
from clusterq.testing import interleave


class LinearQuantizer(Quantizer):
    """Inputs (8 bits, moving range) and weights (4 bits per channel) of every linear layer."""

    def __init__(self, kind: Callable[..., Any]) -> None:
        super().__init__()
        self.input = QuantizationSpec(
            torch.int8,
            quant_min=-128,
            quant_max=127,
            qscheme=torch.per_tensor_affine,
            observer_or_fake_quant_ctr=kind.with_args(observer=MovingAverageMinMaxObserver),
        )
        self.weight = QuantizationSpec(
            torch.int8,
            quant_min=-8,
            quant_max=7,
            qscheme=torch.per_channel_symmetric,
            ch_axis=0,
            observer_or_fake_quant_ctr=kind.with_args(observer=MovingAveragePerChannelMinMaxObserver),
        )

    def annotate(self, model: GraphModule) -> GraphModule:
        for node in model.graph.nodes:
            if node.target is torch.ops.aten.linear.default:
                x, weight = node.args[:2]
                node.meta["quantization_annotation"] = QuantizationAnnotation(
                    input_qspec_map={x: self.input, weight: self.weight}, _annotated=True
                )
        return model

    def validate(self, model: GraphModule) -> None:
        pass


def train(network: nn.Module) -> list[float]:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(5):
        x = torch.randn(32, 64, generator=generator)
        loss = (network(x) - x[:, :10]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    x = torch.randn(32, 64)
    prepared, losses = {}, {}
    for name, kind in {"clusterq": adapters.FakeQuantize, "torchao": FakeQuantize}.items():
        program = torch.export.export(copy.deepcopy(network), (x,)).module()
        prepared[name] = prepare_qat_pt2e(program, LinearQuantizer(kind))
        losses[name] = train(prepared[name])
    assert sum(isinstance(module, adapters.FakeQuantize) for module in prepared["clusterq"].modules()) == 4
    assert losses["clusterq"] == losses["torchao"], losses
    for key, value in prepared["torchao"].state_dict().items():
        assert torch.equal(prepared["clusterq"].state_dict()[key], value), key

    grad = torch.randn(32, 10)
    steps = {name: lambda m=module: m(x).backward(grad) for name, module in prepared.items()}
    times = interleave(steps, rounds=9)
    ratio = times["torchao"].ratio_to(times["clusterq"])

    for name in prepared:
        prepared[name].load_state_dict(prepared["torchao"].state_dict())
    converted = [convert_pt2e(prepared[name])(x) for name in ("clusterq", "torchao")]
    assert torch.equal(*converted)
    print(f"{len(losses['torchao'])} losses, the state and the converted networks are equal")
    print(f"forward and backward of the network: {ratio:.1f} times as fast as torchao")


if __name__ == "__main__":
    main()
