"""How the images of a bank begin and what is asked of them: every chunk of images has a recipe of its own.

Images that match the BatchNorm statistics alone are all alike in what those statistics do not fix: how much of a
channel's variance lies between images, how sure the network is of them, how rough they are. A student trained on images
of one kind learns that kind. Measured on ResNet-20 and CIFAR-10 at W3A3 (`bench/LADDER.md`), chunks of different kinds
are worth more than more images or more steps of one kind.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from clusterq.config import SynthesisConfig
from clusterq.synthesis.dead_leaves import dead_leaves


@dataclass(frozen=True)
class ImageRecipe:
    """Of one chunk of images.

    Attributes:
        roughness: exponent a of the amplitude spectrum 1 / f^a of the noise that the images start from: 0 is white
            noise, about 1 the spectrum of natural images (Field 1987).
        contrast: standard deviation of the logarithm of an image's contrast at the start, and of its brightness; half
            of it for the brightness of single colours.
        temperature: T of the cross-entropy, taken of logits / T: the larger, the surer of its images the network is to
            be.
        shift: images move by up to so many pixels each way, and are mirrored half the time, before every look that the
            network takes at them; 0: neither.
        leaves: they start from dead leaves (`clusterq.synthesis.dead_leaves`) instead of noise, whatever `roughness`.
    """

    roughness: float
    contrast: float
    temperature: float
    shift: int
    leaves: bool = False


def draw_recipes(config: SynthesisConfig, count: int, random: torch.Generator) -> list[ImageRecipe]:
    """`count` recipes, each setting drawn evenly from its range in `config`; the shift is on for `shifted_share`.

    `leaves_share` of them, spread evenly, begin as dead leaves, and none of fewer than `1 / leaves_share`.
    """

    def within(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=random, dtype=torch.float64))

    return [
        ImageRecipe(
            roughness=within(*config.roughness),
            contrast=within(*config.contrast),
            temperature=within(*config.ce_temperature),
            shift=config.shift if within(0, 1) < config.shifted_share else 0,
            leaves=int((i + 1) * config.leaves_share) > int(i * config.leaves_share),
        )
        for i in range(count)
    ]


def initial_images(recipe: ImageRecipe, shape: tuple[int, int, int, int], random: torch.Generator) -> Tensor:
    """[N, C, H, W] float32 on the CPU: noise of the recipe's spectrum, or leaves, with variance 1; then contrast."""
    count, channels, height, width = shape
    images = dead_leaves(shape, random) if recipe.leaves else torch.randn(shape, generator=random)
    if recipe.roughness > 0 and not recipe.leaves:
        rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None]
        # The constant part gets the amplitude of the longest wave.
        frequency = torch.sqrt(rows**2 + columns**2).clamp_min(1 / max(height, width))
        spectrum = torch.fft.rfft2(images) * frequency**-recipe.roughness
        images = torch.fft.irfft2(spectrum, s=(height, width))
        images = images / images.std()
    if recipe.contrast > 0:
        contrast, brightness = torch.randn(2, count, 1, 1, 1, generator=random) * recipe.contrast
        color = torch.randn(count, channels, 1, 1, generator=random) * (recipe.contrast / 2)
        images = images * contrast.exp() + brightness + color
    return images


def shifted(images: Tensor, shift: int, random: torch.Generator, fill: float = 0.0) -> Tensor:
    """Images [N, C, H, W], all moved by the same random number of pixels and mirrored half the time.

    Pixels of value `fill` move in.
    Draws from `random`, a generator on the CPU; differentiable.
    """
    height, width = images.shape[2:]
    top, left = (int(torch.randint(0, 2 * shift + 1, (), generator=random)) for _ in range(2))
    moved = functional.pad(images, (shift,) * 4, value=fill)[:, :, top : top + height, left : left + width]
    return moved.flip(3) if bool(torch.rand((), generator=random) < 0.5) else moved
