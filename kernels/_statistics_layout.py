"""Tiles and grids of the statistics: plain Python, shared by the launchers in `bn_stats.py`.

x [N, C, *spatial] is walked in memory order, as planes [N * C, S] or, with the channel fastest, as rows [N * S, C]. A
tile holds 16 elements per thread, its rows begin at 16 bytes, and where an image or channel has more than a tile the
work is divided until there are about PROGRAMS of them.
"""

import math

import triton

ELEMENTS = 16
# Tiles of planes and of rows; the widest tile of rows.
TILE, LARGEST, WIDEST = 2048, 4096, 64
# Eight for each of 132 multiprocessors. Most tiles that a program sums around the mean of its first.
PROGRAMS, MOST_TILES = 1056, 16


def launch(tile):
    return {"num_warps": max(1, min(8, tile // (32 * ELEMENTS)))}


def walked(x):
    """x, or a contiguous copy of it, and whether the channel is its fastest dimension."""
    inner = not x.is_contiguous() and x.dim() > 2 and x.movedim(1, -1).is_contiguous()
    x = x if inner else x.contiguous()
    return x, inner or x.shape[2:].numel() == 1


def vector(x):
    return 16 // x.element_size()


def power(n):
    return triton.next_power_of_2(max(n, 1))


def split(tiles, others):
    """(parts, tiles of each): parts for PROGRAMS programs together with `others`, at most MOST_TILES tiles long."""
    length = min(max(tiles * max(others, 1) // PROGRAMS, 1), MOST_TILES)
    return triton.cdiv(tiles, length), length


def group(cols):
    """As in `_layout`, and with room for offsets up to a tile behind the last column."""
    size = 0 if cols >= 2**31 - 2**17 else next(g for g in (16, 8, 4, 2, 1) if cols % g == 0)
    return size, cols // max(size, 1)


def planes(x):
    """Grid and constants of a walk over planes [N * C, S]: BLOCK_G planes or one part of a plane per program."""
    channels, cols = x.shape[1], x.shape[2:].numel()
    count = x.shape[0] * channels
    vec = 1 if cols % vector(x) == 0 else vector(x)
    width = power(max(cols + vec - 1, vector(x)))
    if width <= LARGEST:
        block_k, parts, tiles = width, 1, 1
    else:
        block_k = LARGEST
        parts, tiles = split(triton.cdiv(cols, LARGEST), count)
    block_g = min(max(TILE // block_k, 1), power(count))
    size, col_groups = group(cols)
    # A row that begins before its part, at 16 bytes, ends in a second tile where the part fills the first.
    single = tiles == 1 and (vec == 1 or width <= LARGEST)
    constants = {"VEC": vec, "GROUP": size, "BLOCK_G": block_g, "BLOCK_K": block_k, "SINGLE": single}
    constants |= {"MANY": channels >= 2 * block_g, "FEW": block_g == 1}
    sizes = (count, channels, col_groups, parts, tiles, magic(cols))
    return triton.cdiv(count, block_g) * parts, sizes, constants


def magic(divisor):
    """n // divisor is the upper half of n * magic while n * divisor < 2^32."""
    return -(-(1 << 32) // divisor)


def rows(count, cols, segments, whole, each=False):
    """(programs, (col_groups, parts, tiles), constants) of a walk over [segments, count, cols], channels fastest.

    whole: a segment is one part, if its tiles are few enough; each: a part is one tile.
    """
    block_k = min(power(cols), WIDEST)
    block_r = max(TILE // block_k, 1)
    if count <= 2 * block_r:
        block_r = power(count)
        block_k = min(max(block_k, TILE // block_r), power(cols))
    tiles = triton.cdiv(count, block_r)
    side = triton.cdiv(cols, block_k)
    parts, length = split(tiles, segments * side)
    if whole and tiles <= MOST_TILES and segments * side * 4 >= PROGRAMS:
        parts, length = 1, tiles
    if each:
        parts, length = tiles, 1
    size, col_groups = group(cols)
    constants = {"GROUP": size, "BLOCK_R": block_r, "BLOCK_K": block_k, "SINGLE": length == 1}
    return side * segments * parts, (col_groups, parts, length), constants


def fold(count, cols, vec):
    """Rows that, side by side, begin at 16 bytes; 1 where that does not divide `count`."""
    factor = vec // math.gcd(cols, vec)
    return factor if count % factor == 0 else 1


def unit_rows(t):
    """Rows [N or 1, C] with unit stride, and the distance between two of them, 0 if there is but one."""
    if t.stride(1) != 1 and t.shape[1] > 1:
        t = t.contiguous()
    return t, t.stride(0) if t.shape[0] > 1 else 0


def inverses(values, parts, length):
    """1 / (values of a part): of every part, and of the last."""
    return 1 / min(values, length), 1 / (values - (parts - 1) * length)
