"""Fake-quantize on a GPU through Triton: every function takes the arguments of its op, in schema order.

A dense tensor is walked in memory order, whatever its strides: flat for one scale, as [outer, channels, cols] for a
scale per channel, as [outer, channels] where the channel is the fastest dimension. Other tensors are copied to
contiguous first. Outputs have the strides of a dense input. Launches go to the current stream; nothing waits for the
device.

Bytes moved per element of float32, and launches: forward 8, 1; backward 12, 1; learned backward 12, 2; weights 8 (12
for channels of more than `_IN_REGISTERS` elements), 1; observer 12, 3, without `observe` 8, 2.
"""

import torch
import triton

from . import _fake_quant_jit as jit
from . import _range_jit as ranges

_ACTIVATIONS = {"none": 0, "relu": 1, "relu6": 2}
# Elements of a tile. In a reduction one 16-byte access of a 16-bit input is enough: two would double the registers.
_TILE, _TILE_HALF, _REDUCE_TILE = 1024, 2048, 1024
# Most tiles that one program of a reduction walks; each lane adds so many in float32 before going to float64.
_REDUCE_TILES = 8
# Largest channel of a weight that one program keeps in registers between finding its range and quantizing it.
_IN_REGISTERS = 8192
# No contraction: a fused multiply-add would round once where the other backends round twice.
_LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}
_LAUNCH_WIDE = {"num_warps": 8, "enable_fp_fusion": False}


def _code_dtype(quant_min, quant_max):
    if quant_min >= 0 and quant_max <= 255:
        return torch.uint8
    if quant_min >= -128 and quant_max <= 127:
        return torch.int8
    return torch.int16 if quant_min >= -32768 and quant_max <= 32767 else torch.int32


def _compute_dtype(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _dense(x, dtype=None):
    """x, or a contiguous copy where it leaves gaps in memory, and an empty output of the same strides."""
    out = torch.empty_like(x, dtype=dtype)
    if out.stride() == x.stride():
        return x, out
    return x.contiguous(), torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _in_layout_of(grad, x):
    if grad.shape != x.shape:
        raise ValueError(f"grad has shape {tuple(grad.shape)}; wanted {tuple(x.shape)}, the shape of x")
    return grad if grad.stride() == x.stride() else torch.empty_like(x).copy_(grad)


def _check_parameters(x, first, second, axis):
    """What memory safety needs; values and dtypes are checked by the public functions."""
    channels = first.numel()
    if second.numel() != channels:
        raise ValueError(f"two per-channel parameters have {channels} and {second.numel()} elements; wanted as many")
    if channels != 1 and (axis is None or x.size(axis) != channels):
        raise ValueError(
            f"a parameter has {channels} elements; wanted 1 or the size of axis {axis} of {tuple(x.shape)}"
        )
    return first.contiguous(), second.contiguous()


def _matrix(x, channels, axis):
    """(outer, cols, LAST) of a dense, non-empty tensor."""
    inner = x.stride(axis) if channels > 1 else x.numel()
    outer = x.numel() // (channels * inner)
    return (outer, channels, True) if inner == 1 and channels > 1 else (outer, inner, False)


def _tile(rows, cols, size):
    """(BLOCK_R, BLOCK_K) of about `size` elements, with the fewest idle lanes past the end of cols, then the widest."""
    tallest = min(triton.next_power_of_2(rows), size)
    widest = min(triton.next_power_of_2(cols), size)
    narrowest = min(max(size // tallest, 32), widest)
    widths = [1 << k for k in range(narrowest.bit_length() - 1, widest.bit_length())]
    width = min(widths, key=lambda w: (-(-cols // w) * w, -w))
    return min(tallest, size // width), width


def _group(cols):
    """Largest power of two up to 16 that divides cols: with it, row starts are known to be aligned."""
    return next(g for g in (16, 8, 4, 2, 1) if cols % g == 0)


def _tile_size(x):
    return _TILE_HALF if x.element_size() <= 2 else _TILE


def _programs(tiles):
    """(programs, tiles of each) of a reduction."""
    per_program = min(triton.next_power_of_2(tiles), _REDUCE_TILES)
    return triton.cdiv(tiles, per_program), per_program


def _split(x, channels, axis):
    """Division of a per-channel reduction: (grid, splits, outer, cols, constants); of shape and strides alone."""
    outer, cols, last = _matrix(x, channels, axis)
    block_r, block_k = _tile(outer, min(cols, 128) if last else cols, _REDUCE_TILE)
    col_blocks = triton.cdiv(cols, block_k)
    tiles = triton.cdiv(outer, block_r) * (1 if last else col_blocks)
    splits, per_program = _programs(tiles)
    constants = {"LAST": last, "GROUP": _group(cols), "BLOCK_R": block_r, "BLOCK_K": block_k, "TILES": per_program}
    return (splits * (col_blocks if last else channels),), splits, outer, cols, constants


def _elementwise(op, out, x, grad, scale, zero_point, limits, axis, activation):
    scale, zero_point = _check_parameters(x, scale, zero_point, axis)
    n = x.numel()
    if n == 0:
        return out
    channels = scale.numel()
    size = _tile_size(out)
    with torch.cuda.device_of(x):
        if channels == 1:
            jit.flat_kernel[(triton.cdiv(n, size),)](
                out, x, grad, scale, zero_point, n, *limits, OP=op, ACTIVATION=activation, BLOCK=size, **_LAUNCH
            )
            return out
        outer, cols, last = _matrix(x, channels, axis)
        rows = outer if last else outer * channels
        block_r, block_k = _tile(rows, cols, size)
        group = _group(cols)
        jit.tile_kernel[(triton.cdiv(rows, block_r) * triton.cdiv(cols, block_k),)](
            out, x, grad, scale, zero_point, rows, cols // group, channels, *limits,
            OP=op, ACTIVATION=activation, LAST=last, GROUP=group, BLOCK_R=block_r, BLOCK_K=block_k, **_LAUNCH,
        )  # fmt: skip
    return out


def fake_quantize(x, scale, zero_point, quant_min, quant_max, axis, activation):
    x, y = _dense(x)
    limits, act = (quant_min, quant_max), _ACTIVATIONS[activation]
    return _elementwise(jit.FORWARD.value, y, x, x, scale, zero_point, limits, axis, act)


def fake_quantize_backward(grad, x, scale, zero_point, quant_min, quant_max, axis, activation):
    x, dx = _dense(x)
    limits, act = (quant_min, quant_max), _ACTIVATIONS[activation]
    return _elementwise(jit.BACKWARD.value, dx, x, _in_layout_of(grad, x), scale, zero_point, limits, axis, act)


def quantize(x, scale, zero_point, quant_min, quant_max, axis):
    x, codes = _dense(x, _code_dtype(quant_min, quant_max))
    return _elementwise(jit.QUANTIZE.value, codes, x, x, scale, zero_point, (quant_min, quant_max), axis, 0)


def dequantize(codes, scale, zero_point, axis, dtype):
    codes, y = _dense(codes, dtype)
    return _elementwise(jit.DEQUANTIZE.value, y, codes, codes, scale, zero_point, (0, 0), axis, 0)


def fake_quantize_learned_backward(grad, x, scale, zero_point, quant_min, quant_max, axis, activation):
    shape = scale.shape
    scale, zero_point = _check_parameters(x, scale, zero_point, axis)
    x, dx = _dense(x)
    n = x.numel()
    if n == 0:
        return dx, torch.zeros_like(scale), torch.zeros_like(zero_point)
    grad = _in_layout_of(grad, x)
    dscale, dzero = torch.empty_like(scale), torch.empty_like(zero_point)
    channels = scale.numel()
    limits, act = (quant_min, quant_max), _ACTIVATIONS[activation]
    with torch.cuda.device_of(x):
        if channels == 1:
            splits, per_program = _programs(triton.cdiv(n, _REDUCE_TILE))
            partial = torch.empty(2 * splits, dtype=torch.float64, device=x.device)
            jit.learned_flat_kernel[(splits,)](
                dx, partial, x, grad, scale, zero_point, n, *limits,
                ACTIVATION=act, BLOCK=_REDUCE_TILE, TILES=per_program, **_LAUNCH,
            )  # fmt: skip
        else:
            grid, splits, outer, cols, constants = _split(x, channels, axis)
            partial = torch.empty(2 * splits * channels, dtype=torch.float64, device=x.device)
            jit.learned_tile_kernel[grid](
                dx, partial, x, grad, scale, zero_point, outer, channels, cols // constants["GROUP"], splits, *limits,
                ACTIVATION=act, **constants, **_LAUNCH,
            )  # fmt: skip
        block_c = min(triton.next_power_of_2(channels), 32)
        jit.learned_finish_kernel[(triton.cdiv(channels, block_c),)](
            dscale, dzero, partial, scale, splits, channels, BLOCK_S=1024 // block_c, BLOCK_C=block_c, **_LAUNCH
        )
    return dx, dscale.view(shape), dzero


def _symmetric_zero(quant_min, quant_max):
    # Python rounds half to even.
    return round((quant_min + quant_max) / 2)


def fake_quantize_weight(w, quant_min, quant_max, axis, symmetric):
    w, y = _dense(w)
    channels = w.size(axis)
    middle = _symmetric_zero(quant_min, quant_max)
    scale = torch.empty(channels, dtype=_compute_dtype(w), device=w.device)
    zero_point = torch.empty_like(scale)
    if w.numel() == 0:
        nearest = middle if symmetric else min(max(0, quant_min), quant_max)
        return y, scale.fill_(1.0), zero_point.fill_(nearest)
    outer, cols, last = _matrix(w, channels, axis)
    lanes = triton.next_power_of_2(outer) * triton.next_power_of_2(cols)
    single = not last and lanes <= _IN_REGISTERS
    if single:
        block_r, block_k = triton.next_power_of_2(outer), triton.next_power_of_2(cols)
    else:
        block_r, block_k = _tile(outer, min(cols, 32) if last else cols, 4096)
    col_blocks = triton.cdiv(cols, block_k)
    tiles = triton.cdiv(outer, block_r) * (1 if last else col_blocks)
    group = _group(cols)
    with torch.cuda.device_of(w):
        ranges.weight_kernel[(col_blocks if last else channels,)](
            y, w, scale, zero_point, outer, channels, cols // group, tiles, quant_min, quant_max, middle,
            SYMMETRIC=symmetric, LAST=last, GROUP=group, BLOCK_R=block_r, BLOCK_K=block_k, SINGLE=single,
            **(_LAUNCH_WIDE if block_r * block_k > 2048 else _LAUNCH),
        )  # fmt: skip
    return y, scale, zero_point


def observe_fake_quantize(
    x, running_min, running_max, quant_min, quant_max, momentum, observe, symmetric, axis, activation
):
    low, high = _check_parameters(x, running_min, running_max, axis)
    x, y = _dense(x)
    n = x.numel()
    channels = low.numel()
    act = _ACTIVATIONS[activation]
    scale = torch.empty_like(low)
    zero_point = torch.empty_like(low)
    if channels == 0:
        return y, scale, zero_point
    splits = 0
    partial = low
    with torch.cuda.device_of(x):
        if observe and n > 0:
            if channels == 1:
                splits, per_program = _programs(triton.cdiv(n, _REDUCE_TILE))
                partial = torch.empty(2 * splits, dtype=low.dtype, device=x.device)
                ranges.range_flat_kernel[(splits,)](
                    partial, x, n, ACTIVATION=act, BLOCK=_REDUCE_TILE, TILES=per_program, **_LAUNCH
                )
            else:
                grid, splits, outer, cols, constants = _split(x, channels, axis)
                partial = torch.empty(2 * splits * channels, dtype=low.dtype, device=x.device)
                ranges.range_tile_kernel[grid](
                    partial, x, outer, channels, cols // constants["GROUP"], splits,
                    ACTIVATION=act, **constants, **_LAUNCH,
                )  # fmt: skip
        block_c = min(triton.next_power_of_2(channels), 32)
        ranges.range_finish_kernel[(triton.cdiv(channels, block_c),)](
            scale, zero_point, low, high, partial, splits, channels, quant_min, quant_max,
            _symmetric_zero(quant_min, quant_max), momentum, 1.0 - momentum,
            SYMMETRIC=symmetric, BLOCK_S=1024 // block_c, BLOCK_C=block_c, **_LAUNCH,
        )  # fmt: skip
    if low is not running_min:
        running_min.copy_(low)
    if high is not running_max:
        running_max.copy_(high)
    _elementwise(jit.FORWARD.value, y, x, x, scale, zero_point, (quant_min, quant_max), axis, act)
    return y, scale, zero_point
