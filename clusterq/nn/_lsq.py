"""What quantizers with learned steps share.

LSQ (Esser et al. 2020, arXiv 1902.08153): the gradient of a step is multiplied by `1 / sqrt(n * quant_max)` (section
2.2), n the number of values that share it: a channel's weights, a sample's features.
"""

from __future__ import annotations

import math

from torch import Tensor

# Scale, zero point, quant_min, quant_max.
QuantizationParameters = tuple[Tensor, Tensor, int, int]


def gradient_factor(x: Tensor, quant_max: int) -> float:
    """The factor for a step that the values of one entry of axis 0 share."""
    sharing = x.numel() // max(x.size(0), 1) if x.dim() > 0 else 1
    return 1.0 / math.sqrt(max(sharing, 1) * quant_max)
