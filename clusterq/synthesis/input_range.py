"""The range of a network's images, found from what its first BatchNorm layer remembers.

Images begin as noise of mean 0 and deviation 1, which is what most networks are given. One that takes pixels of 0 to
255 would get noise that is black to it, and Adam, whose steps have a fixed length, would never leave it. The layers in
front of the first BatchNorm are linear, or nearly so: what that layer remembers says where images lie and how far they
spread.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from clusterq.synthesis.recipes import ImageRecipe, initial_images

if TYPE_CHECKING:
    from clusterq.synthesis.teacher import Teacher

# The middle of the kinds of noise in preset default.
_NOISE = ImageRecipe(roughness=0.75, contrast=0.25, temperature=1.0, shift=0)
_IMAGES, _ROUNDS = 32, 6
# Channels of less than this share of the largest variance are dead: they say nothing.
_DEAD = 1e-8


class InputRange(NamedTuple):
    """Where the images of a network lie: `center + scale * noise`, the noise with mean 0 and variance 1."""

    center: float = 0.0
    scale: float = 1.0

    def apply(self, noise: Tensor) -> Tensor:
        """Images in the network's input space."""
        return noise if self == (0.0, 1.0) else self.center + self.scale * noise


class _Response(NamedTuple):
    """Of the first BatchNorm layer to images: mean and variance of its input, [C] float64, of channels that live."""

    mean: Tensor
    var: Tensor


@torch.no_grad()
def find_input_range(teacher: Teacher) -> InputRange:
    """One center and one scale for all channels of the image, such as (128, 64) for pixels of 0 to 255.

    The scale is a power of two and the center a multiple of it: the estimate is no better than that, and networks whose
    images are normalised, if only roughly, have exactly (0, 1). So have those whose first BatchNorm layer says nothing:
    all of its channels constant, or no range found that fits it better.
    """
    channels = teacher.channels[0]
    var = teacher.running_var[:channels].double()
    live = var > _DEAD * var.max()
    if not bool(live.any()):
        return InputRange()
    goal = _Response(teacher.running_mean[:channels].double()[live], var[live])
    units = (goal.var + teacher.eps[:channels].double()[live]).rsqrt()
    noise = initial_images(_NOISE, (_IMAGES, *teacher.input_shape), torch.Generator().manual_seed(0))
    noise = noise.to(teacher.device, teacher.dtype)

    def respond(center: float, scale: float) -> _Response:
        output = teacher(center + scale * noise)
        mean, inner = (part[:, :channels].double()[:, live] for part in (output.mean, output.var))
        return _Response(mean.mean(0), inner.mean(0) + mean.var(0, correction=0))

    def misfit(found: _Response, ratio: Tensor) -> float:
        return float(((found.mean - goal.mean) * units).square().mean() + ratio.square().mean())

    best, least, center, scale = InputRange(), math.inf, 0.0, 1.0
    for _ in range(_ROUNDS):
        found = respond(center, scale)
        ratio = 0.5 * torch.log(goal.var / found.var)
        error = misfit(found, ratio)
        # Also ends the search where the images fill the range of floating-point numbers, or no image moves the layer.
        if not error < least:
            break
        best, least = InputRange(center, scale), error
        # Where brighter images move the layer, and by how much in all: least squares for one number.
        slope = (respond(center + scale, scale).mean - found.mean) * units
        wanted = (goal.mean - found.mean) * units
        steepness = float(slope.square().sum())
        if steepness > 0:
            center += scale * float((slope * wanted).sum()) / steepness
        scale *= math.exp(float(ratio.mean()))
    power = 2.0 ** round(math.log2(best.scale))
    return InputRange(power * round(best.center / power), power)
