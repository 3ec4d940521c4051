"""Launches that serve several tensors: the table of tensors, and which of them are better off alone."""

import torch
import triton

from . import _bn_stats_list_jit as jit
from . import _statistics_layout as layout
from ._layout import ELEMENTS, device_table

# Most values per image and channel that a program of a list walks, in planes and in rows (tiles of 1024 and of 32);
# elements of a tile of a backward.
_WIDTH, _ROWS = 1 << 14, 1 << 10
_BLOCK = 1024


def first_columns(xs):
    """First column of every tensor, and their number."""
    starts = [0]
    for x in xs:
        starts.append(starts[-1] + x.shape[1])
    return starts[:-1], starts[-1]


def statistics_kind(x, inner):
    """(kind, programs), or None for a tensor that is better off alone."""
    images, channels, values = *x.shape[:2], x.shape[2:].numel()
    if values > (_ROWS if inner else _WIDTH):
        return None
    if inner and values == 1:
        return jit.SINGLES, triton.cdiv(images, 32) * triton.cdiv(channels, 64)
    if inner:
        kind = jit.UNALIGNED if channels % layout.vector(x) else jit.INNER
        return kind, images * triton.cdiv(channels, 32)
    reach = values + layout.vector(x) - 1
    kind, planes = (jit.NARROW, 64) if reach <= 16 else (jit.MIDDLE, 8) if reach <= 128 else (jit.BROAD, 1)
    return kind, triton.cdiv(images * channels, planes)


def backward_kind(x, inner):
    images, channels, values = *x.shape[:2], x.shape[2:].numel()
    if inner:
        kind = jit.UNALIGNED if channels % layout.vector(x) else jit.INNER
        return kind, triton.cdiv(images * values, _BLOCK // 64) * triton.cdiv(channels, 64)
    kind = jit.BROAD if values >= _BLOCK else jit.MIDDLE if values > 16 else jit.NARROW
    return kind, triton.cdiv(images * channels * values, _BLOCK)


# Calls whose tensors have been through the kernels of single tensors.
_loaded = set()


def not_loaded(call, ways, alone):
    """Indices of tensors in the table that have to go once through the kernels of single tensors as well.

    They serve while a graph is captured, and a kernel that has not run before cannot be loaded then.
    """
    if not ways[0][0].is_cuda or torch.cuda.is_current_stream_capturing():
        return []
    found = []
    for i, (x, inner) in enumerate(ways):
        key = (call, x.device, x.dtype, inner, x.shape)
        if i not in alone and key not in _loaded:
            _loaded.add(key)
            found.append(i)
    return found


def sort(ways, starts, kind_of, outputs=None):
    """Columns of the table, and the indices of the tensors that are not in it."""
    # A graph that is captured would read the table at its replay, from memory that is something else then.
    with torch.cuda.device_of(ways[0][0]):
        captured = ways[0][0].is_cuda and torch.cuda.is_current_stream_capturing()
    table, alone, programs = [], [], 0
    for i, (x, inner) in enumerate(ways):
        out = x if outputs is None else outputs[i]
        fits = 0 < x.numel() < 2**31 and not captured
        fits = fits and (x.dtype, x.device) == (ways[0][0].dtype, ways[0][0].device)
        kind = kind_of(x, inner) if fits and (x.data_ptr() | out.data_ptr()) % 16 == 0 else None
        if kind is None:
            alone.append(i)
            continue
        values = x.shape[2:].numel()
        table.append((programs, kind[0].value, x.data_ptr(), out.data_ptr(), starts[i], x.shape[1], values))
        programs += kind[1]
    return (table, programs), alone


def launch_statistics(mean, var, table, x):
    table, programs = table
    if table:
        with torch.cuda.device_of(x):
            jit.instance_list_kernel[(programs,)](
                mean, var, device_table(table, x.device), len(table), *mean.shape,
                ELEMENT=ELEMENTS[x.dtype], VEC=layout.vector(x), ENTRIES=layout.power(len(table)), num_warps=4,
            )  # fmt: skip


def launch_backward(table, x, center, grad_mean, grad_var):
    table, programs = table
    if table:
        center, center_step = layout.unit_rows(center)
        own = [(center, 0) if t is None else layout.unit_rows(t) for t in (grad_mean, grad_var)]
        terms = (grad_mean is not None) + 2 * (grad_var is not None)
        with torch.cuda.device_of(x):
            jit.backward_list_kernel[(programs,)](
                center, own[0][0], own[1][0], device_table(table, x.device), len(table), x.shape[0], center_step,
                own[0][1], own[1][1], ELEMENT=ELEMENTS[x.dtype], TERMS=terms, VEC=layout.vector(x),
                ENTRIES=layout.power(len(table)), BLOCK=_BLOCK, num_warps=4,
            )  # fmt: skip
