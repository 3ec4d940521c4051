"""What the op families share: dtypes and the checks of tensors; none of them waits for the device."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of arithmetic, statistics, scales, distances and weights for data of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_tensor(name: str, value: object, dtypes: tuple[torch.dtype, ...] | None = None) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {type(value).__name__}; wanted a Tensor")
    if dtypes is not None and value.dtype not in dtypes:
        *most, last = (str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} has dtype {value.dtype}; wanted {', '.join(most)}{' or ' if most else ''}{last}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name} has layout {value.layout}; wanted a dense tensor")


def check_integer(name: str, value: int, least: int | None = None, most: int | None = None) -> None:
    # The plain int first: asking the abstract class costs more than the rest of the check.
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, (numbers.Integral, torch.SymInt))):
        raise TypeError(f"{name} is {value!r}; wanted a whole number")
    if (least is not None and value < least) or (most is not None and value > most):
        raise ValueError(f"{name} is {value}; wanted {least} {'or more' if most is None else f'to {most}'}")


def check_number(name: str, value: float, least: float, most: float = math.inf, *, below: float = math.inf) -> None:
    """A number from `least` to `most`, smaller than `below`."""
    if type(value) is not float and not isinstance(value, (numbers.Real, torch.SymFloat)):
        raise TypeError(f"{name} is {value!r}; wanted a number")
    if not (least <= value <= most and value < below):
        end = f" <= {most}" if most < math.inf else f" < {below}"
        raise ValueError(f"{name} is {value}; wanted {least} <= {name}{end}")


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; wanted {tuple(shape)}")


def check_device(name: str, tensor: Tensor, device: torch.device, owner: str) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; wanted {device}, where {owner} is")


def check_row_weights(name: str, weights: Tensor, rows: Tensor) -> None:
    """Weights or a mask [..., N] of rows [..., N, D]."""
    check_tensor(name, weights)
    if weights.dtype.is_complex:
        raise TypeError(f"{name} has dtype {weights.dtype}; wanted a real one")
    check_shape(name, weights, rows.shape[:-1])
    check_device(name, weights, rows.device, "x")


def check_precision(precision: str) -> None:
    """Of a nearest-centroid search."""
    if precision not in ("exact", "fast"):
        raise ValueError(f"precision is {precision!r}; wanted exact or fast")


def check_own_memory(name: str, tensor: Tensor) -> None:
    """Refuses a tensor that would be written in place while its elements share memory, such as an expanded one."""
    if tensor.is_contiguous():
        return
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)} and strides {tuple(tensor.stride())}: elements share"
                    " memory; wanted a tensor whose elements can be changed one by one (call clone())"
                )
            reach += (size - 1) * stride


def ordered_sum(values: Tensor, dims: list[int]) -> Tensor:
    """`values.sum(dims)` with the same bits for any number of threads; `dims` are not empty, counted from the front.

    On the CPU torch divides a reduction among its threads when it ends in a single number, and not when it ends in
    several: so it is made to end in two.
    """
    return several_outputs(values, dims).sum([d + 1 for d in dims])[0]


def several_outputs(values: Tensor, dims: list[int]) -> Tensor:
    """`values` with a new first dimension: of size 2, without a copy, where a reduction would end in one number."""
    outputs = 1
    for axis, size in enumerate(values.shape):
        outputs *= 1 if axis in dims else size
    return values.expand(2 if outputs == 1 and values.device.type == "cpu" else 1, *values.shape)
