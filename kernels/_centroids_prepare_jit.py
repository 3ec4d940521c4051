"""Triton kernels that make centroids ready for the search: a centre, bfloat16 parts, offsets and the largest norms.

Scores are x'.c' - |c'|^2 / 2 with x' = fl(x - m) and c' = fl(c - m), float32: relative to m they keep their digits
whatever the offset of the data. float32 c' = h + m' + l, h and m' bfloat16 with |m'| <= 2^-8 |c'|, |l| <= 2^-17 |c'|.
Where x and centroids share a 16-bit dtype and the centroids do not lie far from 0, m is 0 and the values stay as they
are: their products are exact in float32.

    info [B, 4] int32   bits of the largest |c'| and |c'|^2 / 2 (float32, rounded up; integers of positive floats are in
                        their order), then 1 if the values stay as they are.
    packed [B, 2, P, W] h and m', or the values and nothing; P and W are K and D padded to whole tiles, with 0.
    offset [B, P]       -|c'|^2 / 2; -inf for padding and for a centroid that is not finite.
    turned [B, D, K]    the centroids as given, for the search in float64.
"""

import triton
import triton.language as tl

from ._fake_quant_jit import cast

# Slack for the roundings of a norm.
UP = tl.constexpr(1.000001)


@triton.jit(do_not_specialize=["clusters", "dim", "step_b", "step_k", "step_d"])
def centre_kernel(
    centre_ptr, info_ptr, c_ptr, clusters, dim, step_b, step_k, step_d,
    PLAIN: tl.constexpr, SAMPLE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """centre [B, D]: mean of evenly spread centroids, of what is finite. PLAIN: the values may stay as they are."""
    entry = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, SAMPLE) * clusters.to(tl.int64) // SAMPLE
    shift = tl.zeros([BLOCK_D], tl.float64)
    spread = tl.zeros([BLOCK_D], tl.float64)
    start = 0
    while start < dim:
        d = start + tl.arange(0, BLOCK_D)
        at = c_ptr + entry * step_b + k[:, None] * step_k + d.to(tl.int64)[None, :] * step_d
        c = tl.load(at, mask=(d < dim)[None, :], other=0.0).to(tl.float32)
        used = tl.abs(c) < float("inf")
        count = tl.maximum(tl.sum(used.to(tl.int32), 0), 1).to(tl.float64)
        wide = tl.where(used, c, 0.0).to(tl.float64)
        mean = (tl.sum(wide, 0) / count).to(tl.float32)
        tl.store(centre_ptr + entry * dim + d, mean, mask=d < dim)
        if PLAIN:
            m = mean.to(tl.float64)
            offset = tl.where(used, wide - m[None, :], 0.0)
            shift += m * m
            spread += tl.sum(offset * offset, 0) / count
        start += BLOCK_D
    stays = 0
    if PLAIN:
        stays = (tl.sum(shift, 0) <= tl.sum(spread, 0)).to(tl.int32)
        if stays != 0:
            start = 0
            while start < dim:
                d = start + tl.arange(0, BLOCK_D)
                tl.store(centre_ptr + entry * dim + d, tl.zeros([BLOCK_D], tl.float32), mask=d < dim)
                start += BLOCK_D
    slot = tl.arange(0, 4)
    tl.store(info_ptr + entry * 4 + slot, tl.where(slot == 2, stays, 0))


@triton.jit
def _bits(v):
    return (v * UP).to(tl.float32).to(tl.int32, bitcast=True)


@triton.jit
def _store_parts(packed_ptr, at, part, centred):
    high = cast(centred, tl.bfloat16)
    tl.store(packed_ptr + at, high)
    tl.store(packed_ptr + part + at, cast(centred - high.to(tl.float32), tl.bfloat16))


@triton.jit(do_not_specialize=["clusters", "dim", "padded", "tiles", "step_b", "step_k", "step_d"])
def pack_kernel(
    packed_ptr, plain_ptr, offset_ptr, turned_ptr, info_ptr, centre_ptr, c_ptr, clusters, dim, padded, tiles,
    step_b, step_k, step_d, PLAIN: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of centroids; plain_ptr: the memory of `packed` in the dtype of the centroids."""
    pid = tl.program_id(0)
    entry = (pid // tiles).to(tl.int64)
    k = pid % tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = k < clusters
    row = c_ptr + entry * step_b + k.to(tl.int64)[:, None] * step_k
    usable = inside
    for start in range(0, WIDTH, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        mask = inside[:, None] & (d < dim)[None, :]
        c = tl.load(row + d.to(tl.int64)[None, :] * step_d, mask=mask, other=0.0)
        turned = turned_ptr + (entry * dim + d)[None, :] * clusters + k[:, None]
        tl.store(turned, c, mask=mask)
        usable = usable & (tl.sum((tl.abs(c.to(tl.float32)) < float("inf")).to(tl.int32), 1) == BLOCK_D)
    stays = tl.load(info_ptr + entry * 4 + 2) != 0
    squares = tl.zeros([BLOCK_K, BLOCK_D], tl.float64)
    for start in range(0, WIDTH, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        mask = usable[:, None] & (d < dim)[None, :]
        c = tl.load(row + d.to(tl.int64)[None, :] * step_d, mask=mask, other=0.0)
        m = tl.load(centre_ptr + entry * dim + d, mask=d < dim, other=0.0)
        centred = tl.where(mask, c.to(tl.float32) - m[None, :], 0.0)
        squares += centred.to(tl.float64) * centred.to(tl.float64)
        at = (entry * 2 * padded + k)[:, None] * WIDTH + d[None, :]
        if PLAIN:
            if stays:
                tl.store(plain_ptr + at, c)
            else:
                _store_parts(packed_ptr, at, padded.to(tl.int64) * WIDTH, centred)
        else:
            _store_parts(packed_ptr, at, padded.to(tl.int64) * WIDTH, centred)
    half = 0.5 * tl.sum(squares, 1)
    tl.store(offset_ptr + entry * padded + k, tl.where(usable, -half.to(tl.float32), float("-inf")))
    # A maximum is the same in whatever order the tiles arrive.
    tl.atomic_max(info_ptr + entry * 4, _bits(tl.sqrt(2.0 * tl.max(half, 0))))
    tl.atomic_max(info_ptr + entry * 4 + 1, _bits(tl.max(half, 0)))
