"""Argument checks of the public functions in `fake_quant.py`; none of them waits for the device."""

from __future__ import annotations

import math
import numbers
from typing import Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from clusterq.ops._checks import FLOATING, check_device, check_integer, check_own_memory, check_tensor

Activation = Literal["none", "relu", "relu6"]
Save = Literal["auto", "mask", "input"]
ACTIVATIONS = ("none", "relu", "relu6")
GRADIENTS = ("clipped", "pass_through", "learned")
SEMANTICS = ("aten", "real_range")
SAVES = ("auto", "mask", "input")
CODES = (torch.uint8, torch.int8, torch.int16, torch.int32)
# Up to here every code and every difference of two codes is a whole float32.
LARGEST_CODE = 1 << 23


def check_choice(value: str, choices: tuple[str, ...], name: str) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; wanted one of {', '.join(choices)}")


def check_input(x: Tensor, axis: int | None, name: str, dtypes: tuple[torch.dtype, ...] = FLOATING) -> int | None:
    """Checks dtype and axis of the data; returns the axis counted from the front."""
    check_tensor(name, x, dtypes)
    if axis is None:
        return None
    check_integer("axis", axis)
    if not -x.dim() <= axis < x.dim():
        raise ValueError(f"axis is {axis}; wanted an axis of {name}, which has {x.dim()} dimensions")
    return axis % x.dim()


def check_range(quant_min: int, quant_max: int) -> None:
    check_integer("quant_min", quant_min)
    check_integer("quant_max", quant_max)
    if not -LARGEST_CODE <= quant_min < quant_max <= LARGEST_CODE:
        raise ValueError(
            f"quant_min is {quant_min} and quant_max is {quant_max}; wanted quant_min < quant_max within +-2^23"
        )


def code_range(bits: int, signed: bool) -> tuple[int, int]:
    """The 2^bits codes from 0, or from -2^(bits-1) if signed; raises for a width that is not 2 to 16."""
    check_integer("bits", bits, 2, 16)
    # A power, since torch 2.11 does not trace a shift by a number that may change.
    low = -(2 ** (bits - 1)) if signed else 0
    return low, low + 2**bits - 1


def as_parameter(value: Tensor | float, x: Tensor, axis: int | None, dtype: torch.dtype, name: str) -> Tensor:
    """A scale or zero point as the ops want it: `dtype`, one element or one per channel of `axis`."""
    count = 1 if axis is None else x.size(axis)
    # The usual case first: on a small weight the checks below would take longer than its kernel.
    if (
        isinstance(value, Tensor)
        and type(value) in (Tensor, Parameter)
        and value.dtype is dtype
        and value.numel() == count
        and value.device == x.device
        and value.layout is torch.strided
    ):
        return value
    if not isinstance(value, Tensor):
        return torch.full((count,), float(value), dtype=dtype, device=x.device)
    check_tensor(name, value)
    if value.numel() != count:
        wanted = "1 (axis is None)" if axis is None else f"{count}, one per channel of axis {axis}"
        raise ValueError(f"{name} has {value.numel()} elements; wanted {wanted}")
    check_device(name, value, x.device, "the data")
    if value.dtype.is_complex or value.dtype == torch.bool:
        raise TypeError(f"{name} has dtype {value.dtype}; wanted a floating-point or integer dtype")
    return value.to(dtype)


def detached(value: Tensor) -> Tensor:
    return value.detach() if value.requires_grad else value


def check_running(value: Tensor, x: Tensor, axis: int | None, dtype: torch.dtype, name: str) -> None:
    """A bound of a running range: of the compute dtype, shaped like a parameter, each element in memory of its own."""
    check_tensor(name, value)
    if value.dtype != dtype:
        raise TypeError(f"{name} has dtype {value.dtype}; wanted {dtype} for x of {x.dtype}")
    if value.requires_grad:
        raise ValueError(f"{name} requires a gradient; wanted a buffer, which is changed in place")
    as_parameter(value, x, axis, dtype, name)
    check_own_memory(name, value)


def as_scale(value: Tensor | float, x: Tensor, axis: int | None, dtype: torch.dtype) -> Tensor:
    if isinstance(value, Tensor):
        if not value.dtype.is_floating_point:
            raise TypeError(f"scale has dtype {value.dtype}; wanted a floating-point dtype")
    else:
        if not isinstance(value, numbers.Real):
            raise TypeError(f"scale is {type(value).__name__}; wanted a number or a Tensor")
        # Between two numbers of `dtype`, hence normal and finite also once it is rounded to it.
        smallest, largest = torch.finfo(dtype).tiny, torch.finfo(dtype).max
        if not smallest <= value <= largest:
            raise ValueError(
                f"scale is {value}; wanted {smallest:.4g} to {largest:.4g}, the normal positive numbers of {dtype}"
            )
    return as_parameter(value, x, axis, dtype, "scale")


def check_zero_point(value: Tensor | float, quant_min: int, quant_max: int) -> None:
    """Of a Python number also the value; a Tensor's would wait for the device."""
    if isinstance(value, Tensor):
        return
    if not isinstance(value, numbers.Real):
        raise TypeError(f"zero_point is {type(value).__name__}; wanted a number or a Tensor")
    # Comparisons, since torch.compile does not trace math.isfinite of a number that may change.
    if not -math.inf < value < math.inf:
        raise ValueError(f"zero_point is {value}; wanted a finite number")
    if not quant_min <= round(value) <= quant_max:
        raise ValueError(f"zero_point is {value}; wanted {quant_min} to {quant_max}, the range of the codes")


def as_zero_point(
    value: Tensor | float, x: Tensor, axis: int | None, dtype: torch.dtype, quant_min: int, quant_max: int
) -> Tensor:
    """Floating zero points are rounded half to even and clamped into the code range, detached from the graph."""
    check_zero_point(value, quant_min, quant_max)
    zero_point = detached(as_parameter(value, x, axis, dtype, "zero_point"))
    integral = not value.dtype.is_floating_point if isinstance(value, Tensor) else isinstance(value, int)
    # In this order the second of them needs no memory: the bounds are whole.
    return zero_point if integral else zero_point.clamp(quant_min, quant_max).round_()


def keeps_mask(x: Tensor, save: Save, gradient: str, activation: Activation) -> bool:
    """A parameter is alive anyway; a gradient that passes everything needs nothing."""
    if gradient == "pass_through" and activation == "none":
        return False
    return save == "mask" or (save == "auto" and not x.is_leaf)
