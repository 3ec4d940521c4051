"""Cost of the whole alignment loss on the teacher: forward and backward to the images, with it and without it.

    python bench/bench_alignment.py [--threads 2] [--repeats 15] [--quick] [--json FILE]
    pytest bench/bench_alignment.py --benchmark-only

ResNet-20 on 32x32 images, float32. First the loss alone, given the inputs of all BatchNorm layers: statistics, BN
alignment, class alignment and diversity of the 12 deepest layers, and the gradients of the inputs.

- `clusterq`: `instance_statistics_list` and `AlignmentTargets`.
- `eager`: `x.mean` and `x.var`, as published code has it, and the same loss in a dozen torch operations and two
  merges of ours (`eager_losses.py`).
- `squares`: the same with the variance as mean of the centred squares, which torch computes several times as fast.
- `compiled`: `torch.compile` of `eager`.

Then the teacher. `plain` is the same network with ordinary BatchNorm in evaluation mode and
cross-entropy alone; the others add BN alignment, class alignment and diversity enhancement with the moving average of
the centroids:

- `clusterq`: `SynthesisObjective`, statistics from the fused BatchNorm.
- `hooks`: forward hooks that keep the BatchNorm inputs, mean and variance by torch, one-hot products per layer.
- `loops`: the published arrangement: hooks, batch statistics, a Python loop over samples and layers.

On a machine that does other work a figure of 2 threads is the wait for the slower one: compare with `--threads 1`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from eager_losses import bns_loss, channel_weights, class_alignment_loss, class_statistics
from harness import Bar, Case, main
from torch import Tensor, nn

from clusterq import ops
from clusterq.config import SynthesisConfig
from clusterq.networks import resnet20
from clusterq.synthesis import SynthesisObjective, Teacher, semantic_start

CLASSES = 10
CONFIG = SynthesisConfig(
    bns_weight=1.0, alignment_weight=0.9, diversity_weight=0.6, class_reduction="mean", assignment="label",
    autocast=False,
)  # fmt: skip
EAGER = Bar("eager", 10.0)
# Images and labels -> the loss, detached.
Step = Callable[[Tensor, Tensor], Tensor]


def build_network() -> nn.Module:
    """ResNet-20 with running statistics away from their initial values."""
    torch.manual_seed(0)
    network = resnet20()
    network.train()
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(16, 3, 32, 32))
    return network.eval().requires_grad_(False)


def plain_step(network: nn.Module) -> Step:
    def step(images: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(network(images), labels)
        loss.backward()
        return loss.detach()

    return step


def clusterq_objective(
    network: nn.Module, images: Tensor, labels: Tensor, config: SynthesisConfig = CONFIG
) -> SynthesisObjective:
    objective = SynthesisObjective(Teacher(network, (3, 32, 32)), config, seed=0)
    objective.initialise_centroids([(images.detach(), labels)])
    return objective


def clusterq_step(objective: SynthesisObjective) -> Step:
    def step(images: Tensor, labels: Tensor) -> Tensor:
        terms = objective(images, labels)
        terms.total.backward()
        objective.update_centroids(terms)
        return terms.total.detach()

    return step


class Hooked:
    """A network whose BatchNorm inputs are kept by hooks, with centroids per semantic layer."""

    def __init__(self, network: nn.Module) -> None:
        self.network = copy.deepcopy(network)
        self.inputs: list[Tensor] = []
        self.norms: list[nn.BatchNorm2d] = []
        for module in self.network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_pre_hook(self._keep)
        with torch.no_grad():
            self.network(torch.zeros(1, 3, 32, 32))
        self.first = semantic_start(len(self.norms))
        width = [norm.num_features for norm in self.norms]
        self.mean = [torch.randn(CLASSES, c) for c in width]
        self.std = [torch.rand(CLASSES, c) for c in width]

    @property
    def layers(self) -> int:
        """How many layers carry centroids."""
        return len(self.norms) - self.first

    def _keep(self, module: nn.Module, args: tuple[Tensor]) -> None:
        self.inputs.append(args[0])
        if len(self.norms) < len(self.inputs):
            self.norms.append(module)

    def forward(self, images: Tensor) -> Tensor:
        self.inputs.clear()
        return self.network(images)

    def bns(self) -> Tensor:
        loss = torch.zeros(())
        for x, norm in zip(self.inputs, self.norms, strict=True):
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
            loss = loss + (mean - norm.running_mean).square().sum()
            loss = loss + (var.sqrt() - norm.running_var.sqrt()).square().sum()
        return loss


def hooks_step(hooked: Hooked, config: SynthesisConfig = CONFIG) -> Step:
    def step(images: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(hooked.forward(images), labels) + config.bns_weight * hooked.bns()
        share = F.one_hot(labels, CLASSES).float()
        share = share / share.sum(0).clamp(min=1)
        moved = []
        for layer in range(hooked.first, len(hooked.inputs)):
            x = hooked.inputs[layer]
            mean = share.T @ x.mean((2, 3))
            std = (share.T @ x.square().mean((2, 3)) - mean.square()).clamp(min=1e-10).sqrt()
            target_mean, target_std = hooked.mean[layer], hooked.std[layer]
            align = F.mse_loss(mean, target_mean) + F.mse_loss(std, target_std)
            noisy_mean = target_mean + config.noise_mean * torch.randn_like(target_mean)
            noisy_std = target_std + config.noise_spread * torch.randn_like(target_std)
            diverse = F.mse_loss(mean, noisy_mean) + F.mse_loss(std, noisy_std)
            loss = loss + (config.alignment_weight * align + config.diversity_weight * diverse) / hooked.layers
            moved.append((mean.detach(), std.detach()))
        loss.backward()
        for layer, (mean, std) in enumerate(moved, hooked.first):
            hooked.mean[layer].lerp_(mean, 1 - config.decay)
            hooked.std[layer].lerp_(std, 1 - config.decay)
        return loss.detach()

    return step


def loops_step(hooked: Hooked, config: SynthesisConfig = CONFIG) -> Step:
    def step(images: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(hooked.forward(images), labels) + config.bns_weight * hooked.bns()
        means = [x.mean((0, 2, 3)) for x in hooked.inputs]
        stds = [x.var((0, 2, 3), correction=0).sqrt() for x in hooked.inputs]
        for label in labels:
            k = int(label)
            for layer in range(hooked.first, len(hooked.inputs)):
                loss = loss + F.mse_loss(means[layer], hooked.mean[layer][k])
                loss = loss + F.mse_loss(stds[layer], hooked.std[layer][k])
        loss.backward()
        return loss.detach()

    return step


def check(network: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Before anything is timed: equal losses, gradients to the images, and moved centroids.

    Without the noise of the diversity term, which is drawn anew. `hooks` on the images themselves; `loops`, which has
    no class statistics, on a batch of one class, where those of the batch are those of the class.
    """
    # Weights that make all terms about equally large, so that none hides behind another.
    quiet = replace(CONFIG, noise_mean=0.0, noise_spread=0.0, bns_weight=0.01)
    objective, hooked = _same_centroids(network, images, labels, quiet)
    _compare(clusterq_step(objective), hooks_step(hooked, quiet), images, labels)
    assert objective.bank is not None
    torch.testing.assert_close(torch.cat(hooked.mean[hooked.first :], 1), objective.bank.mean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(torch.cat(hooked.std[hooked.first :], 1), objective.bank.spread, rtol=1e-3, atol=1e-3)
    # A sum over images and layers, where ours has the mean of both.
    loops = replace(quiet, alignment_weight=float(len(images) * hooked.layers), diversity_weight=0.0)
    objective, hooked = _same_centroids(network, images, labels, loops)
    _compare(clusterq_step(objective), loops_step(hooked, loops), images, torch.full_like(labels, 3))


def _same_centroids(
    network: nn.Module, images: Tensor, labels: Tensor, config: SynthesisConfig
) -> tuple[SynthesisObjective, Hooked]:
    """Both with centroids away from the statistics of the images."""
    objective, hooked = clusterq_objective(network, images, labels, config), Hooked(network)
    assert objective.bank is not None
    table = objective.bank.table
    table.add_(torch.randn(table.shape, generator=torch.Generator().manual_seed(1)))
    width = [norm.num_features for norm in hooked.norms[hooked.first :]]
    hooked.mean[hooked.first :] = objective.bank.mean.clone().split(width, 1)
    hooked.std[hooked.first :] = objective.bank.spread.clone().split(width, 1)
    return objective, hooked


def _compare(ours: Step, theirs: Step, images: Tensor, labels: Tensor) -> None:
    results = []
    for step in (ours, theirs):
        leaf = images.detach().clone().requires_grad_()
        results.append((step(leaf, labels), leaf.grad))
    (loss, grad), (want_loss, want_grad) = results
    torch.testing.assert_close(loss, want_loss, rtol=1e-3, atol=1e-3)
    # All together: single values differ where rounding puts an activation on the other side of ReLU's zero.
    difference = ((grad - want_grad).norm() / want_grad.norm()).item()
    if not difference < 1e-3:
        raise AssertionError(f"gradients to the images differ by {difference:.1e} of their norm")


def teacher_case(batch: int) -> Case:
    network = build_network()
    images = torch.randn(batch, 3, 32, 32, requires_grad=True)
    labels = torch.arange(batch) % CLASSES
    check(network, images, labels)
    steps = {
        "clusterq": clusterq_step(clusterq_objective(network, images, labels)),
        "plain": plain_step(network),
        "hooks": hooks_step(Hooked(network)),
        "loops": loops_step(Hooked(network)),
    }

    def call(step: Step) -> None:
        images.grad = None
        step(images, labels)

    return Case(
        "teacher forward and backward, ResNet-20",
        f"batch {batch}",
        {name: partial(call, step) for name, step in steps.items()},
        bar=Bar("plain", 1.08, "at most x of the time"),
    )


def layer_inputs(batch: int) -> tuple[list[Tensor], list[nn.BatchNorm2d]]:
    """What enters every BatchNorm of ResNet-20, as leaves, and the layers."""
    hooked = Hooked(build_network())
    with torch.no_grad():
        hooked.forward(torch.randn(batch, 3, 32, 32))
    return [x.clone().requires_grad_() for x in hooked.inputs], hooked.norms


def loss_case(batch: int, num_classes: int, *, compiled: bool, bar: Bar | None = EAGER) -> Case:
    torch.manual_seed(0)
    xs, norms = layer_inputs(batch)
    channels = [x.shape[1] for x in xs]
    running = [torch.cat([getattr(norm, f"running_{name}") for norm in norms]) for name in ("mean", "var")]
    first = semantic_start(len(xs))
    offset, labels = sum(channels[:first]), torch.arange(batch) % num_classes
    goals = torch.rand(2, 2, num_classes, sum(channels) - offset)
    weights = (CONFIG.alignment_weight, CONFIG.diversity_weight)
    targets = ops.AlignmentTargets(channels, *running, reduction="mean", first=first, class_reduction="mean")
    classes = ops.ClassTargets(labels, *goals, weights, average=True)
    columns, class_columns = channel_weights(channels), channel_weights(channels[first:])

    def clusterq_loss() -> Tensor:
        return targets(*ops.instance_statistics_list(xs), classes).total

    def eager_loss(squares: bool = False) -> Tensor:
        means = [x.mean((2, 3)) for x in xs]
        mean = torch.cat(means, 1)
        if squares:
            centred = (x - m[:, :, None, None] for x, m in zip(xs, means, strict=True))
            var = torch.cat([d.square().mean((2, 3)) for d in centred], 1)
        else:
            var = torch.cat([x.var((2, 3), correction=0) for x in xs], 1)
        loss = bns_loss(mean, var, *running, columns)
        found = class_statistics(mean[:, offset:], var[:, offset:], labels, num_classes)
        rows = found.classes.clamp(min=0)
        for weight, goal_mean, goal_spread in zip(weights, *goals, strict=True):
            loss = loss + weight * class_alignment_loss(found, goal_mean[rows], goal_spread[rows], class_columns)
        return loss

    def call(loss: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(), xs)

    torch.testing.assert_close(clusterq_loss(), eager_loss(), rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(call(clusterq_loss), call(eager_loss), strict=True):
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm()
    losses = {"clusterq": clusterq_loss, "eager": eager_loss, "squares": partial(eager_loss, squares=True)}
    if compiled:
        losses["compiled"] = torch.compile(eager_loss)
    return Case(
        "alignment loss and its gradients, all layers of ResNet-20",
        f"batch {batch}, {num_classes} classes",
        {name: partial(call, loss) for name, loss in losses.items()},
        bar,
    )


def cases(quick: bool) -> Iterator[Case]:
    for num_classes in (10, 100):
        yield loss_case(10 if quick else 256, num_classes, compiled=not quick)
    yield teacher_case(10 if quick else 128)


@pytest.mark.parametrize("contestant", ["clusterq", "plain", "hooks", "loops"])
def test_teacher_step(benchmark: Any, contestant: str) -> None:
    teacher_case(32).benchmark(benchmark, contestant)


if __name__ == "__main__":
    names = ("batch_norm_instance_statistics", "batch_norm_statistics_backward", "alignment_loss")
    main("alignment", __doc__, cases, ops=names, repeats=15)
