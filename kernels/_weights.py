"""Launches that quantize weights with live ranges per channel."""

import torch
import triton

from . import _weight_jit as jit
from ._layout import ELEMENTS, LAUNCH, LAUNCH_WIDE, compute_dtype, dense, device_table, group, matrix, tile_shape
from ._observe import symmetric_zero

# Largest channel of a weight that one program keeps in registers between finding its range and quantizing it.
_IN_REGISTERS = 8192


def _weight(y, w, scale, zero_point, quant_min, quant_max, axis, symmetric):
    """Writes values, scale and zero point."""
    channels = w.size(axis)
    middle = symmetric_zero(quant_min, quant_max)
    if w.numel() == 0:
        scale.fill_(1.0)
        zero_point.fill_(middle if symmetric else min(max(0, quant_min), quant_max))
        return
    outer, cols, last = matrix(w, channels, axis)
    lanes = triton.next_power_of_2(outer) * triton.next_power_of_2(cols)
    single = not last and lanes <= _IN_REGISTERS
    if single:
        block_r, block_k = triton.next_power_of_2(outer), triton.next_power_of_2(cols)
    else:
        block_r, block_k = tile_shape(outer, min(cols, 32) if last else cols, 4096)
    col_blocks = triton.cdiv(cols, block_k)
    tiles = triton.cdiv(outer, block_r) * (1 if last else col_blocks)
    width, col_groups = group(cols)
    with torch.cuda.device_of(w):
        jit.weight_kernel[(col_blocks if last else channels,)](
            y, w, scale, zero_point, outer, channels, col_groups, tiles, quant_min, quant_max, middle,
            SYMMETRIC=symmetric, LAST=last, GROUP=width, BLOCK_R=block_r, BLOCK_K=block_k, SINGLE=single,
            **(LAUNCH_WIDE if block_r * block_k > 2048 else LAUNCH),
        )  # fmt: skip


def fake_quantize_weight(w, quant_min, quant_max, axis, symmetric):
    scale, zero_point = (torch.empty(w.size(axis), dtype=compute_dtype(w), device=w.device) for _ in range(2))
    w, y = dense(w)
    _weight(y, w, scale, zero_point, quant_min, quant_max, axis, symmetric)
    return y, scale, zero_point


def fake_quantize_weights(weights, quant_min, quant_max, axis, symmetric):
    """At most two launches for all weights whose channels are rows of memory, one for each other weight."""
    settings = (quant_min, quant_max, axis, symmetric)
    first = weights[0]
    if any(w.dtype != first.dtype for w in weights):
        values, scales, zero_points = zip(*(fake_quantize_weight(w, *settings) for w in weights), strict=True)
        return list(values), torch.cat(scales), torch.cat(zero_points)
    sizes = [w.size(axis) for w in weights]
    scale, zero_point = (torch.empty(sum(sizes), dtype=compute_dtype(first), device=first.device) for _ in range(2))
    parts = zip(scale.split(sizes), zero_point.split(sizes), strict=True)
    # A graph that is captured would read the table at its replay, from memory that is something else then.
    alone = len(weights) == 1 or (first.is_cuda and torch.cuda.is_current_stream_capturing())
    outputs, tables, start = [], ([], []), 0
    for w, size, (s, z) in zip(weights, sizes, parts, strict=True):
        w, y = dense(w)
        if alone or w.numel() == 0 or matrix(w, size, axis)[0] != 1:
            _weight(y, w, s, z, *settings)
        else:
            cols, step = w.numel() // size, 16 // w.element_size()
            unaligned = cols % step or w.data_ptr() % 16 or y.data_ptr() % 16
            tables[bool(unaligned)].append((size, start, cols if unaligned else cols // step, w, y))
        outputs.append(y)
        start += size
    for table, width in zip(tables, (16 // first.element_size(), 1), strict=True):
        if table:
            _launch_table(table, width, scale, zero_point, quant_min, quant_max, symmetric)
    return outputs, scale, zero_point


def _launch_table(table, width, scale, zero_point, quant_min, quant_max, symmetric):
    """Rows (channels, first channel, cols / width, input, output) of one launch."""
    programs, rows = 0, []
    for channels, start, cols, w, y in table:
        rows.append((programs, start, cols, w.data_ptr(), y.data_ptr()))
        programs += channels
    fields = device_table(rows, scale.device)
    with torch.cuda.device_of(scale):
        jit.weights_kernel[(programs,)](
            fields, scale, zero_point, len(rows), quant_min, quant_max, symmetric_zero(quant_min, quant_max),
            ELEMENT=ELEMENTS[table[0][3].dtype], SYMMETRIC=symmetric, GROUP=width,
            ENTRIES=triton.next_power_of_2(len(rows)), BLOCK=1024, **LAUNCH,
        )  # fmt: skip
