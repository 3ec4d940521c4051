"""Uniform fake-quantization with straight-through gradients, per tensor or channel; of weights with their own ranges.

Ranges that are observed or searched: `fake_quant_ranges.py`.

The formulas, shared by every backend, stand in `_fake_quant_reference.py`. Outputs keep the strides of inputs that fill
their memory without gaps (contiguous, channels_last, any permutation) and are contiguous otherwise. Float32, bfloat16,
float16 and float64 inputs; scales, zero points and running ranges are float32, float64 for float64 inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from clusterq.ops._autograd import apply, wants_gradient
from clusterq.ops._checks import (
    FLOATING,
    check_device,
    check_integer,
    check_number,
    compute_dtype,
)
from clusterq.ops._fake_quant_autograd import (
    RULES,
    FakeQuantize,
    FakeQuantizeLearned,
    FakeQuantizeMasked,
    FakeQuantizeWeight,
    FakeQuantizeWeights,
)
from clusterq.ops._fake_quant_checks import (
    ACTIVATIONS,
    CODES,
    GRADIENTS,
    LARGEST_CODE,
    SAVES,
    SEMANTICS,
    Activation,
    Save,
    as_parameter,
    as_scale,
    as_zero_point,
    check_choice,
    check_input,
    check_range,
    check_zero_point,
    code_range,
    detached,
    keeps_mask,
)
from clusterq.ops._fake_quant_ops import dequantize_op, fake_quantize_op, quantize_op, weight_op, weights_op

__all__ = [
    "dequantize",
    "fake_quantize",
    "fake_quantize_weight",
    "fake_quantize_weights",
    "quantize",
]


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
    semantics: Literal["aten", "real_range"] = "aten",
    save: Save = "auto",
    grad_factor: float = 1.0,
) -> Tensor:
    """Rounds x to the grid `(code - zero_point) * scale`, code in [quant_min, quant_max]; shape and dtype of x.

    Args:
        x: any shape; float32, bfloat16, float16 or float64.
        scale: step of the grid, finite and positive: a number, or a tensor with one element (`axis` None) or one per
            channel of `axis`. A number must be normal in the dtype of the arithmetic. Tensor values are not checked
            here, for that would wait for the device; they should be normal too. To torch.compile a number is a
            constant: one that changes compiles anew.
        zero_point: code of 0.0: a number, or a tensor like `scale`. Floating-point zero points are rounded half to
            even. Tensors of them are then clamped into the code range; a number outside it is an error, whatever
            `gradient` is.
        axis: channel axis of per-channel parameters.
        gradient: `"clipped"` (x where the rounded code lies in the range), `"pass_through"` (x everywhere), or
            `"learned"` (clipped, and LSQ/LSQ+ gradients for scale and zero point, unscaled).
        activation: `"relu"` or `"relu6"` is applied to x first, with its own gradient.
        semantics: which x the clipped gradient reaches. `"aten"`: the rounded code lies in the range, as in
            `torch.fake_quantize_*`. These are its values and gradients bit for bit in float32, bfloat16 and float16
            for whole zero points and |x / scale| below 2^31; torch reckons float64 with float32 parameters.
            `"real_range"`: x itself lies between the values of the outermost codes, as in NNCF and ModelOpt; not for
            `"learned"`.
        save: what is kept for backward. `"mask"`: one bit per element. `"input"`: x, at no cost where something else
            keeps it anyway; not for `"real_range"`. `"auto"`: x of a parameter (a leaf of the graph), else the mask. A
            learned gradient always keeps x, `"pass_through"` without an activation nothing.
        grad_factor: 0 or more; multiplies the learned gradients of scale and zero point, as in torch's learnable ops.
            LSQ takes `1 / sqrt(n * quant_max)`, n values sharing a step.

    The gradient for x can be differentiated again, that of the scale and zero point raises RuntimeError then; there are
    no forward-mode derivatives. Raises ValueError or TypeError for a bad argument.
    """
    axis = check_input(x, axis, "x")
    check_range(quant_min, quant_max)
    check_choice(gradient, GRADIENTS, "gradient")
    check_choice(activation, ACTIVATIONS, "activation")
    check_choice(semantics, SEMANTICS, "semantics")
    check_choice(save, SAVES, "save")
    check_number("grad_factor", grad_factor, 0, below=math.inf)
    dtype = compute_dtype(x.dtype)
    step = as_scale(scale, x, axis, dtype)
    check_zero_point(zero_point, quant_min, quant_max)
    if gradient == "learned" and semantics != "aten":
        raise ValueError(f"semantics is {semantics!r}; wanted aten, the one that a learned gradient has")
    if semantics == "real_range" and save == "input":
        raise ValueError("save is 'input'; wanted 'auto' or 'mask' for semantics real_range")
    if gradient == "learned":
        offset = as_parameter(zero_point, x, axis, dtype, "zero_point")
        if wants_gradient(step, offset):
            whole = not offset.requires_grad
            if whole:
                offset = as_zero_point(zero_point, x, axis, dtype, quant_min, quant_max)
            y: Tensor = apply(
                FakeQuantizeLearned,
                *(x, step, offset, quant_min, quant_max, axis, activation, float(grad_factor), 0.0, whole),
            )
            return y
    offset = as_zero_point(zero_point, x, axis, dtype, quant_min, quant_max)
    step = detached(step)
    if not wants_gradient(x):
        y = fake_quantize_op(x, step, offset, quant_min, quant_max, axis, activation)
        return y
    # Without a parameter to learn, "learned" is "clipped": no sums.
    to_x = "clipped" if gradient == "learned" else gradient
    real = semantics == "real_range" and to_x == "clipped"
    if keeps_mask(x, save, to_x, activation) or real:
        rule = "real" if real else RULES[to_x]
        y = apply(FakeQuantizeMasked, x, step, offset, quant_min, quant_max, axis, activation, rule)[0]
    else:
        y = apply(FakeQuantize, x, step, offset, quant_min, quant_max, axis, activation, to_x)
    return y


# The least step of `fake_quantize_by_magnitude`.
SMALLEST_STEP = 1e-8


def fake_quantize_by_magnitude(
    x: Tensor,
    step: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    *,
    axis: int | None = None,
    activation: Activation = "none",
    grad_factor: float,
) -> Tensor:
    """`fake_quantize` on the scale `max(|step|, 1e-8)`, with learned gradients for x and the step: for trained steps.

    An optimizer may carry a step through zero; its magnitude is what quantizes, and the gradient's sign turns with it.
    Below the floor the gradient passes as if there were none, so that a step can leave it again. Arguments are those of
    `fake_quantize`, zero_point a tensor of whole numbers within the codes; quant_min, quant_max, activation and
    grad_factor are not checked.
    """
    axis = check_input(x, axis, "x")
    dtype = compute_dtype(x.dtype)
    offset = as_parameter(zero_point, x, axis, dtype, "zero_point")
    step = as_scale(step, x, axis, dtype)
    learned = (quant_min, quant_max, axis, activation, grad_factor, SMALLEST_STEP, True)
    if wants_gradient(x, step):
        y: Tensor = apply(FakeQuantizeLearned, x, step, offset, *learned)
    else:
        y = fake_quantize_op(x, magnitude(step), offset, *learned[:4])
    return y


def magnitude(step: Tensor) -> Tensor:
    """`max(|step|, 1e-8)`, detached."""
    return step.detach().abs().clamp_min(SMALLEST_STEP)


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
    if wants_gradient(w):
        output = apply(FakeQuantizeWeight, w, low, high, front, symmetric, gradient)
    else:
        output = weight_op(w, low, high, front, symmetric)
    y, scale, zero_point = output
    return (y, scale, zero_point) if return_qparams else y


def fake_quantize_weights(
    weights: Sequence[Tensor],
    bits: int,
    *,
    axis: int = 0,
    symmetric: bool = False,
    gradient: Literal["clipped", "pass_through"] = "pass_through",
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """`fake_quantize_weight` of all weights of a network at once, in one or two launches on a GPU with CUDA kernels.

    Args:
        weights: at least one, of one dtype and device; any shapes with at least one dimension.
        bits, axis, symmetric, gradient: as in `fake_quantize_weight`, the same for all.

    Returns three lists, an entry per weight: the weight on its grid, scale [C] and zero point [C]. Raises ValueError or
    TypeError for a bad argument.
    """
    check_integer("axis", axis)
    if not isinstance(weights, Sequence):
        raise TypeError(f"weights is {type(weights).__name__}; wanted a list of Tensors")
    if len(weights) == 0:
        raise ValueError("weights is empty; wanted at least one")
    for i, w in enumerate(weights):
        check_input(w, axis, f"weights[{i}]")
        check_device(f"weights[{i}]", w, weights[0].device, "weights[0]")
        if w.dtype != weights[0].dtype:
            raise TypeError(f"weights[{i}] has dtype {w.dtype}; wanted {weights[0].dtype}, that of weights[0]")
    check_choice(gradient, GRADIENTS[:2], "gradient")
    low, high = code_range(bits, signed=True)
    if wants_gradient(*weights):
        *quantized, scale, zero_point = apply(FakeQuantizeWeights, low, high, axis, symmetric, gradient, *weights)
        # What a frozen weight gives is frozen too.
        quantized = [y if w.requires_grad else y.detach() for y, w in zip(quantized, weights, strict=True)]
    else:
        quantized, scale, zero_point = weights_op(list(weights), low, high, axis, symmetric)
    sizes = [w.size(axis) for w in weights]
    return list(quantized), list(scale.split(sizes)), list(zero_point.split(sizes))
