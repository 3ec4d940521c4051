"""Triton kernels of the moving average of centroids; its formulas: `clusterq.ops.centroids`. Arithmetic in float64."""

import triton
import triton.language as tl

from ._centroids_sums_jit import rounded


@triton.jit
def _sizes(size_ptr, count_ptr, mask, keep, take):
    """Old and new cluster sizes, and the counts."""
    old = tl.load(size_ptr, mask=mask, other=0.0).to(tl.float64)
    count = tl.load(count_ptr, mask=mask, other=0.0)
    return old, keep * old + take * count, count


@triton.jit(do_not_specialize=["clusters", "dim", "step_sb", "step_sk"])
def whole_kernel(
    whole_ptr, size_ptr, sums_ptr, clusters, dim, step_sb, step_sk,
    decay: "fp64", rest: "fp64", BLOCK_K: tl.constexpr,  # noqa: F821 (names of types)
):  # fmt: skip
    """whole [B] float64: sum over k of the new sizes, the same lanes in the same order always."""
    entry = tl.program_id(0).to(tl.int64)
    keep, take = tl.full((), decay, tl.float64), tl.full((), rest, tl.float64)
    total = tl.zeros([BLOCK_K], tl.float64)
    start = 0
    while start < clusters:
        k = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        mask = k < clusters
        count_ptr = sums_ptr + (entry * clusters + k) * (dim.to(tl.int64) + 1) + dim
        _, size, _ = _sizes(size_ptr + entry * step_sb + k * step_sk, count_ptr, mask, keep, take)
        total += tl.where(mask, size, 0.0)
        start += BLOCK_K
    tl.store(whole_ptr + entry, tl.sum(total, 0))


@triton.jit(
    do_not_specialize=[
        "clusters", "dim", "tiles", "step_b", "step_k", "step_d", "step_sb", "step_sk", "step_rb", "step_rk", "step_rd",
    ],
)  # fmt: skip
def move_kernel(
    c_ptr, size_ptr, running_ptr, sums_ptr, whole_ptr, clusters, dim, tiles, step_b, step_k, step_d, step_sb, step_sk,
    step_rb, step_rk, step_rd, decay: "fp64", rest: "fp64", smoothing: "fp64",  # noqa: F821 (names of types)
    MEAN: tl.constexpr, RUNNING: tl.constexpr, SMOOTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of centroids in place, all columns: nobody else reads or writes their sizes."""
    pid = tl.program_id(0)
    entry = (pid // tiles).to(tl.int64)
    k = (pid % tiles * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
    valid = k < clusters
    width = dim.to(tl.int64) + 1
    sums_ptr += (entry * clusters + k) * width
    size_ptr += entry * step_sb + k * step_sk
    keep, take = tl.full((), decay, tl.float64), tl.full((), rest, tl.float64)
    old_size, size, count = _sizes(size_ptr, sums_ptr + dim, valid, keep, take)
    divisor = size
    if SMOOTH:
        extra = tl.full((), smoothing, tl.float64)
        whole = tl.load(whole_ptr + entry)
        divisor = (size + extra) / (whole + clusters * extra) * whole
    if RUNNING:
        used = divisor != 0.0
    elif MEAN:
        used = count != 0.0
    else:
        used = (count != 0.0) & (size != 0.0)
    used = used & valid
    safe_divisor = tl.where(used, divisor, 1.0)[:, None]
    safe_count = tl.where(used, count, 1.0)[:, None]
    start = 0
    while start < dim:
        d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        mask = valid[:, None] & (d < dim)[None, :]
        total = tl.load(sums_ptr[:, None] + d[None, :], mask=mask, other=0.0)
        at = c_ptr + entry * step_b + k[:, None] * step_k + d[None, :] * step_d
        old = tl.load(at, mask=mask, other=0.0).to(tl.float64)
        if RUNNING:
            running_at = running_ptr + entry * step_rb + k[:, None] * step_rk + d[None, :] * step_rd
            running = keep * tl.load(running_at, mask=mask, other=0.0).to(tl.float64) + take * total
            moved = running / safe_divisor
            tl.store(running_at, running.to(running_ptr.dtype.element_ty), mask=mask)
        elif MEAN:
            moved = keep * old + take * (total / safe_count)
        else:
            moved = (keep * old_size[:, None] * old + take * total) / safe_divisor
        tl.store(at, rounded(moved, c_ptr.dtype.element_ty), mask=mask & used[:, None])
        start += BLOCK_D
    tl.store(size_ptr, size.to(tl.float32), mask=valid)
