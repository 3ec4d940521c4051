"""Arguments of every op in every dtype and memory layout, for the files `test_op_*.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clusterq.op_cases import OP_CASES, OpCase
from clusterq.ops import backends
from clusterq.testing import layouts

OP = torch.ops.clusterq
NAMES = sorted({row.op for row in backends()})
CASES = [(name, case) for name in NAMES for case in OP_CASES.get(name, ())]
IDS = [f"{name}-{OP_CASES[name].index(case)}" for name, case in CASES]
LAYOUTS = ("contiguous", "channels_last", "permuted", "sliced", "expanded")


def overload(name: str) -> Any:
    return getattr(OP, name).default


def strided(tensor: Tensor, layout: str) -> Tensor:
    """The values of `tensor` in another layout; vectors have gaps in all but the contiguous one."""
    if layout == "contiguous" or tensor.dim() == 0:
        return tensor
    if tensor.dim() == 1:
        return torch.stack([tensor, tensor], 1)[:, 0]
    return layouts(tensor).get(layout, tensor)


def laid_out(name: str, arguments: tuple[Any, ...], layout: str) -> tuple[Any, ...]:
    """Every tensor of `arguments` in `layout`: `expanded` repeats the first entry, except where the op writes."""
    written = [a.alias_info is not None for a in overload(name)._schema.arguments]
    moved = []
    for argument, is_written in zip(arguments, written, strict=True):
        if isinstance(argument, Tensor) and layout == "expanded":
            repeat = argument.dim() > 1 and argument.shape[0] > 0 and not is_written
            argument = argument[:1].expand_as(argument) if repeat else argument
        elif isinstance(argument, Tensor):
            argument = strided(argument, layout)
        moved.append(argument)
    return tuple(moved)


def empty_shapes(case: OpCase) -> list[tuple[int, ...]]:
    """The case's shape with one dimension of size 0, for every dimension that may be."""
    return [
        tuple(0 if d == empty else size for d, size in enumerate(case.shape))
        for empty in range(len(case.shape))
        if empty not in case.never_empty
    ]


def tensors(values: Any) -> list[Tensor]:
    """The tensors among arguments or results."""
    return [v for v in ((values,) if isinstance(values, Tensor) else values or ()) if isinstance(v, Tensor)]
