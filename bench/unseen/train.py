"""Trains the networks of `networks.py` in floating point, seeded, on what this machine has, and writes what they need.

CIFAR-10: the first 8,000 of the 10,000 test images train, the last 2,000 are for `--data`. Pairs of digits: two of
scikit-learn's 8x8 digits side by side, each at a height of its own, one class per pair; the digits of the pairs that
train and of those that measure are different ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import networks
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from clusterq.data import DIGITS_HELD_OUT

TRAINED_ON, CIFAR10_EPOCHS, PAIRS_EPOCHS = 8_000, 20, 12
PAIRS = {"train": 10_000, "test": 2_000}
# Share of the channels of every BatchNorm of the network with dead channels, and of these those with a constant input.
DEAD, CONSTANT = 0.25, 0.5
_SMALL = 1e-6


@dataclass(frozen=True)
class Kind:
    """A network and its images.

    Attributes:
        build: makes it untrained; its name is the network's.
        what: for a table.
        data: `"cifar10"` or `"pairs"`.
        mean, std: of the pixels in 0..1, for each channel: the network gets (pixel - mean) / std.
        dead: whether some of its channels are killed half way through the training.
    """

    build: Callable[[], nn.Module]
    what: str
    data: str
    mean: float
    std: float
    dead: bool = False

    @property
    def name(self) -> str:
        return self.build.__name__

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return (3, 32, 32) if self.data == "cifar10" else (1, 16, 16)

    @property
    def input_range(self) -> str:
        low, high = (0 - self.mean) / self.std, (1 - self.mean) / self.std
        return f"{low:.4g}..{high:.4g}"


KINDS = (
    Kind(networks.preactivation, "pre-activation ResNet", "cifar10", 0.473, 0.251),
    Kind(networks.mobilenet, 'MobileNet-V2: ReLU6, TF padding "same"', "cifar10", 0.5, 0.5),
    Kind(networks.vgg, "VGG: biases, max pooling", "cifar10", 0.0, 1 / 255),
    Kind(networks.resnet, "ResNet, a quarter of the channels dead", "cifar10", 0.473, 0.251, dead=True),
    Kind(networks.densenet, "DenseNet, BatchNorm1d in the head", "cifar10", 0.0, 1.0),
    Kind(networks.efficientnet, "EfficientNet: SiLU, squeeze-excite", "cifar10", 3 / 14, 1 / 14),
    Kind(networks.hundred, "plain, 100 classes", "pairs", 0.0, 1 / 16),
)


def cifar10(archive: Path, part: slice) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, 32, 32, 3] and labels int64 [N] of a part of the test images."""
    with np.load(archive) as data:
        return data["images"][part], data["labels"][part].astype(np.int64)


def pairs(split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [count, 16, 16, 1] and labels 10 * left + right; digits of `"test"` are none of `"train"`."""
    from sklearn.datasets import load_digits

    source = load_digits()
    random = np.random.default_rng(0)
    order = random.permutation(len(source.target))
    chosen = order[:DIGITS_HELD_OUT] if split == "test" else order[DIGITS_HELD_OUT:]
    random = np.random.default_rng(1 + (split == "test"))
    images = np.zeros((count, 16, 16, 1))
    labels = np.zeros(count, np.int64)
    for image in range(count):
        for left in (0, 8):
            digit, top = random.choice(chosen), random.integers(0, 9)
            images[image, top : top + 8, left : left + 8, 0] = source.images[digit]
            labels[image] = 10 * labels[image] + source.target[digit]
    return (images * (255 / 16)).round().astype(np.uint8), labels


def samples(kind: Kind, archive: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, H, W, C] and labels of `"train"` or `"test"`."""
    if kind.data == "pairs":
        return pairs(split, PAIRS[split])
    return cifar10(archive, slice(None, TRAINED_ON) if split == "train" else slice(TRAINED_ON, None))


def _augmented(images: Tensor, fill: float, mirror: bool) -> Tensor:
    """Images [N, C, H, W], all moved by the same few pixels, and each mirrored half the time where `mirror`."""
    height, width = images.shape[2:]
    by = height // 8
    padded = functional.pad(images, (by,) * 4, value=fill)
    top, left = torch.randint(0, 2 * by + 1, (2,)).tolist()
    images = padded[:, :, top : top + height, left : left + width]
    if mirror:
        flip = torch.rand(len(images), 1, 1, 1) < 0.5
        images = torch.where(flip, images.flip(3), images)
    return images


class Killer:
    """Keeps a share of the channels of every BatchNorm behind a convolution dead.

    Half of them have gain and offset 0, as pruning leaves them; the other half an input that hardly differs from 0,
    with a running variance of 1e-12 or less, as channels whose filters weight decay shrank to nothing.
    """

    def __init__(self, network: nn.Module) -> None:
        self.channels: list[tuple[nn.Conv2d, _BatchNorm, Tensor, Tensor]] = []
        for conv, norm in pairwise(network.modules()):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, _BatchNorm):
                dead = norm.weight.detach().abs().argsort()[: round(DEAD * len(norm.weight))]
                constant = round(CONSTANT * len(dead))
                self.channels.append((conv, norm, dead[constant:], dead[:constant]))

    @torch.no_grad()
    def __call__(self) -> None:
        for conv, norm, removed, constant in self.channels:
            norm.weight[removed] = 0
            norm.bias[removed] = 0
            norms = conv.weight[constant].flatten(1).norm(dim=1)[:, None, None, None]
            conv.weight[constant] *= _SMALL / norms
            norm.running_mean[constant] = 0
            norm.running_var[constant] = _SMALL**2


def train(kind: Kind, archive: Path, *, seed: int, epochs: int | None = None, limit: int | None = None) -> nn.Module:
    """A trained network in evaluation mode: Adam with a one-cycle rate, batches of 64.

    Args:
        kind: the network.
        archive: CIFAR-10's test images.
        seed: of weights, order and augmentation.
        epochs, limit: fewer epochs, and images, than usual.
    """
    torch.manual_seed(seed)
    network = kind.build().train()
    raw, targets = samples(kind, archive, "train")
    pixels = torch.from_numpy(raw[:limit]).permute(0, 3, 1, 2).float() / 255
    images, labels = (pixels - kind.mean) / kind.std, torch.from_numpy(targets[:limit])
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2, weight_decay=1e-5, fused=True)
    epochs = epochs or (CIFAR10_EPOCHS if kind.data == "cifar10" else PAIRS_EPOCHS)
    batches = len(labels) // 64
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=epochs * batches)
    killer = None
    for epoch in range(epochs):
        if kind.dead and epoch == epochs // 2:
            killer = Killer(network)
        order = torch.randperm(len(labels))
        for chosen in order[: batches * 64].split(64):
            batch = _augmented(images[chosen], -kind.mean / kind.std, mirror=kind.data == "cifar10")
            loss = functional.cross_entropy(network(batch), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if killer is not None:
                killer()
    return network.eval()


def prepare(kind: Kind, archive: Path, folder: Path, *, seed: int, epochs: int | None, limit: int | None) -> None:
    """`NAME.safetensors` and the images to measure on, `DATA.npz`, in a folder; what is there is not made again."""
    folder.mkdir(parents=True, exist_ok=True)
    weights, data = folder / f"{kind.name}.safetensors", folder / f"{kind.data}.npz"
    if not data.is_file():
        images, labels = samples(kind, archive, "test")
        classes = np.array([str(i) for i in range(10 if kind.data == "cifar10" else 100)])
        np.savez(data, images=images[:limit], labels=labels[:limit], classes=classes)
    if not weights.is_file():
        network = train(kind, archive, seed=seed, epochs=epochs, limit=limit)
        save_file({k: v.contiguous() for k, v in network.state_dict().items()}, weights)
