"""clusterq's ops as the tensor quantizer of Brevitas layers: named in an injector, or put into a model that exists.

    python examples/brevitas_layers.py

Outputs and gradients of a network have to be Brevitas's to rounding; a value at a tie between two codes may take the
other one (`clusterq.deploy.brevitas` says why). Then the time of a step in each.
"""

from __future__ import annotations

import copy

import brevitas.nn as qnn
import torch
from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat
from torch import Tensor, nn

from clusterq.deploy.brevitas import IntQuant, replace_int_quant
from clusterq.testing import interleave


class Weight(Int8WeightPerChannelFloat):
    bit_width = 4


class Input(Int8ActPerTensorFloat):
    bit_width = 4


class FastWeight(Weight):
    int_quant = IntQuant


def network(weight: type) -> nn.Sequential:
    torch.manual_seed(0)
    settings = {"padding": 1, "weight_quant": weight, "input_quant": Input}
    return nn.Sequential(
        qnn.QuantConv2d(3, 32, 3, **settings),
        nn.ReLU(),
        qnn.QuantConv2d(32, 32, 3, groups=32, **settings),
        nn.ReLU(),
        qnn.QuantConv2d(32, 64, 3, **settings),
    )


def step(model: nn.Module, x: Tensor, slope: Tensor) -> tuple[Tensor, list[Tensor]]:
    y = model(x)
    return y.detach(), list(torch.autograd.grad(y, list(model.parameters()), slope))


def main() -> None:
    theirs = network(Weight)
    ours = replace_int_quant(copy.deepcopy(theirs))
    assert sum(isinstance(module, IntQuant) for module in ours.modules()) == 6
    # By injector: the weights alone here.
    assert isinstance(network(FastWeight)[0].weight_quant.tensor_quant.int_quant, IntQuant)

    x, slope = torch.randn(8, 3, 32, 32), torch.randn(8, 64, 32, 32)
    for _ in range(3):
        (y, grads), (wanted, wanted_grads) = (step(model, x, slope) for model in (ours, theirs))
        error = (y - wanted).abs()
        # Beyond this lie a tie that took the other code and what it reaches.
        moved = int((error > 1e-4 * wanted.abs().max()).sum())
        assert moved <= y.numel() // 10000, f"{moved} of {y.numel()} outputs differ"
        for got, want in zip(grads, wanted_grads, strict=True):
            distance = float((got - want).norm() / want.norm().clamp_min(1e-6))
            assert distance < 1e-3, f"gradients differ by {distance}"
    print(f"outputs are equal to rounding but {moved} of {y.numel()}, so are gradients")

    steps = {name: lambda m=model: step(m, x, slope) for name, model in {"clusterq": ours, "Brevitas": theirs}.items()}
    times = interleave(steps, rounds=9)
    ratio = times["Brevitas"].ratio_to(times["clusterq"])
    print(f"forward and backward of the network: {ratio:.1f} times as fast as Brevitas")


if __name__ == "__main__":
    main()
