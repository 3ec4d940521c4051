"""Triton kernels of the backwards of the BatchNorm statistics; the ways through x are those of `_bn_stats_jit`.

dx = a * (x - center) + b, a = grad_var * var_factor and b = grad_mean * mean_factor of the element's image and channel,
plus grad * weight / sqrt(running_var + eps) where BatchNorm is behind it (NORM >= 0; 1: with weight). TERMS: 1 has
grad_mean, 2 has grad_var; without the latter x is not read. Where a is 0 a select leaves x out.
"""

import triton
import triton.language as tl

from ._bn_stats_jit import compute_type, image_and_channel, inverse_root, plane_tile, planes_past
from ._fake_quant_jit import cast, columns


@triton.jit
def coefficients(
    center_ptr, grad_mean_ptr, grad_var_ptr, center_step, mean_step, var_step, image, channel, mask, mean_factor,
    var_factor, real: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """center, a and b; rows of an image lie *_step apart, 0 for one row in all."""
    center = tl.zeros(mask.shape, real)
    a = tl.zeros(mask.shape, real)
    b = tl.zeros(mask.shape, real)
    if TERMS % 2 == 1:
        b = tl.load(grad_mean_ptr + image * mean_step + channel, mask=mask, other=0.0) * mean_factor
    if TERMS >= 2:
        a = tl.load(grad_var_ptr + image * var_step + channel, mask=mask, other=0.0) * var_factor
        center = tl.load(center_ptr + image * center_step + channel, mask=mask, other=0.0)
    return center, a, b


@triton.jit
def norm_scale(weight_ptr, var_ptr, channel, mask, eps, real: tl.constexpr, NORM: tl.constexpr):
    scale = inverse_root(tl.load(var_ptr + channel, mask=mask, other=1.0), tl.full((), eps, real))
    if NORM == 1:
        scale = tl.load(weight_ptr + channel, mask=mask, other=0.0) * scale
    return scale


@triton.jit
def gradient(
    dx_ptr, x_ptr, grad_ptr, offs, mask, center, a, b, scale, real: tl.constexpr, TERMS: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """Writes dx."""
    own = b
    if TERMS >= 2:
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(real)
        own = tl.where(a == 0.0, 0.0, a * (x - center)) + b
    if NORM >= 0:
        own = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(real) * scale + own
    value = tl.zeros(mask.shape, real) + own
    tl.store(dx_ptr + offs, cast(value, dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["planes", "channels", "col_groups", "center_step", "mean_step", "var_step"])
def planes_backward_kernel(
    dx_ptr, x_ptr, grad_ptr, center_ptr, grad_mean_ptr, grad_var_ptr, weight_ptr, var_ptr, planes, channels, col_groups,
    center_step, mean_step, var_step, mean_factor: "fp64", var_factor: "fp64", eps: "fp64",  # noqa: F821
    TERMS: tl.constexpr, NORM: tl.constexpr, MANY: tl.constexpr, GROUP: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of x [planes, cols] whose planes begin at 16 bytes."""
    real: tl.constexpr = compute_type(x_ptr.dtype)
    mean_factor = tl.full((), mean_factor, real)
    var_factor = tl.full((), var_factor, real)
    cols = columns(col_groups, GROUP)
    col_blocks = tl.cdiv(cols, BLOCK_K)
    pid = tl.program_id(0)
    first = (pid // col_blocks).to(tl.int64) * BLOCK_R
    row = tl.arange(0, BLOCK_R)
    col = (pid % col_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    valid = first + row < planes
    image, channel = image_and_channel(first, row, channels, MANY)
    center, a, b = coefficients(
        center_ptr, grad_mean_ptr, grad_var_ptr, center_step, mean_step, var_step, image, channel, valid, mean_factor,
        var_factor, real, TERMS,
    )  # fmt: skip
    scale = norm_scale(weight_ptr, var_ptr, channel, valid, eps, real, NORM) if NORM >= 0 else a
    offs = (first + row)[:, None] * cols + col[None, :]
    mask = valid[:, None] & (col < cols)[None, :]
    gradient(
        dx_ptr, x_ptr, grad_ptr, offs, mask, center[:, None], a[:, None], b[:, None], scale[:, None], real, TERMS, NORM
    )  # fmt: skip


@triton.jit(do_not_specialize=["planes", "channels", "cols", "magic", "center_step", "mean_step", "var_step"])
def flat_backward_kernel(
    dx_ptr, x_ptr, grad_ptr, center_ptr, grad_mean_ptr, grad_var_ptr, weight_ptr, var_ptr, planes, channels, cols,
    magic, center_step, mean_step, var_step, mean_factor: "fp64", var_factor: "fp64", eps: "fp64",  # noqa: F821
    TERMS: tl.constexpr, NORM: tl.constexpr, MANY: tl.constexpr, FEW: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK elements of x [planes, cols], in at most ROWS planes, which begin anywhere."""
    real: tl.constexpr = compute_type(x_ptr.dtype)
    mean_factor = tl.full((), mean_factor, real)
    var_factor = tl.full((), var_factor, real)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    plane = start // cols
    row = tl.arange(0, ROWS)
    valid = plane + row < planes
    image, channel = image_and_channel(plane, row, channels, MANY)
    center, a, b = coefficients(
        center_ptr, grad_mean_ptr, grad_var_ptr, center_step, mean_step, var_step, image, channel, valid, mean_factor,
        var_factor, real, TERMS,
    )  # fmt: skip
    scale = norm_scale(weight_ptr, var_ptr, channel, valid, eps, real, NORM) if NORM >= 0 else a
    past = planes_past(start - plane * cols, cols, magic, FEW, BLOCK)
    own_center = tl.gather(center, past, 0)
    own_a = tl.gather(a, past, 0)
    own_b = tl.gather(b, past, 0)
    own_scale = tl.gather(scale, past, 0)
    index = tl.arange(0, BLOCK)
    stop = planes.to(tl.int64) * cols
    if start + BLOCK <= stop:
        gradient(
            dx_ptr + start, x_ptr + start, grad_ptr + start, index, index >= 0, own_center, own_a, own_b, own_scale,
            real, TERMS, NORM,
        )  # fmt: skip
    else:
        gradient(
            dx_ptr + start, x_ptr + start, grad_ptr + start, index, start + index < stop, own_center, own_a, own_b,
            own_scale, real, TERMS, NORM,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "channels", "col_groups", "of_image"])
def inner_backward_kernel(
    dx_ptr, x_ptr, grad_ptr, center_ptr, grad_mean_ptr, grad_var_ptr, weight_ptr, var_ptr, rows, channels, col_groups,
    of_image, center_step, mean_step, var_step, mean_factor: "fp64", var_factor: "fp64", eps: "fp64",  # noqa: F821
    TERMS: tl.constexpr, NORM: tl.constexpr, EACH: tl.constexpr, FOLD: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of one segment of x [segments, rows, cols]. FOLD: the channel of a column is column % channels.

    The image is the segment; EACH: there is one segment, and of_image rows belong to an image.
    """
    real: tl.constexpr = compute_type(x_ptr.dtype)
    mean_factor = tl.full((), mean_factor, real)
    var_factor = tl.full((), var_factor, real)
    cols = columns(col_groups, GROUP)
    col_blocks = tl.cdiv(cols, BLOCK_K)
    row_blocks = tl.cdiv(rows, BLOCK_R)
    pid = tl.program_id(0)
    col = (pid % col_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    segment = (pid // col_blocks // row_blocks).to(tl.int64)
    block = pid // col_blocks % row_blocks
    # A division of int32 is the cheaper one.
    row = (block if EACH else block.to(tl.int64)) * BLOCK_R + tl.arange(0, BLOCK_R)
    valid = col < cols
    mask = (row < rows)[:, None] & valid[None, :]
    channel = col % channels if FOLD else col
    if EACH:
        image = (row // of_image).to(tl.int64)[:, None]
        own = channel[None, :]
        inside = mask
    else:
        image = segment
        own = channel
        inside = valid
    center, a, b = coefficients(
        center_ptr, grad_mean_ptr, grad_var_ptr, center_step, mean_step, var_step, image, own, inside, mean_factor,
        var_factor, real, TERMS,
    )  # fmt: skip
    scale = a
    if NORM >= 0:
        scale = norm_scale(weight_ptr, var_ptr, channel, valid, eps, real, NORM)[None, :]
    if not EACH:
        center = center[None, :]
        a = a[None, :]
        b = b[None, :]
    offs = (segment * rows + row)[:, None] * cols + col[None, :]
    gradient(dx_ptr, x_ptr, grad_ptr, offs, mask, center, a, b, scale, real, TERMS, NORM)


@triton.jit(do_not_specialize=["planes", "channels", "col_groups", "parts", "tiles"])
def planes_parameter_kernel(
    partial_ptr, x_ptr, grad_ptr, mean_ptr, planes, channels, col_groups, parts, tiles,
    SINGLE: tl.constexpr, EXACT: tl.constexpr, VEC: tl.constexpr, MANY: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums of grad * (x - mean) and of grad per plane and part: partial [2, images, parts, channels] float64."""
    cols = columns(col_groups, GROUP)
    pid = tl.program_id(0)
    first = (pid // parts).to(tl.int64) * BLOCK_G
    part = pid % parts
    row = tl.arange(0, BLOCK_G)
    valid = first + row < planes
    image, channel = image_and_channel(first, row, channels, MANY)
    begin = part * (tiles * BLOCK_K + cols * 0)
    width = tl.minimum(cols - begin, tiles * BLOCK_K)
    last = (tl.minimum(first + BLOCK_G, planes) - 1) * cols + begin + width
    tail = (last + VEC - 1) // VEC * VEC > planes.to(tl.int64) * cols
    mean = tl.load(mean_ptr + channel, mask=valid, other=0.0)[:, None]
    x, _, _, _ = plane_tile(x_ptr, first, planes, cols, begin, width, 0, tail, EXACT, VEC, BLOCK_G, BLOCK_K)
    total, _, _, _ = plane_tile(grad_ptr, first, planes, cols, begin, width, 0, tail, EXACT, VEC, BLOCK_G, BLOCK_K)
    product = total * (x - mean)
    if not SINGLE:
        start = begin * 0 + BLOCK_K
        while start < width + VEC - 1:
            x, _, _, _ = plane_tile(
                x_ptr, first, planes, cols, begin, width, start, tail, EXACT, VEC, BLOCK_G, BLOCK_K
            )  # fmt: skip
            grad, _, _, _ = plane_tile(
                grad_ptr, first, planes, cols, begin, width, start, tail, EXACT, VEC, BLOCK_G, BLOCK_K
            )  # fmt: skip
            product += grad * (x - mean)
            total += grad
            start += BLOCK_K
    at = partial_ptr + (image * parts + part) * channels + channel
    tl.store(at, tl.sum(product, 1).to(tl.float64), mask=valid)
    tl.store(at + planes.to(tl.int64) * parts, tl.sum(total, 1).to(tl.float64), mask=valid)


@triton.jit(do_not_specialize=["rows", "channels", "col_groups", "parts", "tiles"])
def inner_parameter_kernel(
    partial_ptr, x_ptr, grad_ptr, mean_ptr, rows, channels, col_groups, parts, tiles,
    FOLD: tl.constexpr, GROUP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The same of a part of x [rows, cols]: partial [2, parts, cols]. FOLD: the channel is column % channels."""
    real: tl.constexpr = compute_type(x_ptr.dtype)
    cols = columns(col_groups, GROUP)
    col_blocks = tl.cdiv(cols, BLOCK_K)
    pid = tl.program_id(0)
    col = (pid % col_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    part = pid // col_blocks
    valid = col < cols
    start = part.to(tl.int64) * (tiles * BLOCK_R)
    stop = tl.minimum(rows, start + tiles * BLOCK_R)
    mean = tl.load(mean_ptr + (col % channels if FOLD else col), mask=valid, other=0.0)[None, :]
    product = tl.zeros([BLOCK_R, BLOCK_K], real)
    total = tl.zeros([BLOCK_R, BLOCK_K], real)
    while start < stop:
        row = start + tl.arange(0, BLOCK_R)
        offs = row[:, None] * cols + col[None, :]
        mask = (row < stop)[:, None] & valid[None, :]
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(real)
        grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(real)
        product += grad * (x - mean)
        total += grad
        start += BLOCK_R
    at = partial_ptr + part.to(tl.int64) * cols + col
    tl.store(at, tl.sum(product, 0).to(tl.float64), mask=valid)
    tl.store(at + parts.to(tl.int64) * cols, tl.sum(total, 0).to(tl.float64), mask=valid)


@triton.jit(do_not_specialize=["rows", "channels"])
def parameter_sum_kernel(
    dweight_ptr, dbias_ptr, partial_ptr, var_ptr, rows, channels, eps: "fp64",  # noqa: F821
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums partial [2, rows, channels] over rows, always in the same order."""
    real: tl.constexpr = dweight_ptr.dtype.element_ty
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = channel < channels
    product = tl.zeros([BLOCK_S, BLOCK_C], tl.float64)
    total = tl.zeros([BLOCK_S, BLOCK_C], tl.float64)
    second = rows.to(tl.int64) * channels
    start = 0
    while start < rows:
        row = start + tl.arange(0, BLOCK_S)
        at = partial_ptr + row.to(tl.int64)[:, None] * channels + channel[None, :]
        mask = (row < rows)[:, None] & valid[None, :]
        product += tl.load(at, mask=mask, other=0.0)
        total += tl.load(at + second, mask=mask, other=0.0)
        start += BLOCK_S
    scale = inverse_root(tl.load(var_ptr + channel, mask=valid, other=1.0), tl.full((), eps, real))
    tl.store(dweight_ptr + channel, (tl.sum(product, 0) * scale.to(tl.float64)).to(real), mask=valid)
    tl.store(dbias_ptr + channel, tl.sum(total, 0).to(real), mask=valid)
