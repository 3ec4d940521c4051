"""Which layers have a quantized form, and the reason of those that have none."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from clusterq.nn.same_padding import SamePadConv2d
from clusterq.qat.trace import TRACE_ERRORS

_CONVOLUTIONS = (nn.Conv2d, SamePadConv2d)
_OWN_FORWARD = "has a forward of its own"


def recognise_convolutions(student: nn.Module) -> None:
    """Convolutions of a class of their own become `nn.Conv2d` or `SamePadConv2d` where they compute the same, in place.

    That is told by trying, on images of sizes with every remainder of the stride: padding "same" of TensorFlow has
    many forms in PyTorch (timm's Conv2dSame is one).
    """
    for module in student.modules():
        if isinstance(module, nn.Conv2d) and unsupported_layer(module) == _OWN_FORWARD and _holds_weight(module):
            for cls in _CONVOLUTIONS:
                if _computes(module, cls):
                    module.__class__ = cls
                    break


def _holds_weight(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    known = isinstance(weight, nn.Parameter) and not isinstance(weight, nn.UninitializedParameter)
    return known and not hasattr(module, "parametrizations")


@torch.no_grad()
def _computes(module: nn.Conv2d, cls: type[nn.Conv2d]) -> bool:
    """Whether the module gives what the forward of `cls` would give with its parameters and settings."""
    generator = torch.Generator().manual_seed(0)
    reach = max(d * (k - 1) + 1 for d, k in zip(module.dilation, module.kernel_size, strict=True))
    for i in range(2 * max(module.stride) + 1):
        # Neither side is ever smaller than the kernel, and both meet every remainder of the stride.
        shape = (1, module.in_channels, reach + i, reach + 2 * max(module.stride) - i)
        x = torch.randn(shape, generator=generator).to(module.weight)
        try:
            found = module(x)
        except TRACE_ERRORS:
            return False
        expected = cls._conv_forward(module, x, module.weight, module.bias)
        if not isinstance(found, Tensor) or found.shape != expected.shape:
            return False
        # A zero in another place moves the border by as much as the weights are large; rounding does by much less.
        if not torch.allclose(found, expected, rtol=0, atol=1e-2 * float(expected.abs().max())):
            return False
    return True


def unsupported_layer(module: nn.Module) -> str | None:
    """Empty for a Conv2d or Linear that can be quantized, the reason for one that cannot, None for any other module."""
    if isinstance(module, nn.Conv2d):
        own = type(module).forward is not nn.Conv2d.forward or type(module)._conv_forward is not nn.Conv2d._conv_forward
    elif isinstance(module, nn.Linear):
        own = type(module).forward is not nn.Linear.forward
    else:
        return None
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "its weight is read by nn.MultiheadAttention"
    if own and type(module) is not SamePadConv2d:
        return _OWN_FORWARD
    if hasattr(module, "parametrizations") or not isinstance(module._parameters.get("weight"), nn.Parameter):
        return "its weight is computed from other parameters"
    if isinstance(module.weight, nn.UninitializedParameter):
        return "its weight is not initialised yet"
    if not module.weight.is_floating_point():
        return f"its weight is {module.weight.dtype}"
    return ""


def unsupported_other(module: nn.Module) -> str:
    """The reason when a layer of torch.nn holds a matrix or is an activation function without a quantized form."""
    package = type(module).__module__
    if package == "torch.nn.modules.activation" and not isinstance(module, nn.MultiheadAttention):
        return "no quantizer for this activation function"
    matrix = any(p is not None and p.dim() > 1 for p in module._parameters.values())
    if package.startswith("torch.nn.modules.") and matrix and not isinstance(module, nn.LayerNorm):
        return "no quantized form of this layer"
    return ""
