"""Small arguments for every op: shared by the self-checks of `clusterq doctor` and by the tests that take every op.

The values come from integer arithmetic, so they are the same bits in every torch and on every processor; random numbers
are not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clusterq.ops._checks import compute_dtype

Shape = tuple[int, ...]


def values(shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Multiples of 1/1024 in [-2, 2) without visible order, rounded to `dtype`."""
    i = torch.arange(math.prod(shape)) + 7919 * seed
    bits = (i * i + i) * 2654435761 % (1 << 32) >> 20
    return (bits.double() / 1024 - 2).to(dtype).reshape(shape)


def positive(shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Like `values`, in [0.5, 2.5]."""
    return values(shape, dtype, seed).abs() + 0.5


@dataclass(frozen=True)
class OpCase:
    """How to make arguments for one op.

    Attributes:
        build: (shape and dtype of the data) -> arguments in the order of the schema, contiguous, fresh at every call.
        shape: a shape that fits, small.
        never_empty: dimensions that must not be 0.
    """

    build: Callable[[Shape, torch.dtype], tuple[Any, ...]]
    shape: Shape = (2, 3, 5, 7)
    never_empty: tuple[int, ...] = ()

    def arguments(self, shape: Shape | None = None, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
        return self.build(shape or self.shape, dtype)


def _grid(count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and zero point of `count` channels for codes 0 to 15."""
    return 0.2 * positive((count,), compute_dtype(dtype)), 3 * torch.arange(count).to(compute_dtype(dtype)) % 16


def _fake_quantize(backward: bool, axis: int | None, activation: str) -> OpCase:
    def build(shape: Shape, dtype: torch.dtype) -> tuple[Any, ...]:
        grad = (values(shape, dtype, 1),) if backward else ()
        grid = _grid(1 if axis is None else shape[axis], dtype)
        return (*grad, values(shape, dtype), *grid, 0, 15, axis, activation)

    return OpCase(build)


def _observe(shape: Shape, dtype: torch.dtype) -> tuple[Any, ...]:
    end = torch.ones(shape[1], dtype=compute_dtype(dtype))
    return values(shape, dtype), -end, end, 0, 15, 0.9, True, False, 1, "none"


def _observe_first(shape: Shape, dtype: torch.dtype) -> tuple[Any, ...]:
    end = torch.full((1,), torch.inf, dtype=compute_dtype(dtype))
    return values(shape, dtype), end, -end, -8, 7, 0.9, True, True, None, "relu"


def _quantization_error(shape: Shape, dtype: torch.dtype) -> tuple[Any, ...]:
    scales = 0.2 * positive((6, shape[1]), compute_dtype(dtype))
    return values(shape, dtype), scales, torch.zeros_like(scales), -8, 7, 1


def _masked(rule: str, axis: int | None, activation: str) -> OpCase:
    plain = _fake_quantize(False, axis, activation)
    return OpCase(lambda shape, dtype: (*plain.arguments(shape, dtype), rule))


def _masked_backward(shape: Shape, dtype: torch.dtype) -> tuple[Any, ...]:
    grad = values(shape, dtype)
    mask = torch.arange((grad.numel() + 7) // 8) * 37 % 256
    return grad, mask.to(torch.uint8), list(grad.stride())


def _delayed(shape: Shape, dtype: torch.dtype) -> tuple[Any, ...]:
    x, low, high, quant_min, quant_max, momentum, _, *rest = _observe(shape, dtype)
    return x, low, high, quant_min, quant_max, momentum, *rest, "codes"


def _rows_of_statistics(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, float, float]:
    """Center and gradients of mean and variance, [N, C], with their factors."""
    center, by_mean, by_var = (values(shape[:2], compute_dtype(dtype), seed) for seed in range(1, 4))
    return center, by_mean, by_var, 0.25, 0.5


def _batch_norm(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """Weight, bias, running mean, running variance [C] and eps."""
    channel, wide = shape[1:2], compute_dtype(dtype)
    return (
        positive(channel, wide, 2),
        values(channel, wide, 3),
        values(channel, wide, 1),
        positive(channel, wide, 4),
        1e-5,
    )


def _batch_norm_backward(shape: Shape, dtype: torch.dtype) -> tuple[Any, ...]:
    weight, _, _, running_var, eps = _batch_norm(shape, dtype)
    own = _rows_of_statistics(shape, dtype)
    return (values(shape, dtype, 4), values(shape, dtype), weight, running_var, eps, *own)


def _list(shape: Shape, dtype: torch.dtype) -> list[Tensor]:
    """Two layers of one batch: the second has twice the channels and no positions."""
    return [values(shape, dtype), values((shape[0], 2 * shape[1]), dtype, 5)]


def _list_backward(shape: Shape, dtype: torch.dtype) -> tuple[Any, ...]:
    columns = (shape[0], 3 * shape[1])
    center, by_mean, by_var = (values(columns, compute_dtype(dtype), seed) for seed in range(1, 4))
    return _list(shape, dtype), center, by_mean, by_var


def _alignment(classes: bool, squared: bool) -> Callable[[Shape, torch.dtype], tuple[Any, ...]]:
    """Statistics [N, D] of two layers, the second with class terms."""

    def build(shape: Shape, dtype: torch.dtype) -> tuple[Any, ...]:
        images, columns = shape
        first, wide = columns // 2, compute_dtype(dtype)
        rows = 3, columns - first
        batch = (
            values(shape, wide),
            positive(shape, wide, 1),
            values((columns,), wide, 2),
            positive((columns,), wide, 3),
            positive((3, columns), wide, 4),
            torch.tensor([0, first, columns]),
            0.7,
            squared,
            1e-10 if squared else None,
        )
        if not classes:
            return (*batch, None, None, 0, columns, None, None, None, [], False, None, None, None)
        labels, mask, known = _labels(images), torch.arange(images) != 3, torch.tensor([True, True, False])
        targets = values((2, *rows), wide, 5), positive((2, *rows), wide, 6)
        return (*batch, labels, mask, 3, first, *targets, known, [0.9, 0.6], True, None, None, None)

    return build


def _codes(shape: Shape) -> Tensor:
    """0 to 255 without visible order."""
    return (torch.arange(math.prod(shape)) * 73 % 256).reshape(shape)


def _image_weights(shape: Shape, dtype: torch.dtype) -> Tensor:
    """0, 1/2, 1, 3/2 in turn."""
    return (torch.arange(shape[0]) % 4).to(compute_dtype(dtype)) / 2


def _labels(images: int) -> Tensor:
    """-1 to 3: some images are of no class."""
    return torch.arange(images) * 3 % 5 - 1


def _book(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Five centroids and their sizes for rows [B, N, D]."""
    batch, _, dim = shape
    return values((batch, 5, dim), dtype, 1), positive((batch, 5), seed=2)


def _pair(*precision: str) -> Callable[[Shape, torch.dtype], tuple[Any, ...]]:
    return lambda shape, dtype: (values(shape, dtype), _book(shape, dtype)[0], *precision)


def _sums(shape: Shape) -> Tensor:
    """Sums of the rows of five centroids and their counts, the last of them 0."""
    batch, _, dim = shape
    sums = values((batch, 5, dim + 1), torch.float64, 4)
    sums[..., -1] = torch.arange(5.0) % 4
    return sums


def _running(shape: Shape, dtype: torch.dtype) -> Tensor:
    return values((shape[0], 5, shape[2]), compute_dtype(dtype), 6)


def _index(shape: Shape) -> Tensor:
    batch, rows, _ = shape
    return (torch.arange(batch * rows) % 6 - 1).reshape(batch, rows)


def _weights(shape: Shape, dtype: torch.dtype) -> Tensor:
    return positive(shape[:2], compute_dtype(dtype), 3)


def _rows(build: Callable[[Shape, torch.dtype], tuple[Any, ...]]) -> OpCase:
    return OpCase(build, (2, 11, 4), never_empty=(2,))


# At least one case of every op; several where an optional argument or another value takes another path.
OP_CASES: dict[str, tuple[OpCase, ...]] = {
    "fake_quantize": (_fake_quantize(False, 1, "relu"), _fake_quantize(False, None, "relu6")),
    "fake_quantize_backward": (_fake_quantize(True, 1, "none"), _fake_quantize(True, None, "relu6")),
    "fake_quantize_learned_backward": (_fake_quantize(True, 1, "none"), _fake_quantize(True, None, "relu")),
    "quantize": (OpCase(lambda shape, dtype: (values(shape, dtype), *_grid(shape[1], dtype), 0, 15, 1)),),
    "dequantize": (
        OpCase(
            lambda shape, dtype: (
                (torch.arange(math.prod(shape)) % 16).to(torch.uint8).reshape(shape),
                *_grid(shape[1], dtype),
                1,
                dtype,
            )
        ),
    ),
    "fake_quantize_weight": (
        OpCase(lambda shape, dtype: (values(shape, dtype), -8, 7, 0, True)),
        OpCase(lambda shape, dtype: (values(shape, dtype), -8, 7, 1, False)),
    ),
    "observe_fake_quantize": (OpCase(_observe), OpCase(_observe_first)),
    "fake_quantize_masked": (
        _masked("codes", 1, "relu"),
        _masked("real", None, "none"),
        _masked("activation", 1, "relu6"),
    ),
    "fake_quantize_masked_backward": (OpCase(_masked_backward),),
    "observe_fake_quantize_masked": (OpCase(lambda shape, dtype: (*_observe(shape, dtype), "codes")),),
    "delayed_fake_quantize": (OpCase(_delayed),),
    "fake_quantize_weights": (
        OpCase(lambda shape, dtype: ([values(shape, dtype), values((4, 3), dtype, 1)], -8, 7, 0, True)),
        OpCase(lambda shape, dtype: ([values((3, 4), dtype, 1), values(shape, dtype)], -2, 1, 1, False)),
    ),
    "finite_range": (
        OpCase(lambda shape, dtype: (values(shape, dtype), 1, "none")),
        OpCase(lambda shape, dtype: (values(shape, dtype), None, "relu6")),
    ),
    "pack_codes": (OpCase(lambda shape, dtype: ((_codes(shape) % 16).to(torch.uint8), 4)),),
    "unpack_codes": (
        OpCase(lambda shape, dtype: (_codes((*shape[:-1], (shape[-1] + 3) // 4)).to(torch.uint8), 2, shape[-1], True)),
    ),
    "quantization_error": (OpCase(_quantization_error),),
    "instance_statistics": (OpCase(lambda shape, dtype: (values(shape, dtype),)),),
    "instance_statistics_list": (OpCase(lambda shape, dtype: (_list(shape, dtype),)),),
    "batch_norm_statistics": (
        OpCase(lambda shape, dtype: (values(shape, dtype), 1, None)),
        OpCase(lambda shape, dtype: (values(shape, dtype), 0, _image_weights(shape, dtype))),
    ),
    "class_statistics": (
        OpCase(lambda shape, dtype: (values(shape, dtype), _labels(shape[0]), 3, _image_weights(shape, dtype))),
        OpCase(lambda shape, dtype: (values(shape, dtype), _labels(shape[0]), 3, None), shape=(6, 3)),
    ),
    "batch_norm_instance_statistics": (
        OpCase(lambda shape, dtype: (values(shape, dtype), *_batch_norm(shape, dtype))),
    ),
    "batch_norm_batch_statistics": (OpCase(lambda shape, dtype: (values(shape, dtype), *_batch_norm(shape, dtype))),),
    "statistics_backward": (OpCase(lambda shape, dtype: (values(shape, dtype), *_rows_of_statistics(shape, dtype))),),
    "statistics_backward_list": (OpCase(_list_backward),),
    "batch_norm_statistics_backward": (OpCase(_batch_norm_backward),),
    "batch_norm_parameter_backward": (
        OpCase(
            lambda shape, dtype: (values(shape, dtype, 4), values(shape, dtype), *_batch_norm(shape, dtype)[2:]),
        ),
    ),
    "alignment_loss": (
        OpCase(_alignment(True, True), shape=(6, 8), never_empty=(0, 1)),
        OpCase(_alignment(False, False), shape=(6, 8), never_empty=(0, 1)),
    ),
    "nearest_centroid": (_rows(_pair("exact")), _rows(_pair("fast"))),
    "two_nearest_centroids": (_rows(_pair("exact")),),
    "undecided_rows": (_rows(_pair()),),
    "nearest_centroid_backward": (
        _rows(
            lambda shape, dtype: (
                _weights(shape, dtype),
                values(shape, dtype),
                _book(shape, dtype)[0],
                _index(shape),
            )
        ),
    ),
    "centroid_sums": (
        _rows(lambda shape, dtype: (values(shape, dtype), _index(shape), _weights(shape, dtype), 5, True)),
        _rows(lambda shape, dtype: (values(shape, dtype), _index(shape), None, 5, False)),
    ),
    "assign_and_sum": (
        _rows(lambda shape, dtype: (values(shape, dtype), _book(shape, dtype)[0], None, "exact", True)),
        _rows(
            lambda shape, dtype: (
                values(shape, dtype),
                _book(shape, dtype)[0],
                _weights(shape, dtype),
                "fast",
                False,
            )
        ),
    ),
    "move_centroids_": (
        _rows(lambda shape, dtype: (*_book(shape, dtype), None, _sums(shape), 0.8, "mean", 0.0)),
        _rows(lambda shape, dtype: (*_book(shape, dtype), None, _sums(shape), 0.8, "codebook", 0.0)),
        _rows(lambda shape, dtype: (*_book(shape, dtype), _running(shape, dtype), _sums(shape), 0.8, "codebook", 0.01)),
    ),
}
