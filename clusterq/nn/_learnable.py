"""The forward of learnable fake-quantize modules, shared by the drop-ins for torch.ao and torchao."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clusterq import ops
from clusterq.nn._observed import Observed


class LearnableObserved(Observed):
    """Mixin: host flags and forward of `_LearnableFakeQuantize`; see `Observed`."""

    if TYPE_CHECKING:
        eps: Tensor
        use_grad_scaling: bool
    _OBSERVER_FLAG = "static_enabled"

    def toggle_observer_update(self, enabled: bool = True) -> Any:
        self._observing = bool(enabled)
        return super().toggle_observer_update(enabled)  # type: ignore[misc]

    def toggle_fake_quant(self, enabled: bool = True) -> Any:
        self._quantizing = bool(enabled)
        return super().toggle_fake_quant(enabled)  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        """x on the grid, with LSQ gradients for scale and zero point where they learn; shape and dtype of x."""
        symmetric = self.qscheme in (torch.per_tensor_symmetric, torch.per_channel_symmetric)
        with torch.no_grad():
            if self._observing:
                self._observe(x)
            else:
                self.scale.clamp_(min=self.eps)
            if self._quantizing and symmetric:
                self.zero_point.zero_()
        if not self._quantizing:
            return x
        limits = (self.quant_min, self.quant_max)
        if not (self.scale.requires_grad or self.zero_point.requires_grad):
            return ops.fake_quantize(x, self.scale.detach().clone(), self.zero_point, *limits, axis=self._axis)
        factor = 1.0
        if self.use_grad_scaling:
            # An empty x has no gradient to scale.
            factor = (max(x.numel(), 1) * self.quant_max) ** -0.5
        # Copies: backward must see these values, whatever happens to the parameters until then.
        scale, zero_point = self.scale.clone(), self.zero_point.clone()
        return ops.fake_quantize(x, scale, zero_point, *limits, axis=self._axis, gradient="learned", grad_factor=factor)
