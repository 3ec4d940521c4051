"""Triton kernels of fake-quantization that keep one bit per element: behind the launchers of `fake_quant_mask.py`.

Bit i % 8 of byte i // 8 belongs to element i in memory order. Eight neighbours of one row of a tile are one byte, so a
tile needs rows of a multiple of 8 elements; `masked_any_kernel` does without, at two integer divisions per element.
Arithmetic and layout words as in `_fake_quant_jit`.
"""

import triton
import triton.language as tl

from ._fake_quant_jit import activate, cast, clamp, columns, passes, reciprocal, round_half_even

# Rules; NO_MASK writes none.
CODES = tl.constexpr(0)
REAL = tl.constexpr(1)
FINITE = tl.constexpr(2)
NO_MASK = tl.constexpr(3)


@triton.jit
def masked_value(x, scale, inverse, zero, low, high, RULE: tl.constexpr, ACTIVATION: tl.constexpr):
    """Value, and whether the gradient reaches x."""
    shown = activate(x, ACTIVATION)
    code = round_half_even(shown * inverse) + zero
    held = clamp(code, low, high)
    if RULE == REAL:
        inside = (shown >= (low - zero) * scale) & (shown <= (high - zero) * scale)
    elif RULE == FINITE:
        inside = tl.abs(x) < float("inf")
    else:
        # False for NaN.
        inside = held == code
    return (held - zero) * scale, passes(inside, x, ACTIVATION)


@triton.jit
def row_bytes(flags):
    """[size] -> bytes [size / 8]."""
    size: tl.constexpr = flags.shape[0]
    bits = tl.reshape(flags, [size // 8, 8])
    return tl.sum(tl.where(bits, 1 << tl.arange(0, 8)[None, :], 0), 1).to(tl.uint8)


@triton.jit
def tile_bytes(flags):
    """[rows, size] -> bytes [rows, size / 8]."""
    rows: tl.constexpr = flags.shape[0]
    size: tl.constexpr = flags.shape[1]
    bits = tl.reshape(flags, [rows, size // 8, 8])
    return tl.sum(tl.where(bits, 1 << tl.arange(0, 8)[None, None, :], 0), 2).to(tl.uint8)


@triton.jit(do_not_specialize=["n", "quant_min", "quant_max"])
def masked_flat_kernel(
    y_ptr, mask_ptr, x_ptr, scale_ptr, zero_ptr, n, quant_min, quant_max,
    RULE: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One scale."""
    real: tl.constexpr = scale_ptr.dtype.element_ty
    scale = tl.load(scale_ptr)
    zero = tl.load(zero_ptr)
    inverse = reciprocal(scale)
    low = quant_min.to(real)
    high = quant_max.to(real)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offs = start + tl.arange(0, BLOCK)
    byte = start // 8 + tl.arange(0, BLOCK // 8)
    if start + BLOCK <= n:
        x = tl.load(x_ptr + offs).to(real)
        value, inside = masked_value(x, scale, inverse, zero, low, high, RULE, ACTIVATION)
        tl.store(y_ptr + offs, cast(value, y_ptr.dtype.element_ty))
        tl.store(mask_ptr + byte, row_bytes(inside))
    else:
        valid = offs < n
        x = tl.load(x_ptr + offs, mask=valid, other=0.0).to(real)
        value, inside = masked_value(x, scale, inverse, zero, low, high, RULE, ACTIVATION)
        tl.store(y_ptr + offs, cast(value, y_ptr.dtype.element_ty), mask=valid)
        tl.store(mask_ptr + byte, row_bytes(inside & valid), mask=byte * 8 < n)


@triton.jit(do_not_specialize=["rows", "col_groups", "channels", "quant_min", "quant_max"])
def masked_tile_kernel(
    y_ptr, mask_ptr, x_ptr, scale_ptr, zero_ptr, rows, col_groups, channels, quant_min, quant_max,
    RULE: tl.constexpr, ACTIVATION: tl.constexpr, LAST: tl.constexpr, GROUP: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A scale per channel over a matrix [rows, cols], GROUP a multiple of 8."""
    real: tl.constexpr = scale_ptr.dtype.element_ty
    cols = columns(col_groups, GROUP)
    col_blocks = tl.cdiv(cols, BLOCK_K)
    pid = tl.program_id(0)
    row = (pid // col_blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    first = (pid % col_blocks) * BLOCK_K
    col = first + tl.arange(0, BLOCK_K)
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
    offs = row[:, None] * cols + col[None, :]
    valid = (row < rows)[:, None] & (col < cols)[None, :]
    x = tl.load(x_ptr + offs, mask=valid, other=0.0).to(real)
    value, inside = masked_value(
        x, scale, inverse, zero, quant_min.to(real), quant_max.to(real), RULE, ACTIVATION
    )  # fmt: skip
    tl.store(y_ptr + offs, cast(value, y_ptr.dtype.element_ty), mask=valid)
    byte = first // 8 + tl.arange(0, BLOCK_K // 8)
    row_groups = col_groups * (GROUP // 8)
    fits = (row < rows)[:, None] & (byte < row_groups)[None, :]
    tl.store(mask_ptr + row[:, None] * row_groups + byte[None, :], tile_bytes(inside), mask=fits)


@triton.jit(do_not_specialize=["n", "inner", "channels", "quant_min", "quant_max"])
def masked_any_kernel(
    y_ptr, mask_ptr, x_ptr, scale_ptr, zero_ptr, n, inner, channels, quant_min, quant_max,
    RULE: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A scale per channel, element i of channel i // inner % channels, inner and channels of any size."""
    real: tl.constexpr = scale_ptr.dtype.element_ty
    start = tl.program_id(0).to(tl.int64) * BLOCK
    row = start // inner
    if inner.dtype == tl.int32:
        # What is left of a row, and BLOCK, add up to less than 2^32.
        within = (start - row * inner).to(tl.uint32) + tl.arange(0, BLOCK).to(tl.uint32)
        channel = ((row % channels).to(tl.uint32) + within // inner.to(tl.uint32)) % channels.to(tl.uint32)
    else:
        channel = (row + (start - row * inner + tl.arange(0, BLOCK)) // inner) % channels
    offs = start + tl.arange(0, BLOCK)
    byte = start // 8 + tl.arange(0, BLOCK // 8)
    scale = tl.load(scale_ptr + channel)
    zero = tl.load(zero_ptr + channel)
    inverse = reciprocal(scale)
    low = quant_min.to(real)
    high = quant_max.to(real)
    if start + BLOCK <= n:
        x = tl.load(x_ptr + offs).to(real)
        value, inside = masked_value(x, scale, inverse, zero, low, high, RULE, ACTIVATION)
        tl.store(y_ptr + offs, cast(value, y_ptr.dtype.element_ty))
        tl.store(mask_ptr + byte, row_bytes(inside))
    else:
        valid = offs < n
        x = tl.load(x_ptr + offs, mask=valid, other=0.0).to(real)
        value, inside = masked_value(x, scale, inverse, zero, low, high, RULE, ACTIVATION)
        tl.store(y_ptr + offs, cast(value, y_ptr.dtype.element_ty), mask=valid)
        tl.store(mask_ptr + byte, row_bytes(inside & valid), mask=byte * 8 < n)


@triton.jit
def _selected(grad, byte):
    """grad [rows, 8] where the bits of byte [rows] are set, else 0."""
    bit = (byte.to(tl.int32)[:, None] >> tl.arange(0, 8)[None, :]) & 1
    return tl.where(bit != 0, grad, 0.0)


@triton.jit(do_not_specialize=["n"])
def masked_backward_kernel(dx_ptr, grad_ptr, mask_ptr, n, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    byte = start // 8 + tl.arange(0, BLOCK // 8)
    offs = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    if start + BLOCK <= n:
        grad = tl.load(grad_ptr + offs)
        tl.store(dx_ptr + offs, _selected(grad, tl.load(mask_ptr + byte)))
    else:
        grad = tl.load(grad_ptr + offs, mask=offs < n, other=0.0)
        tl.store(dx_ptr + offs, _selected(grad, tl.load(mask_ptr + byte, mask=byte * 8 < n, other=0)), mask=offs < n)
