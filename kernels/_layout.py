"""Shapes, strides and grids of the launchers: plain Python, shared by the modules beside it.

A dense tensor is walked in memory order, whatever its strides: flat for one scale, as [outer, channels, cols] for a
scale per channel, as [outer, channels] where the channel is the fastest dimension. Other tensors are copied to
contiguous first.
"""

import torch
import triton

ACTIVATIONS = {"none": 0, "relu": 1, "relu6": 2}
# Elements of a tile. In a reduction one 16-byte access of a 16-bit input is enough: two would double the registers.
TILE, TILE_HALF, REDUCE_TILE = 1024, 2048, 1024
# Most tiles that one program of a learned backward walks; each lane adds so many in float32 before going to float64.
REDUCE_TILES = 8
# Tile of a range reduction and most programs of it: they walk it with this stride, from the front to the end. Their
# partial results are so few that each program of the next kernel reads all of them (per channel: RANGE_SPLITS).
RANGE_TILE, RANGE_PROGRAMS, RANGE_SPLITS = 4096, 512, 64
# No contraction: a fused multiply-add would round once where the other backends round twice.
LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}
LAUNCH_WIDE = {"num_warps": 8, "enable_fp_fusion": False}


ELEMENTS = {
    torch.float32: triton.language.float32,
    torch.bfloat16: triton.language.bfloat16,
    torch.float16: triton.language.float16,
    torch.float64: triton.language.float64,
}


def device_table(rows, device):
    """int64 [fields, rows] of a launch that serves several tensors, without a wait for the device."""
    # torch keeps the pinned memory until the copy is done.
    fields = list(zip(*rows, strict=True))
    table = torch.tensor(fields, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    return table.to(device, non_blocking=True)


def compute_dtype(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def dense(x, dtype=None):
    """x, or a contiguous copy where it leaves gaps in memory, and an empty output of the same strides."""
    out = torch.empty_like(x, dtype=dtype)
    if out.stride() == x.stride():
        return x, out
    return x.contiguous(), torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def without_gaps(x):
    """x, or a contiguous copy where it leaves gaps in memory or lies twice in it."""
    if x.is_contiguous() or x.numel() == 0:
        return x
    steps = sorted((step, size) for step, size in zip(x.stride(), x.shape, strict=True) if size > 1)
    wanted = 1
    for step, size in steps:
        if step != wanted:
            return x.contiguous()
        wanted *= size
    return x


def in_memory_order(grad, shape, stride):
    """grad, or a copy of it, with the given strides; those of dimensions of size 1 do not matter."""
    if grad.shape != shape:
        raise ValueError(f"grad has shape {tuple(grad.shape)}; wanted {tuple(shape)}, the shape of x")
    if all(ours == theirs or size <= 1 for ours, theirs, size in zip(grad.stride(), stride, shape, strict=True)):
        return grad
    return grad.new_empty_strided(shape, stride).copy_(grad)


def check_parameters(x, first, second, axis):
    """What memory safety needs; values and dtypes are checked by the public functions."""
    channels = first.numel()
    if second.numel() != channels:
        raise ValueError(f"two per-channel parameters have {channels} and {second.numel()} elements; wanted as many")
    if channels != 1 and (axis is None or x.size(axis) != channels):
        raise ValueError(
            f"a parameter has {channels} elements; wanted 1 or the size of axis {axis} of {tuple(x.shape)}"
        )
    return first.contiguous(), second.contiguous()


def matrix(x, channels, axis):
    """(outer, cols, LAST) of a dense, non-empty tensor."""
    inner = x.stride(axis) if channels > 1 else x.numel()
    outer = x.numel() // (channels * inner)
    return (outer, channels, True) if inner == 1 and channels > 1 else (outer, inner, False)


def tile_shape(rows, cols, size):
    """(BLOCK_R, BLOCK_K) of about `size` elements, with the fewest idle lanes past the end of cols, then the widest."""
    tallest = min(triton.next_power_of_2(rows), size)
    widest = min(triton.next_power_of_2(cols), size)
    narrowest = min(max(size // tallest, 32), widest)
    widths = [1 << k for k in range(narrowest.bit_length() - 1, widest.bit_length())]
    width = min(widths, key=lambda w: (-(-cols // w) * w, -w))
    return min(tallest, size // width), width


def group(cols):
    """GROUP and cols / GROUP: the largest power of two up to 16 that divides cols; 0 and cols where int32 is too small.

    With GROUP, row starts are known to be aligned.
    """
    size = 0 if cols >= 2**31 - 2**16 else next(g for g in (16, 8, 4, 2, 1) if cols % g == 0)
    return size, cols // max(size, 1)


def tile_size(x):
    return TILE_HALF if x.element_size() <= 2 else TILE


def programs(tiles):
    """(programs, tiles of each) of a learned backward."""
    per_program = min(triton.next_power_of_2(tiles), REDUCE_TILES)
    return triton.cdiv(tiles, per_program), per_program


def channel_tiles(x, channels, axis, size, widest_last):
    """(programs side by side, tiles of one of them, outer, col_groups, constants) of a walk over a tensor.

    Of shape and strides alone. LAST: a program has up to `widest_last` columns; else one channel.
    """
    outer, cols, last = matrix(x, channels, axis)
    block_r, block_k = tile_shape(outer, min(cols, widest_last) if last else cols, size)
    col_blocks = triton.cdiv(cols, block_k)
    tiles = triton.cdiv(outer, block_r) * (1 if last else col_blocks)
    size, col_groups = group(cols)
    constants = {"LAST": last, "GROUP": size, "BLOCK_R": block_r, "BLOCK_K": block_k}
    return col_blocks if last else channels, tiles, outer, col_groups, constants
