"""Triton kernels that quantize with a running range; every program computes scale and zero point, from few loads.

MODE says from what. RUNNING: the range in the buffers. MOVING: that range as `range_*_kernel` has kept it, moved by
the partial ranges [2, splits, channels] before it; the first program of a channel writes the buffers, which no program
reads. DELAYED: the range in the buffers, and the partial ranges of x are collected for `range_finish_kernel`. So no
counter is needed that would have to outlive a launch.

MOVING goes from the end to the front: the end of x was read last and may still be in the cache.
"""

import triton
import triton.language as tl

from ._fake_quant_jit import cast, columns, reciprocal, tile_at
from ._mask_jit import NO_MASK, masked_value, row_bytes, tile_bytes
from ._range_jit import ends_of, finite_or_nan, moved, qparams

RUNNING = tl.constexpr(0)
MOVING = tl.constexpr(1)
DELAYED = tl.constexpr(2)


@triton.jit(do_not_specialize=["n", "splits", "quant_min", "quant_max", "symmetric_zero"])
def observed_flat_kernel(
    y_ptr, mask_ptr, x_ptr, scale_ptr, zero_ptr, min_ptr, max_ptr, partial_ptr, n, splits, quant_min, quant_max,
    symmetric_zero, momentum: "fp64", rest: "fp64",  # noqa: F821 (Triton's names of scalar types)
    MODE: tl.constexpr, RULE: tl.constexpr, SYMMETRIC: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    real: tl.constexpr = scale_ptr.dtype.element_ty
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    if MODE == MOVING:
        split = tl.arange(0, SPLITS)
        now_low = tl.min(tl.load(partial_ptr + split, mask=split < splits, other=float("inf")), 0)
        now_high = tl.max(tl.load(partial_ptr + splits + split, mask=split < splits, other=-float("inf")), 0)
        kept = partial_ptr + 2 * splits
        low, high = moved(tl.load(kept), tl.load(kept + 1), now_low, now_high, momentum, rest)
    else:
        low = tl.load(min_ptr)
        high = tl.load(max_ptr)
    scale, zero = qparams(low, high, quant_min, quant_max, symmetric_zero, SYMMETRIC)
    if pid == 0:
        tl.store(scale_ptr, scale)
        tl.store(zero_ptr, zero)
        if MODE == MOVING:
            tl.store(min_ptr, low)
            tl.store(max_ptr, high)
    inverse = reciprocal(scale)
    least = quant_min.to(real)
    most = quant_max.to(real)
    lowest = tl.full([BLOCK], float("inf"), real)
    highest = tl.full([BLOCK], -float("inf"), real)
    tiles = n // BLOCK
    if pid == programs - 1:
        offs = (tl.zeros([BLOCK], tl.int64) + tiles) * BLOCK + tl.arange(0, BLOCK)
        valid = offs < n
        x = tl.load(x_ptr + offs, mask=valid, other=0.0).to(real)
        value, inside = masked_value(x, scale, inverse, zero, least, most, RULE, ACTIVATION)
        tl.store(y_ptr + offs, cast(value, y_ptr.dtype.element_ty), mask=valid)
        if RULE != NO_MASK:
            byte = (tl.zeros([BLOCK // 8], tl.int64) + tiles) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
            tl.store(mask_ptr + byte, row_bytes(inside & valid), mask=byte * 8 < n)
        if MODE == DELAYED:
            seen = finite_or_nan(x, valid, ACTIVATION)
            lowest = tl.minimum(lowest, seen)
            highest = tl.maximum(highest, seen)
    tile = tiles - 1 - pid
    while tile >= 0:
        start = tile.to(tl.int64) * BLOCK
        offs = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offs).to(real)
        value, inside = masked_value(x, scale, inverse, zero, least, most, RULE, ACTIVATION)
        tl.store(y_ptr + offs, cast(value, y_ptr.dtype.element_ty))
        if RULE != NO_MASK:
            tl.store(mask_ptr + start // 8 + tl.arange(0, BLOCK // 8), row_bytes(inside))
        if MODE == DELAYED:
            seen = finite_or_nan(x, x == x, ACTIVATION)
            lowest = tl.minimum(lowest, seen)
            highest = tl.maximum(highest, seen)
        tile -= programs
    if MODE == DELAYED:
        tl.store(partial_ptr + pid, tl.min(lowest, 0))
        tl.store(partial_ptr + programs + pid, tl.max(highest, 0))


@triton.jit(
    do_not_specialize=[
        "outer", "channels", "col_groups", "splits", "tiles", "quant_min", "quant_max", "symmetric_zero"
    ]
)  # fmt: skip
def observed_tile_kernel(
    y_ptr, mask_ptr, x_ptr, scale_ptr, zero_ptr, min_ptr, max_ptr, partial_ptr, outer, channels, col_groups, splits,
    tiles, quant_min, quant_max, symmetric_zero,
    momentum: "fp64", rest: "fp64",  # noqa: F821 (Triton's names of scalar types)
    MODE: tl.constexpr, RULE: tl.constexpr, SYMMETRIC: tl.constexpr, ACTIVATION: tl.constexpr, LAST: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Work divided as in `range_tile_kernel`; a mask needs GROUP to be a multiple of 8."""
    real: tl.constexpr = scale_ptr.dtype.element_ty
    cols = columns(col_groups, GROUP)
    col_blocks = tl.cdiv(cols, BLOCK_K)
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    if LAST:
        split = pid // col_blocks
        channel = (pid % col_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
        valid = channel < cols
    else:
        split = pid // channels
        channel = pid % channels
        valid = channel < channels
    if MODE == MOVING:
        if LAST:
            now_low, now_high = ends_of(partial_ptr, channel, channels, splits, real, SPLITS, BLOCK_K)
        else:
            part = tl.arange(0, SPLITS)
            at = partial_ptr + part.to(tl.int64) * channels + channel
            now_low = tl.min(tl.load(at, mask=part < splits, other=float("inf")), 0)
            at += splits.to(tl.int64) * channels
            now_high = tl.max(tl.load(at, mask=part < splits, other=-float("inf")), 0)
        kept = partial_ptr + 2 * splits.to(tl.int64) * channels + channel
        low = tl.load(kept, mask=valid, other=0.0)
        high = tl.load(kept + channels, mask=valid, other=0.0)
        low, high = moved(low, high, now_low, now_high, momentum, rest)
    else:
        low = tl.load(min_ptr + channel, mask=valid, other=0.0)
        high = tl.load(max_ptr + channel, mask=valid, other=0.0)
    scale, zero = qparams(low, high, quant_min, quant_max, symmetric_zero, SYMMETRIC)
    if split == 0:
        tl.store(scale_ptr + channel, scale, mask=valid)
        tl.store(zero_ptr + channel, zero, mask=valid)
        if MODE == MOVING:
            tl.store(min_ptr + channel, low, mask=valid)
            tl.store(max_ptr + channel, high, mask=valid)
    inverse = reciprocal(scale)
    if LAST:
        inverse = inverse[None, :]
        scale = scale[None, :]
        zero = zero[None, :]
    least = quant_min.to(real)
    most = quant_max.to(real)
    lowest = tl.full([BLOCK_R, BLOCK_K], float("inf"), real)
    highest = tl.full([BLOCK_R, BLOCK_K], -float("inf"), real)
    tile = split + (tiles - 1 - split) // splits * splits
    while tile >= 0:
        offs, mask = tile_at(tile, channel, outer, channels, cols, LAST, BLOCK_R, BLOCK_K)
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(real)
        value, inside = masked_value(x, scale, inverse, zero, least, most, RULE, ACTIVATION)
        tl.store(y_ptr + offs, cast(value, y_ptr.dtype.element_ty), mask=mask)
        if RULE != NO_MASK:
            byte, fits = _bytes_at(tile, pid, outer, channels, cols, LAST, BLOCK_R, BLOCK_K)
            tl.store(mask_ptr + byte, tile_bytes(inside), mask=fits)
        if MODE == DELAYED:
            seen = finite_or_nan(x, mask, ACTIVATION)
            lowest = tl.minimum(lowest, seen)
            highest = tl.maximum(highest, seen)
        tile -= splits
    if MODE == DELAYED:
        lowest = tl.min(lowest, 0)
        highest = tl.max(highest, 0)
        if not LAST:
            lowest = tl.min(lowest, 0)
            highest = tl.max(highest, 0)
        at = partial_ptr + split.to(tl.int64) * channels + channel
        tl.store(at, lowest, mask=valid)
        tl.store(at + splits.to(tl.int64) * channels, highest, mask=valid)


@triton.jit
def _bytes_at(tile, pid, outer, channels, cols, LAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    """Offsets and mask of the bytes of the tile that `tile_at` gives."""
    col_blocks = tl.cdiv(cols, BLOCK_K)
    if LAST:
        row = (tl.zeros([BLOCK_R], tl.int64) + tile) * BLOCK_R + tl.arange(0, BLOCK_R)
        line = row
        byte = (pid % col_blocks) * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)
    else:
        row = (tl.zeros([BLOCK_R], tl.int64) + tile // col_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
        line = row * channels + pid % channels
        byte = (tile % col_blocks) * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)
    return line[:, None] * (cols // 8) + byte[None, :], (row < outer)[:, None] & (byte < cols // 8)[None, :]
