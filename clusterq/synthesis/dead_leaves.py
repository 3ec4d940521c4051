"""Images of dead leaves: plain shapes of all sizes, each hiding what lies below it.

They have what noise of any spectrum lacks, edges and even surfaces, and share with photographs the statistics of
differences between pixels (Lee, Mumford and Huang 2001, "Occlusion models for natural images", IJCV 41); networks
learn from them what they do not learn from noise (Baradad et al. 2021, arXiv 2106.05963).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LEAVES = 80
# Radii as shares of the longer side, with a density of r^-3: images then look alike at every scale.
_SMALLEST, _LARGEST = 0.05, 0.6
# Deviations of the colours around a leaf's brightness, of the slope of its shading, and of the noise on all.
_COLOR, _SHADING, _NOISE = 0.4, 0.3, 0.1


def dead_leaves(shape: tuple[int, int, int, int], random: torch.Generator) -> Tensor:
    """[N, C, H, W] float32 on the CPU, variance 1: ellipses and rectangles of random place, size, turn and colour.

    Draws from `random`, a generator on the CPU.
    """
    count, channels, height, width = shape
    rows = torch.arange(height)[:, None] + 0.5
    columns = torch.arange(width)[None] + 0.5
    side = max(height, width)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=random)

    images = normal(count, channels, 1, 1).expand(shape)
    for _ in range(_LEAVES):
        top, left, size, turn, slenderness, corners = torch.rand(6, count, 1, 1, generator=random)
        # Inverse of the distribution function of r^-3 between both ends.
        radius = side * (_SMALLEST**-2 - size * (_SMALLEST**-2 - _LARGEST**-2)).rsqrt()
        # From a tenth outside to a tenth outside: the border is as full as the middle.
        down, right = rows - height * (1.2 * top - 0.1), columns - width * (1.2 * left - 0.1)
        cos, sin = torch.cos(math.pi * turn), torch.sin(math.pi * turn)
        # [N, H, W] in units of the leaf's half-axes.
        along = (right * cos + down * sin) / radius
        across = (down * cos - right * sin) / (radius * (0.4 + 0.6 * slenderness))
        rectangle = torch.maximum(along.abs(), across.abs()) < 0.9
        inside = torch.where(corners < 0.5, along.square() + across.square() < 1, rectangle)
        slopes = _SHADING * normal(2, count, 1, 1)
        color = normal(count, 1, 1, 1) + _COLOR * normal(count, channels, 1, 1)
        images = torch.where(inside[:, None], color + (slopes[0] * along + slopes[1] * across)[:, None], images)
    images = images + _NOISE * normal(*shape)
    return images / images.std()
