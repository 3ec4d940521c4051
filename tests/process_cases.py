"""What several processes compute together, for tests: `python process_cases.py CASE RANK SIZE RENDEZVOUS OUTPUT`."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from small_network import network

from clusterq import ClusterQ, ClusterQConfig, preset
from clusterq.config import FinetuneConfig, QuantizationConfig, SynthesisConfig
from clusterq.processes import Processes, SharedBatchNorm2d

SHAPE = (1, 8, 8)


def teacher() -> torch.nn.Module:
    torch.manual_seed(0)
    return network().eval()


def bank() -> ClusterQConfig:
    synthesis = SynthesisConfig(
        num_images=30, batch_size=10, image_steps=6, image_lr=0.01, shifted_share=1.0, autocast=False
    )
    finetune = FinetuneConfig(steps=6, batch_size=12, calibration_images=12, autocast=False)
    return ClusterQConfig(QuantizationConfig(), synthesis, finetune)


def classes() -> ClusterQConfig:
    config = bank()
    synthesis = replace(config.synthesis, warmup_steps=2, alignment_weight=0.5, diversity_weight=0.2)
    return replace(config, synthesis=synthesis)


def stream() -> ClusterQConfig:
    """Preset paper: a generator in training, EMA ranges, class terms.

    The gradient of a bias before BatchNorm is zero but for rounding, and Adam makes whole steps of it, which show in
    evaluation mode: hence small ones.
    """
    config = preset("paper")
    synthesis = replace(
        config.synthesis, batch_size=12, warmup_steps=4, generator_width=8, latent_dim=6, generator_lr=1e-5
    )
    finetune = replace(config.finetune, steps=4, batch_size=12, calibration_images=12)
    return replace(config, synthesis=synthesis, finetune=finetune)


def conditional() -> ClusterQConfig:
    config = stream()
    return replace(config, synthesis=replace(config.synthesis, generator="conditional_norm", assignment="nearest"))


CONFIGS = {"bank": bank, "classes": classes, "stream": stream, "conditional": conditional}


def everything(case: str, group: Any = None, state: Any = None, after: int = 0) -> dict[str, Any]:
    """Images, student, centroids and losses of a whole run; with `after`, the state after so many steps of images."""
    states: list[Any] = []

    def after_step(phase: str, take: Callable[[], Any]) -> None:
        # Every process takes it, as part of it is exchanged.
        if phase == "synthesis" and len(states) < after:
            states.append(take())

    method = ClusterQ(
        teacher(), CONFIGS[case](), input_shape=SHAPE, process_group=group, after_step=after_step if after else None
    )
    source = method.synthesize(state=state)
    result = method.finetune()
    bank_ = source.objective.bank
    return {
        "images": result.images.detach(),
        "labels": result.labels,
        "student": {k: v.clone() for k, v in result.student.state_dict().items()},
        "centroids": {} if bank_ is None else bank_.state_dict(),
        "metrics": result.metrics,
        "state": states[-1] if states else None,
    }


def parts() -> None:
    """What the rest is built of, against one process that has all rows; raises AssertionError."""
    processes = Processes(dist.group.WORLD)
    rank, size = processes.rank, processes.size
    random = torch.Generator().manual_seed(1)
    for count in (5, 3, 2):
        whole = torch.randn(count, 3, 2, generator=random)
        shown = torch.full_like(whole, torch.nan)
        shown[processes.rows(count)] = whole[processes.rows(count)]
        processes.gather_(shown)
        assert torch.equal(shown, whole)
    assert processes.agree(7 * (rank == 1)) == 7

    # Unequal rows, a mean far from zero, something after the layer that is different for every row.
    x = (torch.randn(5, 3, 4, 6, generator=random, dtype=torch.float64) + 50).requires_grad_()
    factor = torch.randn(5, 3, 4, 6, generator=random, dtype=torch.float64)
    for affine in (True, False):
        alone = torch.nn.BatchNorm2d(3, affine=affine, dtype=torch.float64)
        shared = copy.deepcopy(torch.nn.Sequential(alone))
        SharedBatchNorm2d.convert_(shared, processes)
        for _ in range(2):
            wanted, rows = alone(x), processes.rows(5)
            own = x.detach()[rows].clone().requires_grad_()
            got = shared(own)
            torch.testing.assert_close(got, wanted[rows])
            (gradient,) = torch.autograd.grad((wanted.sin() * factor).sum(), x, retain_graph=True)
            (got.sin() * factor[rows]).sum().backward()
            torch.testing.assert_close(own.grad, gradient[rows], rtol=1e-9, atol=1e-12)
        if affine:
            (wanted.sin() * factor).sum().backward()
            shared.zero_grad()
            (shared(own.detach()).sin() * factor[rows]).sum().backward()
            processes.add_gradients_(shared.parameters())
            torch.testing.assert_close(shared[0].weight.grad, alone.weight.grad)
            torch.testing.assert_close(shared[0].bias.grad, alone.bias.grad)
            alone(x)
        torch.testing.assert_close(shared[0].state_dict(), alone.state_dict())
        assert torch.equal(shared.eval()(own), shared(own)) and size > 1

    linear = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(linear.weight, float(rank))
    processes.equalise_(linear)
    assert bool((linear.weight == 0).all())


def main(case: str, rank: str, size: str, rendezvous: str, output: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=int(rank), world_size=int(size))
    if case == "parts":
        return parts()
    start = Path(output).with_name("start.pt")
    state = torch.load(start, weights_only=False) if start.exists() else None
    torch.save(everything(case, dist.group.WORLD, state, after=5), f"{output}.{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
