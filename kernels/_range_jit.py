"""Triton kernels that find ranges: weights with live ranges, and the running range of an observer.

NaN and infinities are left out of every range. Formulas from range to scale and zero point are those of the reference
in `clusterq.ops`, to the bit. Layout words (LAST, GROUP, tiles) as in `_fake_quant_jit`.
"""

import triton
import triton.language as tl

from ._fake_quant_jit import FORWARD, activate, cast, clamp, quantized, reciprocal, round_half_even, tile_at


@triton.jit
def finite_range(x, mask, ACTIVATION: tl.constexpr):
    """Candidates for the smallest and the largest element; NaN and infinities are left out."""
    x = activate(x, ACTIVATION)
    mask = mask & (tl.abs(x) < float("inf"))
    return tl.where(mask, x, float("inf")), tl.where(mask, x, -float("inf"))


@triton.jit
def _divide(a, b):
    return a / b if a.dtype == tl.float64 else tl.div_rn(a, b)


@triton.jit
def _qparams(low, high, quant_min, quant_max, symmetric_zero, SYMMETRIC: tl.constexpr):
    """Scale and zero point of the ranges [low, high]; low > high means that nothing finite was seen."""
    real: tl.constexpr = low.dtype
    smallest = quant_min.to(real)
    largest = quant_max.to(real)
    empty = low > high
    low = tl.where(low > 0.0, 0.0, low)
    high = tl.where(high < 0.0, 0.0, high)
    steps = largest - smallest
    if SYMMETRIC:
        scale = _divide(tl.where(-low > high, -low, high), steps * 0.5)
    else:
        scale = _divide(high * 0.5 - low * 0.5, steps) * 2.0
    smallest_normal: tl.constexpr = 2.2250738585072014e-308 if real == tl.float64 else 1.1754943508222875e-38
    scale = tl.where(empty | (scale < smallest_normal), 1.0, scale)
    if SYMMETRIC:
        zero = tl.zeros_like(low) + symmetric_zero.to(real)
    else:
        zero = smallest - round_half_even(_divide(low, scale))
        zero = clamp(tl.where(empty, 0.0, zero), smallest, largest)
    return scale, zero


@triton.jit(do_not_specialize=["quant_min", "quant_max", "symmetric_zero"])
def weight_kernel(
    y_ptr, w_ptr, scale_ptr, zero_ptr, outer, channels, col_groups, tiles, quant_min, quant_max, symmetric_zero,
    SYMMETRIC: tl.constexpr, LAST: tl.constexpr, GROUP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    SINGLE: tl.constexpr,
):  # fmt: skip
    """Range, scale, zero point and values of one channel (LAST: BLOCK_K channels), which one program walks twice.

    SINGLE: the channel is one tile and stays in registers, so that w is read once.
    """
    real: tl.constexpr = scale_ptr.dtype.element_ty
    cols = col_groups * GROUP
    pid = tl.program_id(0)
    lowest = tl.full([BLOCK_R, BLOCK_K], float("inf"), real)
    highest = tl.full([BLOCK_R, BLOCK_K], -float("inf"), real)
    channel = pid * BLOCK_K + tl.arange(0, BLOCK_K) if LAST else pid
    if SINGLE:
        offs, mask = tile_at(0, channel, outer, channels, cols, LAST, BLOCK_R, BLOCK_K)
        w = tl.load(w_ptr + offs, mask=mask, other=0.0).to(real)
        lowest, highest = finite_range(w, mask, 0)
    else:
        tile = 0
        while tile < tiles:
            at, inside = tile_at(tile, channel, outer, channels, cols, LAST, BLOCK_R, BLOCK_K)
            low, high = finite_range(tl.load(w_ptr + at, mask=inside, other=0.0).to(real), inside, 0)
            lowest = tl.minimum(lowest, low)
            highest = tl.maximum(highest, high)
            tile += 1
    lowest = tl.min(lowest, 0)
    highest = tl.max(highest, 0)
    if not LAST:
        lowest = tl.min(lowest, 0)
        highest = tl.max(highest, 0)
    scale, zero = _qparams(lowest, highest, quant_min, quant_max, symmetric_zero, SYMMETRIC)
    if LAST:
        tl.store(scale_ptr + channel, scale, mask=channel < cols)
        tl.store(zero_ptr + channel, zero, mask=channel < cols)
        inverse = reciprocal(scale)[None, :]
        scale = scale[None, :]
        zero = zero[None, :]
    else:
        tl.store(scale_ptr + channel, scale)
        tl.store(zero_ptr + channel, zero)
        inverse = reciprocal(scale)
    least = quant_min.to(real)
    most = quant_max.to(real)
    if SINGLE:
        value = quantized(w, w, scale, inverse, zero, least, most, FORWARD, 0)
        tl.store(y_ptr + offs, cast(value, y_ptr.dtype.element_ty), mask=mask)
    else:
        tile = 0
        while tile < tiles:
            at, inside = tile_at(tile, channel, outer, channels, cols, LAST, BLOCK_R, BLOCK_K)
            x = tl.load(w_ptr + at, mask=inside, other=0.0).to(real)
            value = quantized(x, x, scale, inverse, zero, least, most, FORWARD, 0)
            tl.store(y_ptr + at, cast(value, y_ptr.dtype.element_ty), mask=inside)
            tile += 1


@triton.jit
def range_flat_kernel(partial_ptr, x_ptr, n, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """Smallest and largest finite element per program: partial [2, programs]."""
    real: tl.constexpr = partial_ptr.dtype.element_ty
    pid = tl.program_id(0)
    start = pid.to(tl.int64) * (BLOCK * TILES)
    lowest = tl.full([BLOCK], float("inf"), real)
    highest = tl.full([BLOCK], -float("inf"), real)
    if start + BLOCK * TILES <= n:
        for tile in range(TILES):
            x = tl.load(x_ptr + start + tile * BLOCK + tl.arange(0, BLOCK)).to(real)
            low, high = finite_range(x, x == x, ACTIVATION)
            lowest = tl.minimum(lowest, low)
            highest = tl.maximum(highest, high)
    else:
        for tile in range(TILES):
            offs = start + tile * BLOCK + tl.arange(0, BLOCK)
            mask = offs < n
            low, high = finite_range(tl.load(x_ptr + offs, mask=mask, other=0.0).to(real), mask, ACTIVATION)
            lowest = tl.minimum(lowest, low)
            highest = tl.maximum(highest, high)
    tl.store(partial_ptr + pid, tl.min(lowest, 0))
    tl.store(partial_ptr + tl.num_programs(0) + pid, tl.max(highest, 0))


@triton.jit
def range_tile_kernel(
    partial_ptr, x_ptr, outer, channels, col_groups, splits,
    ACTIVATION: tl.constexpr, LAST: tl.constexpr, GROUP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """Smallest and largest finite element per channel and split, work divided as in `learned_tile_kernel`."""
    real: tl.constexpr = partial_ptr.dtype.element_ty
    cols = col_groups * GROUP
    col_blocks = tl.cdiv(cols, BLOCK_K)
    pid = tl.program_id(0)
    if LAST:
        split = pid // col_blocks
        channel = (pid % col_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    else:
        split = pid // channels
        channel = pid % channels
    lowest = tl.full([BLOCK_R, BLOCK_K], float("inf"), real)
    highest = tl.full([BLOCK_R, BLOCK_K], -float("inf"), real)
    for i in range(TILES):
        tile = split.to(tl.int64) * TILES + i
        offs, mask = tile_at(tile, channel, outer, channels, cols, LAST, BLOCK_R, BLOCK_K)
        low, high = finite_range(tl.load(x_ptr + offs, mask=mask, other=0.0).to(real), mask, ACTIVATION)
        lowest = tl.minimum(lowest, low)
        highest = tl.maximum(highest, high)
    at = partial_ptr + split.to(tl.int64) * channels + channel
    second = splits.to(tl.int64) * channels
    if LAST:
        tl.store(at, tl.min(lowest, 0), mask=channel < cols)
        tl.store(at + second, tl.max(highest, 0), mask=channel < cols)
    else:
        tl.store(at, tl.min(tl.min(lowest, 1), 0))
        tl.store(at + second, tl.max(tl.max(highest, 1), 0))


@triton.jit(do_not_specialize=["splits", "quant_min", "quant_max", "symmetric_zero"])
def range_finish_kernel(
    scale_ptr, zero_ptr, min_ptr, max_ptr, partial_ptr, splits, channels, quant_min, quant_max, symmetric_zero,
    momentum: "fp64", rest: "fp64",  # noqa: F821 (Triton's names of scalar types)
    SYMMETRIC: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Moves the running range by partial [2, splits, channels], if splits > 0, and writes scale and zero point."""
    real: tl.constexpr = scale_ptr.dtype.element_ty
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = channel < channels
    low = tl.load(min_ptr + channel, mask=valid, other=0.0)
    high = tl.load(max_ptr + channel, mask=valid, other=0.0)
    if splits > 0:
        lowest = tl.full([BLOCK_S, BLOCK_C], float("inf"), real)
        highest = tl.full([BLOCK_S, BLOCK_C], -float("inf"), real)
        second = splits.to(tl.int64) * channels
        start = 0
        while start < splits:
            split = start + tl.arange(0, BLOCK_S)
            at = partial_ptr + split.to(tl.int64)[:, None] * channels + channel[None, :]
            mask = (split < splits)[:, None] & valid[None, :]
            lowest = tl.minimum(lowest, tl.load(at, mask=mask, other=float("inf")))
            highest = tl.maximum(highest, tl.load(at + second, mask=mask, other=-float("inf")))
            start += BLOCK_S
        now_low = tl.min(lowest, 0)
        now_high = tl.max(highest, 0)
        first = low > high
        seen = now_low <= now_high
        old = tl.full([BLOCK_C], momentum, real)
        new = tl.full([BLOCK_C], rest, real)
        new_low = tl.where(first, now_low, old * low + new * now_low)
        new_high = tl.where(first, now_high, old * high + new * now_high)
        low = tl.where(seen, new_low, low)
        high = tl.where(seen, new_high, high)
        tl.store(min_ptr + channel, low, mask=valid)
        tl.store(max_ptr + channel, high, mask=valid)
    scale, zero = _qparams(low, high, quant_min, quant_max, symmetric_zero, SYMMETRIC)
    tl.store(scale_ptr + channel, scale, mask=valid)
    tl.store(zero_ptr + channel, zero, mask=valid)
