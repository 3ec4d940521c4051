"""Cost of the quantization-aware training step against training the network in floating point.

    python bench/bench_steps.py [--threads 2] [--repeats 15] [--network NAME ...] [--quick] [--json FILE]
    pytest bench/bench_steps.py --benchmark-only

ResNet-20 and ResNet-18 with a CIFAR stem on 32x32 images, MobileNet-V2 on 64x64 ones, W4A4, float32: student forward,
distillation loss to stored teacher logits, backward, SGD step. `float` is the same network with frozen BatchNorm
statistics, the same loss and the same optimizer.

- `clusterq`: `clusterq.prepare` with the quantization of preset `default` in scheme paper: asymmetric weights, learned
  steps, activation and quantization fused.
- `clusterq symmetric weights` (ResNet-20): the same with zero point 0 for the weights.
- `clusterq moving range`: activation ranges as moving averages and live weight ranges, nothing learned.
- `eager`: the quantization of `clusterq` written with torch's round and clamp (LSQ).
- `torch.ao`: `FusedMovingAvgObsFakeQuantize` for activations and per-channel weights, the counterpart of the moving
  range.
- `Brevitas`: its layers in the first 300 steps, which follow a percentile of the activations; `Brevitas learned`: in
  those after, which learn their scale. Left out, with a line, where it is not installed.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from fake_quant_peers import installed
from harness import OURS as MAIN
from harness import Bar, Call, Case, main
from step_peers import AoActivation, brevitas, eager_learned, eager_ranges, torch_ao
from torch import Tensor, nn

from clusterq.config import preset
from clusterq.networks import resnet20
from clusterq.nn.quantizers import WeightQuantizer
from clusterq.qat import calibrate, distillation_loss, freeze_batch_norm_statistics, prepare

# Quantizers where the peers have them, at weights and activation functions.
DEFAULT = replace(preset("default").quantization, scheme="paper")
SYMMETRIC = replace(DEFAULT, weight_symmetric=True)
MOVING = replace(DEFAULT, learned_scale=False, weight_range="minmax", activation_range="ema", gradient="pass_through")
SYMMETRIC_NAME, MOVING_NAME = f"{MAIN} symmetric weights", f"{MAIN} moving range"
OURS = {MAIN: DEFAULT, SYMMETRIC_NAME: SYMMETRIC, MOVING_NAME: MOVING}
TEMPERATURE = 20.0


def resnet18() -> nn.Module:
    """torchvision's with the stem for small images: 3x3, stride 1, no pooling."""
    from torchvision.models import resnet18 as build

    network = build(num_classes=10)
    network.conv1, network.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return network


def mobilenet_v2() -> nn.Module:
    """torchvision's without dropout, which would draw other units for every contestant."""
    from torchvision.models import mobilenet_v2 as build

    return build(num_classes=10, dropout=0.0)


@dataclass(frozen=True)
class Network:
    """One network and the promises: time of the step with learned steps and with a moving range against float."""

    title: str
    build: Callable[[], nn.Module]
    batch: int
    size: int
    learned: float
    moving: float
    ours: Sequence[str] = (MAIN, MOVING_NAME)

    @property
    def bars(self) -> dict[str, Bar]:
        limits = {MAIN: self.learned, MOVING_NAME: self.moving}
        return {name: Bar("float", limit, "at most x of the time") for name, limit in limits.items()}


NETWORKS: Mapping[str, Network] = {
    "resnet20": Network("ResNet-20", resnet20, 128, 32, 1.10, 1.05, tuple(OURS)),
    "resnet18": Network("ResNet-18", resnet18, 32, 32, 1.08, 1.05),
    "mobilenet_v2": Network("MobileNet-V2", mobilenet_v2, 64, 64, 1.12, 1.08),
}


def build_networks(images: Tensor, kind: Network = NETWORKS["resnet20"]) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    network = kind.build()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            # The statistics of this batch: frozen ones that are not the data's let activations grow or vanish.
            module.momentum = 1.0
    with torch.no_grad():
        network(images)
    floating = copy.deepcopy(network).train()
    freeze_batch_norm_statistics(floating)
    networks = {}
    for name in kind.ours:
        networks[name] = prepare(network, OURS[name], example_input=images[:2])
        calibrate(networks[name], images)
        networks[name].train()
    networks["float"] = floating
    networks["eager"] = eager_learned(networks[MAIN])
    if importlib.util.find_spec("torch.ao.quantization") is not None:
        networks["torch.ao"] = torch_ao(networks[MOVING_NAME])
    if installed("brevitas"):
        networks["Brevitas"] = brevitas(networks[MAIN], images, learned=False)
        networks["Brevitas learned"] = brevitas(networks[MAIN], images, learned=True)
    return networks


def check(networks: dict[str, nn.Module], images: Tensor) -> None:
    """Before anything is timed: what is written in torch's ops computes what each of ours computes.

    `eager` and the same for symmetric weights: outputs and every gradient. The moving range: likewise, at rest, for
    its ranges move with every forward of training. `torch.ao`: its activation quantizers against ours on the same
    values; its weights are symmetric and clip the gradient where ours do neither, so the whole step cannot be equal.
    Brevitas' ranges are its own: that its weights and activations take no more values than ours.
    """
    _compare(networks[MAIN], networks["eager"], images)
    if SYMMETRIC_NAME in networks:
        symmetric = copy.deepcopy(networks[SYMMETRIC_NAME])
        for module in symmetric.modules():
            if isinstance(module, WeightQuantizer):
                # Symmetric steps may put the largest weight on the tie between the last code and the range's outside.
                module.scale.data.mul_(1.01)
        _compare(symmetric, eager_learned(symmetric), images)
    moving = copy.deepcopy(networks[MOVING_NAME]).eval()
    _compare(moving, eager_ranges(moving), images)
    if "torch.ao" in networks:
        _check_ao_activations(networks[MOVING_NAME], networks["torch.ao"])
    for name in {"Brevitas", "Brevitas learned"} & set(networks):
        _check_brevitas(networks[name])


def _compare(ours: nn.Module, eager: nn.Module, images: Tensor) -> None:
    """In float64, where next to no value is so close to a tie that x / s and x * (1 / s) round to different codes."""
    ours, eager, images = copy.deepcopy(ours).double(), copy.deepcopy(eager).double(), images.double()
    outputs = [ours(images), eager(images)]
    torch.testing.assert_close(*outputs, rtol=1e-7, atol=1e-7)
    for output in outputs:
        output.square().mean().backward()
    theirs = dict(eager.named_parameters())
    for name, parameter in ours.named_parameters():
        atol = 1e-6 * parameter.grad.abs().max().item()
        torch.testing.assert_close(theirs[name].grad, parameter.grad, rtol=1e-6, atol=atol)


def _check_ao_activations(ours: nn.Module, ao: nn.Module) -> None:
    """Outputs and gradients in float32 on the first values that torch.ao's observer sees: codes equal but at ties."""
    x = 3 * torch.randn(4, 16, 32, 32, generator=torch.Generator().manual_seed(2))
    for name, theirs in ao.named_modules():
        if not isinstance(theirs, AoActivation):
            continue
        quantizer, theirs = copy.deepcopy(ours.get_submodule(name)), copy.deepcopy(theirs).train()
        with quantizer.calibrating("minmax"):
            quantizer(x)
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [quantizer.eval()(leaves[0]), theirs(leaves[1])]
        scale = quantizer.qparams()[0].item()
        apart = (outputs[0] - outputs[1]).abs()
        if apart.max() > 1.001 * scale or (apart > 1e-3 * scale).float().mean() > 1e-4:
            raise AssertionError(f"{name}: torch.ao quantizes activations to other codes")
        grads = torch.autograd.grad([output.square().sum() for output in outputs], leaves)
        if (grads[0] - grads[1]).abs().max() > 2.01 * scale or not torch.equal(grads[0] != 0, grads[1] != 0):
            raise AssertionError(f"{name}: torch.ao has another gradient for activations")


def _check_brevitas(network: nn.Module) -> None:
    """On a copy, for its activation quantizers count the batches they see."""
    from brevitas import nn as qnn

    x = 3 * torch.randn(4, 16, 32, 32, generator=torch.Generator().manual_seed(2))
    for name, module in copy.deepcopy(network).named_modules():
        if isinstance(module, qnn.QuantReLU):
            rows = [module(x)]
        elif isinstance(module, (qnn.QuantConv2d, qnn.QuantLinear)):
            rows = list(module.quant_weight().value)
        else:
            continue
        if max(row.unique().numel() for row in rows) > 16:
            raise AssertionError(f"{name}: Brevitas quantizes to more than 4 bits")


def training_step(network: nn.Module, images: Tensor, targets: Tensor) -> Call:
    optimizer = torch.optim.SGD(
        network.parameters(), lr=1e-6, momentum=0.9, nesterov=True, weight_decay=1e-4, fused=True
    )

    def step() -> None:
        loss = distillation_loss(network(images), targets, TEMPERATURE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def step_case(name: str, batch: int | None = None) -> Case:
    """One network at its own batch, or at another."""
    kind = NETWORKS[name]
    batch = batch or kind.batch
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, kind.size, kind.size, generator=generator)
    targets = torch.randn(batch, 10, generator=generator)
    networks = build_networks(images, kind)
    check(networks, images[:4])
    return Case(
        f"QAT step, {kind.title} W4A4",
        f"batch {batch}",
        {name: training_step(network, images, targets) for name, network in networks.items()},
        bar=kind.bars,
        ours=kind.ours,
    )


def cases(quick: bool, networks: Sequence[str] = tuple(NETWORKS)) -> Iterator[Case]:
    for name in networks:
        if name != "resnet20" and importlib.util.find_spec("torchvision") is None:
            print(f"  left out: {name}, torchvision is not installed", flush=True)
            continue
        yield step_case(name, 2 if quick else None)


@pytest.mark.parametrize("contestant", [*OURS, "float", "eager", "torch.ao", "Brevitas"])
def test_training_step(benchmark: Any, contestant: str) -> None:
    case = step_case("resnet20", 32)
    if contestant not in case.contestants:
        pytest.skip(f"{contestant} is not installed")
    case.benchmark(benchmark, contestant)


if __name__ == "__main__":
    main(
        "steps",
        __doc__,
        cases,
        ops=("fake_quantize", "fake_quantize_learned_backward"),
        repeats=15,
        choice="network",
        choices=tuple(NETWORKS),
    )
