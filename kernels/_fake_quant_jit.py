"""Triton kernels behind the launchers of `fake_quant.py`.

Arithmetic is that of the other backends to the bit: 1/scale by IEEE division, product, round half to even, zero point,
clamp; comparisons and selects keep NaN. Launches switch floating-point contraction off. Sums run in a fixed order: a
few float32 adds per lane, then float64, then a second launch over the partial sums.

A matrix [rows, cols] is cols wide in memory; its cols come as col_groups * GROUP, which tells the compiler how wide it
may access memory (GROUP 0: as an int64). LAST says that the channel is the column. Otherwise the channel of a row is
row % channels, of an element of [outer, channels, cols] the middle index.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
FORWARD = tl.constexpr(0)
BACKWARD = tl.constexpr(1)
QUANTIZE = tl.constexpr(2)
DEQUANTIZE = tl.constexpr(3)


@triton.jit
def cast(value, TYPE: tl.constexpr):
    """value.to(TYPE); the interpreter cuts the bits off that bfloat16 lacks, so there they are rounded first."""
    if INTERPRETED and tl.bfloat16 == TYPE:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.uint32).to(tl.float32, bitcast=True)
        value = tl.where(value == value, rounded, value)
    return value.to(TYPE)


@triton.jit
def columns(col_groups, GROUP: tl.constexpr):
    return col_groups.to(tl.int64) if GROUP == 0 else col_groups * GROUP


@triton.jit
def round_half_even(v):
    if INTERPRETED:
        # From 2**51 on every value is an integer already; NaN and infinities pass through too.
        small = tl.abs(v) < 2251799813685248.0
        u = tl.where(small, v, 0.0)
        low = tl.floor(u)
        rest = u - low
        odd = low - 2.0 * tl.floor(low * 0.5) == 1.0
        rounded = tl.where(small, tl.where((rest > 0.5) | ((rest == 0.5) & odd), low + 1.0, low), v)
    elif v.dtype == tl.float64:
        rounded = tl.inline_asm_elementwise("cvt.rni.f64.f64 $0, $1;", "=d,d", [v], tl.float64, is_pure=True, pack=1)
    else:
        rounded = tl.inline_asm_elementwise("cvt.rni.f32.f32 $0, $1;", "=f,f", [v], tl.float32, is_pure=True, pack=1)
    return rounded


@triton.jit
def reciprocal(scale):
    return 1.0 / scale if scale.dtype == tl.float64 else tl.div_rn(1.0, scale)


@triton.jit
def clamp(q, low, high):
    # NaN stays NaN.
    q = tl.maximum(q, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(q, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION >= 1:
        x = tl.where(x < 0.0, 0.0, x)
    if ACTIVATION == 2:
        x = tl.where(x > 6.0, 6.0, x)
    return x


@triton.jit
def passes(inside, x, ACTIVATION: tl.constexpr):
    """Where the gradient reaches x: the code was not clamped and x lies strictly inside the activation's slope."""
    if ACTIVATION >= 1:
        inside = inside & (x > 0.0)
    if ACTIVATION == 2:
        inside = inside & (x < 6.0)
    return inside


@triton.jit
def quantized(x, grad, scale, inverse, zero, low, high, OP: tl.constexpr, ACTIVATION: tl.constexpr):
    if OP == DEQUANTIZE:
        value = (x - zero) * scale
    else:
        code = round_half_even(activate(x, ACTIVATION) * inverse) + zero
        if OP == BACKWARD:
            value = tl.where(passes((code >= low) & (code <= high), x, ACTIVATION), grad, 0.0)
        elif OP == QUANTIZE:
            # Integers have no NaN: it becomes the code of 0.
            value = clamp(tl.where(code == code, code, zero), low, high)
        else:
            value = (clamp(code, low, high) - zero) * scale
    return value


@triton.jit(do_not_specialize=["quant_min", "quant_max"])
def flat_kernel(
    out_ptr, x_ptr, grad_ptr, scale_ptr, zero_ptr, n, quant_min, quant_max,
    OP: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One scale. Full blocks go without a mask: with one, and n of any size, every access would be one element wide."""
    real: tl.constexpr = scale_ptr.dtype.element_ty
    scale = tl.load(scale_ptr)
    zero = tl.load(zero_ptr)
    inverse = reciprocal(scale)
    low = quant_min.to(real)
    high = quant_max.to(real)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offs = start + tl.arange(0, BLOCK)
    if start + BLOCK <= n:
        x = tl.load(x_ptr + offs).to(real)
        grad = x
        if OP == BACKWARD:
            grad = tl.load(grad_ptr + offs).to(real)
        value = quantized(x, grad, scale, inverse, zero, low, high, OP, ACTIVATION)
        tl.store(out_ptr + offs, cast(value, out_ptr.dtype.element_ty))
    else:
        mask = offs < n
        x = tl.load(x_ptr + offs, mask=mask, other=0).to(real)
        grad = x
        if OP == BACKWARD:
            grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(real)
        value = quantized(x, grad, scale, inverse, zero, low, high, OP, ACTIVATION)
        tl.store(out_ptr + offs, cast(value, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["channels", "col_groups", "quant_min", "quant_max"])
def tile_kernel(
    out_ptr, x_ptr, grad_ptr, scale_ptr, zero_ptr, rows, col_groups, channels, quant_min, quant_max,
    OP: tl.constexpr, ACTIVATION: tl.constexpr, LAST: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A scale per channel over a matrix [rows, cols]: the channel is the column (LAST) or row % channels."""
    real: tl.constexpr = scale_ptr.dtype.element_ty
    cols = columns(col_groups, GROUP)
    col_blocks = tl.cdiv(cols, BLOCK_K)
    pid = tl.program_id(0)
    row = (pid // col_blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    col = (pid % col_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    if LAST:
        scale = tl.load(scale_ptr + col, mask=col < cols, other=1.0)
        zero = tl.load(zero_ptr + col, mask=col < cols, other=0.0)[None, :]
        inverse = reciprocal(scale)[None, :]
        scale = scale[None, :]
    else:
        channel = row % channels
        scale = tl.load(scale_ptr + channel)
        zero = tl.load(zero_ptr + channel)[:, None]
        inverse = reciprocal(scale)[:, None]
        scale = scale[:, None]
    low = quant_min.to(real)
    high = quant_max.to(real)
    offs = row[:, None] * cols + col[None, :]
    mask = (row < rows)[:, None] & (col < cols)[None, :]
    x = tl.load(x_ptr + offs, mask=mask, other=0).to(real)
    grad = x
    if OP == BACKWARD:
        grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(real)
    value = quantized(x, grad, scale, inverse, zero, low, high, OP, ACTIVATION)
    tl.store(out_ptr + offs, cast(value, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def tile_at(tile, channel, outer, channels, cols, LAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    """Offsets and mask of one tile of a channel's [outer, cols]; LAST: of the rows of the columns `channel`."""
    if LAST:
        row = (tl.zeros([BLOCK_R], tl.int64) + tile) * BLOCK_R + tl.arange(0, BLOCK_R)
        col = channel
        offs = row[:, None] * cols + col[None, :]
    else:
        col_blocks = tl.cdiv(cols, BLOCK_K)
        row = (tl.zeros([BLOCK_R], tl.int64) + tile // col_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
        col = (tile % col_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
        offs = (row[:, None] * channels + channel) * cols + col[None, :]
    return offs, (row < outer)[:, None] & (col < cols)[None, :]


@triton.jit
def _learned_terms(x, grad, inverse, zero, low, high, ACTIVATION: tl.constexpr):
    """Gradient for x and the terms of the sums: dscale = sum(first), dzero = -scale * sum(second)."""
    scaled = activate(x, ACTIVATION) * inverse
    rounded = round_half_even(scaled)
    code = rounded + zero
    below = code < low
    above = code > high
    inside = (code >= low) & (code <= high)
    dx = tl.where(passes(inside, x, ACTIVATION), grad, 0.0)
    step = tl.where(below, low - zero, high - zero)
    outside = below | above
    dscale = tl.where(inside, grad * (rounded - scaled), tl.where(outside, grad * step, 0.0))
    return dx, dscale, tl.where(outside, grad, 0.0)


@triton.jit(do_not_specialize=["quant_min", "quant_max"])
def learned_flat_kernel(
    dx_ptr, partial_ptr, x_ptr, grad_ptr, scale_ptr, zero_ptr, n, quant_min, quant_max,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Writes dx and, per program, one partial sum of each of the two gradients: partial [2, programs] float64."""
    real: tl.constexpr = scale_ptr.dtype.element_ty
    zero = tl.load(zero_ptr)
    inverse = reciprocal(tl.load(scale_ptr))
    low = quant_min.to(real)
    high = quant_max.to(real)
    pid = tl.program_id(0)
    start = pid.to(tl.int64) * (BLOCK * TILES)
    sum_scale = tl.zeros([BLOCK], real)
    sum_zero = tl.zeros([BLOCK], real)
    if start + BLOCK * TILES <= n:
        for tile in range(TILES):
            offs = start + tile * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + offs).to(real)
            grad = tl.load(grad_ptr + offs).to(real)
            dx, dscale, dzero = _learned_terms(x, grad, inverse, zero, low, high, ACTIVATION)
            tl.store(dx_ptr + offs, cast(dx, dx_ptr.dtype.element_ty))
            sum_scale += dscale
            sum_zero += dzero
    else:
        for tile in range(TILES):
            offs = start + tile * BLOCK + tl.arange(0, BLOCK)
            mask = offs < n
            x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(real)
            grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(real)
            dx, dscale, dzero = _learned_terms(x, grad, inverse, zero, low, high, ACTIVATION)
            tl.store(dx_ptr + offs, cast(dx, dx_ptr.dtype.element_ty), mask=mask)
            sum_scale += dscale
            sum_zero += dzero
    tl.store(partial_ptr + pid, tl.sum(sum_scale.to(tl.float64), 0))
    tl.store(partial_ptr + tl.num_programs(0) + pid, tl.sum(sum_zero.to(tl.float64), 0))


@triton.jit(do_not_specialize=["outer", "channels", "col_groups", "splits", "quant_min", "quant_max"])
def learned_tile_kernel(
    dx_ptr, partial_ptr, x_ptr, grad_ptr, scale_ptr, zero_ptr, outer, channels, col_groups, splits, quant_min,
    quant_max, ACTIVATION: tl.constexpr, LAST: tl.constexpr, GROUP: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Per channel: writes dx and partial [2, splits, channels] float64.

    LAST: x is [outer, cols] with cols = channels, a program owns BLOCK_K channels and TILES * BLOCK_R rows.
    Else: x is [outer, channels, cols], a program owns TILES tiles of one channel's [outer, cols].
    """
    real: tl.constexpr = scale_ptr.dtype.element_ty
    low = quant_min.to(real)
    high = quant_max.to(real)
    cols = columns(col_groups, GROUP)
    col_blocks = tl.cdiv(cols, BLOCK_K)
    pid = tl.program_id(0)
    if LAST:
        split = pid // col_blocks
        channel = (pid % col_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
        scale = tl.load(scale_ptr + channel, mask=channel < cols, other=1.0)
        zero = tl.load(zero_ptr + channel, mask=channel < cols, other=0.0)[None, :]
        inverse = reciprocal(scale)[None, :]
    else:
        split = pid // channels
        channel = pid % channels
        zero = tl.load(zero_ptr + channel)
        inverse = reciprocal(tl.load(scale_ptr + channel))
    sum_scale = tl.zeros([BLOCK_R, BLOCK_K], real)
    sum_zero = tl.zeros([BLOCK_R, BLOCK_K], real)
    for i in range(TILES):
        tile = split.to(tl.int64) * TILES + i
        offs, mask = tile_at(tile, channel, outer, channels, cols, LAST, BLOCK_R, BLOCK_K)
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(real)
        grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(real)
        dx, dscale, dzero = _learned_terms(x, grad, inverse, zero, low, high, ACTIVATION)
        tl.store(dx_ptr + offs, cast(dx, dx_ptr.dtype.element_ty), mask=mask)
        sum_scale += dscale
        sum_zero += dzero
    at = partial_ptr + split.to(tl.int64) * channels + channel
    second = splits.to(tl.int64) * channels
    if LAST:
        tl.store(at, tl.sum(sum_scale.to(tl.float64), 0), mask=channel < cols)
        tl.store(at + second, tl.sum(sum_zero.to(tl.float64), 0), mask=channel < cols)
    else:
        tl.store(at, tl.sum(tl.sum(sum_scale.to(tl.float64), 1), 0))
        tl.store(at + second, tl.sum(tl.sum(sum_zero.to(tl.float64), 1), 0))


@triton.jit(do_not_specialize=["splits", "channels"])
def learned_finish_kernel(
    dscale_ptr, dzero_ptr, partial_ptr, scale_ptr, splits, channels, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Sums partial [2, splits, channels] over splits, always in the same order."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    sum_scale = tl.zeros([BLOCK_S, BLOCK_C], tl.float64)
    sum_zero = tl.zeros([BLOCK_S, BLOCK_C], tl.float64)
    second = splits.to(tl.int64) * channels
    start = 0
    while start < splits:
        split = start + tl.arange(0, BLOCK_S)
        at = partial_ptr + split.to(tl.int64)[:, None] * channels + channel[None, :]
        mask = (split < splits)[:, None] & (channel < channels)[None, :]
        sum_scale += tl.load(at, mask=mask, other=0.0)
        sum_zero += tl.load(at + second, mask=mask, other=0.0)
        start += BLOCK_S
    mask = channel < channels
    scale = tl.load(scale_ptr + channel, mask=mask, other=0.0).to(tl.float64)
    real: tl.constexpr = dscale_ptr.dtype.element_ty
    tl.store(dscale_ptr + channel, tl.sum(sum_scale, 0).to(real), mask=mask)
    tl.store(dzero_ptr + channel, (-scale * tl.sum(sum_zero, 0)).to(real), mask=mask)
