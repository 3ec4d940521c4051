"""Fake-quantize with one saved bit per element, on a GPU through Triton: arguments of the ops, in schema order.

Layouts as in `fake_quant.py`; launches go to the current stream and nothing waits for the device.

Bytes moved per element of float32, and launches: forward 8.125, 1; backward 8.125, 1; observed 12.125 (4 of them from
the cache while x fits), 2, without `observe` 8.125, 1; delayed 8.125, 2, the second over a few numbers. Per channel,
where the runs of a channel in memory are no multiple of 8 elements: observed 12.125, 3, without `observe` 8.125, 2;
delayed 12.125, 3.
"""

import torch
import triton

from . import _mask_jit as jit
from ._layout import ACTIVATIONS, LAUNCH, check_parameters, dense, group, in_memory_order, matrix, tile_shape, tile_size
from ._observe import DELAYED, MOVING, RUNNING, any_masked, observe

_RULES = {"codes": jit.CODES.value, "real": jit.REAL.value, "activation": jit.FINITE.value}


def fake_quantize_masked(x, scale, zero_point, quant_min, quant_max, axis, activation, rule):
    scale, zero_point = check_parameters(x, scale, zero_point, axis)
    x, y = dense(x)
    n, channels = x.numel(), scale.numel()
    mask = torch.empty(triton.cdiv(n, 8), dtype=torch.uint8, device=x.device)
    if n == 0:
        return y, mask
    limits = (quant_min, quant_max)
    choices = {"RULE": _RULES[rule], "ACTIVATION": ACTIVATIONS[activation]}
    size = tile_size(x)
    with torch.cuda.device_of(x):
        if channels == 1:
            jit.masked_flat_kernel[(triton.cdiv(n, size),)](
                y, mask, x, scale, zero_point, n, *limits, **choices, BLOCK=size, **LAUNCH
            )
            return y, mask
        outer, cols, last = matrix(x, channels, axis)
        width, col_groups = group(cols)
        if width not in (8, 16):
            any_masked(y, mask, x, scale, zero_point, axis, limits, choices["ACTIVATION"], choices["RULE"])
            return y, mask
        rows = outer if last else outer * channels
        block_r, block_k = tile_shape(rows, cols, size)
        jit.masked_tile_kernel[(triton.cdiv(rows, block_r) * triton.cdiv(cols, block_k),)](
            y, mask, x, scale, zero_point, rows, col_groups, channels, *limits,
            **choices, LAST=last, GROUP=width, BLOCK_R=block_r, BLOCK_K=block_k, **LAUNCH,
        )  # fmt: skip
    return y, mask


def fake_quantize_masked_backward(grad, mask, stride):
    n = grad.numel()
    grad = in_memory_order(grad, grad.shape, stride)
    dx = grad.new_empty_strided(grad.shape, stride)
    if n == 0:
        return dx
    if mask.numel() != triton.cdiv(n, 8):
        raise ValueError(f"mask has {mask.numel()} bytes; wanted {triton.cdiv(n, 8)}, one bit per element of grad")
    size = tile_size(grad)
    with torch.cuda.device_of(grad):
        jit.masked_backward_kernel[(triton.cdiv(n, size),)](dx, grad, mask.contiguous(), n, BLOCK=size, **LAUNCH)
    return dx


def observe_fake_quantize_masked(
    x, running_min, running_max, quant_min, quant_max, momentum, observe_, symmetric, axis, activation, rule
):
    return observe(
        MOVING if observe_ else RUNNING, x, running_min, running_max, (quant_min, quant_max), momentum, symmetric, axis,
        ACTIVATIONS[activation], _RULES[rule],
    )  # fmt: skip


def delayed_fake_quantize(
    x, running_min, running_max, quant_min, quant_max, momentum, symmetric, axis, activation, rule
):
    return observe(
        DELAYED, x, running_min, running_max, (quant_min, quant_max), momentum, symmetric, axis,
        ACTIVATIONS[activation], _RULES[rule],
    )  # fmt: skip
