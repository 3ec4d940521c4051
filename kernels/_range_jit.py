"""Triton kernels that find ranges, and what follows from a range: scale, zero point, the running range of an observer.

NaN and infinities are left out of every range. Formulas from range to scale and zero point are those of the reference
in `clusterq.ops`, to the bit. Layout words (LAST, GROUP, tiles) as in `_fake_quant_jit`.
"""

import triton
import triton.language as tl

from ._fake_quant_jit import activate, clamp, columns, round_half_even, tile_at


@triton.jit
def finite_or_nan(x, mask, ACTIVATION: tl.constexpr):
    """NaN for what is left out of a range: tl.minimum and tl.maximum pass it over."""
    x = activate(x, ACTIVATION)
    return tl.where(mask & (tl.abs(x) < float("inf")), x, float("nan"))


@triton.jit
def _divide(a, b):
    return a / b if a.dtype == tl.float64 else tl.div_rn(a, b)


@triton.jit
def qparams(low, high, quant_min, quant_max, symmetric_zero, SYMMETRIC: tl.constexpr):
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


@triton.jit
def moved(low, high, now_low, now_high, momentum, rest):
    """The range [low, high] moved toward [now_low, now_high]; an empty one leaves it alone."""
    seen = now_low <= now_high
    first = low > high
    old = tl.full(low.shape, momentum, low.dtype)
    new = tl.full(low.shape, rest, low.dtype)
    new_low = tl.where(first, now_low, old * low + new * now_low)
    new_high = tl.where(first, now_high, old * high + new * now_high)
    return tl.where(seen, new_low, low), tl.where(seen, new_high, high)


@triton.jit
def ends_of(partial_ptr, channel, channels, splits, real: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    """Ends of partial [2, splits, channels] over splits, for channels `channel` [BLOCK_C]."""
    lowest = tl.full([BLOCK_S, BLOCK_C], float("inf"), real)
    highest = tl.full([BLOCK_S, BLOCK_C], -float("inf"), real)
    second = splits.to(tl.int64) * channels
    start = 0
    while start < splits:
        split = start + tl.arange(0, BLOCK_S)
        at = partial_ptr + split.to(tl.int64)[:, None] * channels + channel[None, :]
        mask = (split < splits)[:, None] & (channel < channels)[None, :]
        lowest = tl.minimum(lowest, tl.load(at, mask=mask, other=float("inf")))
        highest = tl.maximum(highest, tl.load(at + second, mask=mask, other=-float("inf")))
        start += BLOCK_S
    return tl.min(lowest, 0), tl.max(highest, 0)


@triton.jit(do_not_specialize=["n", "second"])
def range_flat_kernel(
    low_ptr, high_ptr, x_ptr, min_ptr, max_ptr, n, second,
    ACTIVATION: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Smallest and largest finite element per program: low [programs], high [programs] from high_ptr + second on.

    The programs go over x together, front to end. KEEP: the range before this step is copied behind `high`, where the
    next kernel reads it while it overwrites the running one.
    """
    real: tl.constexpr = low_ptr.dtype.element_ty
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    if KEEP and pid == 0:
        tl.store(high_ptr + second + programs, tl.load(min_ptr))
        tl.store(high_ptr + second + programs + 1, tl.load(max_ptr))
    lowest = tl.full([BLOCK], float("inf"), real)
    highest = tl.full([BLOCK], -float("inf"), real)
    tiles = n // BLOCK
    tile = pid
    while tile < tiles:
        x = tl.load(x_ptr + tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)).to(real)
        seen = finite_or_nan(x, x == x, ACTIVATION)
        lowest = tl.minimum(lowest, seen)
        highest = tl.maximum(highest, seen)
        tile += programs
    if pid == programs - 1:
        offs = (tl.zeros([BLOCK], tl.int64) + tiles) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offs, mask=offs < n, other=0.0).to(real)
        seen = finite_or_nan(x, offs < n, ACTIVATION)
        lowest = tl.minimum(lowest, seen)
        highest = tl.maximum(highest, seen)
    tl.store(low_ptr + pid, tl.min(lowest, 0))
    tl.store(high_ptr + second + pid, tl.max(highest, 0))


@triton.jit(do_not_specialize=["outer", "channels", "col_groups", "splits", "tiles", "second"])
def range_tile_kernel(
    low_ptr, high_ptr, x_ptr, min_ptr, max_ptr, outer, channels, col_groups, splits, tiles, second,
    ACTIVATION: tl.constexpr, KEEP: tl.constexpr, LAST: tl.constexpr, GROUP: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Per split and channel: low [splits, channels], high from high_ptr + second on; KEEP as above.

    LAST: a program has BLOCK_K channels, else one; of their tiles, numbers split, split + splits, ...
    """
    real: tl.constexpr = low_ptr.dtype.element_ty
    cols = columns(col_groups, GROUP)
    pid = tl.program_id(0)
    if LAST:
        col_blocks = tl.cdiv(cols, BLOCK_K)
        split = pid // col_blocks
        channel = (pid % col_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
        valid = channel < cols
    else:
        split = pid // channels
        channel = pid % channels
        valid = channel < channels
    if KEEP and split == 0:
        kept = high_ptr + second + splits.to(tl.int64) * channels + channel
        tl.store(kept, tl.load(min_ptr + channel, mask=valid), mask=valid)
        tl.store(kept + channels, tl.load(max_ptr + channel, mask=valid), mask=valid)
    lowest = tl.full([BLOCK_R, BLOCK_K], float("inf"), real)
    highest = tl.full([BLOCK_R, BLOCK_K], -float("inf"), real)
    tile = split
    while tile < tiles:
        offs, mask = tile_at(tile, channel, outer, channels, cols, LAST, BLOCK_R, BLOCK_K)
        seen = finite_or_nan(tl.load(x_ptr + offs, mask=mask, other=0.0).to(real), mask, ACTIVATION)
        lowest = tl.minimum(lowest, seen)
        highest = tl.maximum(highest, seen)
        tile += splits
    lowest = tl.min(lowest, 0)
    highest = tl.max(highest, 0)
    if not LAST:
        lowest = tl.min(lowest, 0)
        highest = tl.max(highest, 0)
    at = split.to(tl.int64) * channels + channel
    tl.store(low_ptr + at, lowest, mask=valid)
    tl.store(high_ptr + second + at, highest, mask=valid)


@triton.jit(do_not_specialize=["splits", "channels", "quant_min", "quant_max", "symmetric_zero"])
def range_finish_kernel(
    scale_ptr, zero_ptr, min_ptr, max_ptr, partial_ptr, splits, channels, quant_min, quant_max, symmetric_zero,
    momentum: "fp64", rest: "fp64",  # noqa: F821 (Triton's names of scalar types)
    QPARAMS: tl.constexpr, SYMMETRIC: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Moves the running range by partial [2, splits, channels], if splits > 0.

    QPARAMS: scale and zero point of the range before (1) or after (2) it moves; 0: none.
    """
    real: tl.constexpr = min_ptr.dtype.element_ty
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = channel < channels
    low = tl.load(min_ptr + channel, mask=valid, other=0.0)
    high = tl.load(max_ptr + channel, mask=valid, other=0.0)
    if QPARAMS == 1:
        scale, zero = qparams(low, high, quant_min, quant_max, symmetric_zero, SYMMETRIC)
    if splits > 0:
        now_low, now_high = ends_of(partial_ptr, channel, channels, splits, real, BLOCK_S, BLOCK_C)
        low, high = moved(low, high, now_low, now_high, momentum, rest)
        tl.store(min_ptr + channel, low, mask=valid)
        tl.store(max_ptr + channel, high, mask=valid)
    if QPARAMS == 2:
        scale, zero = qparams(low, high, quant_min, quant_max, symmetric_zero, SYMMETRIC)
    if QPARAMS > 0:
        tl.store(scale_ptr + channel, scale, mask=valid)
        tl.store(zero_ptr + channel, zero, mask=valid)


@triton.jit(do_not_specialize=["splits", "channels"])
def range_reduce_kernel(low_ptr, high_ptr, partial_ptr, splits, channels, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    """Range [channels] of partial [2, splits, channels]."""
    real: tl.constexpr = low_ptr.dtype.element_ty
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    low, high = ends_of(partial_ptr, channel, channels, splits, real, BLOCK_S, BLOCK_C)
    tl.store(low_ptr + channel, low, mask=channel < channels)
    tl.store(high_ptr + channel, high, mask=channel < channels)
