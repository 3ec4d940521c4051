"""Cost of the quantization-aware training step against training the network in floating point.

    python bench/bench_steps.py [--batch 128] [--threads 2] [--rounds 15] [--json FILE]

ResNet-20 on 32x32 images, W4A4, float32: student forward, distillation loss to stored teacher logits, backward, SGD
step. `float` is the same network with frozen BatchNorm statistics, the same loss and the same optimizer.

- `clusterq`: `clusterq.prepare`, learned steps (the default), activation and quantization fused.
- `clusterq moving range`: the same with activation ranges as moving averages and live weight ranges.
- `eager`: the same quantization written with torch's round and clamp (LSQ).
- `torch.ao`: `FusedMovingAvgObsFakeQuantize` for activations and per-channel weights.

The variants take turns within one process; figures are medians over the rounds, and ratios the medians of the ratios to
`float` within each round.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import math
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from clusterq.config import QuantizationConfig
from clusterq.networks import resnet20
from clusterq.nn.quantizers import ActivationQuantizer, WeightQuantizer
from clusterq.qat import calibrate, distillation_loss, freeze_batch_norm_statistics, prepare

LEARNED = QuantizationConfig(weight_range="minmax", activation_range="minmax", weight_symmetric=True)
MOVING = QuantizationConfig(learned_scale=False, weight_range="minmax", activation_range="ema", gradient="pass_through")
TEMPERATURE = 20.0
Step = Callable[[], Tensor]


class _Round(torch.autograd.Function):
    """Rounding with a straight-through gradient; adding a detached difference instead would miss whole numbers."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


def _eager_fake_quantize(x: Tensor, scale: Tensor, low: int, high: int, sharing: int) -> Tensor:
    """LSQ in torch's own ops; gradient scaling by a detached difference."""
    factor = 1.0 / math.sqrt(sharing * high)
    step = (scale - scale * factor).detach() + scale * factor
    # Codes at the bounds still pass the gradient, so the clamp sits just inside the next tie.
    return _Round.apply((x / step).clamp(low - 0.49, high + 0.49)) * step


class EagerActivation(nn.Module):
    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        self.scale, self.high = quantizer.scale, quantizer.quant_max

    def forward(self, x: Tensor) -> Tensor:
        return _eager_fake_quantize(functional.relu(x), self.scale, 0, self.high, x[:1].numel())


class EagerWeight(nn.Module):
    def __init__(self, quantizer: WeightQuantizer) -> None:
        super().__init__()
        self.scale, self.low, self.high = quantizer.scale, quantizer.quant_min, quantizer.quant_max

    def forward(self, weight: Tensor) -> Tensor:
        scale = self.scale.view(-1, *[1] * (weight.dim() - 1))
        return _eager_fake_quantize(weight, scale, self.low, self.high, weight[:1].numel())


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
    learned, moving = prepare(network, LEARNED), prepare(network, MOVING)
    calibrate(learned, images)
    calibrate(moving, images)
    networks = {"float": floating, "clusterq": learned.train(), "clusterq moving range": moving.train()}
    networks["eager"] = _replaced(
        learned, lambda m: EagerActivation(m) if isinstance(m, ActivationQuantizer) else EagerWeight(m)
    )
    if importlib.util.find_spec("torch.ao.quantization") is not None:
        networks["torch.ao"] = _replaced(
            moving, lambda m: AoActivation() if isinstance(m, ActivationQuantizer) else _ao_weight()
        )
    return networks


def build_steps(batch: int) -> dict[str, Step]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, 32, 32, generator=generator)
    targets = torch.randn(batch, 10, generator=generator)

    def training(network: nn.Module) -> Step:
        optimizer = torch.optim.SGD(
            network.parameters(), lr=1e-6, momentum=0.9, nesterov=True, weight_decay=1e-4, fused=True
        )

        def step() -> Tensor:
            loss = distillation_loss(network(images), targets, TEMPERATURE)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    return {name: training(network) for name, network in build_networks(images).items()}


def check(batch: int = 8) -> None:
    """The eager form must compute what the ops compute before anything is timed: outputs and gradients of the steps."""
    images = torch.randn(batch, 3, 32, 32)
    networks = build_networks(images)
    gradients = {}
    for name in ("clusterq", "eager"):
        networks[name].zero_grad()
        with torch.no_grad():
            # A min/max range puts the largest weight of each channel right on a tie, where both outcomes are right.
            for parameter_name, parameter in networks[name].named_parameters():
                if parameter_name.endswith("scale"):
                    parameter.mul_(1.03)
        networks[name](images).square().mean().backward()
        gradients[name] = {n: p.grad for n, p in networks[name].named_parameters() if n.endswith("scale")}
    # A value next to a tie may round either way: x / s against x * (1 / s).
    torch.testing.assert_close(networks["eager"](images), networks["clusterq"](images), rtol=0.05, atol=0.05)
    for name, gradient in gradients["clusterq"].items():
        torch.testing.assert_close(gradients["eager"][name], gradient, rtol=0.1, atol=0.1 * gradient.abs().max().item())


def measure(batch: int, rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of every variant and the median of its ratios to `float`, round by round."""
    check()
    steps = build_steps(batch)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - start)
    return {
        name: {
            "ms": 1e3 * statistics.median(values),
            "ratio": statistics.median(v / f for v, f in zip(values, seconds["float"], strict=True)),
        }
        for name, values in seconds.items()
    }


VARIANTS = ("float", "clusterq", "clusterq moving range", "eager", "torch.ao")


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_step(benchmark, variant):
    """One variant under pytest-benchmark; compare within one run."""
    steps = build_steps(32)
    if variant not in steps:
        pytest.skip("this torch has no torch.ao.quantization")
    benchmark.pedantic(steps[variant], rounds=5, warmup_rounds=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    # torch.ao announces its own retirement on each construction.
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    results = measure(arguments.batch, arguments.rounds)
    print(f"training step, ResNet-20, W4A4, batch {arguments.batch}, float32, {arguments.threads} threads")
    print(f"{'variant':22} {'ms':>9} {'ratio':>7}")
    for name, row in results.items():
        print(f"{name:22} {row['ms']:9.1f} {row['ratio']:7.2f}")
    if arguments.json is not None:
        record = {
            "bench": "steps",
            "torch": torch.__version__,
            "machine": platform.processor() or platform.machine(),
            "batch": arguments.batch,
            "threads": arguments.threads,
            "rounds": arguments.rounds,
            "results": results,
        }
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
