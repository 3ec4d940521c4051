"""Triton kernels of the nearest-centroid search on tensor cores, and of what decides whether its labels are certain.

float32 (and anything that is not one 16-bit dtype): x' = h + m + l as the centroids (`_centroids_prepare_jit`), three
products h.h + h.m + m.h in one float32 accumulator; plain 16-bit values: one product.

A score s differs from t = (x - m).(c - m) - |c - m|^2 / 2, exactly, by less than E = r (|x'| |c'| + |c'|^2 / 2) + u:

- dropped products m.m, l.c', x'.l: at most 2^-16 + 2^-17 + 2^-17 of |x'||c'|, none for plain values;
- accumulation: a tensor core aligns the products of a block of 8 or more and the accumulator to the largest of them and
  drops bits below 2^-23 of it, then rounds: (8 + 2) / 8 for every d, and 2 for the last block, of 2^-23, each pass;
- x', c', their effect on |c - m|^2 / 2, the offset and its addition: less than 3 in 2^-23;
- second-order terms, and partial sums (with or without the offset in them) that exceed the sum above by 2^-6: a
  factor of 1.02;
- u: what is lost to underflow, with or without flush to zero.

So the labels of a row whose best score leads by more than 2 E are those of exact arithmetic. Nothing is certain where
|x'| |c'| + |c'|^2 / 2 may pass 1e37.
"""

import triton
import triton.language as tl

from ._fake_quant_jit import INTERPRETED, cast

LARGEST = tl.constexpr(1e37)
TINY = tl.constexpr(2.0**-120)


@triton.jit
def _dot(a, b, acc):
    if INTERPRETED:
        # numpy would multiply the bits of bfloat16 as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _halves(t):
    """Left and right half of the columns, which of an accumulator lie in the same thread."""
    return tl.split(tl.permute(tl.reshape(t, [t.shape[0], 2, t.shape[1] // 2]), [0, 2, 1]))


@triton.jit
def merge(best, second, third, i, j, best2, second2, third2, i2, j2, TRACK: tl.constexpr):
    """The largest scores of two sets, each in falling order; among equals those of the first set, the lower indices."""
    right = best2 > best
    if TRACK >= 3:
        right_next = tl.where(right, second2 > best, best2 > second)
        j = tl.where(right_next, tl.where(right, j2, i2), tl.where(right, i, j))
        third = tl.maximum(tl.maximum(third, third2), tl.maximum(tl.minimum(second, best2), tl.minimum(best, second2)))
    if TRACK >= 2:
        second = tl.maximum(tl.minimum(best, best2), tl.maximum(second, second2))
    return tl.maximum(best, best2), second, third, tl.where(right, i2, i), j


@triton.jit
def _columns_of(score, TRACK: tl.constexpr, LANES: tl.constexpr):
    """The largest scores of each of LANES classes of columns (those equal modulo LANES), and their columns.

    Comparing halves keeps all of it in registers; the left half holds the lower indices.
    """
    width: tl.constexpr = score.shape[1]
    empty = tl.full([score.shape[0], LANES], float("-inf"), tl.float32)
    # One return: behind a return in a branch that is taken the compiler still reads on.
    if width == LANES:
        best, second, third = score, empty, empty
        i = tl.zeros([score.shape[0], LANES], tl.int32)
        j = i
    else:
        left, right = _halves(score)
        column = (tl.arange(0, width // 2) // LANES * LANES)[None, :]
        over = right > left
        best, second = tl.maximum(left, right), tl.minimum(left, right)
        i = tl.where(over, column + width // 2, column)
        j = i
        third = best
        if TRACK >= 3:
            j = tl.where(over, column, column + width // 2)
            third = tl.full(best.shape, float("-inf"), tl.float32)
        for level in tl.static_range(1, 8):
            if (width >> level) > LANES:
                best, best2 = _halves(best)
                i, i2 = _halves(i)
                second2, third2, j2 = best2, best2, i2
                if TRACK >= 2:
                    second, second2 = _halves(second)
                if TRACK >= 3:
                    third, third2 = _halves(third)
                    j, j2 = _halves(j)
                best, second, third, i, j = merge(
                    best, second, third, i, j, best2, second2, third2, i2, j2, TRACK
                )  # fmt: skip
        if TRACK < 3:
            third, j = empty, i
        if TRACK < 2:
            second = empty
    return best, second, third, i, j


@triton.jit
def _rows_of(x_ptr, centre_ptr, valid, start, dim, step_d, PLAIN: tl.constexpr, BLOCK_D: tl.constexpr):
    """Columns start + [0, BLOCK_D) of the rows at x_ptr [BLOCK_N]: values and themselves, or the parts of x'."""
    d = start + tl.arange(0, BLOCK_D)
    mask = valid[:, None] & (d < dim)[None, :]
    x = tl.load(x_ptr[:, None] + d[None, :] * step_d, mask=mask, other=0.0)
    if PLAIN:
        high, low = x, x
    else:
        m = tl.load(centre_ptr + d, mask=d < dim, other=0.0)
        centred = x.to(tl.float32) - m[None, :]
        high = cast(centred, tl.bfloat16)
        low = cast(centred - high.to(tl.float32), tl.bfloat16)
    return high, low


@triton.jit
def _products(acc, high, low, c_ptr, part, PLAIN: tl.constexpr):
    c = tl.load(c_ptr)
    acc = _dot(high, tl.trans(c), acc)
    if not PLAIN:
        c_low = tl.load(c_ptr + part)
        acc = _dot(high, tl.trans(c_low), acc)
        acc = _dot(low, tl.trans(c), acc)
    return acc


@triton.jit(
    do_not_specialize=["batch", "rows", "padded", "row_tiles", "splits", "length", "batch_groups", "row_groups"],
)
def search_kernel(
    score_ptr, label_ptr, x_ptr, centre_ptr, packed_ptr, offset_ptr, info_ptr, batch, rows, dim, padded, row_tiles,
    splits, length, batch_groups, row_groups, step_d, PLAIN: tl.constexpr, TRACK: tl.constexpr, GROUP: tl.constexpr,
    CHUNKS: tl.constexpr, RESIDENT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    LANES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The largest scores of a tile of rows over `length` centroids, a part of them.

    score [TRACK, splits, B, N] float32 in falling order, label [1 or 2, splits, B, N] int32 of the first (two). PLAIN
    programs serve the entries of the batch whose values stay as they are, the others the rest. RESIDENT: all columns of
    the rows stay in shared memory; else they are read again for every tile of centroids.
    """
    pid = tl.program_id(0)
    tile = pid % row_tiles
    split = pid // row_tiles % splits
    entry = (pid // (row_tiles * splits)).to(tl.int64)
    if (tl.load(info_ptr + entry * 4 + 2) != 0) != PLAIN:
        return
    width: tl.constexpr = CHUNKS * BLOCK_D
    row = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = row < rows
    x_ptr += entry * batch_groups * GROUP + row.to(tl.int64) * row_groups * GROUP
    centre_ptr += entry * dim
    part = padded.to(tl.int64) * width
    k = tl.arange(0, BLOCK_K)
    packed_ptr += entry * 2 * part + k[:, None] * width + tl.arange(0, BLOCK_D)[None, :]
    offset_ptr += entry * padded + k
    if RESIDENT:
        highs = ()
        lows = ()
        for chunk in tl.static_range(CHUNKS):
            high, low = _rows_of(x_ptr, centre_ptr, valid, chunk * BLOCK_D, dim, step_d, PLAIN, BLOCK_D)
            highs = highs + (high,)  # noqa: RUF005 (the compiler reads no stars)
            lows = lows + (low,)  # noqa: RUF005
    best = tl.full([BLOCK_N, LANES], float("-inf"), tl.float32)
    second, third = best, best
    i = tl.zeros([BLOCK_N, LANES], tl.int32)
    j = i
    begin = split * length
    packed_ptr += begin.to(tl.int64) * width
    for start in tl.range(begin, tl.minimum(begin + length, padded), BLOCK_K, num_stages=STAGES if RESIDENT else 1):
        acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        if RESIDENT:
            for chunk in tl.static_range(CHUNKS):
                acc = _products(acc, highs[chunk], lows[chunk], packed_ptr + chunk * BLOCK_D, part, PLAIN)
        else:
            for chunk in tl.range(0, CHUNKS, num_stages=STAGES):
                high, low = _rows_of(x_ptr, centre_ptr, valid, chunk * BLOCK_D, dim, step_d, PLAIN, BLOCK_D)
                acc = _products(acc, high, low, packed_ptr + chunk * BLOCK_D, part, PLAIN)
        packed_ptr += BLOCK_K * width
        score = acc + tl.load(offset_ptr + start)[None, :]
        best2, second2, third2, i2, j2 = _columns_of(score, TRACK, LANES)
        best, second, third, i, j = merge(
            best, second, third, i, j, best2, second2, third2, i2 + start, j2 + start, TRACK
        )  # fmt: skip
    column = tl.arange(0, LANES)[None, :]
    _store(
        score_ptr, label_ptr, (split * batch + entry) * rows + row, splits * batch.to(tl.int64) * rows, valid,
        best, second, third, i + column, j + column, TRACK,
    )  # fmt: skip


@triton.jit
def _store(score_ptr, label_ptr, at, step, valid, best, second, third, i, j, TRACK: tl.constexpr):
    """Merges the classes of columns; labels of equal scores in the order of their indices."""
    beyond: tl.constexpr = 2147483647
    first = tl.max(best, 1)
    label = tl.min(tl.where(best == first[:, None], i, beyond), 1)
    tl.store(score_ptr + at, first, mask=valid)
    tl.store(label_ptr + at, label, mask=valid)
    if TRACK >= 2:
        taken = i == label[:, None]
        best = tl.where(taken, second, best)
        runner = tl.max(best, 1)
        tl.store(score_ptr + step + at, runner, mask=valid)
        if TRACK >= 3:
            i = tl.where(taken, j, i)
            second = tl.where(taken, third, second)
            label = tl.min(tl.where(best == runner[:, None], i, beyond), 1)
            tl.store(label_ptr + step + at, label, mask=valid)
            last = tl.max(tl.where(i == label[:, None], second, best), 1)
            tl.store(score_ptr + 2 * step + at, last, mask=valid)
