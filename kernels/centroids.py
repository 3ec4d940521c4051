"""The centroid ops on a GPU through Triton: every function takes the arguments of its op, in schema order.

The search: centre and parts of the centroids (2 launches), scores on tensor cores (1; 2 for one 16-bit dtype, of which
one leaves at once), labels and distances of the rows that are certain (1), float64 for the rest (1). Where tensor
cores would multiply padding, or for float64, all rows go to float64 (1). Sums: slots, a sort, segments, joins. Launches
go to the current stream; nothing waits for the device.
"""

import torch
import triton

from . import _centroids_jit as search
from . import _centroids_move_jit as move
from . import _centroids_prepare_jit as prepare
from . import _centroids_settle_jit as settle
from . import _centroids_sums_jit as segments
from ._centroids_layout import (
    LANES,
    columns_of_sums,
    length_of_segments,
    longest_group,
    search_plan,
    wanted_splits,
)
from ._layout import compute_dtype

__all__ = [
    "assign_and_sum",
    "centroid_sums",
    "move_centroids_",
    "nearest_centroid",
    "nearest_centroid_backward",
    "two_nearest_centroids",
    "undecided_rows",
]

# Below, a product on tensor cores is mostly padding; above, the bound on the error of a score is not derived.
_NARROW, _WIDE = 4, 1 << 16
# Programs of the float64 search of listed rows: 8 for each multiprocessor of an H200.
_SETTLERS = 1056
_LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}


def _direct(x):
    return x.dtype == torch.float64 or not _NARROW < x.shape[2] <= _WIDE


def _block(size, most):
    return min(triton.next_power_of_2(size), most)


def _scores(x, centroids, track):
    """The `track` largest scores of every row by parts of the centroids, and what later steps need of the centroids."""
    (batch, rows, dim), clusters, device = x.shape, centroids.shape[1], x.device
    plain = x.dtype == centroids.dtype and x.element_size() == 2
    unit = max(16, _block(clusters, 128))
    padded = triton.cdiv(clusters, unit) * unit
    plans = [search_plan(x, unit, flag, track) for flag in ((True, False) if plain else (False,))]
    block_d = plans[0]["BLOCK_D"]
    width = plans[0]["CHUNKS"] * block_d

    centre = torch.empty((batch, dim), dtype=torch.float32, device=device)
    info = torch.empty((batch, 4), dtype=torch.int32, device=device)
    packed = torch.empty((batch, 2, padded, width), dtype=torch.int16, device=device)
    offset = torch.empty((batch, padded), dtype=torch.float32, device=device)
    turned = centroids.new_empty((batch, dim, clusters))
    parts, values = packed.view(torch.bfloat16), packed.view(x.dtype if plain else torch.bfloat16)
    prepare.centre_kernel[(batch,)](
        centre, info, centroids, clusters, dim, *centroids.stride(), PLAIN=plain, SAMPLE=32, BLOCK_D=128, **_LAUNCH
    )
    tiles = triton.cdiv(padded, min(32, unit))
    prepare.pack_kernel[(batch * tiles,)](
        parts, values, offset, turned, info, centre, centroids, clusters, dim, padded, tiles, *centroids.stride(),
        PLAIN=plain, WIDTH=width, BLOCK_K=min(32, unit), BLOCK_D=block_d, **_LAUNCH,
    )  # fmt: skip

    block_n = plans[0]["BLOCK_N"]
    row_tiles = triton.cdiv(rows, block_n)
    splits, length = wanted_splits(batch * row_tiles, padded, unit)
    score = torch.empty((track, splits, batch, rows), dtype=torch.float32, device=device)
    label = torch.empty((max(track - 1, 1), splits, batch, rows), dtype=torch.int32, device=device)
    group, batch_groups, row_groups = longest_group(x)
    for plan in plans:
        search.search_kernel[(batch * splits * row_tiles,)](
            score, label, x, centre, values if plan["PLAIN"] else parts, offset, info, batch, rows, dim, padded,
            row_tiles, splits, length, batch_groups, row_groups, x.stride(2), TRACK=track, GROUP=group, LANES=LANES,
            **plan,
        )  # fmt: skip
    return score, label, splits, centre, info, turned


def _finish(x, centroids, track, exact, index, distance, mask):
    """Labels and distances of rows that are certain, or `mask` of the others; returns the list of these."""
    score, label, splits, centre, info, turned = _scores(x, centroids, track)
    (batch, rows, dim), device = x.shape, x.device
    listed = torch.empty(0 if mask is not None else batch * rows, dtype=torch.int64, device=device)
    count = torch.zeros(1, dtype=torch.int32, device=device)
    outputs = (count, count, mask) if mask is not None else (index, distance, count)
    row_tiles = triton.cdiv(rows, 32)
    settle.finish_kernel[(batch * row_tiles,)](
        *outputs, listed, count, score, label, x, centroids, centre, info, batch, rows, dim, row_tiles, splits,
        *x.stride(), *centroids.stride(), TRACK=track, EXACT=exact, MASK=mask is not None, BLOCK_R=32, BLOCK_D=32,
        **_LAUNCH,
    )  # fmt: skip
    return listed, count, turned


def _nearest(x, centroids, precision, two):
    (batch, rows, dim), clusters = x.shape, centroids.shape[1]
    shape = (batch, rows, 2) if two else (batch, rows)
    index = torch.empty(shape, dtype=torch.int64, device=x.device)
    distance = torch.empty(shape, dtype=compute_dtype(x), device=x.device)
    if index.numel() == 0:
        return index, distance
    with torch.cuda.device_of(x):
        if _direct(x):
            block_k = _block(clusters, 128)
            block_r = _block(rows, 2048 // block_k)
            row_tiles = triton.cdiv(rows, block_r)
            programs, listed, count = batch * row_tiles, index, index
            turned = centroids.transpose(1, 2).contiguous()
        else:
            exact = precision == "exact"
            track = 3 if two else 2 if exact else 1
            listed, count, turned = _finish(x, centroids, track, exact, index, distance, None)
            block_r, block_k = (8, _block(clusters, 128)) if batch == 1 else (1, _block(clusters, 512))
            programs, row_tiles = min(triton.cdiv(batch * rows, block_r), _SETTLERS), 1
        settle.settle_kernel[(programs,)](
            index, distance, listed, count, x, turned, rows, clusters, dim, row_tiles, *x.stride(), ALL=_direct(x),
            TWO=two, BLOCK_R=block_r, BLOCK_K=block_k, num_warps=4 if block_r * block_k >= 256 else 1,
            enable_fp_fusion=False,
        )  # fmt: skip
    return index, distance


def nearest_centroid(x, centroids, precision):
    return _nearest(x, centroids, precision, two=False)


def two_nearest_centroids(x, centroids, precision):
    return _nearest(x, centroids, precision, two=True)


def undecided_rows(x, centroids):
    if _direct(x) or x.shape[:2].numel() == 0:
        return torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    mask = torch.empty(x.shape[:2], dtype=torch.uint8, device=x.device)
    with torch.cuda.device_of(x):
        _finish(x, centroids, 2, True, None, None, mask)
    return mask.view(torch.bool)


def _slots(index, weights, clusters):
    """Slot of every row [B * N], batch * clusters for none."""
    batch, rows = index.shape
    slots = batch * clusters
    slot = torch.empty(batch * rows, dtype=torch.int32 if slots < 2**31 - 1 else torch.int64, device=index.device)
    weighted = weights is not None
    segments.slot_kernel[(triton.cdiv(batch * rows, 512),)](
        slot, index, weights if weighted else index, batch * rows, rows, clusters, slots, *index.stride(),
        *(weights.stride() if weighted else (0, 0)), WEIGHTED=weighted, BLOCK=512, **_LAUNCH,
    )  # fmt: skip
    return slot


def _ordered_sums(out, slot, x, weights, centroids):
    """Into out [B, K, D + 1], or the gradient of the distances into out [B, K, D] if centroids are given."""
    (batch, rows, dim), device = x.shape, x.device
    clusters, total = out.shape[1], batch * rows
    slope, weighted = centroids is not None, weights is not None
    order = torch.sort(slot, stable=True)
    length = length_of_segments(total, batch * clusters)
    number = triton.cdiv(total, length)
    carry = torch.empty((number, 2, dim + 1), dtype=torch.float64, device=device)
    ranges = torch.zeros((batch * clusters, 2), dtype=torch.int64, device=device)
    block_d, chunks = columns_of_sums(dim, 2048 // length)
    segments.segment_kernel[(number * chunks,)](
        out, carry, ranges, order.values, order.indices, x, weights if weighted else x, centroids if slope else x,
        total, rows, clusters, batch * clusters, dim, chunks, *x.stride(),
        *(weights.stride() if weighted else (0, 0)), *(centroids.stride() if slope else (0, 0, 0)),
        WEIGHTED=weighted, SLOPE=slope, LENGTH=length, BLOCK_D=block_d, **_LAUNCH,
    )  # fmt: skip
    block_d, chunks = columns_of_sums(out.shape[2], 64)
    segments.join_kernel[(batch * clusters * chunks,)](
        out, carry, ranges, total, dim, chunks, SLOPE=slope, LENGTH=length, BLOCK_S=16, BLOCK_D=block_d, num_warps=1,
        enable_fp_fusion=False,
    )  # fmt: skip


def centroid_sums(x, index, weights, clusters, deterministic):
    batch, rows, dim = x.shape
    empty, shape = batch * rows == 0, (batch, clusters, dim + 1)
    make = torch.zeros if empty or not deterministic else torch.empty
    sums = make(shape, dtype=torch.float64, device=x.device)
    if empty:
        return sums
    with torch.cuda.device_of(x):
        slot = _slots(index, weights, clusters)
        if deterministic:
            _ordered_sums(sums, slot, x, weights, None)
        else:
            weighted = weights is not None
            block_d = _block(dim + 1, 64)
            chunks = triton.cdiv(dim + 1, block_d)
            segments.loose_kernel[(triton.cdiv(batch * rows, 16) * chunks,)](
                sums, slot, x, weights if weighted else x, batch * rows, rows, batch * clusters, dim, chunks,
                *x.stride(), *(weights.stride() if weighted else (0, 0)), WEIGHTED=weighted, BLOCK_R=16,
                BLOCK_D=block_d, **_LAUNCH,
            )  # fmt: skip
    return sums


def assign_and_sum(x, centroids, weights, precision, deterministic):
    index, distance = nearest_centroid(x, centroids, precision)
    return index, distance, centroid_sums(x, index, weights, centroids.shape[1], deterministic)


def nearest_centroid_backward(grad, x, centroids, index):
    (batch, rows, dim), clusters = x.shape, centroids.shape[1]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    make = torch.zeros if batch * rows == 0 else torch.empty
    grad_centroids = make(centroids.shape, dtype=centroids.dtype, device=x.device)
    if batch * rows == 0:
        return dx, grad_centroids
    with torch.cuda.device_of(x):
        block_d = _block(dim, 64)
        chunks = triton.cdiv(dim, block_d)
        segments.slope_kernel[(triton.cdiv(batch * rows, 16) * chunks,)](
            dx, grad, x, centroids, index, batch * rows, rows, clusters, dim, chunks, *x.stride(), *grad.stride(),
            *index.stride(), *centroids.stride(), BLOCK_R=16, BLOCK_D=block_d, **_LAUNCH,
        )  # fmt: skip
        _ordered_sums(grad_centroids, _slots(index, None, clusters), x, grad, centroids)
    return dx, grad_centroids


def move_centroids_(centroids, cluster_size, running_sum, sums, decay, update_mode, smoothing):
    batch, clusters, dim = centroids.shape
    if batch == 0:
        return
    sums = sums.contiguous()
    running, smooth = running_sum is not None, running_sum is not None and smoothing > 0
    whole = torch.empty(batch if smooth else 0, dtype=torch.float64, device=sums.device)
    decays = (decay, 1 - decay)
    with torch.cuda.device_of(sums):
        if smooth:
            move.whole_kernel[(batch,)](
                whole, cluster_size, sums, clusters, dim, *cluster_size.stride(), *decays,
                BLOCK_K=_block(clusters, 1024), **_LAUNCH,
            )  # fmt: skip
        block_d = _block(dim, 64)
        block_k = _block(clusters, 8)
        tiles = triton.cdiv(clusters, block_k)
        move.move_kernel[(batch * tiles,)](
            centroids, cluster_size, running_sum if running else centroids, sums, whole, clusters, dim, tiles,
            *centroids.stride(), *cluster_size.stride(), *(running_sum.stride() if running else (0, 0, 0)), *decays,
            smoothing, MEAN=update_mode == "mean", RUNNING=running, SMOOTH=smooth, BLOCK_K=block_k, BLOCK_D=block_d,
            **_LAUNCH,
        )  # fmt: skip
