"""BatchNorm statistics on a GPU through Triton: every function takes the arguments of its op, in schema order.

Outputs shaped like x keep channels innermost and are contiguous otherwise. Launches go to the current stream; nothing
waits for the device. Reads of x, and launches: instance statistics 1, 1 (2 where an image and channel is divided);
batch and class statistics 1, 2; a backward 1, 1; the parameter backward 1, 2.
"""

import math

import torch
import triton

from . import _bn_stats_backward_jit as backward
from . import _bn_stats_jit as jit
from . import _bn_stats_merge_jit as merge
from . import _statistics_layout as layout
from . import _statistics_lists as lists
from ._layout import TILE, compute_dtype, in_memory_order, tile_shape, tile_size

__all__ = [
    "batch_norm_batch_statistics",
    "batch_norm_instance_statistics",
    "batch_norm_parameter_backward",
    "batch_norm_statistics",
    "batch_norm_statistics_backward",
    "class_statistics",
    "instance_statistics",
    "instance_statistics_list",
    "statistics_backward",
    "statistics_backward_list",
]

# Values of an image that are too few for a program of their own: a copy with planes shares programs among images.
_FEW = 256


def _pair(x, *shape):
    return tuple(torch.empty(shape, dtype=compute_dtype(x), device=x.device) for _ in range(2))


def _moments(x, per_image, norm=None, final=True):
    """Moments of every image and channel, or of parts of the batch; y too if norm = (weight, bias, mean, var, eps).

    final: in the dtype of statistics where an image and channel is one part; else always float64, for a merge.

    Returns x or its copy, y, the moments and what `_merge` needs to know of their rows: `None` if they are mean and
    variance [N, C], else (rows, parts of an image, fold, values of a part, values of an image) of float64 moments.
    """
    x, inner = layout.walked(x)
    y = x if norm is None else torch.empty_like(x)
    images, channels, values = *x.shape[:2], x.shape[2:].numel()
    if inner and per_image and norm is None and values > 1 and values * channels <= _FEW:
        x, inner = x.contiguous(), False
    weight, bias, mean, var, eps = norm or (None, None, None, None, 0.0)
    affine = -1 if norm is None else (weight is not None) + 2 * (bias is not None)
    own = [x if t is None else t.contiguous() for t in (weight, bias, mean, var)]
    if inner:
        each = per_image and values == 1
        segments, count = (images, values) if per_image and not each else (1, images * values)
        fold = layout.fold(count, channels, layout.vector(x))
        count //= fold
        programs, (col_groups, parts, tiles), constants = layout.rows(
            count, fold * channels, segments, per_image and fold == 1, each
        )
        length = tiles * constants["BLOCK_R"]
        final = each or (final and per_image and parts == fold == 1)
        rows = (segments * parts * fold, parts, fold, length, count)
    else:
        programs, sizes, constants = layout.planes(x)
        parts, tiles = sizes[3:5]
        length = tiles * constants["BLOCK_K"]
        final = final and per_image and parts == 1
        rows = (images * parts, parts, 1, length, values)
    if final:
        first, second = _pair(x, images, channels)
    else:
        first, second = torch.empty((2, rows[0], channels), dtype=torch.float64, device=x.device)
    with torch.cuda.device_of(x):
        if inner:
            jit.inner_kernel[(programs,)](
                y, first, second, x, *own, count, channels, col_groups, parts, tiles,
                *layout.inverses(count, parts, length), eps, NORM=affine, FINAL=final, EACH=each, FOLD=fold > 1,
                **constants, **layout.launch(constants["BLOCK_R"] * constants["BLOCK_K"]),
            )  # fmt: skip
        else:
            jit.planes_kernel[(programs,)](
                y, first, second, x, *own, *sizes, *layout.inverses(values, parts, length), eps, NORM=affine,
                FINAL=final, EXACT=values == constants["BLOCK_K"], **constants,
                **layout.launch(constants["BLOCK_G"] * constants["BLOCK_K"]),
            )  # fmt: skip
    return x, y, (first, second), None if final else rows


def _merge(x, moments, rows, mode, groups, correction=0, labels=None, weights=None):
    """Mean and variance [groups, C] from rows of moments; moments None: of x [N, C] itself."""
    mean, var = _pair(x, groups, x.shape[1])
    count = total = mean
    if labels is not None:
        count = torch.empty(groups, dtype=torch.int64, device=x.device)
        total = torch.empty(groups, dtype=mean.dtype, device=x.device)
    center, spread = (x, x) if moments is None else moments
    channels = x.shape[1]
    height = rows[0] // groups if mode == merge.INSTANCE else rows[0]
    block_c, tile = (2, 2048) if height > 1024 else (8 if height > 256 else 32, 1024)
    block_c = min(layout.power(channels), block_c)
    with torch.cuda.device_of(x):
        merge.merge_kernel[(groups * max(triton.cdiv(channels, block_c), 1),)](
            mean, var, count, total, center, spread, center if labels is None else labels.contiguous(),
            center if weights is None else weights.contiguous(), rows[0], channels, *rows[1:], correction,
            MODE=mode.value, PLAIN=moments is None, WEIGHTED=weights is not None,
            BLOCK_S=min(layout.power(height), tile // block_c), BLOCK_C=block_c, num_warps=tile // 256,
        )  # fmt: skip
    return count, total, mean, var


def _nan(x, *shape):
    return tuple(t.fill_(float("nan")) for t in _pair(x, *shape))


def instance_statistics(x):
    if x.numel() == 0:
        return _nan(x, *x.shape[:2])
    x, _, moments, rows = _moments(x, True)
    return moments if rows is None else _merge(x, moments, rows, merge.INSTANCE, x.shape[0])[2:]


def batch_norm_instance_statistics(x, weight, bias, running_mean, running_var, eps):
    if x.numel() == 0:
        return torch.empty_like(x.contiguous()), *_nan(x, *x.shape[:2])
    x, y, moments, rows = _moments(x, True, (weight, bias, running_mean, running_var, eps))
    return y, *(moments if rows is None else _merge(x, moments, rows, merge.INSTANCE, x.shape[0])[2:])


def batch_norm_batch_statistics(x, weight, bias, running_mean, running_var, eps):
    if x.numel() == 0:
        return torch.empty_like(x.contiguous()), *_nan(x, x.shape[1])
    x, y, moments, rows = _moments(x, False, (weight, bias, running_mean, running_var, eps))
    _, _, mean, var = _merge(x, moments, rows, merge.BATCH, 1)
    return y, mean[0], var[0]


def _groups(x, weights, correction=0, labels=None, groups=1):
    """Statistics of groups of whole images."""
    mode = merge.BATCH if labels is None else merge.CLASS
    x, _ = layout.walked(x)
    images, channels, values = *x.shape[:2], x.shape[2:].numel()
    if values == 0:
        nan = torch.full((images, channels), math.nan, dtype=torch.float64, device=x.device)
        return _merge(x, (nan, nan), (images, 1, 1, 1, 0), mode, groups, correction, labels, weights)
    if values == 1 or x.numel() == 0:
        x = x.reshape(images, channels, -1)[:, :, 0] if x.numel() else x
        return _merge(x, None, (x.shape[0], 1, 1, 1, 1), mode, groups, correction, labels, weights)
    x, _, moments, rows = _moments(x, True, final=False)
    return _merge(x, moments, rows, mode, groups, correction, labels, weights)


def batch_norm_statistics(x, correction, weights):
    if x.numel() == 0:
        return _nan(x, x.shape[1])
    if weights is not None:
        _, _, mean, var = _groups(x, weights, correction)
    else:
        x, _, moments, rows = _moments(x, False)
        _, _, mean, var = _merge(x, moments, rows, merge.BATCH, 1, correction)
    return mean[0], var[0]


def class_statistics(x, labels, num_classes, weights):
    return _groups(x, weights, 0, labels, num_classes)


def _backward(x, center, grad_mean, grad_var, mean_factor, var_factor, norm=None):
    """dx; norm: (grad, weight, running_var, eps) of a BatchNorm behind the statistics."""
    x, inner = layout.walked(x)
    dx = torch.empty_like(x)
    grad, weight, var, eps = norm or (x, None, x, 0.0)
    grad = in_memory_order(grad, x.shape, x.stride())
    if x.numel() == 0:
        return dx
    images, channels, values = *x.shape[:2], x.shape[2:].numel()
    terms = (grad_mean is not None) + 2 * (grad_var is not None)
    own, steps = zip(
        *(
            layout.unit_rows(t) if t is not None and t.numel() else (x, 0)
            for t in (center if terms >= 2 else None, grad_mean, grad_var)
        ),
        strict=True,
    )
    tensors = (dx, x, grad, *own, x if weight is None else weight.contiguous(), var.contiguous() if norm else x)
    factors = (*steps, mean_factor, var_factor, eps)
    constants = {"TERMS": terms, "NORM": -1 if norm is None else int(weight is not None), "num_warps": 4}
    size = tile_size(x) if norm is None else TILE
    with torch.cuda.device_of(x):
        if inner:
            per_image = any(steps)
            fold = layout.fold(values if per_image else images * values, channels, layout.vector(x))
            of_image = values // fold if per_image else images * values // fold
            # With few rows of an image a tile holds several, and a coefficient per element.
            each = per_image and of_image < 16
            segments, count = (images, of_image) if per_image and not each else (1, images * values // fold)
            cols = fold * channels
            block_r, block_k = tile_shape(count, min(cols, 64), size)
            width, col_groups = layout.group(cols)
            grid = segments * triton.cdiv(count, block_r) * triton.cdiv(cols, block_k)
            backward.inner_backward_kernel[(grid,)](
                *tensors, count, channels, col_groups, of_image, *factors,
                EACH=each, FOLD=fold > 1, GROUP=width, BLOCK_R=block_r, BLOCK_K=block_k, **constants,
            )  # fmt: skip
        elif values % layout.vector(x):
            few, rows = values >= size, layout.power(size // values + 2)
            backward.flat_backward_kernel[(triton.cdiv(x.numel(), size),)](
                *tensors, images * channels, channels, values, layout.magic(values), *factors,
                MANY=channels >= rows, FEW=few, ROWS=2 if few else rows, BLOCK=size, **constants,
            )  # fmt: skip
        else:
            block_r, block_k = tile_shape(images * channels, values, size)
            width, col_groups = layout.group(values)
            grid = triton.cdiv(images * channels, block_r) * triton.cdiv(values, block_k)
            backward.planes_backward_kernel[(grid,)](
                *tensors, images * channels, channels, col_groups, *factors,
                MANY=channels >= block_r, GROUP=width, BLOCK_R=block_r, BLOCK_K=block_k, **constants,
            )  # fmt: skip
    return dx


def statistics_backward(x, center, grad_mean, grad_var, mean_factor, var_factor):
    return _backward(x, center, grad_mean, grad_var, mean_factor, var_factor)


def batch_norm_statistics_backward(
    grad, x, weight, running_var, eps, center, grad_mean, grad_var, mean_factor, var_factor
):
    return _backward(x, center, grad_mean, grad_var, mean_factor, var_factor, (grad, weight, running_var, eps))


def batch_norm_parameter_backward(grad, x, running_mean, running_var, eps):
    x, inner = layout.walked(x)
    grad = in_memory_order(grad, x.shape, x.stride())
    channels, values = x.shape[1], x.shape[2:].numel()
    dweight, dbias = _pair(x, channels)
    if x.numel() == 0:
        return dweight.zero_(), dbias.zero_()
    mean = running_mean.contiguous()
    with torch.cuda.device_of(x):
        if inner:
            count = x.shape[0] * values
            fold = layout.fold(count, channels, layout.vector(x))
            programs, (col_groups, parts, tiles), constants = layout.rows(count // fold, fold * channels, 1, False)
            del constants["SINGLE"]
            rows = parts * fold
            partial = torch.empty(2 * rows * channels, dtype=torch.float64, device=x.device)
            backward.inner_parameter_kernel[(programs,)](
                partial, x, grad, mean, count // fold, channels, col_groups, parts, tiles, FOLD=fold > 1,
                **constants, **layout.launch(constants["BLOCK_R"] * constants["BLOCK_K"]),
            )  # fmt: skip
        else:
            programs, sizes, constants = layout.planes(x)
            del constants["FEW"]
            rows = x.shape[0] * sizes[3]
            partial = torch.empty(2 * rows * channels, dtype=torch.float64, device=x.device)
            backward.planes_parameter_kernel[(programs,)](
                partial, x, grad, mean, *sizes[:5], EXACT=values == constants["BLOCK_K"],
                **constants, **layout.launch(constants["BLOCK_G"] * constants["BLOCK_K"]),
            )  # fmt: skip
        block_c = min(layout.power(channels), 8)
        backward.parameter_sum_kernel[(triton.cdiv(channels, block_c),)](
            dweight, dbias, partial, running_var.contiguous(), rows, channels, eps,
            BLOCK_S=min(layout.power(rows), 1024 // block_c), BLOCK_C=block_c, num_warps=4,
        )  # fmt: skip
    return dweight, dbias


def instance_statistics_list(xs):
    """One launch for all but large and misaligned tensors; while a graph is captured, one per tensor."""
    ways = [layout.walked(x) for x in xs]
    starts, columns = lists.first_columns(xs)
    mean, var = _pair(xs[0], xs[0].shape[0], columns)
    table, alone = lists.sort(ways, starts, lists.statistics_kind)
    lists.launch_statistics(mean, var, table, xs[0])
    for i in lists.not_loaded("statistics", ways, alone):
        instance_statistics(xs[i])
    for i in alone:
        own = slice(starts[i], starts[i] + xs[i].shape[1])
        for out, values in zip((mean, var), instance_statistics(xs[i]), strict=True):
            out[:, own] = values
    return mean, var


def statistics_backward_list(xs, center, grad_mean, grad_var):
    """As `instance_statistics_list`."""
    ways = [layout.walked(x) for x in xs]
    starts, _ = lists.first_columns(xs)
    results = [torch.empty_like(x) for x, _ in ways]
    table, alone = lists.sort(ways, starts, lists.backward_kind, results)
    lists.launch_backward(table, xs[0], center, grad_mean, grad_var)

    def single(i):
        own = slice(starts[i], starts[i] + xs[i].shape[1])
        rows = (None if t is None else t[:, own] for t in (center, grad_mean, grad_var))
        values = xs[i].shape[2:].numel()
        factor = 1.0 / values if values else math.nan
        return _backward(xs[i], *rows, factor, 2.0 * factor)

    for i in alone:
        results[i] = single(i)
    given = "backward", center.shape[0], *(None if t is None else t.shape[0] for t in (grad_mean, grad_var))
    for i in lists.not_loaded(given, ways, alone):
        single(i)
    return results
