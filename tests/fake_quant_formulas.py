"""The contract of the fake-quantize ops in plain torch, and inputs, for the files `test_fake_quant*.py`."""

from __future__ import annotations

import torch
from torch import Tensor

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OP = torch.ops.clusterq


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values in every memory layout a 4-d tensor comes in."""
    padded = torch.full([n + 2 for n in x.shape], NAN, dtype=x.dtype)
    padded[1:-1, 1:-1, 1:-1, 1:-1] = x
    return {
        "contiguous": x.contiguous(),
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "permuted": x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        "sliced": padded[1:-1, 1:-1, 1:-1, 1:-1],
        "expanded": x[:1].expand_as(x),
    }


def along(p: Tensor, x: Tensor, axis: int | None) -> Tensor:
    shape = [1] * x.dim()
    if axis is not None:
        shape[axis] = -1
    return p.reshape(shape)


def formula(
    x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, axis: int | None, activation: str = "none"
) -> tuple[Tensor, Tensor, Tensor]:
    """Value, unclamped code and ratio by the contract, one torch op at a time."""
    s, z = along(scale, x, axis), along(zero_point, x, axis)
    v = x.to(scale.dtype)
    if activation != "none":
        v = torch.where(v < 0, 0.0, v)
    if activation == "relu6":
        v = torch.where(v > 6, 6.0, v)
    ratio = v * (1 / s)
    q = torch.round(ratio) + z
    code = torch.where(q < low, float(low), torch.where(q > high, float(high), q))
    return ((code - z) * s).to(x.dtype), q, ratio


def learned_formula(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    low: int,
    high: int,
    axis: int | None,
    activation: str = "none",
) -> tuple[Tensor, Tensor]:
    """LSQ (Esser et al. 2020, eq. 3) and LSQ+ (Bhalgat et al. 2020, eq. 5, 6) as printed, in float64."""
    _, q, _ = formula(x, scale, zero_point, low, high, axis, activation)
    s, z = along(scale.double(), x, axis), along(zero_point.double(), x, axis)
    v = x.double()
    if activation != "none":
        v = v.clamp(min=0)
    if activation == "relu6":
        v = v.clamp(max=6)
    below, above = q < low, q > high
    slope = torch.where(below, low - z, torch.where(above, high - z, q - z - v / s))
    dims = [d for d in range(x.dim()) if axis is None or d != axis % x.dim()]
    to_scale = torch.where(q.isnan(), 0.0, grad.double() * slope)
    to_zero = torch.where(below | above, -grad.double() * s, 0.0)
    if dims:
        to_scale, to_zero = to_scale.sum(dims), to_zero.sum(dims)
    return to_scale.reshape(scale.shape), to_zero.reshape(scale.shape)


def activation_mask(x: Tensor, activation: str) -> Tensor:
    return {"none": x == x, "relu": x > 0, "relu6": (x > 0) & (x < 6)}[activation]


def weight_qparams(w: Tensor, low: int, high: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Per-channel scale and zero point of rows [C, n], in the arithmetic of the contract."""
    scales, zero_points = [], []
    for row in w.to(wide(w.dtype)):
        finite = row[row.isfinite()]
        smallest = torch.cat([finite, finite.new_zeros(1)]).min()
        largest = torch.cat([finite, finite.new_zeros(1)]).max()
        scale = (
            torch.maximum(-smallest, largest) / ((high - low) / 2) if symmetric else (largest - smallest) / (high - low)
        )
        scale = scale if scale > 0 else torch.ones_like(scale)
        scales.append(scale)
        zero = torch.round(low - torch.round(smallest / scale)).clamp(low, high)
        zero = zero if finite.numel() else torch.zeros_like(zero)
        zero_points.append(torch.zeros_like(scale) if symmetric else zero)
    return torch.stack(scales), torch.stack(zero_points)


def parameters(x: Tensor, axis: int | None, low: int, high: int) -> tuple[Tensor, Tensor]:
    count = 1 if axis is None else x.size(axis)
    generator = torch.Generator().manual_seed(count)
    scale = torch.rand(count, generator=generator) * 0.3 + 0.05
    zero_point = torch.randint(low, high + 1, (count,), generator=generator)
    return scale.to(wide(x.dtype)), zero_point.to(wide(x.dtype))


def fresh(count: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.full((count,), INF, dtype=dtype), torch.full((count,), -INF, dtype=dtype)


def equal(a: Tensor, b: Tensor) -> bool:
    """Bit-identical up to NaN payloads: -0 differs from +0."""
    same = (a == b) & (a.signbit() == b.signbit())
    return a.dtype == b.dtype and a.shape == b.shape and bool((same | (a.isnan() & b.isnan())).all())


def with_specials(x: Tensor) -> Tensor:
    """Replaces some elements by NaN, infinities, zeros of both signs and huge values."""
    x = x.clone()
    flat = x.view(-1)
    specials = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1e30, -1e30, -1e-8, 6.0], dtype=torch.float64).to(x.dtype)
    places = flat[:: max(1, flat.numel() // 40)][: len(specials)]
    places.copy_(specials[: len(places)])
    return x
