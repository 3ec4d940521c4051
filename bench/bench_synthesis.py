"""Images made per second: a step of preset default's bank against the same step in eager float32 PyTorch.

    python bench/bench_synthesis.py [--threads 2] [--repeats 15] [--quick] [--json FILE]
    pytest bench/bench_synthesis.py --benchmark-only

ResNet-20, 128 images of 32x32: forward, cross-entropy, BatchNorm alignment of all layers, backward to the images, Adam.
A bank takes a fixed number of such steps, so the ratio of times is that of images per second.

- `clusterq`: `BankSource` as preset default has it, bfloat16 where the processor has instructions for it.
- `clusterq float32`: the same in float32.
- `eager`: hooks that keep the BatchNorm inputs, `x.mean` and `x.var`, torch's Adam.
- `compiled`: `torch.compile` of `eager`'s network and loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bench_alignment import Hooked, build_network
from harness import OURS as MAIN
from harness import Bar, Call, Case, main
from torch import Tensor, nn

from clusterq.config import SynthesisConfig, preset
from clusterq.precision import autocasts
from clusterq.synthesis import BankSource, Teacher

BATCH = 128
SHAPE = (3, 32, 32)
CONFIG = replace(preset("default").synthesis, num_images=BATCH, batch_size=BATCH, image_schedule="constant")
FLOAT32 = f"{MAIN} float32"
# No shift and the plain cross-entropy, so that one step has one result.
PLAIN = replace(CONFIG, autocast=False, shifted_share=0.0, ce_temperature=(1.0, 1.0))
Loss = Callable[[Tensor, Tensor], Tensor]


def source(network: nn.Module, config: SynthesisConfig) -> BankSource:
    return BankSource(Teacher(network, SHAPE), config, seed=0)


def bank_step(bank: BankSource) -> Call:
    return bank._train_step


def eager_loss(network: nn.Module) -> Loss:
    hooked = Hooked(network)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(hooked.forward(images), labels) + hooked.bns()

    return loss


def eager_step(loss: Loss, images: Tensor, labels: Tensor) -> Call:
    leaf = images.clone().requires_grad_()
    optimizer = torch.optim.Adam([leaf], lr=CONFIG.image_lr)

    def step() -> None:
        optimizer.zero_grad()
        loss(leaf, labels).backward()
        optimizer.step()

    return step


def check(network: nn.Module) -> None:
    """The gradient to the images of our step and of eager's, from the same images."""
    bank = source(network, PLAIN)
    leaf = bank.images().detach().clone().requires_grad_()
    eager_loss(network)(leaf, bank.labels()).backward()
    terms = bank.objective(own := bank.images().detach().clone().requires_grad_(), bank.labels())
    terms.total.backward()
    assert leaf.grad is not None and own.grad is not None
    difference = float((own.grad - leaf.grad).norm() / leaf.grad.norm())
    # All together: single values differ where rounding puts an activation on the other side of ReLU's zero.
    if not difference < 1e-3:
        raise AssertionError(f"gradients to the images differ by {difference:.1e} of their norm")


def step_case(*, compiled: bool) -> Case:
    network = build_network()
    check(network)
    ours = {MAIN: source(network, CONFIG), FLOAT32: source(network, replace(CONFIG, autocast=False))}
    images, labels = ours[MAIN].images().detach(), ours[MAIN].labels()
    steps: dict[str, Call] = {name: bank_step(bank) for name, bank in ours.items()}
    steps["eager"] = eager_step(eager_loss(network), images, labels)
    if compiled:
        steps["compiled"] = eager_step(torch.compile(eager_loss(network)), images, labels)
    computes = "bfloat16" if autocasts(torch.device("cpu"), CONFIG.autocast) else "float32"
    return Case(
        "step of a bank, ResNet-20",
        f"{BATCH} images",
        steps,
        bar=Bar("eager", 2.5),
        note=f"{MAIN} computes in {computes}",
        ours=(MAIN, FLOAT32),
    )


def cases(quick: bool) -> Iterator[Case]:
    yield step_case(compiled=not quick)


@pytest.mark.parametrize("contestant", [MAIN, FLOAT32, "eager"])
def test_step(benchmark: Any, contestant: str) -> None:
    step_case(compiled=False).benchmark(benchmark, contestant)


if __name__ == "__main__":
    names = ("batch_norm_instance_statistics", "batch_norm_statistics_backward", "alignment_loss")
    main("synthesis", __doc__, cases, ops=names, repeats=15)
