"""Cost of the quantization-aware training step against training the network in floating point.

    python bench/bench_steps.py [--threads 2] [--repeats 15] [--quick] [--json FILE]
    pytest bench/bench_steps.py --benchmark-only

ResNet-20 on 32x32 images, W4A4, float32: student forward, distillation loss to stored teacher logits, backward, SGD
step. `float` is the same network with frozen BatchNorm statistics, the same loss and the same optimizer.

- `clusterq`: `clusterq.prepare` with the quantization of preset `default`: asymmetric weights, learned steps,
  activation and quantization fused.
- `clusterq symmetric weights`: the same with zero point 0 for the weights.
- `clusterq moving range`: activation ranges as moving averages and live weight ranges, nothing learned.
- `eager`: the quantization of `clusterq` written with torch's round and clamp (LSQ).
- `torch.ao`: `FusedMovingAvgObsFakeQuantize` for activations and per-channel weights, the counterpart of the moving
  range.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from harness import Bar, Call, Case, main
from torch import Tensor, nn
from torch.nn import functional

from clusterq.config import preset
from clusterq.networks import resnet20
from clusterq.nn.quantizers import ActivationQuantizer, WeightQuantizer
from clusterq.qat import calibrate, distillation_loss, freeze_batch_norm_statistics, prepare

DEFAULT = preset("default").quantization
SYMMETRIC = replace(DEFAULT, weight_symmetric=True)
MOVING = replace(DEFAULT, learned_scale=False, weight_range="minmax", activation_range="ema", gradient="pass_through")
TEMPERATURE = 20.0
OURS = ("clusterq", "clusterq symmetric weights", "clusterq moving range")


class _Round(torch.autograd.Function):
    """Rounding with a straight-through gradient; adding a detached difference instead would miss whole numbers."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


class EagerQuantizer(nn.Module):
    """LSQ in torch's own ops, per channel for weights, per tensor behind ReLU: counterpart of a learned quantizer."""

    def __init__(self, quantizer: ActivationQuantizer | WeightQuantizer) -> None:
        super().__init__()
        self.relu = isinstance(quantizer, ActivationQuantizer)
        self.scale, self.quant_max = quantizer.scale, quantizer.quant_max
        # Values that round to an outermost code still pass the gradient, so the clamp sits just inside the next tie.
        low, high = (code - quantizer.zero_point.float() for code in (quantizer.quant_min, quantizer.quant_max))
        self.register_buffer("low", torch.nextafter(low - 0.5, high))
        self.register_buffer("high", torch.nextafter(high + 0.5, low))

    def forward(self, x: Tensor) -> Tensor:
        if self.relu:
            x = functional.relu(x)
        scale, low, high = (t.view(-1, *[1] * (x.dim() - 1)) for t in (self.scale, self.low, self.high))
        factor = 1.0 / math.sqrt(x[:1].numel() * self.quant_max)
        step = (scale - scale * factor).detach() + scale * factor
        return _Round.apply((x / step).clamp(low, high)) * step


class EagerRange(nn.Module):
    """Live min/max of a weight's rows, or the range an activation quantizer has; gradient 1 everywhere but at ReLU."""

    def __init__(self, quantizer: ActivationQuantizer | WeightQuantizer) -> None:
        super().__init__()
        self.relu = isinstance(quantizer, ActivationQuantizer)
        self.quant_min, self.quant_max = quantizer.quant_min, quantizer.quant_max
        if self.relu:
            self.register_buffer("low", quantizer.running_min.clone())
            self.register_buffer("high", quantizer.running_max.clone())

    def forward(self, x: Tensor) -> Tensor:
        if self.relu:
            x, low, high = functional.relu(x), self.low, self.high
        else:
            low, high = (v.view(-1, *[1] * (x.dim() - 1)) for v in x.detach().flatten(1).aminmax(dim=1))
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high - low) / (self.quant_max - self.quant_min)
        zero_point = (self.quant_min - low / scale).round()
        code = (_Round.apply(x / scale) + zero_point).detach().clamp(self.quant_min, self.quant_max)
        return x + ((code - zero_point) * scale - x).detach()


class AoActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from torch.ao.quantization import FusedMovingAvgObsFakeQuantize, MovingAverageMinMaxObserver

        self.fake_quantize = FusedMovingAvgObsFakeQuantize(
            observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=15, dtype=torch.quint8
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.fake_quantize(functional.relu(x))


def _ao_weight() -> nn.Module:
    from torch.ao.quantization import FusedMovingAvgObsFakeQuantize, MovingAveragePerChannelMinMaxObserver

    return FusedMovingAvgObsFakeQuantize(
        observer=MovingAveragePerChannelMinMaxObserver,
        quant_min=-8,
        quant_max=7,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
    )


def _replaced(student: nn.Module, make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A copy of a prepared network with other quantizers in the places of its own."""
    student = copy.deepcopy(student)
    for parent in list(student.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, (ActivationQuantizer, WeightQuantizer)):
                setattr(parent, name, make(child))
    return student.train()


def build_networks(images: Tensor) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    network = resnet20()
    with torch.no_grad():
        network(images)
    floating = copy.deepcopy(network).train()
    freeze_batch_norm_statistics(floating)
    networks = {}
    for name, config in zip(OURS, (DEFAULT, SYMMETRIC, MOVING), strict=True):
        networks[name] = prepare(network, config)
        calibrate(networks[name], images)
        networks[name].train()
    networks["float"] = floating
    networks["eager"] = _replaced(networks["clusterq"], EagerQuantizer)
    if importlib.util.find_spec("torch.ao.quantization") is not None:
        with warnings.catch_warnings():
            # torch.ao announces its own retirement on each construction.
            warnings.simplefilter("ignore", DeprecationWarning)
            networks["torch.ao"] = _replaced(
                networks["clusterq moving range"],
                lambda m: AoActivation() if isinstance(m, ActivationQuantizer) else _ao_weight(),
            )
    return networks


def check(networks: dict[str, nn.Module], images: Tensor) -> None:
    """Before anything is timed: what is written in torch's ops computes what each of ours computes.

    `eager` and the same for symmetric weights: outputs and every gradient. The moving range: likewise, at rest, for
    its ranges move with every forward of training. `torch.ao`: its activation quantizers against ours on the same
    values; its weights are symmetric and clip the gradient where ours do neither, so the whole step cannot be equal.
    """
    _compare(networks["clusterq"], networks["eager"], images)
    symmetric = copy.deepcopy(networks["clusterq symmetric weights"])
    for module in symmetric.modules():
        if isinstance(module, WeightQuantizer):
            # Symmetric steps may put the largest weight on the tie between the last code and the range's outside.
            module.scale.data.mul_(1.01)
    _compare(symmetric, _replaced(symmetric, EagerQuantizer), images)
    moving = copy.deepcopy(networks["clusterq moving range"]).eval()
    _compare(moving, _replaced(moving, EagerRange), images)
    if "torch.ao" in networks:
        _check_ao_activations(networks["clusterq moving range"], networks["torch.ao"])


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


def step_case(batch: int) -> Case:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, 32, 32, generator=generator)
    targets = torch.randn(batch, 10, generator=generator)
    networks = build_networks(images)
    check(networks, images[:4])
    return Case(
        "QAT step, ResNet-20 W4A4",
        f"batch {batch}",
        {name: training_step(network, images, targets) for name, network in networks.items()},
        bar=Bar("float", 1.15, "at most x of the time"),
        ours=OURS,
    )


def cases(quick: bool) -> Iterator[Case]:
    yield step_case(4 if quick else 128)


@pytest.mark.parametrize("contestant", [*OURS, "float", "eager", "torch.ao"])
def test_training_step(benchmark: Any, contestant: str) -> None:
    case = step_case(32)
    if contestant not in case.contestants:
        pytest.skip("this torch has no torch.ao.quantization")
    case.benchmark(benchmark, contestant)


if __name__ == "__main__":
    main("steps", __doc__, cases, ops=("fake_quantize", "fake_quantize_learned_backward"), repeats=15)
