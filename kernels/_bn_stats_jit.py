"""Triton kernels of the BatchNorm statistics: moments of parts of a tensor, and BatchNorm of them in the same pass.

x is walked in memory order. Planes: [planes, cols], plane n * channels + c holds the cols values of an image and
channel. Inner: [segments, rows, cols], the channel is the fastest dimension and a segment is an image or the batch.

A program shifts its values by c, close to their mean, and sums d = x - c and d^2: mean = c + sum(d) / n and
M2 = sum(d^2) - sum(d)^2 / n. c is the mean of the one tile that the program keeps in registers, or of the first of at
most MOST_TILES tiles, where the subtraction costs at most their number in roundings. What another program reads is
float64; `_bn_stats_merge_jit` merges it in a fixed order. Squares of (d * 2^-72) stand in where those of d overflow
float32; the other sums are scaled by 2^-12 for the same reason.
"""

import triton
import triton.language as tl

from ._fake_quant_jit import cast, columns

SMALL = tl.constexpr(2.0**-72)
LARGE = tl.constexpr(2.0**72)


@triton.constexpr_function
def compute_type(pointer_type):
    return tl.float64 if pointer_type.element_ty == tl.float64 else tl.float32


@triton.constexpr_function
def overflows(pointer_type):
    return pointer_type.element_ty in (tl.float32, tl.bfloat16)


@triton.jit
def shift_of(x, inverse, AXIS: tl.constexpr, RESCALE: tl.constexpr):
    """About the mean along AXIS; inverse: 1 / (values in the sum)."""
    if RESCALE:
        return tl.sum(x * 0.000244140625, AXIS) * (inverse * 4096.0)
    return tl.sum(x, AXIS) * inverse


@triton.jit
def moments(center, sums, squares, small, inverse, RESCALE: tl.constexpr, WIDE: tl.constexpr):
    """Mean and variance from the sums of d, d^2 and (d * 2^-72)^2, in float64 if WIDE."""
    if WIDE:
        center = center.to(tl.float64)
        sums = sums.to(tl.float64)
    step = sums * inverse
    var = squares.to(center.dtype) * inverse - step * step
    if RESCALE:
        shrunk = step * SMALL
        spare = small.to(center.dtype) * inverse - shrunk * shrunk
        var = tl.where(squares < float("inf"), var, spare * LARGE * LARGE)
    # NaN stays NaN.
    return center + step, tl.where(var < 0.0, 0.0, var)


@triton.jit
def inverse_root(var, eps):
    # One return: behind a return in a branch that is taken the compiler still reads on.
    if var.dtype == tl.float64:  # noqa: SIM108 (in a conditional expression both sides are compiled)
        inverse = 1.0 / tl.sqrt(var + eps)
    else:
        inverse = tl.div_rn(1.0, tl.sqrt_rn(var + eps))
    return inverse


@triton.jit
def batch_norm_of(
    weight_ptr, bias_ptr, mean_ptr, var_ptr, channel, mask, eps, real: tl.constexpr, AFFINE: tl.constexpr
):  # fmt: skip
    """Center, scale and shift of y = (x - center) * scale + shift. AFFINE: 1 with weight, 2 with bias, 3 with both."""
    center = tl.load(mean_ptr + channel, mask=mask, other=0.0)
    scale = inverse_root(tl.load(var_ptr + channel, mask=mask, other=1.0), eps)
    shift = tl.zeros_like(center)
    if AFFINE % 2 == 1:
        scale = tl.load(weight_ptr + channel, mask=mask, other=0.0) * scale
    if AFFINE >= 2:
        shift = tl.load(bias_ptr + channel, mask=mask, other=0.0)
    return center, scale, shift


@triton.jit
def image_and_channel(first, row, channels, MANY: tl.constexpr):
    """Of the planes first + row; MANY: no program reaches more than two images."""
    image = first // channels
    channel = (first - image * channels).to(tl.int32) + row
    if MANY:
        over = channel >= channels
        return image + over.to(tl.int64), tl.where(over, channel - channels, channel)
    return image + channel // channels, channel % channels


@triton.jit
def plane_tile(
    x_ptr, first, planes, cols, begin, width, start, tail, EXACT: tl.constexpr, VEC: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Columns begin + [start, start + BLOCK_K) below begin + width of the planes first + [0, BLOCK_G).

    Returns values (0 where the mask is false), mask, offsets and their origin. EXACT: width is BLOCK_K. VEC > 1: planes
    do not begin at 16 bytes. Then a row begins at the last multiple of VEC before its plane, ends at the first one
    behind it, and what belongs to the neighbours is dropped; tail: that could pass the end of x.
    """
    real: tl.constexpr = compute_type(x_ptr.dtype)
    row = tl.arange(0, BLOCK_G)
    col = tl.arange(0, BLOCK_K)
    valid = (first + row < planes)[:, None]
    origin = first * cols + begin
    if VEC == 1:
        origin += start
        offs = row[:, None] * cols + col[None, :]
        mask = valid if EXACT else valid & (start + col < width)[None, :]
        x = tl.load(x_ptr + origin + offs, mask=mask, other=0.0).to(real)
    else:
        low = origin // VEC * VEC
        left = ((origin - low).to(cols.dtype) + row * cols)[:, None]
        origin = low + start
        offs = left // VEC * VEC + col[None, :]
        mask = valid & (start + offs >= left) & (start + offs < left + width)
        if tail:
            x = tl.load(x_ptr + origin + offs, mask=mask, other=0.0).to(real)
        else:
            near = valid & (start + offs < (left + width + VEC - 1) // VEC * VEC)
            x = tl.where(mask, tl.load(x_ptr + origin + offs, mask=near, other=0.0).to(real), 0.0)
    return x, mask, offs, origin


@triton.jit
def planes_past(start, cols, magic, FEW: tl.constexpr, BLOCK: tl.constexpr):
    """(start + [0, BLOCK)) // cols. FEW: it is 0 or 1; else magic = ceil(2^32 / cols), the product below 2^32."""
    if FEW:
        return (start + tl.arange(0, BLOCK) >= cols).to(tl.int32)
    index = (start.to(tl.int32) + tl.arange(0, BLOCK)).to(tl.uint32)
    return tl.umulhi(index, magic.to(tl.uint32)).to(tl.int32)


@triton.jit
def normalized(x, center, scale, shift, out_ptr):
    return cast((x - center) * scale + shift, out_ptr.dtype.element_ty)


@triton.jit
def _flat_norm(
    y_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, start, stop, planes, cols, magic, channels, eps,
    NORM: tl.constexpr, FEW: tl.constexpr, MANY: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """y of [start, stop), elements of at most ROWS planes. Both are multiples of VEC, but for the end of x."""
    real: tl.constexpr = compute_type(x_ptr.dtype)
    plane = start // cols
    row = tl.arange(0, ROWS)
    _, channel = image_and_channel(plane, row, channels, MANY)
    center, scale, shift = batch_norm_of(
        weight_ptr, bias_ptr, mean_ptr, var_ptr, channel, plane + row < planes, eps, real, NORM
    )  # fmt: skip
    origin = plane * cols
    while start < stop:
        index = tl.arange(0, BLOCK)
        # Past the end it may be more.
        past = tl.minimum(planes_past(start - origin, cols, magic, FEW, BLOCK), ROWS - 1)
        own_center = tl.gather(center, past, 0)
        own_scale = tl.gather(scale, past, 0)
        own_shift = tl.gather(shift, past, 0) if NORM >= 2 else 0.0
        if stop % VEC == 0:
            mask = index < (stop - start) // VEC * VEC
            x = tl.load(x_ptr + start + index, mask=mask, other=0.0).to(real)
            tl.store(y_ptr + start + index, normalized(x, own_center, own_scale, own_shift, y_ptr), mask=mask)
        else:
            mask = index < stop - start
            x = tl.load(x_ptr + start + index, mask=mask, other=0.0).to(real)
            tl.store(y_ptr + start + index, normalized(x, own_center, own_scale, own_shift, y_ptr), mask=mask)
        start += BLOCK


@triton.jit(do_not_specialize=["planes", "channels", "col_groups", "parts", "tiles", "magic"])
def planes_kernel(
    y_ptr, first_ptr, second_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, planes, channels, col_groups, parts,
    tiles, magic, inverse: "fp64", inverse_last: "fp64", eps: "fp64",  # noqa: F821 (Triton's names of scalar types)
    NORM: tl.constexpr, FINAL: tl.constexpr, SINGLE: tl.constexpr, EXACT: tl.constexpr, VEC: tl.constexpr,
    FEW: tl.constexpr, MANY: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Moments of BLOCK_G planes, or (not SINGLE) of one part, `tiles` tiles long, of one plane.

    FINAL: mean and variance of the planes; else the same in float64, [images, parts, channels]. NORM >= 0: y too.
    """
    real: tl.constexpr = compute_type(x_ptr.dtype)
    rescale: tl.constexpr = overflows(x_ptr.dtype)
    eps = tl.full((), eps, real)
    cols = columns(col_groups, GROUP)
    pid = tl.program_id(0)
    first = (pid // parts).to(tl.int64) * BLOCK_G
    part = pid % parts
    inverse = tl.full((), inverse if part < parts - 1 else inverse_last, real if FINAL else tl.float64)
    row = tl.arange(0, BLOCK_G)
    valid = first + row < planes
    image, channel = image_and_channel(first, row, channels, MANY)
    begin = part * (tiles * BLOCK_K + cols * 0)
    width = tl.minimum(cols - begin, tiles * BLOCK_K)
    last = (tl.minimum(first + BLOCK_G, planes) - 1) * cols + begin + width
    tail = (last + VEC - 1) // VEC * VEC > planes.to(tl.int64) * cols
    if NORM >= 0 and VEC == 1:
        center, scale, shift = batch_norm_of(
            weight_ptr, bias_ptr, mean_ptr, var_ptr, channel, valid, eps, real, NORM
        )  # fmt: skip
    x, mask, offs, origin = plane_tile(
        x_ptr, first, planes, cols, begin, width, 0, tail, EXACT, VEC, BLOCK_G, BLOCK_K
    )  # fmt: skip
    if SINGLE:
        middle = shift_of(x, inverse.to(real), 1, rescale)
        d = x - middle[:, None] if EXACT else tl.where(mask, x - middle[:, None], 0.0)
        sums = tl.sum(d, 1)
        squares = tl.sum(d * d, 1)
        small = tl.sum((d * SMALL) * (d * SMALL), 1) if rescale else squares
        if NORM >= 0 and VEC == 1:
            y = normalized(x, center[:, None], scale[:, None], shift[:, None], y_ptr)
            tl.store(y_ptr + origin + offs, y, mask=mask)
    else:
        middle = shift_of(x, 1.0 / tl.sum(mask.to(real), 1), 1, rescale)
        sum_tile = tl.zeros([BLOCK_G, BLOCK_K], real)
        square_tile = tl.zeros([BLOCK_G, BLOCK_K], real)
        small_tile = tl.zeros([BLOCK_G, BLOCK_K], real)
        start = begin * 0
        while start < width + VEC - 1:
            x, mask, offs, origin = plane_tile(
                x_ptr, first, planes, cols, begin, width, start, tail, False, VEC, BLOCK_G, BLOCK_K
            )  # fmt: skip
            d = tl.where(mask, x - middle[:, None], 0.0)
            sum_tile += d
            square_tile += d * d
            if rescale:
                small_tile += (d * SMALL) * (d * SMALL)
            if NORM >= 0 and VEC == 1:
                y = normalized(x, center[:, None], scale[:, None], shift[:, None], y_ptr)
                tl.store(y_ptr + origin + offs, y, mask=mask)
            start += BLOCK_K
        sums = tl.sum(sum_tile, 1)
        squares = tl.sum(square_tile, 1)
        small = tl.sum(small_tile, 1)
    if NORM >= 0 and VEC > 1:
        low = (first * cols + begin) // VEC * VEC
        high = last if last == planes.to(tl.int64) * cols else last // VEC * VEC
        _flat_norm(
            y_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, low, high, planes, cols, magic, channels, eps,
            NORM, FEW, MANY, VEC, 2 * BLOCK_G, BLOCK_G * BLOCK_K // 2,
        )  # fmt: skip
    mean, var = moments(middle, sums, squares, small, inverse, rescale, not FINAL)
    if FINAL:
        tl.store(first_ptr + first + row, mean, mask=valid)
        tl.store(second_ptr + first + row, var, mask=valid)
    else:
        at = (image * parts + part) * channels + channel
        tl.store(first_ptr + at, mean, mask=valid)
        tl.store(second_ptr + at, var, mask=valid)


@triton.jit(do_not_specialize=["rows", "channels", "col_groups", "parts", "tiles"])
def inner_kernel(
    y_ptr, first_ptr, second_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, rows, channels, col_groups, parts,
    tiles, inverse: "fp64", inverse_last: "fp64", eps: "fp64",  # noqa: F821 (Triton's names of scalar types)
    NORM: tl.constexpr, FINAL: tl.constexpr, SINGLE: tl.constexpr, EACH: tl.constexpr, FOLD: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Moments of BLOCK_K columns of a part, `tiles` tiles high, of one segment of x [segments, rows, cols].

    FOLD: the channel of a column is column % channels. FINAL: mean and variance; else the same in float64, [segments,
    parts, cols]. EACH: of every element for itself.
    """
    real: tl.constexpr = compute_type(x_ptr.dtype)
    rescale: tl.constexpr = overflows(x_ptr.dtype)
    eps = tl.full((), eps, real)
    cols = columns(col_groups, GROUP)
    col_blocks = tl.cdiv(cols, BLOCK_K)
    pid = tl.program_id(0)
    col = (pid % col_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    segment = (pid // col_blocks // parts).to(tl.int64)
    part = pid // col_blocks % parts
    inverse = tl.full((), inverse if part < parts - 1 else inverse_last, real if FINAL else tl.float64)
    valid = col < cols
    start = part.to(tl.int64) * (tiles * BLOCK_R)
    stop = tl.minimum(rows, start + tiles * BLOCK_R)
    x_ptr += segment * rows * cols
    y_ptr += segment * rows * cols
    if NORM >= 0:
        center, scale, shift = batch_norm_of(
            weight_ptr, bias_ptr, mean_ptr, var_ptr, col % channels if FOLD else col, valid, eps, real, NORM
        )  # fmt: skip
    row = start + tl.arange(0, BLOCK_R)
    offs = row[:, None] * cols + col[None, :]
    mask = (row < stop)[:, None] & valid[None, :]
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(real)
    if SINGLE:
        middle = shift_of(x, inverse.to(real), 0, rescale)
        d = tl.where((row < stop)[:, None], x - middle[None, :], 0.0)
        sums = tl.sum(d, 0)
        squares = tl.sum(d * d, 0)
        small = tl.sum((d * SMALL) * (d * SMALL), 0) if rescale else squares
        if NORM >= 0:
            tl.store(y_ptr + offs, normalized(x, center[None, :], scale[None, :], shift[None, :], y_ptr), mask=mask)
        if EACH:
            tl.store(first_ptr + offs, x, mask=mask)
            # NaN and infinities stay visible.
            tl.store(second_ptr + offs, x - x, mask=mask)
    else:
        middle = shift_of(x, 1.0 / tl.minimum(stop - start, BLOCK_R).to(real), 0, rescale)
        sum_tile = tl.zeros([BLOCK_R, BLOCK_K], real)
        square_tile = tl.zeros([BLOCK_R, BLOCK_K], real)
        small_tile = tl.zeros([BLOCK_R, BLOCK_K], real)
        while start < stop:
            row = start + tl.arange(0, BLOCK_R)
            offs = row[:, None] * cols + col[None, :]
            mask = (row < stop)[:, None] & valid[None, :]
            x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(real)
            d = tl.where((row < stop)[:, None], x - middle[None, :], 0.0)
            sum_tile += d
            square_tile += d * d
            if rescale:
                small_tile += (d * SMALL) * (d * SMALL)
            if NORM >= 0:
                y = normalized(x, center[None, :], scale[None, :], shift[None, :], y_ptr)
                tl.store(y_ptr + offs, y, mask=mask)
            start += BLOCK_R
        sums = tl.sum(sum_tile, 0)
        squares = tl.sum(square_tile, 0)
        small = tl.sum(small_tile, 0)
    if not EACH:
        mean, var = moments(middle, sums, squares, small, inverse, rescale, not FINAL)
        at = (segment * parts + part) * cols + col
        tl.store(first_ptr + at, mean, mask=valid)
        tl.store(second_ptr + at, var, mask=valid)
