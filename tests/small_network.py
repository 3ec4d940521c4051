"""A network of four classes that trains in milliseconds, its weights, and a set to measure it on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

NETWORK = """
import torch.nn as nn

def make(classes=4):
    layers = [nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()]
    layers += [nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, classes))
"""
# As `--set` takes them.
FAST = [
    "synthesis.num_images=8",
    "synthesis.batch_size=8",
    "synthesis.image_steps=2",
    "finetune.steps=2",
    "finetune.batch_size=4",
]
MODEL = ["--model", "net.py:make", "--weights", "weights.pt", "--input-size", "8", "--normalization", "none"]


def network() -> nn.Module:
    """The network of `net.py` with untrained weights, statistics away from 0 and 1."""
    scope: dict[str, object] = {}
    exec(NETWORK, scope)
    model: nn.Module = scope["make"]()  # type: ignore[operator]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.2, 2)
    return model


def write_place(folder: Path, images: int = 24) -> nn.Module:
    """`net.py`, `weights.pt`, `other.pt` and `set.npz` in a folder; returns the network of `weights.pt`."""
    (folder / "net.py").write_text(NETWORK)
    torch.manual_seed(0)
    model, other = network(), network()
    torch.save(model.state_dict(), folder / "weights.pt")
    torch.save(other.state_dict(), folder / "other.pt")
    pixels = np.random.default_rng(0).integers(0, 256, (images, 8, 8, 1), dtype=np.uint8)
    np.savez(folder / "set.npz", images=pixels, labels=np.arange(images) % 4, classes=np.array(list("abcd")))
    return model
