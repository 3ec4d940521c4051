"""Triton kernels behind the search: which labels are certain, distances, and the search in float64 for all other rows.

Squares are added in the order of d without contraction, so that labels are those of a float64 search.
"""

import triton
import triton.language as tl

from ._centroids_jit import LARGEST, TINY, merge

NONE = tl.constexpr(2147483647)


@triton.jit
def _error(norm, entry, info_ptr, dim):
    """(2 E, whether scores are in range) of rows with |x'| <= norm, float64; E: `_centroids_jit`.

    Far beyond all centroids it is the float64 search that errs, by (D + 2) 2^-53 of a distance, and its labels count.
    """
    wide_dim = dim.to(tl.float64)
    largest = tl.load(info_ptr + entry * 4).to(tl.float32, bitcast=True).to(tl.float64)
    half = tl.load(info_ptr + entry * 4 + 1).to(tl.float32, bitcast=True).to(tl.float64)
    steps = (1.25 * wide_dim + 8.0) * 1.1920928955078125e-07
    relative = tl.where(tl.load(info_ptr + entry * 4 + 2) != 0, steps, 3.0 * steps + 3.0517578125e-05)
    magnitude = norm * largest + half
    error = 1.02 * relative * magnitude + wide_dim * TINY * (1.0 + norm + largest)
    error += (wide_dim + 4.0) * 1.1102230246251565e-16 * (norm + largest) * (norm + largest)
    return 2.0 * error, (magnitude < LARGEST) & (norm < LARGEST)


@triton.jit
def _norm(x_ptr, centre_ptr, valid, dim, step_d, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """Upper bounds of |x'|: 1.01 covers the float32 sum of up to 2^16 squares."""
    squares = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    start = 0
    while start < dim:
        d = start + tl.arange(0, BLOCK_D)
        mask = valid[:, None] & (d < dim)[None, :]
        x = tl.load(x_ptr[:, None] + d.to(tl.int64)[None, :] * step_d, mask=mask, other=0.0).to(tl.float32)
        m = tl.load(centre_ptr + d, mask=d < dim, other=0.0)
        offset = tl.where(mask, x - m[None, :], 0.0)
        squares += offset * offset
        start += BLOCK_D
    return tl.sqrt(1.01 * tl.sum(squares, 1).to(tl.float64) + dim.to(tl.float64) * TINY)


@triton.jit
def _distance(
    x_ptr, c_ptr, label, valid, dim, step_xd, step_k, step_d, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """sum (x - c[label])^2 in float64."""
    squares = tl.zeros([BLOCK_R, BLOCK_D], tl.float64)
    c_ptr += label.to(tl.int64) * step_k
    start = 0
    while start < dim:
        d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        mask = valid[:, None] & (d < dim)[None, :]
        x = tl.load(x_ptr[:, None] + d[None, :] * step_xd, mask=mask, other=0.0).to(tl.float64)
        c = tl.load(c_ptr[:, None] + d[None, :] * step_d, mask=mask, other=0.0).to(tl.float64)
        squares += (x - c) * (x - c)
        start += BLOCK_D
    return tl.sum(squares, 1)


@triton.jit(
    do_not_specialize=[
        "batch", "rows", "row_tiles", "splits", "step_xb", "step_xn", "step_b", "step_k",
    ],
)  # fmt: skip
def finish_kernel(
    index_ptr, distance_ptr, undecided_ptr, list_ptr, count_ptr, score_ptr, label_ptr, x_ptr, c_ptr, centre_ptr,
    info_ptr, batch, rows, dim, row_tiles, splits, step_xb, step_xn, step_xd, step_b, step_k, step_d,
    TRACK: tl.constexpr, EXACT: tl.constexpr, MASK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Labels and distances of the rows whose label is certain (EXACT) or in range; lists the others, in any order.

    MASK: writes undecided [B, N] and nothing else.
    """
    pid = tl.program_id(0)
    entry = (pid // row_tiles).to(tl.int64)
    row = pid % row_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    valid = row < rows
    at = entry * rows + row
    total = batch.to(tl.int64) * rows
    step = splits * total
    best = tl.full([BLOCK_R], float("-inf"), tl.float32)
    second, third = best, best
    i = tl.zeros([BLOCK_R], tl.int32)
    j = i
    part = at
    for _ in range(splits):
        best2 = tl.load(score_ptr + part, mask=valid, other=0.0)
        i2 = tl.load(label_ptr + part, mask=valid, other=0)
        second2, third2, j2 = best2, best2, i2
        if TRACK >= 2:
            second2 = tl.load(score_ptr + step + part, mask=valid, other=0.0)
        if TRACK >= 3:
            third2 = tl.load(score_ptr + 2 * step + part, mask=valid, other=0.0)
            j2 = tl.load(label_ptr + step + part, mask=valid, other=0)
        best, second, third, i, j = merge(best, second, third, i, j, best2, second2, third2, i2, j2, TRACK)
        part += total
    x_ptr += entry * step_xb + row.to(tl.int64) * step_xn
    norm = _norm(x_ptr, centre_ptr + entry * dim, valid, dim, step_xd, BLOCK_R, BLOCK_D)
    reach, decided = _error(norm, entry, info_ptr, dim)
    # -inf: no centroid is finite. A lead over it is infinite, and none of it over itself.
    decided = decided & (best > float("-inf"))
    if TRACK >= 3:
        decided = decided & (second > float("-inf"))
    if EXACT:
        decided = decided & (best.to(tl.float64) - second.to(tl.float64) > reach)
        if TRACK >= 3:
            decided = decided & (second.to(tl.float64) - third.to(tl.float64) > reach)
    if MASK:
        tl.store(undecided_ptr + at, (~decided).to(tl.uint8), mask=valid)
    else:
        left = (valid & ~decided).to(tl.int32)
        number = tl.sum(left, 0)
        if number > 0:
            place = tl.atomic_add(count_ptr, number)
            tl.store(list_ptr + place + tl.cumsum(left, 0) - 1, at, mask=left != 0)
        decided = decided & valid
        c_ptr += entry * step_b
        seats: tl.constexpr = 2 if TRACK >= 3 else 1
        tl.store(index_ptr + at * seats, i.to(tl.int64), mask=decided)
        d = _distance(x_ptr, c_ptr, i, decided, dim, step_xd, step_k, step_d, BLOCK_R, BLOCK_D)
        tl.store(distance_ptr + at * seats, d.to(tl.float32), mask=decided)
        if TRACK >= 3:
            tl.store(index_ptr + at * 2 + 1, j.to(tl.int64), mask=decided)
            d = _distance(x_ptr, c_ptr, j, decided, dim, step_xd, step_k, step_d, BLOCK_R, BLOCK_D)
            tl.store(distance_ptr + at * 2 + 1, d.to(tl.float32), mask=decided)


@triton.jit
def _lowest(distance, label):
    """Lowest distance of each row, the lowest label of several; +inf and NONE where no label is known (-1)."""
    known = label >= 0
    low = tl.min(tl.where(known, distance, float("inf")), 1)
    return low, tl.min(tl.where(known & (distance == low[:, None]), label, NONE), 1)


@triton.jit
def _put(index_ptr, distance_ptr, at, low, label, valid):
    found = label != NONE
    nan = tl.full(low.shape, float("nan"), tl.float64)
    tl.store(index_ptr + at, tl.where(found, label, -1).to(tl.int64), mask=valid)
    tl.store(distance_ptr + at, tl.where(found, low, nan).to(distance_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _measure(
    index_ptr, distance_ptr, x_ptr, turned_ptr, at, valid, clusters, dim, step_d,
    TWO: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows at x_ptr [BLOCK_R] against turned [D, K]; results go to their places `at`."""
    first = tl.full([BLOCK_R, BLOCK_K], float("inf"), tl.float64)
    second = first
    i = tl.full([BLOCK_R, BLOCK_K], -1, tl.int32)
    j = i
    start = 0
    while start < clusters:
        k = start + tl.arange(0, BLOCK_K)
        inside = k < clusters
        distance = tl.zeros([BLOCK_R, BLOCK_K], tl.float64)
        from_ptr = x_ptr
        to_ptr = turned_ptr + k
        for _ in range(dim):
            x = tl.load(from_ptr, mask=valid, other=0.0).to(tl.float64)
            c = tl.load(to_ptr, mask=inside, other=0.0).to(tl.float64)
            difference = x[:, None] - c[None, :]
            distance += difference * difference
            from_ptr += step_d
            to_ptr += clusters
        # false for NaN
        known = inside[None, :] & (distance == distance)
        better = known & ((i < 0) | (distance < first))
        if TWO:
            next_best = known & ((j < 0) | (distance < second))
            second = tl.where(better, first, tl.where(next_best, distance, second))
            j = tl.where(better, i, tl.where(next_best, k[None, :], j))
        first = tl.where(better, distance, first)
        i = tl.where(better, k[None, :], i)
        start += BLOCK_K
    low, label = _lowest(first, i)
    seats: tl.constexpr = 2 if TWO else 1
    _put(index_ptr, distance_ptr, at * seats, low, label, valid)
    if TWO:
        taken = i == label[:, None]
        low, label = _lowest(tl.where(taken, second, first), tl.where(taken, j, i))
        _put(index_ptr, distance_ptr, at * 2 + 1, low, label, valid)


@triton.jit(do_not_specialize=["rows", "clusters", "dim", "row_tiles", "step_b", "step_n"])
def settle_kernel(
    index_ptr, distance_ptr, list_ptr, count_ptr, x_ptr, turned_ptr, rows, clusters, dim, row_tiles, step_b, step_n,
    step_d, ALL: tl.constexpr, TWO: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """ALL: a tile of rows each; else the listed rows, BLOCK_R at a time (1 where the batch has several entries)."""
    pid = tl.program_id(0)
    lane = tl.arange(0, BLOCK_R)
    wide = clusters.to(tl.int64)
    if ALL:
        entry = (pid // row_tiles).to(tl.int64)
        row = pid % row_tiles * BLOCK_R + lane
        _measure(
            index_ptr, distance_ptr, x_ptr + entry * step_b + row.to(tl.int64) * step_n,
            turned_ptr + entry * dim * wide, entry * rows + row, row < rows, wide, dim, step_d, TWO, BLOCK_R, BLOCK_K,
        )  # fmt: skip
    else:
        number = tl.load(count_ptr)
        start = pid * BLOCK_R
        while start < number:
            valid = start + lane < number
            at = tl.load(list_ptr + start + lane, mask=valid, other=0)
            entry = tl.load(list_ptr + start) // rows
            row = at - entry * rows
            _measure(
                index_ptr, distance_ptr, x_ptr + entry * step_b + row * step_n, turned_ptr + entry * dim * wide, at,
                valid, wide, dim, step_d, TWO, BLOCK_R, BLOCK_K,
            )  # fmt: skip
            start += tl.num_programs(0) * BLOCK_R
