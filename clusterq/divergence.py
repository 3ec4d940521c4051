"""Where in a network numbers stopped being finite: one pass after the fact, for the message of a diverged run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def first_nonfinite(network: nn.Module, images: Tensor) -> str:
    """The first place in execution order that is NaN or infinite, in words; empty when all of it is finite.

    Args:
        network: any network; its mode is kept.
        images: [N, C, H, W] that it takes.
    """
    if not bool(torch.isfinite(images).all()):
        return "the images themselves are NaN or infinite"
    found: list[str] = []

    def look(name: str, module: nn.Module, output: Any) -> None:
        if found:
            return
        for part, value in module.named_parameters(recurse=False):
            if not bool(torch.isfinite(value).all()):
                found.append(f"{part} of layer {name}")
                return
        if isinstance(output, Tensor) and output.is_floating_point() and not bool(torch.isfinite(output).all()):
            found.append(f"the output of layer {name}")

    def hook(name: str) -> Any:
        return lambda module, inputs, output: look(name, module, output)

    handles = [
        module.register_forward_hook(hook(name))
        for name, module in network.named_modules()
        if not any(module.children())
    ]
    try:
        network(images)
    finally:
        for handle in handles:
            handle.remove()
    return f"the first NaN or infinity is in {found[0]}" if found else ""
