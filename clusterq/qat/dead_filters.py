"""Dead filters stay dead: a limit on their gradients, beside the one on the gradient of all parameters together.

BatchNorm divides by `sqrt(running_var + eps)`. Behind a filter that puts out next to nothing that is `sqrt(eps)`, a
gain of some hundreds, and the filter's gradient is as large while its weights are next to nothing: one step of a size
that suits all others brings the channel back to life, a hundred times as loud as its neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clusterq.nn.layers import QuantizedConv2d, QuantizedLinear

# Guards of the arithmetic, not settings. A filter is dead whose weights are so much smaller than those of its layer's
# largest (in ResNet-20 the smallest has 0.007 of that), and its gradient is at most so many times its size.
_DEAD = 1e-3
_LARGEST_GRADIENT = 2.0


class DeadFilters:
    """Keeps the gradients of dead filters, and of their steps, below twice what filter or step were at the start.

    Args:
        student: network from `clusterq.prepare`, calibrated.
    """

    def __init__(self, student: nn.Module) -> None:
        # Parameter -> the limit for every row, infinite for filters that live; nothing of layers without dead ones.
        self._limits: dict[nn.Parameter, Tensor] = {}
        for module in student.modules():
            if isinstance(module, (QuantizedConv2d, QuantizedLinear)):
                norms = _row_norms(module.weight.detach())
                dead = norms < _DEAD * norms.max()
                if bool(dead.any()):
                    for parameter in (module.weight, *module.weight_quantizer.parameters()):
                        assert isinstance(parameter, nn.Parameter)
                        size = _row_norms(parameter.detach())
                        self._limits[parameter] = torch.where(dead, _LARGEST_GRADIENT * size, torch.inf)

    @torch.no_grad()
    def limit_(self) -> None:
        """Scales the gradients that are too large, in place."""
        for parameter, limit in self._limits.items():
            if parameter.grad is not None:
                norms = _row_norms(parameter.grad).clamp_min(torch.finfo(limit.dtype).tiny)
                factor = (limit / norms).clamp_max(1)
                parameter.grad.mul_(factor.reshape([-1] + [1] * (parameter.dim() - 1)))


def _row_norms(tensor: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(tensor.reshape(len(tensor), -1), dim=1)
    return norms
