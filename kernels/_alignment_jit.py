"""Triton kernels of the alignment loss; its arguments are explained in `clusterq.ops.alignment`. Arithmetic is float64.

With m the mean of an image and channel, every group g (0: the batch, 1 + s: class slot s) has coefficients p, q and a
center c per column, so that the gradients are sums over the groups of an image: grad_mean = p + 2 q (m - c) and
grad_var = q. `groups_kernel` merges the statistics and finds the coefficients, workspace [4, 1 + S, D]: p, q, c and the
factor from the norm's slope to q; `norms_kernel` replaces p and q of the batch where norms are asked for;
`gradients_kernel` applies them and adds up the losses in a fixed order.
"""

import triton
import triton.language as tl


@triton.jit
def _inside(image, images, group, labels_ptr, mask_ptr, SLOTS: tl.constexpr, MASKED: tl.constexpr):
    """Images of a group."""
    inside = image < images
    if SLOTS:
        own = tl.load(labels_ptr + image, mask=inside, other=-1) == group - 1
        if MASKED:
            own = own & (tl.load(mask_ptr + image, mask=inside, other=0) != 0)
        inside = inside & ((group == 0) | own)
    return inside


@triton.jit
def _merged(
    mean_ptr, var_ptr, labels_ptr, mask_ptr, images, mean_step, var_step, group, col, valid,
    SLOTS: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Number of images of a group, mean and variance of its columns; 0 without images."""
    number = tl.zeros([BLOCK_N], tl.int32)
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float64)
    start = 0
    while start < images:
        image = start + tl.arange(0, BLOCK_N)
        inside = _inside(image, images, group, labels_ptr, mask_ptr, SLOTS, MASKED)
        number += inside.to(tl.int32)
        at = mean_ptr + image.to(tl.int64)[:, None] * mean_step + col[None, :]
        total += tl.load(at, mask=inside[:, None] & valid[None, :], other=0.0).to(tl.float64)
        start += BLOCK_N
    count = tl.sum(number, 0).to(tl.float64)
    divisor = tl.maximum(count, 1.0)
    center = tl.sum(total, 0) / divisor
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float64)
    start = 0
    while start < images:
        image = start + tl.arange(0, BLOCK_N)
        inside = _inside(image, images, group, labels_ptr, mask_ptr, SLOTS, MASKED)
        chosen = inside[:, None] & valid[None, :]
        row = image.to(tl.int64)[:, None]
        d = tl.load(mean_ptr + row * mean_step + col[None, :], mask=chosen, other=0.0).to(tl.float64) - center[None, :]
        var = tl.load(var_ptr + row * var_step + col[None, :], mask=chosen, other=0.0).to(tl.float64)
        total += tl.where(chosen, var + d * d, 0.0)
        start += BLOCK_N
    return count, center, tl.sum(total, 0) / divisor


@triton.jit
def _spread(var, floor, ROOT: tl.constexpr):
    """The form of a variance that is compared, and its derivative."""
    if ROOT:
        root = tl.sqrt(var + floor)
        return root, 0.5 / root
    return var, tl.full(var.shape, 1.0, tl.float64)


@triton.jit
def _weight(w0, w1, w2, w3, TERM: tl.constexpr):
    if TERM == 0:  # noqa: SIM116 (the compiler reads no dictionary)
        return w0
    elif TERM == 1:
        return w1
    elif TERM == 2:
        return w2
    else:
        return w3


@triton.jit(
    do_not_specialize=["images", "columns", "slots", "first", "tiles", "mean_step", "var_step"],
    do_not_specialize_on_alignment=["mean_ptr", "var_ptr", "mask_ptr", "known_ptr"],
)
def groups_kernel(
    work_ptr, counts_ptr, partial_ptr, count_ptr, own_mean_ptr, own_spread_ptr, mean_ptr, var_ptr, target_mean_ptr,
    target_spread_ptr, column_ptr, labels_ptr, mask_ptr, class_mean_ptr, class_spread_ptr, known_ptr, merged_count_ptr,
    merged_mean_ptr, merged_var_ptr, images, columns, slots, first, tiles, mean_step, var_step,
    weight: "fp64", floor: "fp64", w0: "fp64", w1: "fp64", w2: "fp64", w3: "fp64",  # noqa: F821 (names of types)
    SQUARED: tl.constexpr, ROOT: tl.constexpr, SLOTS: tl.constexpr, MASKED: tl.constexpr, KNOWN: tl.constexpr,
    MERGED: tl.constexpr, TERMS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One group's tile of columns. partial [tiles + TERMS * slots * tiles]: losses of the batch, of the classes."""
    real: tl.constexpr = own_mean_ptr.dtype.element_ty
    pid = tl.program_id(0)
    group = pid // tiles
    tile = pid % tiles
    begin = tl.where(group > 0, first, 0) + tile * BLOCK_D
    col = begin + tl.arange(0, BLOCK_D)
    valid = col < columns
    floor = tl.full((), floor, tl.float64)
    if MERGED:
        count = tl.load(merged_count_ptr + group).to(tl.float64)
        at = group.to(tl.int64) * columns + col
        center = tl.load(merged_mean_ptr + at, mask=valid, other=0.0).to(tl.float64)
        var = tl.load(merged_var_ptr + at, mask=valid, other=0.0).to(tl.float64)
    else:
        count, center, var = _merged(
            mean_ptr, var_ptr, labels_ptr, mask_ptr, images, mean_step, var_step, group, col, valid,
            SLOTS, MASKED, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    if tile == 0:
        tl.store(counts_ptr + group, count)
    work = work_ptr + group.to(tl.int64) * columns + col
    step = (slots + 1).to(tl.int64) * columns
    tl.store(work + 2 * step, center, mask=valid)
    if group == 0:
        factor = tl.load(column_ptr + columns + col, mask=valid, other=0.0).to(tl.float64)
        spread, slope = _spread(var * factor, floor, ROOT)
        offset = center - tl.load(target_mean_ptr + col, mask=valid, other=0.0).to(tl.float64)
        excess = spread - tl.load(target_spread_ptr + col, mask=valid, other=0.0).to(tl.float64)
        by_var = tl.full((), weight, tl.float64) * slope * factor / count
        if SQUARED:
            column = tl.load(column_ptr + col, mask=valid, other=0.0).to(tl.float64)
            loss = tl.where(valid, column * (offset * offset + excess * excess), 0.0)
            tl.store(partial_ptr + tile, tl.sum(loss, 0))
            tl.store(work, 2.0 * column * offset * tl.full((), weight, tl.float64) / count, mask=valid)
            tl.store(work + step, 2.0 * column * excess * by_var, mask=valid)
        else:
            tl.store(work, offset, mask=valid)
            tl.store(work + step, excess, mask=valid)
            tl.store(work + 3 * step, by_var, mask=valid)
    else:
        slot = group - 1
        wide = columns - first
        own = slot.to(tl.int64) * wide + (col - first)
        spread, slope = _spread(var, floor, ROOT)
        tl.store(own_mean_ptr + own, center.to(real), mask=valid)
        tl.store(own_spread_ptr + own, spread.to(real), mask=valid)
        if tile == 0:
            tl.store(count_ptr + slot, count.to(tl.int64))
        if TERMS > 0:
            # A class without a target may hold anything there.
            wanted = valid & (count + tl.zeros([BLOCK_D], tl.float64) > 0.0)
            if KNOWN:
                wanted = wanted & (tl.load(known_ptr + slot + tl.zeros([BLOCK_D], tl.int32)) != 0)
            column = tl.load(column_ptr + 2 * columns + col, mask=wanted, other=0.0).to(tl.float64)
            by_mean = tl.zeros([BLOCK_D], tl.float64)
            by_spread = tl.zeros([BLOCK_D], tl.float64)
            for term in tl.static_range(TERMS):
                at = (term * slots).to(tl.int64) * wide + own
                goal_mean = tl.load(class_mean_ptr + at, mask=wanted, other=0.0).to(tl.float64)
                goal_spread = tl.load(class_spread_ptr + at, mask=wanted, other=0.0).to(tl.float64)
                offset = tl.where(wanted, center - goal_mean, 0.0)
                excess = tl.where(wanted, spread - goal_spread, 0.0)
                loss = column * (offset * offset + excess * excess)
                tl.store(partial_ptr + tiles + (term * slots + slot) * tiles + tile, tl.sum(loss, 0))
                tau = tl.full((), _weight(w0, w1, w2, w3, term), tl.float64)
                by_mean += 2.0 * tau * column * offset
                by_spread += 2.0 * tau * column * excess
            tl.store(work, by_mean / tl.maximum(count, 1.0), mask=valid)
            tl.store(work + step, by_spread * slope / tl.maximum(count, 1.0), mask=valid)


@triton.jit(do_not_specialize=["columns", "slots"])
def norms_kernel(
    work_ptr, counts_ptr, partial_ptr, column_ptr, starts_ptr, columns, slots, weight: "fp64",  # noqa: F821
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one layer: the norms of offset and excess, which are in place of p and q, and then p and q themselves."""
    layer = tl.program_id(0)
    begin = tl.load(starts_ptr + layer).to(tl.int32)
    end = tl.load(starts_ptr + layer + 1).to(tl.int32)
    step = (slots + 1).to(tl.int64) * columns
    first = tl.zeros([BLOCK], tl.float64)
    second = tl.zeros([BLOCK], tl.float64)
    start = begin
    while start < end:
        col = start + tl.arange(0, BLOCK)
        offset = tl.load(work_ptr + col, mask=col < end, other=0.0)
        excess = tl.load(work_ptr + step + col, mask=col < end, other=0.0)
        first += offset * offset
        second += excess * excess
        start += BLOCK
    norm = tl.sqrt(tl.sum(first, 0))
    spread_norm = tl.sqrt(tl.sum(second, 0))
    column = tl.load(column_ptr + begin, mask=begin < end, other=0.0).to(tl.float64)
    tl.store(partial_ptr + layer, column * (norm + spread_norm))
    by_mean = tl.full((), weight, tl.float64) * column / tl.load(counts_ptr)
    start = begin
    while start < end:
        col = start + tl.arange(0, BLOCK)
        offset = tl.load(work_ptr + col, mask=col < end, other=0.0)
        excess = tl.load(work_ptr + step + col, mask=col < end, other=0.0)
        by_var = tl.load(work_ptr + 3 * step + col, mask=col < end, other=0.0)
        # The derivative of a norm at 0 is 0.
        tl.store(work_ptr + col, tl.where(norm > 0.0, by_mean * offset / norm, 0.0), mask=col < end)
        own = tl.where(spread_norm > 0.0, column * excess / spread_norm, 0.0) * by_var
        tl.store(work_ptr + step + col, own, mask=col < end)
        start += BLOCK


@triton.jit
def _share(counts_ptr, known_ptr, slots, KNOWN: tl.constexpr, AVERAGE: tl.constexpr, BLOCK: tl.constexpr):
    """Of one class in a class term: 1, or 1 / (classes present and known)."""
    if not AVERAGE:
        return tl.full((), 1.0, tl.float64)
    number = tl.zeros([BLOCK], tl.int32)
    start = 0
    while start < slots:
        slot = start + tl.arange(0, BLOCK)
        present = tl.load(counts_ptr + 1 + slot, mask=slot < slots, other=0.0) > 0.0
        if KNOWN:
            present = present & (tl.load(known_ptr + slot, mask=slot < slots, other=0) != 0)
        number += present.to(tl.int32)
        start += BLOCK
    return 1.0 / tl.maximum(tl.sum(number, 0), 1).to(tl.float64)


@triton.jit
def _ordered_sum(partial_ptr, number, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float64)
    start = number * 0
    while start < number:
        index = start + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + index, mask=index < number, other=0.0)
        start += BLOCK
    return tl.sum(total, 0)


@triton.jit(
    do_not_specialize=["images", "columns", "slots", "first", "tiles", "losses", "mean_step"],
    do_not_specialize_on_alignment=["mean_ptr", "mask_ptr", "known_ptr"],
)
def gradients_kernel(
    total_ptr, terms_ptr, grad_mean_ptr, grad_var_ptr, work_ptr, counts_ptr, partial_ptr, norm_ptr, mean_ptr,
    labels_ptr, mask_ptr, known_ptr, images, columns, slots, first, tiles, losses, mean_step,
    weight: "fp64", w0: "fp64", w1: "fp64", w2: "fp64", w3: "fp64",  # noqa: F821 (names of types)
    MASKED: tl.constexpr, KNOWN: tl.constexpr, AVERAGE: tl.constexpr, TERMS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of the gradients; the first program also adds up the losses: norm [losses] of the batch, partial."""
    real: tl.constexpr = total_ptr.dtype.element_ty
    col_blocks = tl.maximum(tl.cdiv(columns, BLOCK_D), 1)
    pid = tl.program_id(0)
    image = pid // col_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    col = pid % col_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    valid = col < columns
    step = (slots + 1).to(tl.int64) * columns
    share = tl.full((), 1.0, tl.float64)
    if TERMS > 0:
        share = _share(counts_ptr, known_ptr, slots, KNOWN, AVERAGE, 128)
    if pid == 0:
        batch = _ordered_sum(norm_ptr, losses, 256)
        tl.store(terms_ptr, batch.to(real))
        total = tl.full((), weight, tl.float64) * batch
        for term in tl.static_range(TERMS):
            loss = share * _ordered_sum(partial_ptr + tiles + term * slots * tiles, slots * tiles, 256)
            tl.store(terms_ptr + 1 + term, loss.to(real))
            total += tl.full((), _weight(w0, w1, w2, w3, term), tl.float64) * loss
        tl.store(total_ptr, total.to(real))
    p = tl.load(work_ptr + col, mask=valid, other=0.0)[None, :]
    q = tl.load(work_ptr + step + col, mask=valid, other=0.0)[None, :]
    center = tl.load(work_ptr + 2 * step + col, mask=valid, other=0.0)[None, :]
    mask = (image < images)[:, None] & valid[None, :]
    row = image.to(tl.int64)[:, None]
    mean = tl.load(mean_ptr + row * mean_step + col[None, :], mask=mask, other=0.0).to(tl.float64)
    by_mean = p + 2.0 * q * (mean - center)
    by_var = q + tl.zeros_like(mean)
    if TERMS > 0:
        inside = image < images
        if MASKED:
            inside = inside & (tl.load(mask_ptr + image, mask=inside, other=0) != 0)
        slot = tl.load(labels_ptr + image, mask=inside, other=-1)
        inside = inside & (slot >= 0) & (slot < slots)
        if KNOWN:
            inside = inside & (tl.load(known_ptr + slot, mask=inside, other=0) != 0)
        chosen = inside[:, None] & (valid & (col >= first))[None, :]
        at = work_ptr + (slot + 1)[:, None] * columns + col[None, :]
        p = tl.load(at, mask=chosen, other=0.0)
        q = tl.load(at + step, mask=chosen, other=0.0)
        center = tl.load(at + 2 * step, mask=chosen, other=0.0)
        by_mean += tl.where(chosen, share * (p + 2.0 * q * (mean - center)), 0.0)
        by_var += share * q
    at = row * columns + col[None, :]
    tl.store(grad_mean_ptr + at, by_mean.to(real), mask=mask)
    tl.store(grad_var_ptr + at, by_var.to(real), mask=mask)
