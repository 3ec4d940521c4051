"""Argument checks of the public functions in `fake_quant.py`; none of them waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor

ACTIVATIONS = ("none", "relu", "relu6")
GRADIENTS = ("clipped", "pass_through", "learned")
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CODES = (torch.uint8, torch.int8, torch.int16, torch.int32)
# Up to here every code and every difference of two codes is a whole float32.
LARGEST_CODE = 1 << 23


def check_choice(value: str, choices: tuple[str, ...], name: str) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; wanted one of {', '.join(choices)}")


def check_input(x: Tensor, axis: int | None, name: str, dtypes: tuple[torch.dtype, ...] = FLOATING) -> int | None:
    """Checks dtype and axis of the data; returns the axis counted from the front."""
    if x.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {x.dtype}; wanted one of {', '.join(map(str, dtypes))}")
    if axis is None:
        return None
    if not -x.dim() <= axis < x.dim():
        raise ValueError(f"axis is {axis}; wanted an axis of {name}, which has {x.dim()} dimensions")
    return axis % x.dim()


def check_range(quant_min: int, quant_max: int) -> None:
    if not -LARGEST_CODE <= quant_min < quant_max <= LARGEST_CODE:
        raise ValueError(
            f"quant_min is {quant_min} and quant_max is {quant_max}; wanted quant_min < quant_max within +-2^23"
        )


def check_bits(bits: int) -> None:
    if not 2 <= bits <= 16:
        raise ValueError(f"bits is {bits}; wanted 2 to 16")


def as_parameter(value: Tensor | float, x: Tensor, axis: int | None, dtype: torch.dtype, name: str) -> Tensor:
    """A scale or zero point as the ops want it: `dtype`, one element or one per channel of `axis`."""
    count = 1 if axis is None else x.size(axis)
    if not isinstance(value, Tensor):
        return torch.full((count,), float(value), dtype=dtype, device=x.device)
    if value.numel() != count:
        wanted = "1 (axis is None)" if axis is None else f"{count}, one per channel of axis {axis}"
        raise ValueError(f"{name} has {value.numel()} elements; wanted {wanted}")
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device}; wanted {x.device}, where the data is")
    if value.dtype.is_complex or value.dtype == torch.bool:
        raise TypeError(f"{name} has dtype {value.dtype}; wanted a floating-point or integer dtype")
    return value.to(dtype)


def as_scale(value: Tensor | float, x: Tensor, axis: int | None, dtype: torch.dtype) -> Tensor:
    if not isinstance(value, Tensor) and not 0 < value < float("inf"):
        raise ValueError(f"scale is {value}; wanted a finite number above 0")
    if isinstance(value, Tensor) and not value.dtype.is_floating_point:
        raise TypeError(f"scale has dtype {value.dtype}; wanted a floating-point dtype")
    return as_parameter(value, x, axis, dtype, "scale")


def as_zero_point(
    value: Tensor | float, x: Tensor, axis: int | None, dtype: torch.dtype, quant_min: int, quant_max: int
) -> Tensor:
    """Floating zero points are rounded half to even and clamped into the code range, detached from the graph."""
    if isinstance(value, int) and not quant_min <= value <= quant_max:
        raise ValueError(f"zero_point is {value}; wanted {quant_min} to {quant_max}, the range of the codes")
    if isinstance(value, float) and value != value:
        raise ValueError("zero_point is nan; wanted a number")
    zero_point = as_parameter(value, x, axis, dtype, "zero_point").detach()
    integral = not value.dtype.is_floating_point if isinstance(value, Tensor) else isinstance(value, int)
    return zero_point if integral else zero_point.round().clamp(quant_min, quant_max)
