"""Fake-quantization in plain PyTorch: default kernels and fakes of the ops in `fake_quant.py`, yardstick of the rest.

Arithmetic is float32, or float64 for float64 inputs; `scale` and `zero_point` come in that dtype, zero points as whole
numbers, with one element for the whole tensor (`axis` None) or one per channel of `axis`. With x' = activation(x):

    r    = nearbyint(x' * (1 / scale))                      half to even
    code = clamp(r + zero_point, quant_min, quant_max)
    y    = (code - zero_point) * scale                      NaN stays NaN, -0 becomes +0, infinities saturate
    pass = quant_min <= r + zero_point <= quant_max         and activation'(x) != 0; false for NaN

Learned gradients (LSQ, Esser et al. 2020, equation 3; LSQ+, Bhalgat et al. 2020, equations 5 and 6), summed in float64:

    inside  dX = dY,  dS += dY * (r - x' / scale)
    below   dX = 0,   dS += dY * (quant_min - zero_point),  dZ -= dY * scale
    above   dX = 0,   dS += dY * (quant_max - zero_point),  dZ -= dY * scale

Range [low, high] to scale and zero point, both ends extended to contain 0:

    asymmetric  scale = (high - low) / (quant_max - quant_min)
                zero_point = clamp(quant_min - nearbyint(low / scale), quant_min, quant_max)
    symmetric   scale = max(-low, high) / ((quant_max - quant_min) / 2)
                zero_point = nearbyint((quant_min + quant_max) / 2)

half to even, so that signed ranges [-2^(b-1), 2^(b-1) - 1] get zero point 0 and unsigned ones 2^(b-1). A scale below
the smallest normal number (an all-zero range) becomes 1; an empty range (low > high: nothing finite seen) gives scale 1
and zero point clamp(0), the middle code when symmetric.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clusterq.ops._checks import check_shape, compute_dtype, ordered_sum

# Elements handled at a time where a temporary per candidate would otherwise multiply memory.
_CHUNK = 1 << 20


def code_dtype(quant_min: int, quant_max: int) -> torch.dtype:
    """Narrowest of uint8 (range starting at 0 or above), int8, int16 and int32 that holds the codes."""
    if quant_min >= 0 and quant_max <= 255:
        return torch.uint8
    if quant_min >= -128 and quant_max <= 127:
        return torch.int8
    if quant_min >= -32768 and quant_max <= 32767:
        return torch.int16
    return torch.int32


def empty_dense(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor with the strides of `x` where `x` fills its memory without gaps, contiguous otherwise."""
    out = torch.empty_like(x, dtype=dtype)
    return (
        out if out.stride() == x.stride() else torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    )


def _store(x: Tensor, value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return empty_dense(x, dtype).copy_(value)


def along(parameter: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """View of a parameter that broadcasts against `x`."""
    if axis is None:
        return parameter.reshape([1] * x.dim())
    return parameter.reshape([-1 if d == axis % x.dim() else 1 for d in range(x.dim())])


def activate(x: Tensor, activation: str) -> Tensor:
    if activation == "none":
        return x
    return x.clamp(min=0) if activation == "relu" else x.clamp(0, 6)


def activation_mask(x: Tensor, activation: str) -> Tensor:
    if activation == "none":
        return x == x
    return x > 0 if activation == "relu" else (x > 0) & (x < 6)


def shifted(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x' / scale, r + zero_point, and the parameters broadcast to `x`."""
    s, z = along(scale, x, axis), along(zero_point, x, axis)
    ratio = activate(x.to(compute_dtype(x.dtype)), activation) * s.reciprocal()
    return ratio, ratio.round() + z, s, z


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int | None, activation: str
) -> Tensor:
    _, q, s, z = shifted(x, scale, zero_point, axis, activation)
    return _store(x, (q.clamp(quant_min, quant_max) - z) * s)


def fake_quantize_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    activation: str,
) -> Tensor:
    check_shape("grad", grad, x.shape)
    _, q, _, _ = shifted(x, scale, zero_point, axis, activation)
    inside = (q >= quant_min) & (q <= quant_max) & activation_mask(x, activation)
    return _store(x, torch.where(inside, grad, 0.0))


def fake_quantize_learned_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    check_shape("grad", grad, x.shape)
    ratio, q, _, z = shifted(x, scale, zero_point, axis, activation)
    below, above = q < quant_min, q > quant_max
    inside = (q >= quant_min) & (q <= quant_max)
    grad_x = _store(x, torch.where(inside & activation_mask(x, activation), grad, 0.0))
    wide = grad.double()
    slope = torch.where(below, quant_min - z, torch.where(above, quant_max - z, q - z - ratio)).double()
    term_scale = torch.where(below | above | inside, wide * slope, 0.0)
    term_zero = torch.where(below | above, wide, 0.0)
    rest = [d for d in range(x.dim()) if axis is None or d != axis % x.dim()]
    sums = (ordered_sum(term_scale, rest), ordered_sum(term_zero, rest)) if rest else (term_scale, term_zero)
    grad_zero = -sums[1].reshape(scale.shape) * scale.double()
    return grad_x, sums[0].reshape(scale.shape).to(scale.dtype), grad_zero.to(scale.dtype).reshape(zero_point.shape)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int | None) -> Tensor:
    _, q, _, z = shifted(x, scale, zero_point, axis, "none")
    codes = torch.where(q == q, q, z).clamp(quant_min, quant_max)
    return _store(x, codes, code_dtype(quant_min, quant_max))


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, dtype: torch.dtype) -> Tensor:
    value = (codes.to(scale.dtype) - along(zero_point, codes, axis)) * along(scale, codes, axis)
    return _store(codes, value, dtype)


def finite_range(x: Tensor, axis: int | None, activation: str) -> tuple[Tensor, Tensor]:
    """Smallest and largest finite element, [1] or [C], in the compute dtype; +inf and -inf where there is none."""
    x = activate(x.to(compute_dtype(x.dtype)), activation)
    rows = (
        x.reshape(1, -1)
        if axis is None
        else x.movedim(axis, 0).reshape(x.size(axis), x.numel() // max(x.size(axis), 1))
    )
    if rows.size(1) == 0:
        empty = rows.new_full((rows.size(0),), float("inf"))
        return empty, -empty
    finite = rows.isfinite()
    low = torch.where(finite, rows, float("inf")).amin(1)
    # Which zero of several comes out depends on the order in which they are seen: +0 it is.
    return low + 0, torch.where(finite, rows, -float("inf")).amax(1) + 0


def range_to_qparams(
    low: Tensor, high: Tensor, quant_min: int, quant_max: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    empty = low > high
    low, high = low.clamp(max=0), high.clamp(min=0)
    if symmetric:
        scale = torch.maximum(-low, high) / ((quant_max - quant_min) / 2)
    else:
        # Halved first: the same bits as (high - low) / steps, without overflow.
        scale = (high * 0.5 - low * 0.5) / (quant_max - quant_min) * 2
    scale = torch.where(empty | (scale < torch.finfo(scale.dtype).tiny), 1.0, scale)
    if symmetric:
        # Python rounds half to even.
        return scale, torch.full_like(scale, round((quant_min + quant_max) / 2))
    zero_point = (quant_min - (low / scale).round()).clamp(quant_min, quant_max)
    return scale, torch.where(empty, float(min(max(0, quant_min), quant_max)), zero_point)


def fake_quantize_weight(
    w: Tensor, quant_min: int, quant_max: int, axis: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    scale, zero_point = range_to_qparams(*finite_range(w, axis, "none"), quant_min, quant_max, symmetric)
    return fake_quantize(w, scale, zero_point, quant_min, quant_max, axis, "none"), scale, zero_point


def fake_quantize_weights(
    weights: list[Tensor], quant_min: int, quant_max: int, axis: int, symmetric: bool
) -> tuple[list[Tensor], Tensor, Tensor]:
    quantized, scales, zero_points = zip(
        *(fake_quantize_weight(w, quant_min, quant_max, axis, symmetric) for w in weights), strict=True
    )
    return list(quantized), torch.cat(scales), torch.cat(zero_points)


def move_range_(running_min: Tensor, running_max: Tensor, low: Tensor, high: Tensor, momentum: float) -> None:
    """Moves the running range toward [low, high] in place; an empty one (low > high) leaves it alone."""
    seen = (low <= high).reshape(running_min.shape)
    first = (running_min > running_max).reshape(running_min.shape)
    for running, now in ((running_min, low), (running_max, high)):
        now = now.reshape(running.shape)
        updated = torch.where(first, now, momentum * running + (1 - momentum) * now)
        running.copy_(torch.where(seen, updated, running))


def observe_fake_quantize(
    x: Tensor,
    running_min: Tensor,
    running_max: Tensor,
    quant_min: int,
    quant_max: int,
    momentum: float,
    observe: bool,
    symmetric: bool,
    axis: int | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if observe:
        move_range_(running_min, running_max, *finite_range(x, axis, activation), momentum)
    scale, zero_point = range_to_qparams(running_min, running_max, quant_min, quant_max, symmetric)
    return fake_quantize(x, scale, zero_point, quant_min, quant_max, axis, activation), scale, zero_point


def quantization_error(
    x: Tensor, scales: Tensor, zero_points: Tensor, quant_min: int, quant_max: int, axis: int | None
) -> Tensor:
    rows = (
        x.reshape(1, -1)
        if axis is None
        else x.movedim(axis, 0).reshape(x.size(axis), x.numel() // max(x.size(axis), 1))
    )
    error = torch.zeros(scales.shape, dtype=torch.float64, device=x.device)
    width = max(1, _CHUNK // max(rows.size(0), 1))
    for start in range(0, rows.size(1), width):
        part = rows[:, start : start + width].to(scales.dtype)
        for m in range(scales.size(0)):
            difference = fake_quantize(part, scales[m], zero_points[m], quant_min, quant_max, 0, "none") - part
            error[m] += ordered_sum(torch.where(part.isfinite(), difference.double().square(), 0.0), [1])
    return error


def fake_like(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int | None, activation: str
) -> Tensor:
    return empty_dense(x)


def fake_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    activation: str,
) -> Tensor:
    return empty_dense(x)


def _contiguous_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def fake_learned_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_dense(x), _contiguous_like(scale), _contiguous_like(zero_point)


def fake_codes(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int | None
) -> Tensor:
    return empty_dense(x, code_dtype(quant_min, quant_max))


def fake_dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, dtype: torch.dtype) -> Tensor:
    return empty_dense(codes, dtype)


def fake_weight(w: Tensor, quant_min: int, quant_max: int, axis: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(w.dtype)
    return empty_dense(w), w.new_empty((w.size(axis),), dtype=dtype), w.new_empty((w.size(axis),), dtype=dtype)


def fake_observe(
    x: Tensor,
    running_min: Tensor,
    running_max: Tensor,
    quant_min: int,
    quant_max: int,
    momentum: float,
    observe: bool,
    symmetric: bool,
    axis: int | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_dense(x), _contiguous_like(running_min), _contiguous_like(running_min)


def fake_range(x: Tensor, axis: int | None, activation: str) -> tuple[Tensor, Tensor]:
    count, dtype = 1 if axis is None else x.size(axis), compute_dtype(x.dtype)
    return x.new_empty((count,), dtype=dtype), x.new_empty((count,), dtype=dtype)


def fake_weights(
    weights: list[Tensor], quant_min: int, quant_max: int, axis: int, symmetric: bool
) -> tuple[list[Tensor], Tensor, Tensor]:
    count, dtype = sum(w.size(axis) for w in weights), compute_dtype(weights[0].dtype)
    return (
        [empty_dense(w) for w in weights],
        weights[0].new_empty((count,), dtype=dtype),
        weights[0].new_empty((count,), dtype=dtype),
    )


def fake_error(
    x: Tensor, scales: Tensor, zero_points: Tensor, quant_min: int, quant_max: int, axis: int | None
) -> Tensor:
    return torch.empty(scales.shape, dtype=torch.float64, device=x.device)
