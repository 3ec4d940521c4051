"""Triton kernels that quantize weights with live ranges: one program finds a channel's range and quantizes it.

Layout words (LAST, GROUP, tiles) as in `_fake_quant_jit`.
"""

import triton
import triton.language as tl

from ._fake_quant_jit import FORWARD, cast, columns, quantized, reciprocal, tile_at
from ._range_jit import finite_or_nan, qparams


@triton.jit(
    do_not_specialize=["outer", "channels", "col_groups", "tiles", "quant_min", "quant_max", "symmetric_zero"],
    do_not_specialize_on_alignment=["scale_ptr", "zero_ptr"],
)
def weight_kernel(
    y_ptr, w_ptr, scale_ptr, zero_ptr, outer, channels, col_groups, tiles, quant_min, quant_max, symmetric_zero,
    SYMMETRIC: tl.constexpr, LAST: tl.constexpr, GROUP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    SINGLE: tl.constexpr,
):  # fmt: skip
    """Range, scale, zero point and values of one channel (LAST: BLOCK_K channels), which one program walks twice.

    SINGLE: the channel is one tile and stays in registers, so that w is read once.
    """
    real: tl.constexpr = scale_ptr.dtype.element_ty
    cols = columns(col_groups, GROUP)
    pid = tl.program_id(0)
    lowest = tl.full([BLOCK_R, BLOCK_K], float("inf"), real)
    highest = tl.full([BLOCK_R, BLOCK_K], -float("inf"), real)
    channel = pid * BLOCK_K + tl.arange(0, BLOCK_K) if LAST else pid
    if SINGLE:
        offs, mask = tile_at(0, channel, outer, channels, cols, LAST, BLOCK_R, BLOCK_K)
        w = tl.load(w_ptr + offs, mask=mask, other=0.0).to(real)
        seen = finite_or_nan(w, mask, 0)
        lowest = tl.minimum(lowest, seen)
        highest = tl.maximum(highest, seen)
    else:
        tile = 0
        while tile < tiles:
            at, inside = tile_at(tile, channel, outer, channels, cols, LAST, BLOCK_R, BLOCK_K)
            seen = finite_or_nan(tl.load(w_ptr + at, mask=inside, other=0.0).to(real), inside, 0)
            lowest = tl.minimum(lowest, seen)
            highest = tl.maximum(highest, seen)
            tile += 1
    lowest = tl.min(lowest, 0)
    highest = tl.max(highest, 0)
    if not LAST:
        lowest = tl.min(lowest, 0)
        highest = tl.max(highest, 0)
    scale, zero = qparams(lowest, highest, quant_min, quant_max, symmetric_zero, SYMMETRIC)
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


@triton.jit(do_not_specialize=["weights", "quant_min", "quant_max", "symmetric_zero"])
def weights_kernel(
    table_ptr, scale_ptr, zero_ptr, weights, quant_min, quant_max, symmetric_zero,
    ELEMENT: tl.constexpr, SYMMETRIC: tl.constexpr, GROUP: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per channel of several weights, whose channels lie in memory one after the other.

    table [5, weights] int64: its first program, its first channel in scale, cols / GROUP, addresses of input and
    output. GROUP: as many columns as 16 bytes hold divide all cols, and addresses are multiples of 16; else 1.
    """
    real: tl.constexpr = scale_ptr.dtype.element_ty
    pid = tl.program_id(0)
    entry = tl.arange(0, ENTRIES)
    first = tl.load(table_ptr + entry, mask=entry < weights, other=9223372036854775807)
    at = table_ptr + tl.sum((first <= pid).to(tl.int32), 0) - 1
    row = pid - tl.load(at)
    channel = tl.load(at + weights) + row
    cols = tl.load(at + 2 * weights) * GROUP
    w_ptr = tl.load(at + 3 * weights).to(tl.pointer_type(ELEMENT))
    y_ptr = tl.load(at + 4 * weights).to(tl.pointer_type(ELEMENT))
    if GROUP > 1:
        w_ptr = tl.multiple_of(w_ptr, 16)
        y_ptr = tl.multiple_of(y_ptr, 16)
    w_ptr += row * cols
    y_ptr += row * cols
    lowest = tl.full([BLOCK], float("inf"), real)
    highest = tl.full([BLOCK], -float("inf"), real)
    col = tl.arange(0, BLOCK)
    start = 0
    while start < cols:
        inside = start + col < cols
        seen = finite_or_nan(tl.load(w_ptr + start + col, mask=inside, other=0.0).to(real), inside, 0)
        lowest = tl.minimum(lowest, seen)
        highest = tl.maximum(highest, seen)
        start += BLOCK
    low = tl.min(lowest, 0)
    high = tl.max(highest, 0)
    scale, zero = qparams(low, high, quant_min, quant_max, symmetric_zero, SYMMETRIC)
    tl.store(scale_ptr + channel, scale)
    tl.store(zero_ptr + channel, zero)
    inverse = reciprocal(scale)
    least = quant_min.to(real)
    most = quant_max.to(real)
    start = 0
    while start < cols:
        inside = start + col < cols
        w = tl.load(w_ptr + start + col, mask=inside, other=0.0).to(real)
        value = quantized(w, w, scale, inverse, zero, least, most, FORWARD, 0)
        tl.store(y_ptr + start + col, cast(value, ELEMENT), mask=inside)
        start += BLOCK
