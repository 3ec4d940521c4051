"""Launches that quantize with a running range, with and without a mask, and that find ranges."""

import torch
import triton

from . import _mask_jit as mask_jit
from . import _observe_jit as jit
from . import _range_jit as ranges
from ._layout import (
    LAUNCH,
    LAUNCH_WIDE,
    RANGE_PROGRAMS,
    RANGE_SPLITS,
    RANGE_TILE,
    TILE,
    channel_tiles,
    check_parameters,
    compute_dtype,
    dense,
    matrix,
    without_gaps,
)

RUNNING, MOVING, DELAYED = jit.RUNNING.value, jit.MOVING.value, jit.DELAYED.value
NO_MASK = mask_jit.NO_MASK.value
_NO_QPARAMS, _BEFORE, _AFTER = 0, 1, 2


def symmetric_zero(quant_min, quant_max):
    # Python rounds half to even.
    return round((quant_min + quant_max) / 2)


class _Walk:
    """How programs share the tiles of x; of shape and strides alone. x is dense and not empty."""

    def __init__(self, x, channels, axis, size=RANGE_TILE):
        if channels == 1:
            self.splits = min(triton.cdiv(x.numel(), size), RANGE_PROGRAMS)
            self.grid, self.shape, self.constants = (self.splits,), None, {"BLOCK": size}
            return
        side, tiles, outer, col_groups, self.constants = channel_tiles(x, channels, axis, size, 64)
        self.splits = min(tiles, RANGE_SPLITS, max(1, 2 * RANGE_PROGRAMS // side))
        self.grid, self.shape = (side * self.splits,), (outer, channels, col_groups, self.splits, tiles)


def _range(walk, x, low, high, second, running, act, keep):
    """Launches the range reduction: partial ranges to low and, from `second` on, to high."""
    if walk.shape is None:
        ranges.range_flat_kernel[walk.grid](
            low, high, x, *running, x.numel(), second, ACTIVATION=act, KEEP=keep, **walk.constants, **LAUNCH_WIDE
        )
    else:
        ranges.range_tile_kernel[walk.grid](
            low, high, x, *running, *walk.shape, second, ACTIVATION=act, KEEP=keep, **walk.constants, **LAUNCH_WIDE
        )


def _columns(channels):
    block_c = min(triton.next_power_of_2(channels), 32)
    return (triton.cdiv(channels, block_c),), {"BLOCK_S": 1024 // block_c, "BLOCK_C": block_c, **LAUNCH}


def finite_range(x, axis, act):
    channels = 1 if axis is None else x.size(axis)
    low = torch.empty(channels, dtype=compute_dtype(x), device=x.device)
    high = torch.empty_like(low)
    if x.numel() == 0:
        return low.fill_(float("inf")), high.fill_(-float("inf"))
    x = without_gaps(x)
    walk = _Walk(x, channels, axis)
    with torch.cuda.device_of(x):
        if walk.splits == 1:
            _range(walk, x, low, high, 0, (low, high), act, False)
        else:
            partial = torch.empty(2 * walk.splits * channels, dtype=low.dtype, device=x.device)
            _range(walk, x, partial, partial, walk.splits * channels, (low, high), act, False)
            grid, options = _columns(channels)
            ranges.range_reduce_kernel[grid](low, high, partial, walk.splits, channels, **options)
    return low, high


def any_masked(y, mask, x, scale, zero_point, axis, limits, act, rule):
    """A mask over channels whose runs in memory are not of a multiple of 8 elements."""
    channels = scale.numel()
    _, cols, last = matrix(x, channels, axis)
    n = x.numel()
    mask_jit.masked_any_kernel[(triton.cdiv(n, TILE),)](
        y, mask, x, scale, zero_point, n, 1 if last else cols, channels, *limits,
        RULE=rule, ACTIVATION=act, BLOCK=TILE, **LAUNCH,
    )  # fmt: skip


def observe(mode, x, running_min, running_max, limits, momentum, symmetric, axis, act, rule):
    """(y, scale, zero point, mask or None); moves the running range unless `mode` is RUNNING."""
    low, high = check_parameters(x, running_min, running_max, axis)
    x, y = dense(x)
    n, channels = x.numel(), low.numel()
    masked = rule != NO_MASK
    mask = torch.empty(triton.cdiv(n, 8), dtype=torch.uint8, device=x.device) if masked else None
    scale, zero_point = torch.empty_like(low), torch.empty_like(low)
    if channels == 0:
        return y, scale, zero_point, mask
    qrange = (*limits, symmetric_zero(*limits))
    move = (momentum, 1.0 - momentum)
    grid, options = _columns(channels)

    def finish(partial, splits, qparams):
        ranges.range_finish_kernel[grid](
            scale, zero_point, low, high, partial, splits, channels, *qrange, *move,
            QPARAMS=qparams, SYMMETRIC=symmetric, **options,
        )  # fmt: skip

    with torch.cuda.device_of(x):
        if n == 0:
            finish(low, 0, _AFTER)
            return y, scale, zero_point, mask
        # Values and both ends of the range at once would need too many registers for the larger tile.
        walk = _Walk(x, channels, axis, RANGE_TILE // 2 if mode == DELAYED else RANGE_TILE)
        partial = low
        if mode != RUNNING:
            # [2, splits, channels], and [2, channels] for the range before.
            partial = torch.empty((2 * walk.splits + 2) * channels, dtype=low.dtype, device=x.device)
        # A byte of the mask must not be shared by two programs.
        straddles = masked and walk.shape is not None and walk.constants["GROUP"] not in (8, 16)
        if mode == MOVING or (mode == DELAYED and straddles):
            _range(walk, x, partial, partial, walk.splits * channels, (low, high), act, True)
        if straddles:
            finish(partial, 0 if mode == RUNNING else walk.splits, _BEFORE if mode == DELAYED else _AFTER)
            any_masked(y, mask, x, scale, zero_point, axis, limits, act, rule)
        else:
            pointers = (y, mask if masked else y, x, scale, zero_point, low, high, partial)
            choices = {"MODE": mode, "RULE": rule, "SYMMETRIC": symmetric, "ACTIVATION": act}
            if walk.shape is None:
                jit.observed_flat_kernel[walk.grid](
                    *pointers, n, walk.splits, *qrange, *move,
                    SPLITS=RANGE_PROGRAMS, **choices, **walk.constants, **LAUNCH_WIDE,
                )  # fmt: skip
            else:
                jit.observed_tile_kernel[walk.grid](
                    *pointers, *walk.shape, *qrange, *move,
                    SPLITS=RANGE_SPLITS, **choices, **walk.constants, **LAUNCH_WIDE,
                )  # fmt: skip
            if mode == DELAYED:
                finish(partial, walk.splits, _NO_QPARAMS)
    for buffer, ours in ((running_min, low), (running_max, high)):
        if ours is not buffer:
            buffer.copy_(ours)
    return y, scale, zero_point, mask
