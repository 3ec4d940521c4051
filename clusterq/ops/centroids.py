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
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clusterq.ops._autograd import apply
from clusterq.ops._checks import (
    FLOATING,
    check_device,
    check_number,
    check_own_memory,
    check_shape,
    check_tensor,
    compute_dtype,
)
from clusterq.ops._library import register_op

__all__ = ["assign_and_update_", "nearest_centroid", "update_centroids_"]

_MODES = ("mean", "codebook")


def _check_pair(x: Tensor, centroids: Tensor) -> None:
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


def _check_update(
    centroids: Tensor, cluster_size: Tensor, x: Tensor, decay: float, weights: Tensor | None, mode: str
) -> None:
    _check_pair(x, centroids)
    check_tensor("cluster_size", cluster_size, (torch.float32,))
    check_shape("cluster_size", cluster_size, centroids.shape[:-1])
    check_device("cluster_size", cluster_size, x.device, "x")
    check_own_memory("centroids", centroids)
    check_own_memory("cluster_size", cluster_size)
    if weights is not None:
        check_tensor("weights", weights)
        if weights.dtype.is_complex:
            raise TypeError(f"weights has dtype {weights.dtype}; wanted a real one")
        check_shape("weights", weights, x.shape[:-1])
        check_device("weights", weights, x.device, "x")
    check_number("decay", decay, 0, 1)
    if mode not in _MODES:
        raise ValueError(f"mode is {mode!r}; wanted one of {', '.join(_MODES)}")


def _nearest_reference(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Direct search in float64, squares added in the order of d, a block of rows at a time."""
    batch, rows, dim = x.shape
    clusters = centroids.shape[1]
    points, means = x.double(), centroids.double()
    index = x.new_empty((batch, rows), dtype=torch.int64)
    distance = x.new_empty((batch, rows), dtype=compute_dtype(x.dtype))
    # float64 scores of one block: 2 MiB stay in a CPU cache, 128 MiB fill a GPU
    budget = 1 << (18 if x.device.type == "cpu" else 24)
    step = max(1, budget // max(1, batch * clusters))
    for start in range(0, rows, step):
        part = points[:, start : start + step]
        score = part.new_zeros((batch, part.shape[1], clusters))
        for d in range(dim):
            score += (part[:, :, None, d] - means[:, None, :, d]).square_()
        excluded = score.isnan()
        best, label = score.masked_fill(excluded, float("inf")).min(-1)
        # +inf may be a true distance as well as an excluded one: only a true one may win
        first = (~excluded).to(torch.int32).argmax(-1)
        label = torch.where(best.isinf(), first, label)
        nowhere = excluded.all(-1)
        index[:, start : start + step] = label.masked_fill(nowhere, -1)
        distance[:, start : start + step] = best.masked_fill(nowhere, float("nan"))
    return index, distance


def _segment_sums(rows: Tensor, index: Tensor, clusters: int) -> Tensor:
    """Sums of `rows [B, N, C]` by `index [B, N]` in row order, [B, K, C] float64; negative indices are left out."""
    batch, count, width = rows.shape
    if rows.device.type == "cpu" and index.numel() > 0:
        low, high = int(index.min()), int(index.max())
        if low < -1 or high >= clusters:
            raise RuntimeError(f"index has values {low} to {high}; wanted -1 to {clusters - 1}")
    offset = torch.arange(batch, device=rows.device)[:, None] * clusters
    slot = torch.where(index < 0, batch * clusters, index + offset).reshape(-1)
    sums = rows.new_zeros((batch * clusters + 1, width), dtype=torch.float64)
    values = rows.reshape(batch * count, width).double()
    if rows.device.type == "cpu":
        sums.index_add_(0, slot, values)
    else:
        # sorts by slot, where index_add_ would add by atomics in any order
        sums.index_put_((slot,), values, accumulate=True)
    return sums[:-1].view(batch, clusters, width)


def _nearest_backward_reference(grad: Tensor, x: Tensor, centroids: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    gather = index.clamp_min(0)[:, :, None].expand(x.shape)
    difference = x.double() - centroids.double().gather(1, gather)
    flow = (2 * grad.double()[:, :, None] * difference).masked_fill((index < 0)[:, :, None], 0)
    grad_centroids = -_segment_sums(flow, index, centroids.shape[1])
    return flow.to(x.dtype).contiguous(), grad_centroids.to(centroids.dtype)


def _update_reference(
    centroids: Tensor,
    cluster_size: Tensor,
    x: Tensor,
    index: Tensor,
    weights: Tensor | None,
    decay: float,
    update_mode: str,
) -> None:
    weight = torch.ones_like(index, dtype=torch.float64) if weights is None else weights.double()
    used = torch.where(weight == 0, -1, index)
    rows = torch.cat([x.double() * weight[:, :, None], weight[:, :, None]], dim=-1)
    sums = _segment_sums(rows, used, centroids.shape[1])
    total, count = sums[..., :-1], sums[..., -1]
    old, old_size = centroids.double(), cluster_size.double()
    size = decay * old_size + (1 - decay) * count
    if update_mode == "mean":
        moved = decay * old + (1 - decay) * (total / count[..., None])
    else:
        moved = (decay * old_size[..., None] * old + (1 - decay) * total) / size[..., None]
    # a codebook entry of size 0 stays 0 / 0 under decay 1
    used_now = (count != 0) & (size != 0) if update_mode == "codebook" else count != 0
    centroids.copy_(torch.where(used_now[..., None], moved, old))
    cluster_size.copy_(size)


def _assign_and_update_reference(
    centroids: Tensor, cluster_size: Tensor, x: Tensor, weights: Tensor | None, decay: float, update_mode: str
) -> tuple[Tensor, Tensor]:
    index, distance = _nearest_reference(x, centroids)
    _update_reference(centroids, cluster_size, x, index, weights, decay, update_mode)
    return index, distance


def _nearest_fake(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], x.shape[1])
    return x.new_empty(shape, dtype=torch.int64), x.new_empty(shape, dtype=compute_dtype(x.dtype))


def _nearest_backward_fake(grad: Tensor, x: Tensor, centroids: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), centroids.new_empty(centroids.shape)


def _update_fake(
    centroids: Tensor,
    cluster_size: Tensor,
    x: Tensor,
    index: Tensor,
    weights: Tensor | None,
    decay: float,
    update_mode: str,
) -> None:
    return None


def _assign_and_update_fake(
    centroids: Tensor, cluster_size: Tensor, x: Tensor, weights: Tensor | None, decay: float, update_mode: str
) -> tuple[Tensor, Tensor]:
    return _nearest_fake(x, centroids)


_nearest = register_op(
    "nearest_centroid(Tensor x, Tensor centroids) -> (Tensor, Tensor)",
    reference=_nearest_reference,
    fake=_nearest_fake,
)
_nearest_backward = register_op(
    "nearest_centroid_backward(Tensor grad, Tensor x, Tensor centroids, Tensor index) -> (Tensor, Tensor)",
    reference=_nearest_backward_reference,
    fake=_nearest_backward_fake,
)
# `update_mode`: torch passes op arguments by keyword next to a `mode` of its own
_update = register_op(
    "update_centroids_(Tensor(a!) centroids, Tensor(b!) cluster_size, Tensor x, Tensor index, Tensor? weights, "
    "float decay, str update_mode) -> ()",
    reference=_update_reference,
    fake=_update_fake,
)
_assign_and_update = register_op(
    "assign_and_update_(Tensor(a!) centroids, Tensor(b!) cluster_size, Tensor x, Tensor? weights, float decay, "
    "str update_mode) -> (Tensor, Tensor)",
    reference=_assign_and_update_reference,
    fake=_assign_and_update_fake,
)


class _NearestCentroid(torch.autograd.Function):
    """One op gives both gradients from the same read of x and the centroids, also where only one of them is needed."""

    @staticmethod
    def forward(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = _nearest(x, centroids)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[0])
        ctx.save_for_backward(*inputs, output[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_index: Tensor | None, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, centroids, index = ctx.saved_tensors
        result: tuple[Tensor, Tensor] = _nearest_backward(grad.contiguous(), x, centroids, index)
        return result


def nearest_centroid(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the nearest centroid of each row and the squared Euclidean distance to it.

    Args:
        x: rows, [N, D] or [B, N, D]; float32, bfloat16, float16 or float64, any strides, N >= 0.
        centroids: [K, D], or [B, K, D] with one set per batch entry; K, D >= 1. float64 together with a float64 x,
            otherwise any of the other three dtypes.

    Returns:
        index: int64 [N] or [B, N]. It equals the index found by a float64 search over the given values,
            `sum_d (x - c)^2` added in the order of d: a float32 search leaves open only rows whose two best scores lie
            closer than a rigorous bound on its rounding error, and those are decided in float64. The lowest index
            wins among equal distances. A NaN distance never wins, so neither does a centroid with a NaN; a row with a
            NaN (or with no centroid free of NaN) gets -1. Infinities follow the same rule.
        distance: squared distance, [N] or [B, N], re-evaluated as `sum (x - c)^2` in float64 and rounded to float32
            (float64 for float64 inputs); NaN where the index is -1. Differentiable once with respect to `x` and
            `centroids`; a row with index -1 passes no gradient.

    Raises:
        TypeError: an argument is no tensor or has an unsupported dtype, or float64 is mixed with another dtype.
        ValueError: shapes or devices that do not match.
    """
    _check_pair(x, centroids)
    batched = x.dim() == 3
    rows, means = (x, centroids) if batched else (x.unsqueeze(0), centroids.unsqueeze(0))
    if torch.is_grad_enabled() and (x.requires_grad or centroids.requires_grad):
        index, distance = apply(_NearestCentroid, rows, means)
    else:
        index, distance = _nearest(rows, means)
    return (index, distance) if batched else (index.squeeze(0), distance.squeeze(0))


def _batched(tensor: Tensor, dims: int) -> Tensor:
    tensor = tensor.detach()
    return tensor if tensor.dim() == dims else tensor.unsqueeze(0)


def _batched_weights(weights: Tensor | None, x: Tensor) -> Tensor | None:
    return None if weights is None else _batched(weights, 2).to(compute_dtype(x.dtype))


def update_centroids_(
    centroids: Tensor,
    cluster_size: Tensor,
    x: Tensor,
    index: Tensor,
    decay: float,
    *,
    weights: Tensor | None = None,
    mode: Literal["mean", "codebook"] = "mean",
) -> None:
    """Moves `centroids` and `cluster_size` in place by an exponential moving average over the rows assigned to each.

    Formulas: module docstring. Sums run in float64 in a fixed order of the rows, so a repetition gives the same bits
    whatever the number of threads; results are rounded to the dtype of their tensor (a bfloat16 centroid cannot
    follow steps below 1/256 of its value: keep centroids in float32 when the decay is near 1). No gradient flows.

    Args:
        centroids: [K, D] or [B, K, D], changed in place.
        cluster_size: float32 [K] or [B, K], moving average of the (weighted) counts, changed in place. It decays also
            where a cluster is empty; the centroid of an empty cluster stays as it is.
        x: rows, [N, D] or [B, N, D], dtypes as in `nearest_centroid`.
        index: int64 [N] or [B, N], values in -1 .. K - 1; rows with -1 are left out. On the CPU any other value raises
            RuntimeError before anything is changed.
        decay: weight of the old value, 0 to 1.
        weights: [N] or [B, N], weight of each row; None weighs all rows 1. A row of weight 0 is left out, whatever it
            holds, and a cluster whose weights sum to 0 counts as empty.
        mode: `"mean"` moves a centroid toward the mean of its rows; `"codebook"` is the count-weighted average of
            VQ-VAE, whose running sum is `centroids * cluster_size`.

    Raises:
        TypeError: an argument is no tensor or has an unsupported dtype.
        ValueError: shapes, devices, `decay` or `mode` that do not fit; elements of `centroids` or of `cluster_size`
            that share memory (an expanded tensor).
    """
    _check_update(centroids, cluster_size, x, decay, weights, mode)
    check_tensor("index", index, (torch.int64,))
    check_shape("index", index, x.shape[:-1])
    check_device("index", index, x.device, "x")
    _update(
        _batched(centroids, 3),
        _batched(cluster_size, 2),
        _batched(x, 3),
        _batched(index, 2),
        _batched_weights(weights, x),
        float(decay),
        mode,
    )


def assign_and_update_(
    centroids: Tensor,
    cluster_size: Tensor,
    x: Tensor,
    decay: float,
    *,
    weights: Tensor | None = None,
    mode: Literal["mean", "codebook"] = "mean",
) -> tuple[Tensor, Tensor]:
    """`nearest_centroid` followed by `update_centroids_` as one op.

    Arguments, formulas and errors are those of the two functions; no gradient flows.

    Returns:
        index, distance: as `nearest_centroid(x, centroids)` gives them for the centroids before the update.
    """
    _check_update(centroids, cluster_size, x, decay, weights, mode)
    index, distance = _assign_and_update(
        _batched(centroids, 3),
        _batched(cluster_size, 2),
        _batched(x, 3),
        _batched_weights(weights, x),
        float(decay),
        mode,
    )
    return (index, distance) if x.dim() == 3 else (index.squeeze(0), distance.squeeze(0))
