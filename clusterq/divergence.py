"""Where in a network numbers stopped being finite: one pass after the fact, for the message of a diverged run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def first_nonfinite(network: nn.Module, images: Tensor) -> str:
    """The first place in execution order that is NaN or infinite, in words; empty when there is none to be seen.

    What a network raises on the images passes unchanged.

    Args:
        network: any network; its mode is kept.
        images: [N, C, H, W] that it takes.
    """
    found: list[str] = []

    def look(name: str, part: str, value: Any) -> None:
        if found or not isinstance(value, Tensor) or not value.is_floating_point():
            return
        if not bool(torch.isfinite(value).all()):
            found.append(f"{part} of {f'layer {name}' if name else 'the network'}")

    def watch(name: str, module: nn.Module) -> list[Any]:
        def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            # After an operation between layers, such as a sum.
            for value in inputs:
                look(name, "the input", value)
            # A quantized layer has modules in it and a weight of its own, which is used before their outputs.
            for part, value in module.named_parameters(recurse=False):
                look(name, part, value)

        return [
            module.register_forward_pre_hook(before),
            module.register_forward_hook(lambda module, inputs, output: look(name, "the output", output)),
        ]

    if not bool(torch.isfinite(images).all()):
        return "the images themselves are NaN or infinite"
    handles: list[Any] = []
    try:
        for name, module in network.named_modules():
            handles += watch(name, module)
        network(images)
    finally:
        for handle in handles:
            handle.remove()
    return f"the first NaN or infinity is in {found[0]}" if found else ""
