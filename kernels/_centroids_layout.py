"""Tiles, parts and grids of the centroid launchers: plain Python."""

import torch
import triton

# Classes of columns that keep scores of their own: what one thread holds of an accumulator, side by side.
LANES = 16
# Programs that keep a GPU busy, and the most parts that the centroids are divided into to have as many.
_PROGRAMS, _MOST_SPLITS = 264, 32
# Shared memory that a program leaves to reductions and to the system.
_RESERVE = 8 << 10


def _device(device):
    """Bytes of shared memory of one program, and major version; where there is no GPU, those of an H200."""
    if device.type != "cuda":
        return 227 << 10, 9
    properties = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin, properties.major


def chunk_of(dim, widest):
    """Columns of one step of a product: wide ones are read faster, narrow ones pad less."""
    needed = triton.cdiv(dim, 16) * 16
    return next(size for size in (64, 32, 16) if size <= widest and triton.cdiv(dim, size) * size <= 1.15 * needed)


def search_plan(x, unit, plain, track):
    """Constants of a search over tiles of up to `unit` centroids.

    The rows stay in shared memory, all columns, beside STAGES tiles of centroids: twice on a multiprocessor if
    possible, so that the one multiplies while the other compares; else once; else neither stays.
    """
    rows, dim = x.shape[1:]
    shared, major = _device(x.device)
    # `mma` holds both factors in registers, what came with sm_90 reads them from shared memory; rows that do not stay
    # there pass through registers.
    block_d = chunk_of(dim, 64 if major >= 9 and dim <= 192 else 32)
    chunks = triton.cdiv(dim, block_d)
    block_n = 128 if rows > 64 else 64
    available = shared - _RESERVE
    column = 2 * (1 if plain else 2) * chunks * block_d
    plan = {"PLAIN": plain, "CHUNKS": chunks, "BLOCK_N": block_n, "BLOCK_D": block_d, "RESIDENT": True}
    plan |= {"num_warps": block_n // 16, "num_stages": 3, "enable_fp_fusion": False}
    for programs in (2, 1):
        for block_k, stages in ((128, 3), (128, 2), (64, 3), (64, 2)):
            block_k = min(block_k, unit)
            if programs * (block_n + stages * block_k) * column <= available:
                # 2 programs of 256 threads share 65536 registers; elsewhere the limit would cost spills.
                limit = 128 if programs == 2 and major == 9 else None
                # Of several products in a loop Triton's pipeline for sm_100 keeps more accumulators than there is room.
                return plan | {"BLOCK_K": block_k, "STAGES": 1 if major >= 10 else stages, "maxnreg": limit}
    widest = 32 if major < 9 else 128 if block_n == 128 and track < 3 else 64
    return plan | {"RESIDENT": False, "BLOCK_K": min(widest, unit), "STAGES": 2, "maxnreg": None}


def wanted_splits(programs, padded, unit):
    """(parts, centroids of a part): of the sizes alone; the result does not depend on them."""
    tiles = padded // unit
    splits = max(1, min(tiles, _MOST_SPLITS, _PROGRAMS // programs))
    each = triton.cdiv(tiles, splits)
    return triton.cdiv(tiles, each), each * unit


def longest_group(x):
    """GROUP and the strides of entries and rows in it: the largest power of two up to 16 that divides both.

    The kernel reads them as run-time numbers and knows all the same where 16 bytes begin.
    """
    steps = (x.stride(0) if x.shape[0] > 1 else 0, x.stride(1) if x.shape[1] > 1 else 0)
    group = next(g for g in (16, 8, 4, 2, 1) if all(step % g == 0 for step in steps))
    return group, steps[0] // group, steps[1] // group


def columns_of_sums(dim, widest):
    """(BLOCK_D, chunks) with the least padding, then the widest."""
    block = min((widest, 32), key=lambda size: (triton.cdiv(dim, size) * size, -size))
    return block, triton.cdiv(dim, block)


def length_of_segments(total, slots):
    """Sorted rows of a program: of the sizes alone. Longer ones where a segment holds few centroids."""
    return 64 if total >= 1 << 17 and total >= 8 * slots else 32
