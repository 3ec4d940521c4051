"""Losses on BatchNorm statistics in three lines, inside anybody's training loop: DeepInversion's and the squared one.

    python examples/deep_inversion.py

Images are optimised until the statistics of a network's BatchNorm inputs are those that it remembers. First the losses
and the gradients of the images have to be equal to those of forward hooks and torch operations, as usually published;
then a few steps of optimisation, and the time of one with either.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clusterq.nn import replace_batch_norm
from clusterq.ops import alignment_loss
from clusterq.testing import interleave


def build_network() -> nn.Module:
    """A small network that has seen data of two kinds of channels."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in ((3, 16), (16, 32), (32, 64)):
        layers += [
            nn.Conv2d(before, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    with torch.no_grad():
        for _ in range(60):
            network(torch.randn(32, 3, 32, 32) * torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1) + 0.3)
    return network.eval().requires_grad_(False)


def hooked(network: nn.Module, images: Tensor, distance: Callable[[Tensor, Tensor], Tensor], std: bool) -> Tensor:
    """The loss as it is usually written."""
    losses: list[Tensor] = []

    def hook(module: nn.Module, inputs: tuple[Tensor], _: Tensor) -> None:
        (x,) = inputs
        mean, var = x.mean((0, 2, 3)), x.transpose(0, 1).flatten(1).var(1, correction=0)
        spread, remembered = (var.sqrt(), module.running_var.sqrt()) if std else (var, module.running_var)
        losses.append(distance(mean, module.running_mean) + distance(spread, remembered))

    handles = [m.register_forward_hook(hook) for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    logits = network(images)
    for handle in handles:
        handle.remove()
    return sum(losses, logits.new_zeros(()))


def main() -> None:
    plain, network = build_network(), build_network()
    images = torch.randn(64, 3, 32, 32, requires_grad=True)

    recorder = replace_batch_norm(network)

    def deep_inversion() -> Tensor:
        with recorder.record() as layers:
            network(images)
        return alignment_loss(layers, reduction="norm", spread="var").total

    def squared() -> Tensor:
        with recorder.record() as layers:
            network(images)
        return alignment_loss(layers, reduction="sum", spread="std").total

    def squares(a: Tensor, b: Tensor) -> Tensor:
        return F.mse_loss(a, b, reduction="sum")

    def norm(a: Tensor, b: Tensor) -> Tensor:
        return torch.linalg.vector_norm(a - b)

    for name, ours, theirs in (
        ("DeepInversion", deep_inversion, lambda: hooked(plain, images, norm, std=False)),
        ("Squares of means and deviations", squared, lambda: hooked(plain, images, squares, std=True)),
    ):
        got, want = ours(), theirs()
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        got_slope, want_slope = (torch.autograd.grad(loss, images)[0] for loss in (got, want))
        error = ((got_slope - want_slope).norm() / want_slope.norm()).item()
        assert error < 1e-3, error
        print(f"{name}: loss {got.item():.4f} and gradients are equal to those of hooks")

    optimizer = torch.optim.Adam([images], lr=0.1)
    first = squared().item()
    for _ in range(30):
        optimizer.zero_grad()
        loss = squared()
        loss.backward()
        optimizer.step()
    last = squared().item()
    assert last < 0.2 * first, (first, last)
    print(f"30 steps of Adam: {first:.3f} to {last:.3f}")

    times = interleave(
        {
            "clusterq": lambda: torch.autograd.grad(deep_inversion(), images),
            "hooks": lambda: torch.autograd.grad(hooked(plain, images, norm, std=False), images),
        },
        rounds=9,
    )
    print(
        f"forward and backward with the loss: {times['hooks'].ratio_to(times['clusterq']):.1f} times as fast as hooks"
    )


if __name__ == "__main__":
    main()
