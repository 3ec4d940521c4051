"""clusterq's fake-quantization inside torchao's `quantize_` training: prepare as always, then replace the modules.

    python examples/torchao_quantize.py

Outputs of the prepared network have to be torchao's bit for bit, gradients to rounding. Then the time of a step in
each.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torchao.quantization import PerGroup, PerToken, quantize_
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

from clusterq.deploy.torchao import IntxFakeQuantizer, replace_fake_quantizers
from clusterq.testing import interleave

ACTIVATIONS = IntxFakeQuantizeConfig(torch.int8, PerToken(), is_symmetric=False)
WEIGHTS = IntxFakeQuantizeConfig(torch.int4, PerGroup(32))


def gradient(quantizer: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(quantizer(x).sum(), x)[0]


def main() -> None:
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256))
    quantize_(theirs, QATConfig(activation_config=ACTIVATIONS, weight_config=WEIGHTS, step="prepare"))
    ours = replace_fake_quantizers(copy.deepcopy(theirs))
    assert sum(isinstance(module, IntxFakeQuantizer) for module in ours.modules()) == 4
    x = torch.randn(64, 256)
    assert torch.equal(ours(x), theirs(x))

    for name, values in (("activation_fake_quantizer", x), ("weight_fake_quantizer", ours[0].weight)):
        got, want = (gradient(getattr(network[0], name), values) for network in (ours, theirs))
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    print("outputs are equal, gradients to rounding")

    grad = torch.randn(64, 256)
    steps = {
        name: lambda m=network: m(x).backward(grad) for name, network in {"clusterq": ours, "torchao": theirs}.items()
    }
    times = interleave(steps, rounds=9)
    ratio = times["torchao"].ratio_to(times["clusterq"])
    print(f"forward and backward of the network: {ratio:.1f} times as fast as torchao")


if __name__ == "__main__":
    main()
