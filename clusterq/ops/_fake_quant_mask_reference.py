"""Fake-quantization that keeps one bit per element for its backward, in plain PyTorch: default kernels and fakes.

Bit `i % 8` of byte `i // 8` of a mask (uint8 [ceil(numel / 8)]) says whether the gradient reaches element i of x,
counted in memory order (in contiguous order where x leaves gaps in memory); the unused bits of the last byte are 0.
`rule` says which elements those are, all of them with activation'(x) != 0:

    codes       quant_min <= r + zero_point <= quant_max                      `pass` of `_fake_quant_reference`
    real        (quant_min - zero_point) * scale <= x' <= (quant_max - zero_point) * scale
                without the half steps beyond the outermost codes that round back into the range
    activation  every finite x
"""

from __future__ import annotations

import torch
from torch import Tensor

from clusterq.ops import _fake_quant_reference as reference
from clusterq.ops._checks import compute_dtype


def mask_bytes(numel: int) -> int:
    return (numel + 7) // 8


def _in_memory_order(dense: Tensor) -> Tensor:
    """View [numel] of a tensor without gaps."""
    return dense.as_strided((dense.numel(),), (1,))


def pack_flags(inside: Tensor, x: Tensor) -> Tensor:
    """Mask of flags shaped like x."""
    flags = x.new_zeros(8 * mask_bytes(x.numel()), dtype=torch.uint8)
    flags[: x.numel()] = _in_memory_order(reference.empty_dense(x, torch.uint8).copy_(inside))
    return (flags.reshape(-1, 8) << torch.arange(8, dtype=torch.uint8, device=x.device)).sum(1, dtype=torch.uint8)


def _inside(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    activation: str,
    rule: str,
) -> Tensor:
    _, q, s, z = reference.shifted(x, scale, zero_point, axis, activation)
    if rule == "activation":
        inside = x.isfinite()
    elif rule == "real":
        value = reference.activate(x.to(compute_dtype(x.dtype)), activation)
        inside = (value >= (quant_min - z) * s) & (value <= (quant_max - z) * s)
    else:
        inside = (q >= quant_min) & (q <= quant_max)
    return inside & reference.activation_mask(x, activation)


def fake_quantize_masked(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    activation: str,
    rule: str,
) -> tuple[Tensor, Tensor]:
    inside = _inside(x, scale, zero_point, quant_min, quant_max, axis, activation, rule)
    y = reference.fake_quantize(x, scale, zero_point, quant_min, quant_max, axis, activation)
    return y, pack_flags(inside, x)


def fake_quantize_masked_backward(grad: Tensor, mask: Tensor, stride: list[int]) -> Tensor:
    """`stride`: of x, or of its contiguous copy where x leaves gaps."""
    if mask.numel() != -(-grad.numel() // 8):
        raise ValueError(f"mask has {mask.numel()} bytes; wanted a bit for each of {grad.numel()} elements of grad")
    bits = (mask.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
    inside = bits.reshape(-1)[: grad.numel()].as_strided(grad.shape, stride)
    return grad.new_empty_strided(grad.shape, stride).copy_(torch.where(inside != 0, grad, 0.0))


def observe_fake_quantize_masked(
    x: Tensor,
    running_min: Tensor,
    running_max: Tensor,
    quant_min: int,
    quant_max: int,
    momentum: float,
    observe: bool,
    symmetric: bool,
    axis: int | None,
    activation: str,
    rule: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, scale, zero_point = reference.observe_fake_quantize(
        x, running_min, running_max, quant_min, quant_max, momentum, observe, symmetric, axis, activation
    )
    inside = _inside(x, scale, zero_point, quant_min, quant_max, axis, activation, rule)
    return y, scale, zero_point, pack_flags(inside, x)


def delayed_fake_quantize(
    x: Tensor,
    running_min: Tensor,
    running_max: Tensor,
    quant_min: int,
    quant_max: int,
    momentum: float,
    symmetric: bool,
    axis: int | None,
    activation: str,
    rule: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantizes with the range as it was before x, then moves the range toward that of x."""
    scale, zero_point = reference.range_to_qparams(running_min, running_max, quant_min, quant_max, symmetric)
    y, mask = fake_quantize_masked(x, scale, zero_point, quant_min, quant_max, axis, activation, rule)
    reference.move_range_(running_min, running_max, *reference.finite_range(x, axis, activation), momentum)
    return y, scale, zero_point, mask


def _fake_mask(x: Tensor) -> Tensor:
    return x.new_empty((mask_bytes(x.numel()),), dtype=torch.uint8)


def fake_masked(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    activation: str,
    rule: str,
) -> tuple[Tensor, Tensor]:
    return reference.empty_dense(x), _fake_mask(x)


def fake_masked_backward(grad: Tensor, mask: Tensor, stride: list[int]) -> Tensor:
    return grad.new_empty_strided(grad.shape, stride)


def fake_observe_masked(
    x: Tensor,
    running_min: Tensor,
    running_max: Tensor,
    quant_min: int,
    quant_max: int,
    momentum: float,
    observe: bool,
    symmetric: bool,
    axis: int | None,
    activation: str,
    rule: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ranges = (running_min, running_max, quant_min, quant_max, momentum, observe, symmetric, axis, activation)
    return (*reference.fake_observe(x, *ranges), _fake_mask(x))


def fake_delayed(
    x: Tensor,
    running_min: Tensor,
    running_max: Tensor,
    quant_min: int,
    quant_max: int,
    momentum: float,
    symmetric: bool,
    axis: int | None,
    activation: str,
    rule: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ranges = (running_min, running_max, quant_min, quant_max, momentum, True, symmetric, axis, activation)
    return fake_observe_masked(x, *ranges, rule)
