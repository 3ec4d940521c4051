"""Triton kernels that serve several tensors in one launch. The ways through them are those of `_bn_stats_jit`.

A table [7, entries] int64 has, of every tensor, its first program, its kind, the addresses of input and output, its
first column in the matrices [N, D] of all tensors, its channels and its values per image and channel. What differs in
the shape of a tile is a kind, a branch that all threads of a program take together.
"""

import triton
import triton.language as tl

from ._bn_stats_backward_jit import coefficients, gradient
from ._bn_stats_jit import SMALL, image_and_channel, moments, overflows, plane_tile, planes_past, shift_of

# Planes up to 12, up to 121 and more values; channels innermost at 16 bytes or not; one value per image and channel.
NARROW = tl.constexpr(0)
MIDDLE = tl.constexpr(1)
BROAD = tl.constexpr(2)
INNER = tl.constexpr(3)
UNALIGNED = tl.constexpr(4)
SINGLES = tl.constexpr(5)


@triton.jit
def entry_of(table_ptr, entries, pid, ELEMENT: tl.constexpr, ENTRIES: tl.constexpr):
    """Program within its tensor, kind, input, output address, first column, channels, values."""
    entry = tl.arange(0, ENTRIES)
    first = tl.load(table_ptr + entry, mask=entry < entries, other=9223372036854775807)
    at = table_ptr + tl.sum((first <= pid).to(tl.int32), 0) - 1
    x_ptr = tl.multiple_of(tl.load(at + 2 * entries).to(tl.pointer_type(ELEMENT)), 16)
    return (
        pid - tl.load(at).to(tl.int32),
        tl.load(at + entries),
        x_ptr,
        tl.load(at + 3 * entries),
        tl.load(at + 4 * entries),
        tl.load(at + 5 * entries).to(tl.int32),
        tl.load(at + 6 * entries).to(tl.int32),
    )


@triton.jit
def _planes(
    mean_ptr, var_ptr, x_ptr, pid, images, width, channels, cols, VEC: tl.constexpr, MANY: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    real: tl.constexpr = mean_ptr.dtype.element_ty
    rescale: tl.constexpr = overflows(x_ptr.dtype)
    planes = images * channels
    first = pid.to(tl.int64) * BLOCK_G
    row = tl.arange(0, BLOCK_G)
    valid = first + row < planes
    last = tl.minimum(first + BLOCK_G, planes) * cols
    tail = (last + VEC - 1) // VEC * VEC > planes.to(tl.int64) * cols
    x, mask, _, _ = plane_tile(x_ptr, first, planes, cols, 0, cols, 0, tail, False, VEC, BLOCK_G, BLOCK_K)
    middle = shift_of(x, 1.0 / tl.maximum(tl.sum(mask.to(real), 1), 1.0), 1, rescale)
    sum_tile = tl.zeros([BLOCK_G, BLOCK_K], real)
    square_tile = tl.zeros([BLOCK_G, BLOCK_K], real)
    small_tile = tl.zeros([BLOCK_G, BLOCK_K], real)
    start = cols * 0
    while start < cols + VEC - 1:
        x, mask, _, _ = plane_tile(x_ptr, first, planes, cols, 0, cols, start, tail, False, VEC, BLOCK_G, BLOCK_K)
        d = tl.where(mask, x - middle[:, None], 0.0)
        sum_tile += d
        square_tile += d * d
        if rescale:
            small_tile += (d * SMALL) * (d * SMALL)
        start += BLOCK_K
    inverse = 1.0 / cols.to(real)
    sums = tl.sum(sum_tile, 1)
    mean, var = moments(middle, sums, tl.sum(square_tile, 1), tl.sum(small_tile, 1), inverse, rescale, False)
    image, channel = image_and_channel(first, row, channels, MANY)
    tl.store(mean_ptr + image * width + channel, mean, mask=valid)
    tl.store(var_ptr + image * width + channel, var, mask=valid)


@triton.jit
def _inner(
    mean_ptr, var_ptr, x_ptr, pid, width, channels, rows,
    VEC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """VEC divides the channels."""
    real: tl.constexpr = mean_ptr.dtype.element_ty
    rescale: tl.constexpr = overflows(x_ptr.dtype)
    cols = channels // VEC * VEC
    col_blocks = tl.cdiv(cols, BLOCK_K)
    image = (pid // col_blocks).to(tl.int64)
    col = pid % col_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    valid = col < cols
    x_ptr += image * rows * cols
    row = tl.arange(0, BLOCK_R)
    offs = row.to(tl.int64)[:, None] * cols + col[None, :]
    x = tl.load(x_ptr + offs, mask=(row < rows)[:, None] & valid[None, :], other=0.0).to(real)
    middle = shift_of(x, 1.0 / tl.minimum(rows, BLOCK_R).to(real), 0, rescale)
    sum_tile = tl.zeros([BLOCK_R, BLOCK_K], real)
    square_tile = tl.zeros([BLOCK_R, BLOCK_K], real)
    small_tile = tl.zeros([BLOCK_R, BLOCK_K], real)
    start = rows * 0
    while start < rows:
        row = start + tl.arange(0, BLOCK_R)
        offs = row.to(tl.int64)[:, None] * cols + col[None, :]
        x = tl.load(x_ptr + offs, mask=(row < rows)[:, None] & valid[None, :], other=0.0).to(real)
        d = tl.where((row < rows)[:, None], x - middle[None, :], 0.0)
        sum_tile += d
        square_tile += d * d
        if rescale:
            small_tile += (d * SMALL) * (d * SMALL)
        start += BLOCK_R
    inverse = 1.0 / rows.to(real)
    sums = tl.sum(sum_tile, 0)
    mean, var = moments(middle, sums, tl.sum(square_tile, 0), tl.sum(small_tile, 0), inverse, rescale, False)
    tl.store(mean_ptr + image * width + col, mean, mask=valid)
    tl.store(var_ptr + image * width + col, var, mask=valid)


@triton.jit(do_not_specialize=["entries", "images", "width"])
def instance_list_kernel(
    mean_ptr, var_ptr, table_ptr, entries, images, width,
    ELEMENT: tl.constexpr, VEC: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Mean and variance [images, width] of every image and channel of all tensors."""
    pid, kind, x_ptr, _, begin, channels, values = entry_of(table_ptr, entries, tl.program_id(0), ELEMENT, ENTRIES)
    mean_ptr += begin
    var_ptr += begin
    if kind == NARROW:
        _planes(mean_ptr, var_ptr, x_ptr, pid, images, width, channels, values, VEC, False, 64, 16)
    elif kind == MIDDLE:
        _planes(mean_ptr, var_ptr, x_ptr, pid, images, width, channels, values, VEC, False, 8, 128)
    elif kind == BROAD:
        _planes(mean_ptr, var_ptr, x_ptr, pid, images, width, channels, values, VEC, False, 1, 1024)
    elif kind == INNER:
        _inner(mean_ptr, var_ptr, x_ptr, pid, width, channels, values, VEC, 32, 32)
    elif kind == UNALIGNED:
        _inner(mean_ptr, var_ptr, x_ptr, pid, width, channels, values, 1, 32, 32)
    else:
        col_blocks = tl.cdiv(channels, 64)
        image = pid // col_blocks * 32 + tl.arange(0, 32)
        col = pid % col_blocks * 64 + tl.arange(0, 64)
        mask = (image < images)[:, None] & (col < channels)[None, :]
        row = image.to(tl.int64)[:, None]
        x = tl.load(x_ptr + row * channels + col[None, :], mask=mask, other=0.0).to(mean_ptr.dtype.element_ty)
        tl.store(mean_ptr + row * width + col[None, :], x, mask=mask)
        # NaN and infinities stay visible.
        tl.store(var_ptr + row * width + col[None, :], x - x, mask=mask)


@triton.jit
def _flat_gradient(
    dx_ptr, x_ptr, center_ptr, grad_mean_ptr, grad_var_ptr, pid, images, channels, cols, center_step, mean_step,
    var_step, factor, real: tl.constexpr, TERMS: tl.constexpr, FEW: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    planes = images * channels
    start = pid.to(tl.int64) * BLOCK
    plane = start // cols
    row = tl.arange(0, ROWS)
    image, channel = image_and_channel(plane, row, channels, False)
    center, a, b = coefficients(
        center_ptr, grad_mean_ptr, grad_var_ptr, center_step, mean_step, var_step, image, channel, plane + row < planes,
        factor, 2.0 * factor, real, TERMS,
    )  # fmt: skip
    magic = (4294967295 + cols.to(tl.int64)) // cols
    past = tl.minimum(planes_past(start - plane * cols, cols, magic, FEW, BLOCK), ROWS - 1)
    own_center = tl.gather(center, past, 0)
    own_a = tl.gather(a, past, 0)
    own_b = tl.gather(b, past, 0)
    index = tl.arange(0, BLOCK)
    stop = planes.to(tl.int64) * cols
    dx_ptr += start
    x_ptr += start
    if start + BLOCK <= stop:
        gradient(dx_ptr, x_ptr, x_ptr, index, index >= 0, own_center, own_a, own_b, own_a, real, TERMS, -1)
    else:
        inside = start + index < stop
        gradient(dx_ptr, x_ptr, x_ptr, index, inside, own_center, own_a, own_b, own_a, real, TERMS, -1)


@triton.jit
def _inner_gradient(
    dx_ptr, x_ptr, center_ptr, grad_mean_ptr, grad_var_ptr, pid, images, channels, rows, center_step, mean_step,
    var_step, factor, real: tl.constexpr, TERMS: tl.constexpr, VEC: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    cols = channels // VEC * VEC
    col_blocks = tl.cdiv(cols, BLOCK_K)
    row = pid // col_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    col = pid % col_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    image = (row // rows).to(tl.int64)
    mask = (image < images)[:, None] & (col < cols)[None, :]
    center, a, b = coefficients(
        center_ptr, grad_mean_ptr, grad_var_ptr, center_step, mean_step, var_step, image[:, None], col[None, :], mask,
        factor, 2.0 * factor, real, TERMS,
    )  # fmt: skip
    offs = row.to(tl.int64)[:, None] * cols + col[None, :]
    gradient(dx_ptr, x_ptr, x_ptr, offs, mask, center, a, b, a, real, TERMS, -1)


@triton.jit(do_not_specialize=["entries", "images", "center_step", "mean_step", "var_step"])
def backward_list_kernel(
    center_ptr, grad_mean_ptr, grad_var_ptr, table_ptr, entries, images, center_step, mean_step, var_step,
    ELEMENT: tl.constexpr, TERMS: tl.constexpr, VEC: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx of every tensor from rows [images, D]; kinds of planes: up to 16 values, below BLOCK, more."""
    real: tl.constexpr = center_ptr.dtype.element_ty
    pid, kind, x_ptr, out, begin, channels, values = entry_of(table_ptr, entries, tl.program_id(0), ELEMENT, ENTRIES)
    dx_ptr = tl.multiple_of(out.to(tl.pointer_type(ELEMENT)), 16)
    center_ptr += begin
    grad_mean_ptr += begin
    grad_var_ptr += begin
    factor = (1.0 / values.to(tl.float64)).to(real)
    if kind == NARROW:
        _flat_gradient(
            dx_ptr, x_ptr, center_ptr, grad_mean_ptr, grad_var_ptr, pid, images, channels, values, center_step,
            mean_step, var_step, factor, real, TERMS, False, BLOCK, BLOCK,
        )  # fmt: skip
    elif kind == MIDDLE:
        _flat_gradient(
            dx_ptr, x_ptr, center_ptr, grad_mean_ptr, grad_var_ptr, pid, images, channels, values, center_step,
            mean_step, var_step, factor, real, TERMS, False, BLOCK // 16, BLOCK,
        )  # fmt: skip
    elif kind == BROAD:
        _flat_gradient(
            dx_ptr, x_ptr, center_ptr, grad_mean_ptr, grad_var_ptr, pid, images, channels, values, center_step,
            mean_step, var_step, factor, real, TERMS, True, 2, BLOCK,
        )  # fmt: skip
    elif kind == INNER:
        _inner_gradient(
            dx_ptr, x_ptr, center_ptr, grad_mean_ptr, grad_var_ptr, pid, images, channels, values, center_step,
            mean_step, var_step, factor, real, TERMS, VEC, BLOCK // 64, 64,
        )  # fmt: skip
    else:
        _inner_gradient(
            dx_ptr, x_ptr, center_ptr, grad_mean_ptr, grad_var_ptr, pid, images, channels, values, center_step,
            mean_step, var_step, factor, real, TERMS, 1, BLOCK // 64, 64,
        )  # fmt: skip
