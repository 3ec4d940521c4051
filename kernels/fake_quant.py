"""Fake-quantize on a GPU through Triton: every function takes the arguments of its op, in schema order.

Outputs have the strides of a dense input. Launches go to the current stream; nothing waits for the device.

Bytes moved per element of float32, and launches: forward 8, 1; backward 12, 1; learned backward 12, 2; a weight 8 (12
for long channels, 4 of them from the cache), 1; weights 12 (4 from the cache), 2; finite range 4, 2; observer 12 (8
from memory, 4 from the cache while x fits), 2, without `observe` 8, 1; quantization error 4 for any number of
candidates, 2.
"""

import torch
import triton

from . import _error_jit as errors
from . import _fake_quant_jit as jit
from . import _observe
from ._layout import (
    ACTIVATIONS,
    LAUNCH,
    LAUNCH_WIDE,
    RANGE_TILE,
    REDUCE_TILE,
    TILE,
    channel_tiles,
    check_parameters,
    dense,
    group,
    in_memory_order,
    matrix,
    programs,
    tile_shape,
    tile_size,
    without_gaps,
)
from ._weights import fake_quantize_weight, fake_quantize_weights

__all__ = [
    "dequantize",
    "fake_quantize",
    "fake_quantize_backward",
    "fake_quantize_learned_backward",
    "fake_quantize_weight",
    "fake_quantize_weights",
    "finite_range",
    "observe_fake_quantize",
    "quantization_error",
    "quantize",
]


def _code_dtype(quant_min, quant_max):
    if quant_min >= 0 and quant_max <= 255:
        return torch.uint8
    if quant_min >= -128 and quant_max <= 127:
        return torch.int8
    return torch.int16 if quant_min >= -32768 and quant_max <= 32767 else torch.int32


def _elementwise(op, out, x, grad, scale, zero_point, limits, axis, activation):
    scale, zero_point = check_parameters(x, scale, zero_point, axis)
    n = x.numel()
    if n == 0:
        return out
    channels = scale.numel()
    # Two inputs at once: the larger tile would need too many registers.
    size = TILE if op == jit.BACKWARD.value else tile_size(out)
    with torch.cuda.device_of(x):
        if channels == 1:
            jit.flat_kernel[(triton.cdiv(n, size),)](
                out, x, grad, scale, zero_point, n, *limits, OP=op, ACTIVATION=activation, BLOCK=size, **LAUNCH
            )
            return out
        outer, cols, last = matrix(x, channels, axis)
        rows = outer if last else outer * channels
        block_r, block_k = tile_shape(rows, cols, size)
        width, col_groups = group(cols)
        jit.tile_kernel[(triton.cdiv(rows, block_r) * triton.cdiv(cols, block_k),)](
            out, x, grad, scale, zero_point, rows, col_groups, channels, *limits,
            OP=op, ACTIVATION=activation, LAST=last, GROUP=width, BLOCK_R=block_r, BLOCK_K=block_k, **LAUNCH,
        )  # fmt: skip
    return out


def fake_quantize(x, scale, zero_point, quant_min, quant_max, axis, activation):
    x, y = dense(x)
    limits, act = (quant_min, quant_max), ACTIVATIONS[activation]
    return _elementwise(jit.FORWARD.value, y, x, x, scale, zero_point, limits, axis, act)


def fake_quantize_backward(grad, x, scale, zero_point, quant_min, quant_max, axis, activation):
    x, dx = dense(x)
    grad = in_memory_order(grad, x.shape, x.stride())
    limits, act = (quant_min, quant_max), ACTIVATIONS[activation]
    return _elementwise(jit.BACKWARD.value, dx, x, grad, scale, zero_point, limits, axis, act)


def quantize(x, scale, zero_point, quant_min, quant_max, axis):
    x, codes = dense(x, _code_dtype(quant_min, quant_max))
    return _elementwise(jit.QUANTIZE.value, codes, x, x, scale, zero_point, (quant_min, quant_max), axis, 0)


def dequantize(codes, scale, zero_point, axis, dtype):
    codes, y = dense(codes, dtype)
    return _elementwise(jit.DEQUANTIZE.value, y, codes, codes, scale, zero_point, (0, 0), axis, 0)


def fake_quantize_learned_backward(grad, x, scale, zero_point, quant_min, quant_max, axis, activation):
    shape = scale.shape
    scale, zero_point = check_parameters(x, scale, zero_point, axis)
    x, dx = dense(x)
    n = x.numel()
    if n == 0:
        return dx, torch.zeros_like(scale), torch.zeros_like(zero_point)
    grad = in_memory_order(grad, x.shape, x.stride())
    dscale, dzero = torch.empty_like(scale), torch.empty_like(zero_point)
    channels = scale.numel()
    limits, act = (quant_min, quant_max), ACTIVATIONS[activation]
    with torch.cuda.device_of(x):
        if channels == 1:
            splits, per_program = programs(triton.cdiv(n, REDUCE_TILE))
            partial = torch.empty(2 * splits, dtype=torch.float64, device=x.device)
            jit.learned_flat_kernel[(splits,)](
                dx, partial, x, grad, scale, zero_point, n, *limits,
                ACTIVATION=act, BLOCK=REDUCE_TILE, TILES=per_program, **LAUNCH,
            )  # fmt: skip
        else:
            side, tiles, outer, col_groups, constants = channel_tiles(x, channels, axis, REDUCE_TILE, 128)
            splits, per_program = programs(tiles)
            partial = torch.empty(2 * splits * channels, dtype=torch.float64, device=x.device)
            jit.learned_tile_kernel[(side * splits,)](
                dx, partial, x, grad, scale, zero_point, outer, channels, col_groups, splits, *limits,
                ACTIVATION=act, TILES=per_program, **constants, **LAUNCH,
            )  # fmt: skip
        block_c = min(triton.next_power_of_2(channels), 32)
        jit.learned_finish_kernel[(triton.cdiv(channels, block_c),)](
            dscale, dzero, partial, scale, splits, channels, BLOCK_S=1024 // block_c, BLOCK_C=block_c, **LAUNCH
        )
    return dx, dscale.view(shape), dzero


def finite_range(x, axis, activation):
    return _observe.finite_range(x, axis, ACTIVATIONS[activation])


def observe_fake_quantize(
    x, running_min, running_max, quant_min, quant_max, momentum, observe, symmetric, axis, activation
):
    mode = _observe.MOVING if observe else _observe.RUNNING
    limits = (quant_min, quant_max)
    result = _observe.observe(
        mode, x, running_min, running_max, limits, momentum, symmetric, axis, ACTIVATIONS[activation], _observe.NO_MASK
    )
    return result[:3]


def quantization_error(x, scales, zero_points, quant_min, quant_max, axis):
    candidates, channels = scales.shape
    if zero_points.shape != scales.shape or channels != (1 if axis is None else x.size(axis)):
        raise ValueError(
            f"scales has shape {tuple(scales.shape)} and zero_points {tuple(zero_points.shape)}; wanted [candidates, 1]"
            " or as many columns as channels"
        )
    out = torch.empty(scales.shape, dtype=torch.float64, device=x.device)
    if out.numel() == 0 or x.numel() == 0:
        return out.zero_()
    x, scales, zero_points = without_gaps(x), scales.contiguous(), zero_points.contiguous()
    side, tiles, outer, col_groups, constants = channel_tiles(x, channels, axis, RANGE_TILE, 64)
    partial = torch.empty(candidates * tiles * channels, dtype=torch.float64, device=x.device)
    with torch.cuda.device_of(x):
        errors.error_kernel[(side * tiles,)](
            partial, x, scales, zero_points, outer, channels, col_groups, tiles, candidates, quant_min, quant_max,
            **constants, **LAUNCH_WIDE,
        )  # fmt: skip
        block_c = min(triton.next_power_of_2(channels), 32)
        errors.error_sum_kernel[(candidates * triton.cdiv(channels, block_c),)](
            out, partial, tiles, channels, BLOCK_S=1024 // block_c, BLOCK_C=block_c, **LAUNCH
        )
    return out
