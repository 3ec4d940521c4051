"""Ranges of fake-quantization: observed while training, read off a tensor, or searched for the least squared error.

Formulas, dtypes and layouts as in `fake_quant.py`. Scales, zero points and running ranges are float32, float64 for
float64 inputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from clusterq.ops import _fake_quant_reference as reference
from clusterq.ops._autograd import apply, transforming, wants_gradient
from clusterq.ops._checks import (
    FLOATING,
    check_device,
    check_integer,
    check_number,
    check_shape,
    check_tensor,
    compute_dtype,
)
from clusterq.ops._fake_quant_autograd import RULES, DelayedFakeQuantize, ObserveFakeQuantize
from clusterq.ops._fake_quant_checks import (
    ACTIVATIONS,
    GRADIENTS,
    SAVES,
    Activation,
    Save,
    check_choice,
    check_input,
    check_range,
    check_running,
    code_range,
    keeps_mask,
)
from clusterq.ops._fake_quant_ops import delayed_op, error_op, observe_op, range_op

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["finite_range", "mse_range", "observe_fake_quantize", "range_to_qparams"]


def observe_fake_quantize(
    x: Tensor,
    running_min: Tensor,
    running_max: Tensor,
    bits: int,
    *,
    momentum: float = 0.9,
    observe: bool = True,
    symmetric: bool = False,
    signed: bool = False,
    axis: int | None = None,
    gradient: Literal["clipped", "pass_through"] = "clipped",
    activation: Activation = "none",
    save: Save = "auto",
    delayed: bool = False,
    process_group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Moves a running range toward that of x in place, then fake-quantizes x with it; nothing waits for the device.

    NaN and infinities are left out of the range. `running_min` +inf and `running_max` -inf mean that nothing was seen:
    the first observation sets them. While nothing was seen, scale is 1 and the zero point is the code nearest to 0 (the
    middle code when symmetric).

    Args:
        x: any shape; float32, bfloat16, float16 or float64.
        running_min, running_max: one element (`axis` None) or one per channel of `axis`; float32, or float64 for
            float64 x.
        bits: 2 to 16; codes in [0, 2^bits - 1], with `signed` in [-2^(bits-1), 2^(bits-1) - 1].
        momentum: weight of the old value: `new = momentum * old + (1 - momentum) * current`.
        observe: False leaves the running range alone.
        symmetric: zero point in the middle of the codes.
        gradient: `"clipped"` to the range or `"pass_through"`; no gradient flows into the range.
        activation: `"relu"` or `"relu6"` is applied to x first.
        save: what is kept for backward, as in `fake_quantize`.
        delayed: x is quantized with the range as it was before x, which moves afterwards: one pass over x instead of
            two. Of use once the range has settled; the first x meets scale 1. With `observe` only; keeps a mask.
        process_group: the range of x is that over all processes of the group (two small numbers per range are
            exchanged); not with `delayed`.

    Returns y with shape and dtype of x, and the scale and zero point used, shaped like `running_min`. Raises ValueError
    or TypeError for a bad argument.
    """
    axis = check_input(x, axis, "x")
    check_choice(gradient, GRADIENTS[:2], "gradient")
    check_choice(activation, ACTIVATIONS, "activation")
    check_choice(save, SAVES, "save")
    check_number("momentum", momentum, 0, below=1)
    for running, name in ((running_min, "running_min"), (running_max, "running_max")):
        check_running(running, x, axis, compute_dtype(x.dtype), name)
    if running_max is running_min or _begins_where(running_min, running_max):
        raise ValueError("running_max is the same memory as running_min; wanted its own")
    low, high = code_range(bits, signed)
    differentiable = wants_gradient(x)
    if delayed:
        if not observe or process_group is not None:
            raise ValueError("delayed is True; wanted False without observe or with a process_group")
        if save == "input":
            raise ValueError("save is 'input'; wanted 'auto' or 'mask' with delayed, which keeps a mask")
        late = (x, running_min, running_max, low, high, momentum, symmetric, axis, activation, RULES[gradient])
        output = apply(DelayedFakeQuantize, *late) if differentiable else delayed_op(*late)
        return output[0], output[1], output[2]
    if observe and process_group is not None:
        low_end, high_end = range_op(x.detach(), axis, activation)
        seen = _shared_range(low_end, high_end, process_group)
        with torch.no_grad():
            reference.move_range_(running_min, running_max, *seen, momentum)
        observe = False
    arguments = (x, running_min, running_max, low, high, momentum, observe, symmetric, axis, activation)
    if differentiable:
        kept = "mask" if keeps_mask(x, save, gradient, activation) else "input"
        output = apply(ObserveFakeQuantize, *arguments, gradient, kept)
    else:
        output = observe_op(*arguments)
    return output[0], output[1], output[2]


def _begins_where(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors begin at the same element; only those with memory of their own are looked at."""
    traced = torch.compiler.is_compiling() or transforming()
    if traced or type(first) is not Tensor or type(second) is not Tensor or first.numel() == 0:
        return False
    return first.data_ptr() == second.data_ptr()


def _shared_range(low: Tensor, high: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """The least `low` and the greatest `high` in the group, one exchange."""
    ends = torch.stack((low, -high))
    torch.distributed.all_reduce(ends, torch.distributed.ReduceOp.MIN, group=group)
    return ends[0], -ends[1]


def finite_range(x: Tensor, *, axis: int | None = None, activation: Activation = "none") -> tuple[Tensor, Tensor]:
    """Smallest and largest finite element of activation(x), per tensor or channel of `axis`: two tensors [1] or [C].

    float32, float64 for float64 x; +inf and -inf where there is no finite element. Not differentiable.
    """
    axis = check_input(x, axis, "x")
    check_choice(activation, ACTIVATIONS, "activation")
    low, high = range_op(x.detach(), axis, activation)
    return low, high


def range_to_qparams(
    low: Tensor, high: Tensor, quant_min: int, quant_max: int, *, symmetric: bool = False
) -> tuple[Tensor, Tensor]:
    """Scale and zero point, shaped like `low`, of the ranges [low, high]; formulas: module `_fake_quant_reference`.

    `low` and `high` have one floating-point dtype; the results are float32, float64 for float64 ends, and detached.
    """
    check_range(quant_min, quant_max)
    check_tensor("low", low, FLOATING)
    check_tensor("high", high, (low.dtype,))
    check_shape("high", high, low.shape)
    check_device("high", high, low.device, "low")
    dtype = compute_dtype(low.dtype)
    ends = (low.detach().to(dtype), high.detach().to(dtype))
    return reference.range_to_qparams(*ends, quant_min, quant_max, symmetric)


@torch.no_grad()
def mse_range(
    x: Tensor,
    quant_min: int,
    quant_max: int,
    *,
    axis: int | None = None,
    symmetric: bool = False,
    candidates: int = 80,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point whose fake-quantization has the least squared error among shrunken min/max ranges.

    The range of x (finite elements, extended to contain 0) is multiplied by 1, (n-1)/n, ..., 1/n for n = `candidates`;
    the best factor is chosen per tensor or per channel of `axis`, the larger one among equals. All of x is used, in
    memory proportional to x. Returns two tensors, [1] or [C], float32 (float64 for float64 x).
    """
    axis = check_input(x, axis, "x")
    check_range(quant_min, quant_max)
    check_integer("candidates", candidates, 1)
    x = x.detach()
    low, high = range_op(x, axis, "none")
    factor = torch.arange(candidates, 0, -1, device=x.device, dtype=low.dtype).div_(candidates).unsqueeze(1)
    # An empty range is infinite: scaled by the factor it stays empty.
    scales, zero_points = reference.range_to_qparams(factor * low, factor * high, quant_min, quant_max, symmetric)
    best = error_op(x, scales, zero_points, quant_min, quant_max, axis).argmin(0, keepdim=True)
    return scales.gather(0, best).squeeze(0), zero_points.gather(0, best).squeeze(0)
