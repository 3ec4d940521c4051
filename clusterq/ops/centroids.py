"""Nearest-centroid assignment and the moving average that follows it.

Assignment: `index[n] = argmin_k sum_d (x[n, d] - c[k, d])^2`, the lowest index among equal distances. A NaN distance
takes no part; a row for which every distance is NaN (a NaN in the row, or only NaN centroids) gets index -1 and
distance NaN.

Gradient of the distance, with `k = index[n]`:
`dx[n] = 2 g[n] (x[n] - c[k])`, `dc[k] = -2 sum_{n: index[n] = k} g[n] (x[n] - c[k])`; the index carries none.

Update, with `n_k = sum w`, `s_k = sum w x` over the rows of centroid k and `d` = decay:

- `mean` (ClusterQ, arXiv 2205.00179, eq. 5, there with beta = 1 - d): `c_k <- d c_k + (1 - d) s_k / n_k`
- `codebook` (VQ-VAE, arXiv 1711.00937, appendix A.1):
  `N_k' = d N_k + (1 - d) n_k`, `c_k <- (d N_k c_k + (1 - d) s_k) / N_k'`

both for `n_k != 0`, and in both `N_k <- d N_k + (1 - d) n_k` for every k, where N is `cluster_size`.

- `codebook` with the running sum kept apart, S: `S_k <- d S_k + (1 - d) s_k`, `c_k <- S_k / M_k` for every k with
  `M_k != 0`, where `M = N`, or with Laplace smoothing by e: `M_k = (N_k + e) / (T + K e) T`, `T = sum_k N_k`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from clusterq.ops import _centroids_ops as op
from clusterq.ops import _centroids_reference as reference
from clusterq.ops._autograd import apply
from clusterq.ops._checks import (
    FLOATING,
    check_device,
    check_number,
    check_own_memory,
    check_precision,
    check_row_weights,
    check_shape,
    check_tensor,
    compute_dtype,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["assign_and_update_", "nearest_centroid", "two_nearest_centroids", "undecided_rows", "update_centroids_"]

Precision = Literal["exact", "fast"]
Mode = Literal["mean", "codebook"]


def _check_pair(x: Tensor, centroids: Tensor, precision: str = "exact") -> None:
    for name, tensor in (("x", x), ("centroids", centroids)):
        check_tensor(name, tensor, FLOATING)
    if x.dim() not in (2, 3):
        raise ValueError(f"x has shape {tuple(x.shape)}; wanted [N, D] or [B, N, D]")
    if centroids.dim() != x.dim():
        wanted = "[K, D]" if x.dim() == 2 else "[B, K, D]"
        raise ValueError(f"centroids has shape {tuple(centroids.shape)}; wanted {wanted} for x of {x.dim()} dimensions")
    if centroids.shape[-2] < 1 or centroids.shape[-1] < 1:
        raise ValueError(f"centroids has shape {tuple(centroids.shape)}; wanted K >= 1 and D >= 1")
    if x.shape[-1] != centroids.shape[-1]:
        raise ValueError(f"x has D = {x.shape[-1]} but centroids has D = {centroids.shape[-1]}")
    if x.dim() == 3 and x.shape[0] != centroids.shape[0]:
        raise ValueError(f"x has B = {x.shape[0]} but centroids has B = {centroids.shape[0]}")
    check_device("centroids", centroids, x.device, "x")
    if (x.dtype == torch.float64) != (centroids.dtype == torch.float64):
        raise TypeError(f"x is {x.dtype} but centroids is {centroids.dtype}; float64 goes with float64 only")
    check_precision(precision)


def _check_update(
    centroids: Tensor,
    cluster_size: Tensor,
    x: Tensor,
    decay: float,
    weights: Tensor | None,
    mode: str,
    running_sum: Tensor | None,
    smoothing: float,
    dead_below: float | None,
) -> None:
    check_tensor("cluster_size", cluster_size, (torch.float32,))
    check_shape("cluster_size", cluster_size, centroids.shape[:-1])
    check_device("cluster_size", cluster_size, x.device, "x")
    check_own_memory("centroids", centroids)
    check_own_memory("cluster_size", cluster_size)
    if weights is not None:
        check_row_weights("weights", weights, x)
    check_number("decay", decay, 0, 1)
    check_number("smoothing", smoothing, 0)
    if dead_below is not None:
        check_number("dead_below", dead_below, 0)
    if mode not in ("mean", "codebook"):
        raise ValueError(f"mode is {mode!r}; wanted mean or codebook")
    if running_sum is None:
        if smoothing != 0:
            raise ValueError(f"running_sum is None; wanted a tensor for a smoothing of {smoothing}")
        return
    if mode != "codebook":
        raise ValueError(f"mode is {mode!r}; with running_sum wanted codebook")
    check_tensor("running_sum", running_sum, (compute_dtype(centroids.dtype),))
    check_shape("running_sum", running_sum, centroids.shape)
    check_device("running_sum", running_sum, x.device, "x")
    check_own_memory("running_sum", running_sum)


class _NearestCentroid(torch.autograd.Function):
    """One op gives both gradients from the same read of x and the centroids, also where only one of them is needed."""

    @staticmethod
    def forward(x: Tensor, centroids: Tensor, precision: str) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = op.nearest_centroid(x, centroids, precision)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[0])
        ctx.save_for_backward(*inputs[:2], output[0])

    @staticmethod
    def backward(ctx: Any, grad_index: Tensor | None, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return (*_backward(grad, *ctx.saved_tensors), None)


class _TwoNearestCentroids(_NearestCentroid):
    @staticmethod
    def forward(x: Tensor, centroids: Tensor, precision: str) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = op.two_nearest_centroids(x, centroids, precision)
        return result

    @staticmethod
    def backward(ctx: Any, grad_index: Tensor | None, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, centroids, index = ctx.saved_tensors
        first, second = (_backward(grad[..., n], x, centroids, index[..., n]) for n in range(2))
        return first[0] + second[0], first[1] + second[1], None


def _backward(grad: Tensor, x: Tensor, centroids: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The op, or its reference where the backward itself has to be differentiable; torch.compile refuses to
    differentiate twice by itself.
    """
    twice = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    backward = reference.nearest_centroid_backward if twice else op.nearest_centroid_backward
    result: tuple[Tensor, Tensor] = backward(grad.contiguous(), x, centroids, index)
    return result


def _search(function: Any, kernel: Any, x: Tensor, centroids: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    _check_pair(x, centroids, precision)
    batched = x.dim() == 3
    rows, means = (x, centroids) if batched else (x.unsqueeze(0), centroids.unsqueeze(0))
    if torch.is_grad_enabled() and (x.requires_grad or centroids.requires_grad):
        index, distance = apply(function, rows, means, precision)
    else:
        index, distance = kernel(rows, means, precision)
    return (index, distance) if batched else (index.squeeze(0), distance.squeeze(0))


def nearest_centroid(x: Tensor, centroids: Tensor, *, precision: Precision = "exact") -> tuple[Tensor, Tensor]:
    """Index of the nearest centroid of each row and the squared Euclidean distance to it.

    Args:
        x: rows, [N, D] or [B, N, D]; float32, bfloat16, float16 or float64, any strides, N >= 0.
        centroids: [K, D], or [B, K, D] with one set per batch entry; K, D >= 1. float64 together with a float64 x,
            otherwise any of the other three dtypes.
        precision: `"exact"`: the index equals the one found by a float64 search over the given values,
            `sum_d (x - c)^2` added in the order of d: the fast search leaves open only rows whose two best scores lie
            closer than a rigorous bound on its rounding error, and those are decided in float64. `"fast"`: those rows
            may keep what the fast search found (`undecided_rows` tells which they are). float64 arguments are searched
            in float64 with either.

    Returns:
        index: int64 [N] or [B, N]. The lowest index wins among equal distances (`"fast"`: among equal scores). A NaN
            distance never wins, so neither does a centroid with a NaN; a row with a NaN (or with no centroid free of
            NaN) gets -1. Infinities follow the same rule.
        distance: squared distance, [N] or [B, N], re-evaluated as `sum (x - c)^2` in float64 and rounded to float32
            (float64 for float64 inputs); NaN where the index is -1. Differentiable with respect to `x` and
            `centroids`, more than once; a row with index -1 passes no gradient.

    Raises:
        TypeError: an argument is no tensor or has an unsupported dtype, or float64 is mixed with another dtype.
        ValueError: shapes, devices or `precision` that do not fit.
    """
    return _search(_NearestCentroid, op.nearest_centroid, x, centroids, precision)


def two_nearest_centroids(x: Tensor, centroids: Tensor, *, precision: Precision = "exact") -> tuple[Tensor, Tensor]:
    """`nearest_centroid` with the runner-up: the nearest of the other centroids, by the same rules.

    Returns:
        index: int64 [N, 2] or [B, N, 2]; -1 where there is no such centroid (the second with K = 1).
        distance: squared distances, [N, 2] or [B, N, 2], NaN where the index is -1. Differentiable.
    """
    return _search(_TwoNearestCentroids, op.two_nearest_centroids, x, centroids, precision)


def undecided_rows(x: Tensor, centroids: Tensor) -> Tensor:
    """Rows that the fast search cannot decide: `precision="exact"` measures these in float64.

    Their share is the price of exactness; it depends on the backend, whose searches round differently.

    Returns:
        bool [N] or [B, N]: the lead of the best score over the second does not exceed the bound on its error.
    """
    _check_pair(x, centroids)
    rows: Tensor = op.undecided_rows(_batched(x, 3), _batched(centroids, 3))
    return rows if x.dim() == 3 else rows.squeeze(0)


def _batched(tensor: Tensor, dims: int) -> Tensor:
    tensor = tensor.detach()
    return tensor if tensor.dim() == dims else tensor.unsqueeze(0)


def _batched_weights(weights: Tensor | None, x: Tensor) -> Tensor | None:
    return None if weights is None else _batched(weights, 2).to(compute_dtype(x.dtype))


def _move(
    sums: Tensor,
    centroids: Tensor,
    cluster_size: Tensor,
    running_sum: Tensor | None,
    decay: float,
    mode: str,
    smoothing: float,
    group: ProcessGroup | None,
) -> None:
    if group is not None:
        torch.distributed.all_reduce(sums, group=group)
    running_sum = None if running_sum is None else _batched(running_sum, 3)
    op.move_centroids_(
        _batched(centroids, 3), _batched(cluster_size, 2), running_sum, sums, float(decay), mode, float(smoothing)
    )


def update_centroids_(
    centroids: Tensor,
    cluster_size: Tensor,
    x: Tensor,
    index: Tensor,
    decay: float,
    *,
    weights: Tensor | None = None,
    mode: Mode = "mean",
    running_sum: Tensor | None = None,
    smoothing: float = 0.0,
    dead_below: float | None = None,
    deterministic: bool = True,
    process_group: ProcessGroup | None = None,
) -> Tensor | None:
    """Moves `centroids` and `cluster_size` in place by an exponential moving average over the rows assigned to each.

    Formulas: module docstring. Sums run in float64 in a fixed order of the rows, so a repetition gives the same bits
    whatever the number of threads; results are rounded to the dtype of their tensor (a bfloat16 centroid cannot
    follow steps below 1/256 of its value: keep centroids in float32 when the decay is near 1). No gradient flows, and
    nothing waits for a GPU.

    Args:
        centroids: [K, D] or [B, K, D], changed in place.
        cluster_size: float32 [K] or [B, K], moving average of the (weighted) counts, changed in place. It decays also
            where a cluster is empty; the centroid of an empty cluster stays as it is.
        x: rows, [N, D] or [B, N, D], dtypes as in `nearest_centroid`.
        index: int64 [N] or [B, N], values in -1 .. K - 1; rows with -1 are left out. On the CPU any other value raises
            RuntimeError before anything is changed; on a GPU, which would have to be waited for, it counts as -1.
        decay: weight of the old value, 0 to 1.
        weights: [N] or [B, N], weight of each row; None weighs all rows 1, a boolean one is a mask. A row of weight 0
            is left out, whatever it holds, and a cluster whose weights sum to 0 counts as empty.
        mode: `"mean"` moves a centroid toward the mean of its rows; `"codebook"` is the count-weighted average of
            VQ-VAE, whose running sum is `centroids * cluster_size`.
        running_sum: float32 (float64 with float64 centroids), shape of `centroids`, changed in place: for
            `"codebook"`, the moving average of the sums, kept apart as VQ-VAE code does.
        smoothing: Laplace smoothing of the sizes that `running_sum` is divided by; 0 for none.
        dead_below: also return which entries have a `cluster_size` below this.
        deterministic: False allows a GPU to add the rows of a centroid in any order, which can be faster.
        process_group: group whose processes hold different rows and equal centroids: their sums are added by one
            all_reduce, float64 [B, K, D + 1], so that all move alike.

    Returns:
        bool [K] or [B, K] of dead entries if `dead_below` is given, else None.

    Raises:
        TypeError: an argument is no tensor or has an unsupported dtype.
        ValueError: shapes, devices, numbers or `mode` that do not fit; elements of a tensor written in place that
            share memory (an expanded tensor).
    """
    _check_pair(x, centroids)
    _check_update(centroids, cluster_size, x, decay, weights, mode, running_sum, smoothing, dead_below)
    check_tensor("index", index, (torch.int64,))
    check_shape("index", index, x.shape[:-1])
    check_device("index", index, x.device, "x")
    sums = op.centroid_sums(
        _batched(x, 3), _batched(index, 2), _batched_weights(weights, x), centroids.shape[-2], bool(deterministic)
    )
    _move(sums, centroids, cluster_size, running_sum, decay, mode, smoothing, process_group)
    return None if dead_below is None else cluster_size < dead_below


def assign_and_update_(
    centroids: Tensor,
    cluster_size: Tensor,
    x: Tensor,
    decay: float,
    *,
    weights: Tensor | None = None,
    mode: Mode = "mean",
    running_sum: Tensor | None = None,
    smoothing: float = 0.0,
    dead_below: float | None = None,
    precision: Precision = "exact",
    deterministic: bool = True,
    process_group: ProcessGroup | None = None,
) -> tuple[Tensor, ...]:
    """`nearest_centroid` followed by `update_centroids_`.

    Arguments, formulas and errors are those of the two functions; no gradient flows.

    Returns:
        index, distance: as `nearest_centroid(x, centroids)` gives them for the centroids before the update; with
            `dead_below` also what `update_centroids_` returns.
    """
    _check_pair(x, centroids, precision)
    _check_update(centroids, cluster_size, x, decay, weights, mode, running_sum, smoothing, dead_below)
    index, distance, sums = op.assign_and_sum(
        _batched(x, 3), _batched(centroids, 3), _batched_weights(weights, x), precision, bool(deterministic)
    )
    _move(sums, centroids, cluster_size, running_sum, decay, mode, smoothing, process_group)
    if x.dim() == 2:
        index, distance = index.squeeze(0), distance.squeeze(0)
    return (index, distance) if dead_below is None else (index, distance, cluster_size < dead_below)
