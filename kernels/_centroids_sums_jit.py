"""Triton kernels of the sums by centroid, in float64 and in a fixed order, and of the gradient of the distance.

Every row has a slot, entry * K + index, or `slots` = B * K where it is left out. A stable sort by slot puts the rows of
a centroid side by side in their order; segments of LENGTH sorted rows are summed by one program each, in order. What a
centroid has in one segment is final unless it touches an end of the segment: then it goes to

    carry [segments, 2, D + 1]   the run at the beginning (which may be the whole segment), the one at the end

and `join_kernel` adds it up in the order of the segments. None of it depends on which program comes first.
"""

import triton
import triton.language as tl

from ._fake_quant_jit import cast


@triton.jit
def rounded(v, TYPE: tl.constexpr):
    """float64 as TYPE, through float32 where TYPE has 16 bits."""
    if tl.float64 != TYPE:
        v = cast(v.to(tl.float32), TYPE)
    return v


@triton.jit(do_not_specialize=["total", "rows", "clusters", "slots", "step_b", "step_n", "step_wb", "step_wn"])
def slot_kernel(
    slot_ptr, index_ptr, weight_ptr, total, rows, clusters, slots, step_b, step_n, step_wb, step_wn,
    WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = at < total
    entry = at // rows
    row = at - entry * rows
    index = tl.load(index_ptr + entry * step_b + row * step_n, mask=valid, other=-1)
    used = (index >= 0) & (index < clusters)
    if WEIGHTED:
        used = used & (tl.load(weight_ptr + entry * step_wb + row * step_wn, mask=valid, other=0.0) != 0.0)
    slot = tl.where(used, entry * clusters + index, slots)
    tl.store(slot_ptr + at, slot.to(slot_ptr.dtype.element_ty), mask=valid)


@triton.jit(
    do_not_specialize=[
        "total", "rows", "clusters", "slots", "dim", "chunks", "step_b", "step_n", "step_wb", "step_wn", "step_cb",
        "step_k", "step_cd",
    ],
)  # fmt: skip
def segment_kernel(
    out_ptr, carry_ptr, range_ptr, slot_ptr, order_ptr, x_ptr, weight_ptr, c_ptr, total, rows, clusters, slots, dim,
    chunks, step_b, step_n, step_d, step_wb, step_wn, step_cb, step_k, step_cd,
    WEIGHTED: tl.constexpr, SLOPE: tl.constexpr, LENGTH: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A segment's sums of BLOCK_D columns of w x and of w (SLOPE: of -2 w (x - c)), run after run.

    out [slots, D + 1], or [slots, D] of a gradient (SLOPE); range [slots, 2] int64, 0 before: where the rows of a slot
    begin and end.
    """
    TYPE: tl.constexpr = out_ptr.dtype.element_ty
    pid = tl.program_id(0).to(tl.int64)
    segment = pid // chunks
    lead = pid % chunks == 0
    d = pid % chunks * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < dim
    width = dim.to(tl.int64) + 1
    columns = dim.to(tl.int64) if SLOPE else width
    begin = segment * LENGTH
    at = begin + tl.arange(0, LENGTH)
    slot = tl.load(slot_ptr + at, mask=at < total, other=slots).to(tl.int64)
    used = slot < slots
    row = tl.load(order_ptr + at, mask=used, other=0)
    entry = row // rows
    n = row - entry * rows
    mask = used[:, None] & inside[None, :]
    x_at = (entry * step_b + n * step_n)[:, None] + d[None, :] * step_d
    value = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(tl.float64)
    if SLOPE:
        c_at = (entry * step_cb + (slot - entry * clusters) * step_k)[:, None] + d[None, :] * step_cd
        value = -2.0 * (value - tl.load(c_ptr + c_at, mask=mask, other=0.0).to(tl.float64))
    if WEIGHTED:
        weight = tl.load(weight_ptr + entry * step_wb + n * step_wn, mask=used, other=0.0).to(tl.float64)
        value = weight[:, None] * value
    else:
        weight = tl.full([LENGTH], 1.0, tl.float64)
    before = tl.load(slot_ptr + begin - 1, mask=begin > 0, other=-1).to(tl.int64)
    end = tl.minimum(begin + LENGTH, total)
    after = tl.load(slot_ptr + end, mask=end < total, other=-1).to(tl.int64)
    carry_ptr += segment * 2 * width
    current = tl.min(slot, 0)
    low = begin
    while current < slots:
        own = slot == current
        sums = tl.sum(tl.where(own[:, None], value, 0.0), 0)
        weights = tl.sum(tl.where(own, weight, 0.0), 0)
        high = low + tl.sum(own.to(tl.int32), 0)
        # The first run may go on from the segment before, the last into the next; what lies between is complete.
        first = low == begin
        last = high == end
        if first | last:
            carried = carry_ptr + tl.where(first, 0, width)
            tl.store(carried + d, sums, mask=inside)
            tl.store(carried + dim, weights, mask=lead)
        else:
            tl.store(out_ptr + current * columns + d, rounded(sums, TYPE), mask=inside)
            if not SLOPE:
                tl.store(out_ptr + current * columns + dim, weights, mask=lead)
        tl.store(range_ptr + 2 * current, low, mask=lead & (~first | (before != current)))
        tl.store(range_ptr + 2 * current + 1, high, mask=lead & (~last | (after != current)))
        low = high
        current = tl.min(tl.where(slot > current, slot, slots), 0)


@triton.jit(do_not_specialize=["total", "dim", "chunks"])
def join_kernel(
    out_ptr, carry_ptr, range_ptr, total, dim, chunks, SLOPE: tl.constexpr, LENGTH: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_D columns of a slot: 0 without rows; where its rows touch the end of a segment, what the segments carry."""
    TYPE: tl.constexpr = out_ptr.dtype.element_ty
    pid = tl.program_id(0).to(tl.int64)
    slot = pid // chunks
    d = pid % chunks * BLOCK_D + tl.arange(0, BLOCK_D)
    width = dim.to(tl.int64) + 1
    columns = dim.to(tl.int64) if SLOPE else width
    inside = d < columns
    out_ptr += slot * columns + d
    begin = tl.load(range_ptr + 2 * slot)
    end = tl.load(range_ptr + 2 * slot + 1)
    if begin == end:
        tl.store(out_ptr, tl.zeros([BLOCK_D], TYPE), mask=inside)
    else:
        first = begin // LENGTH
        last = (end - 1) // LENGTH
        # A run that begins behind the beginning of its first segment and ends before its end is in `out` already.
        leads = begin == first * LENGTH
        if leads | (last > first) | (end == tl.minimum((first + 1) * LENGTH, total)):
            column_ptr = carry_ptr + d
            sums = tl.load(column_ptr + (2 * first + tl.where(leads, 0, 1)) * width, mask=inside, other=0.0)
            start = first + 1
            while start <= last:
                segment = start + tl.arange(0, BLOCK_S)
                at = column_ptr[None, :] + (2 * segment * width)[:, None]
                sums += tl.sum(tl.load(at, mask=(segment <= last)[:, None] & inside[None, :], other=0.0), 0)
                start += BLOCK_S
            tl.store(out_ptr, rounded(sums, TYPE), mask=inside)


@triton.jit(
    do_not_specialize=["total", "rows", "slots", "dim", "chunks", "step_b", "step_n", "step_wb", "step_wn"],
)
def loose_kernel(
    out_ptr, slot_ptr, x_ptr, weight_ptr, total, rows, slots, dim, chunks, step_b, step_n, step_d, step_wb, step_wn,
    WEIGHTED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds rows to out [slots, D + 1], 0 before, in the order in which programs come."""
    pid = tl.program_id(0).to(tl.int64)
    at = pid // chunks * BLOCK_R + tl.arange(0, BLOCK_R)
    d = pid % chunks * BLOCK_D + tl.arange(0, BLOCK_D)
    slot = tl.load(slot_ptr + at, mask=at < total, other=slots).to(tl.int64)
    used = slot < slots
    entry = at // rows
    n = at - entry * rows
    mask = used[:, None] & (d < dim)[None, :]
    x_at = (entry * step_b + n * step_n)[:, None] + d[None, :] * step_d
    x = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(tl.float64)
    if WEIGHTED:
        w = tl.load(weight_ptr + entry * step_wb + n * step_wn, mask=used, other=0.0).to(tl.float64)
    else:
        w = tl.full([BLOCK_R], 1.0, tl.float64)
    # the last column is the weight itself
    value = w[:, None] * tl.where((d == dim)[None, :], 1.0, x)
    out = out_ptr + (slot * (dim.to(tl.int64) + 1))[:, None] + d[None, :]
    tl.atomic_add(out, value, mask=used[:, None] & (d <= dim)[None, :])


@triton.jit(
    do_not_specialize=[
        "total", "rows", "clusters", "dim", "chunks", "step_b", "step_n", "step_gb", "step_gn", "step_ib", "step_in",
        "step_cb", "step_k", "step_cd",
    ],
)  # fmt: skip
def slope_kernel(
    dx_ptr, grad_ptr, x_ptr, c_ptr, index_ptr, total, rows, clusters, dim, chunks, step_b, step_n, step_d, step_gb,
    step_gn, step_ib, step_in, step_cb, step_k, step_cd, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx = 2 g (x - c[index]), 0 without an index; contiguous."""
    pid = tl.program_id(0).to(tl.int64)
    at = pid // chunks * BLOCK_R + tl.arange(0, BLOCK_R)
    d = pid % chunks * BLOCK_D + tl.arange(0, BLOCK_D)
    valid = at < total
    entry = at // rows
    n = at - entry * rows
    index = tl.load(index_ptr + entry * step_ib + n * step_in, mask=valid, other=-1)
    used = (index >= 0) & (index < clusters)
    g = tl.load(grad_ptr + entry * step_gb + n * step_gn, mask=used, other=0.0).to(tl.float64)
    inside = (d < dim)[None, :]
    mask = used[:, None] & inside
    x_at = (entry * step_b + n * step_n)[:, None] + d[None, :] * step_d
    x = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(tl.float64)
    c_at = (entry * step_cb + index * step_k)[:, None] + d[None, :] * step_cd
    c = tl.load(c_ptr + c_at, mask=mask, other=0.0).to(tl.float64)
    flow = tl.where(mask, 2.0 * g[:, None] * (x - c), 0.0)
    dx = dx_ptr + (at * dim)[:, None] + d[None, :]
    tl.store(dx, rounded(flow, dx_ptr.dtype.element_ty), mask=valid[:, None] & inside)
