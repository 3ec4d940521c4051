"""Triton kernel that merges moments of parts into those of images, of the batch, or of classes.

The second sum is around the mean that the first one found, in float64: Chan's rule for all parts at once. The order of
the sums is fixed.
"""

import triton
import triton.language as tl

INSTANCE = tl.constexpr(0)
BATCH = tl.constexpr(1)
CLASS = tl.constexpr(2)


@triton.jit(do_not_specialize=["rows", "channels", "parts", "fold", "length", "values", "correction"])
def merge_kernel(
    mean_ptr, var_ptr, count_ptr, total_ptr, center_ptr, spread_ptr, label_ptr, weight_ptr, rows, channels, parts,
    fold, length, values, correction,
    MODE: tl.constexpr, PLAIN: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Merges rows of moments [rows, channels] of one image, of the batch, or of one class, in a fixed order.

    Row r is part r // fold % parts, `length` of an image's `values` values, of image r // fold // parts. PLAIN: center
    is x itself, one value per image and channel.
    """
    real: tl.constexpr = mean_ptr.dtype.element_ty
    blocks = tl.maximum(tl.cdiv(channels, BLOCK_C), 1)
    pid = tl.program_id(0)
    group = pid // blocks
    channel = (pid % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = channel < channels
    low = group * parts * fold if MODE == INSTANCE else group * 0
    high = low + parts * fold if MODE == INSTANCE else low + rows
    images = tl.zeros([BLOCK_S], tl.int32)
    shares = tl.zeros([BLOCK_S], tl.float64)
    mass = tl.zeros([BLOCK_S], tl.float64)
    total = tl.zeros([BLOCK_S, BLOCK_C], tl.float64)
    start = low
    while start < high:
        row = start + tl.arange(0, BLOCK_S)
        inside, share, size = _row(
            row, high, group, label_ptr, weight_ptr, parts, fold, length, values, MODE, WEIGHTED
        )  # fmt: skip
        images += inside.to(tl.int32)
        shares += share
        mass += share * size
        mask = inside[:, None] & valid[None, :]
        at = row.to(tl.int64)[:, None] * channels + channel[None, :]
        total += (share * size)[:, None] * tl.load(center_ptr + at, mask=mask, other=0.0).to(tl.float64)
        start += BLOCK_S
    weight = tl.sum(mass, 0)
    mean = tl.sum(total, 0) / weight
    total = tl.zeros([BLOCK_S, BLOCK_C], tl.float64)
    start = low
    while start < high:
        row = start + tl.arange(0, BLOCK_S)
        inside, share, size = _row(
            row, high, group, label_ptr, weight_ptr, parts, fold, length, values, MODE, WEIGHTED
        )  # fmt: skip
        mask = inside[:, None] & valid[None, :]
        at = row.to(tl.int64)[:, None] * channels + channel[None, :]
        d = tl.load(center_ptr + at, mask=mask, other=0.0).to(tl.float64) - mean[None, :]
        spread = d * d
        if not PLAIN:
            spread += tl.load(spread_ptr + at, mask=mask, other=0.0)
        total += tl.where(mask, (share * size)[:, None] * spread, 0.0)
        start += BLOCK_S
    divisor = weight - correction
    var = tl.sum(total, 0) / tl.where(divisor > 0.0, divisor, float("nan"))
    if MODE == CLASS:
        number = tl.sum(images, 0) // (parts * fold)
        mean = tl.where(number > 0, mean, 0.0)
        var = tl.where(number > 0, var, 0.0)
        if pid % blocks == 0:
            tl.store(count_ptr + group, number.to(tl.int64))
            tl.store(total_ptr + group, (tl.sum(shares, 0) / (parts * fold)).to(real))
    at = group.to(tl.int64) * channels + channel
    tl.store(mean_ptr + at, mean.to(real), mask=valid)
    tl.store(var_ptr + at, var.to(real), mask=valid)


@triton.jit
def _row(
    row, high, group, label_ptr, weight_ptr, parts, fold, length, values, MODE: tl.constexpr, WEIGHTED: tl.constexpr
):  # fmt: skip
    """Whether a row enters, the weight of its image (0 where not), and the number of its values."""
    inside = row < high
    number = row // fold
    image = number // parts
    if MODE == CLASS:
        inside = inside & (tl.load(label_ptr + image, mask=inside, other=-1) == group)
    share = tl.full(row.shape, 1.0, tl.float64)
    if WEIGHTED:
        share = tl.load(weight_ptr + image, mask=inside, other=0).to(tl.float64)
        inside = inside & (share != 0.0)
    share = tl.where(inside, share, 0.0)
    return inside, share, tl.minimum(values - (number - image * parts) * length, length).to(tl.float64)
