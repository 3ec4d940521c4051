"""Triton kernels behind `quantization_error`: squared errors of many candidates from one read of x.

Squares and sums are float64: a float32 square of 1e20 would be infinite. The order of the sums is fixed.
"""

import triton
import triton.language as tl

from ._fake_quant_jit import FORWARD, columns, quantized, reciprocal, tile_at


@triton.jit(
    do_not_specialize=[
        "outer", "channels", "col_groups", "splits", "candidates", "quant_min", "quant_max"
    ]
)  # fmt: skip
def error_kernel(
    partial_ptr, x_ptr, scale_ptr, zero_ptr, outer, channels, col_groups, splits, candidates, quant_min, quant_max,
    LAST: tl.constexpr, GROUP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of one channel (LAST: of BLOCK_K channels) in registers: partial [candidates, splits, channels]."""
    real: tl.constexpr = scale_ptr.dtype.element_ty
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
    offs, mask = tile_at(split, channel, outer, channels, cols, LAST, BLOCK_R, BLOCK_K)
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(real)
    counted = mask & (tl.abs(x) < float("inf"))
    low = quant_min.to(real)
    high = quant_max.to(real)
    out = partial_ptr + split.to(tl.int64) * channels + channel
    step = splits.to(tl.int64) * channels
    candidate = 0
    while candidate < candidates:
        scale = tl.load(scale_ptr + channel, mask=valid, other=1.0)
        zero = tl.load(zero_ptr + channel, mask=valid, other=0.0)
        inverse = reciprocal(scale)
        if LAST:
            inverse = inverse[None, :]
            scale = scale[None, :]
            zero = zero[None, :]
        value = quantized(x, x, scale, inverse, zero, low, high, FORWARD, 0)
        error = tl.where(counted, value - x, 0.0).to(tl.float64)
        total = tl.sum(error * error, 0)
        if not LAST:
            total = tl.sum(total, 0)
        tl.store(out, total, mask=valid)
        scale_ptr += channels
        zero_ptr += channels
        out += step
        candidate += 1


@triton.jit(do_not_specialize=["splits", "channels"])
def error_sum_kernel(out_ptr, partial_ptr, splits, channels, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    """[candidates, splits, channels] -> [candidates, channels]."""
    blocks = tl.cdiv(channels, BLOCK_C)
    candidate = (tl.program_id(0) // blocks).to(tl.int64)
    channel = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_S, BLOCK_C], tl.float64)
    start = 0
    while start < splits:
        split = start + tl.arange(0, BLOCK_S)
        at = (candidate * splits + split[:, None]) * channels + channel[None, :]
        mask = (split < splits)[:, None] & (channel < channels)[None, :]
        total += tl.load(partial_ptr + at, mask=mask, other=0.0)
        start += BLOCK_S
    tl.store(out_ptr + candidate * channels + channel, tl.sum(total, 0), mask=channel < channels)
