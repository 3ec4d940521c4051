"""Uniform fake-quantization with straight-through gradients, per tensor or channel: fixed, observed or learned ranges.

The formulas, shared by every backend, stand in `_fake_quant_reference.py`. Outputs keep the strides of inputs that fill
their memory without gaps (contiguous, channels_last, any permutation) and are contiguous otherwise. Float32, bfloat16,
float16 and float64 inputs; scales, zero points and running ranges are float32, float64 for float64 inputs.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from clusterq.ops import _fake_quant_reference as reference
from clusterq.ops._checks import (
    FLOATING,
    check_device,
    check_integer,
    check_number,
    check_shape,
    check_tensor,
    compute_dtype,
)
from clusterq.ops._fake_quant_autograd import (
    FakeQuantize,
    FakeQuantizeLearned,
    FakeQuantizeWeight,
    ObserveFakeQuantize,
    dequantize_op,
    error_op,
    fake_quantize_op,
    observe_op,
    quantize_op,
    weight_op,
)
from clusterq.ops._fake_quant_checks import (
    ACTIVATIONS,
    CODES,
    GRADIENTS,
    LARGEST_CODE,
    as_parameter,
    as_scale,
    as_zero_point,
    check_choice,
    check_input,
    check_range,
    check_running,
    check_zero_point,
    code_range,
)

__all__ = [
    "dequantize",
    "fake_quantize",
    "fake_quantize_weight",
    "mse_range",
    "observe_fake_quantize",
    "quantize",
    "range_to_qparams",
]

Activation = Literal["none", "relu", "relu6"]


def fake_quantize(
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | float,
    quant_min: int,
    quant_max: int,
    *,
    axis: int | None = None,
    gradient: Literal["clipped", "pass_through", "learned"] = "clipped",
    activation: Activation = "none",
) -> Tensor:
    """Rounds x to the grid `(code - zero_point) * scale`, code in [quant_min, quant_max]; shape and dtype of x.

    Args:
        x: any shape; float32, bfloat16, float16 or float64.
        scale: step of the grid, finite and positive: a number, or a tensor with one element (`axis` None) or one per
            channel of `axis`. A number must be normal in the dtype of the arithmetic. Tensor values are not checked
            here: that would wait for the device.
        zero_point: code of 0.0: a number, or a tensor like `scale`. Floating-point zero points are rounded half to
            even. Tensors of them are then clamped into the code range; a number outside it is an error, whatever
            `gradient` is.
        axis: channel axis of per-channel parameters.
        gradient: `"clipped"` (x where the rounded code lies in the range), `"pass_through"` (x everywhere), or
            `"learned"` (clipped, and LSQ/LSQ+ gradients for scale and zero point, unscaled).
        activation: `"relu"` or `"relu6"` is applied to x first, with its own gradient.

    Raises ValueError or TypeError for a bad argument.
    """
    axis = check_input(x, axis, "x")
    check_range(quant_min, quant_max)
    check_choice(gradient, GRADIENTS, "gradient")
    check_choice(activation, ACTIVATIONS, "activation")
    dtype = compute_dtype(x.dtype)
    step = as_scale(scale, x, axis, dtype)
    check_zero_point(zero_point, quant_min, quant_max)
    if gradient == "learned" and torch.is_grad_enabled():
        offset = as_parameter(zero_point, x, axis, dtype, "zero_point")
        if step.requires_grad or offset.requires_grad:
            y: Tensor = FakeQuantizeLearned.apply(x, step, offset, quant_min, quant_max, axis, activation)
            return y
    offset = as_zero_point(zero_point, x, axis, dtype, quant_min, quant_max)
    step = step.detach()
    if torch.is_grad_enabled() and x.requires_grad:
        # Without a parameter to learn, "learned" is "clipped": no sums.
        to_x = "clipped" if gradient == "learned" else gradient
        y = FakeQuantize.apply(x, step, offset, quant_min, quant_max, axis, activation, to_x)
    else:
        y = fake_quantize_op(x, step, offset, quant_min, quant_max, axis, activation)
    return y


def quantize(
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | float,
    quant_min: int,
    quant_max: int,
    *,
    axis: int | None = None,
) -> Tensor:
    """Integer codes of x under the arguments of `fake_quantize`; not differentiable.

    Returns uint8 for a range within [0, 255], else int8, int16 or int32, the first that holds the range. Integers have
    no NaN: a NaN gets the code of 0.0 (the zero point).
    """
    axis = check_input(x, axis, "x")
    check_range(quant_min, quant_max)
    dtype = compute_dtype(x.dtype)
    step = as_scale(scale, x, axis, dtype).detach()
    offset = as_zero_point(zero_point, x, axis, dtype, quant_min, quant_max)
    codes: Tensor = quantize_op(x.detach(), step, offset, quant_min, quant_max, axis)
    return codes


def dequantize(
    codes: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | float,
    *,
    axis: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`(codes - zero_point) * scale` in `dtype`; codes uint8, int8, int16 or int32, the rest as in `fake_quantize`."""
    axis = check_input(codes, axis, "codes", CODES)
    if dtype not in FLOATING:
        raise TypeError(f"dtype is {dtype}; wanted one of {', '.join(map(str, FLOATING))}")
    step = as_scale(scale, codes, axis, compute_dtype(dtype)).detach()
    offset = as_zero_point(zero_point, codes, axis, compute_dtype(dtype), -LARGEST_CODE, LARGEST_CODE)
    value: Tensor = dequantize_op(codes, step, offset, axis, dtype)
    return value


@overload
def fake_quantize_weight(
    w: Tensor,
    bits: int,
    *,
    axis: int = ...,
    symmetric: bool = ...,
    gradient: Literal["clipped", "pass_through"] = ...,
    return_qparams: Literal[False] = ...,
) -> Tensor: ...


@overload
def fake_quantize_weight(
    w: Tensor,
    bits: int,
    *,
    axis: int = ...,
    symmetric: bool = ...,
    gradient: Literal["clipped", "pass_through"] = ...,
    return_qparams: Literal[True],
) -> tuple[Tensor, Tensor, Tensor]: ...


def fake_quantize_weight(
    w: Tensor,
    bits: int,
    *,
    axis: int = 0,
    symmetric: bool = False,
    gradient: Literal["clipped", "pass_through"] = "pass_through",
    return_qparams: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Fake-quantizes w with the live minimum and maximum of each channel, codes in [-2^(bits-1), 2^(bits-1) - 1].

    The range of a channel is extended to contain 0 and ignores NaN and infinities; an all-zero channel gets scale 1.
    Formulas: module `_fake_quant_reference`. No gradient flows into the range.

    Args:
        w: any shape with at least one dimension; float32, bfloat16, float16 or float64.
        bits: 2 to 16.
        axis: channel axis.
        symmetric: zero point 0 and a scale of `max|w| / ((2^bits - 1) / 2)`.
        gradient: `"pass_through"`, or `"clipped"` to the range of the codes.
        return_qparams: also return scale [C] and zero point [C] (float32, float64 for float64 weights).

    Raises ValueError or TypeError for a bad argument.
    """
    check_integer("axis", axis)
    front = check_input(w, axis, "w")
    check_choice(gradient, GRADIENTS[:2], "gradient")
    low, high = code_range(bits, signed=True)
    if torch.is_grad_enabled() and w.requires_grad:
        output = FakeQuantizeWeight.apply(w, low, high, front, symmetric, gradient)
    else:
        output = weight_op(w, low, high, front, symmetric)
    y, scale, zero_point = output
    return (y, scale, zero_point) if return_qparams else y


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

    Returns y with shape and dtype of x, and the scale and zero point used, shaped like `running_min`. Raises ValueError
    or TypeError for a bad argument.
    """
    axis = check_input(x, axis, "x")
    check_choice(gradient, GRADIENTS[:2], "gradient")
    check_choice(activation, ACTIVATIONS, "activation")
    check_number("momentum", momentum, 0, below=1)
    for running, name in ((running_min, "running_min"), (running_max, "running_max")):
        check_running(running, x, axis, compute_dtype(x.dtype), name)
    if running_max is running_min:
        raise ValueError("running_max is the same tensor as running_min; wanted one of its own")
    low, high = code_range(bits, signed)
    arguments = (x, running_min, running_max, low, high, momentum, observe, symmetric, axis, activation)
    if torch.is_grad_enabled() and x.requires_grad:
        output = ObserveFakeQuantize.apply(*arguments, gradient)
    else:
        output = observe_op(*arguments)
    y, scale, zero_point = output
    return y, scale, zero_point


def range_to_qparams(
    low: Tensor, high: Tensor, quant_min: int, quant_max: int, *, symmetric: bool = False
) -> tuple[Tensor, Tensor]:
    """Scale and zero point, shaped like `low`, of the ranges [low, high]; formulas: module `_fake_quant_reference`."""
    check_range(quant_min, quant_max)
    check_tensor("low", low, FLOATING)
    check_tensor("high", high, FLOATING)
    check_shape("high", high, low.shape)
    check_device("high", high, low.device, "low")
    return reference.range_to_qparams(low, high, quant_min, quant_max, symmetric)


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
    low, high = reference.finite_range(x, axis)
    factor = torch.arange(candidates, 0, -1, device=x.device, dtype=low.dtype).div_(candidates).unsqueeze(1)
    # An empty range is infinite: scaled by the factor it stays empty.
    scales, zero_points = reference.range_to_qparams(factor * low, factor * high, quant_min, quant_max, symmetric)
    best = error_op(x, scales, zero_points, quant_min, quant_max, axis).argmin(0, keepdim=True)
    return scales.gather(0, best).squeeze(0), zero_points.gather(0, best).squeeze(0)
