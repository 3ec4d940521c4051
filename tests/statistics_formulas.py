"""Float64 definitions of the BatchNorm statistics and of their gradients, for `statistics_kernel_cases.py`."""

from __future__ import annotations

import os
import sys

import torch

sys.path.insert(0, os.path.dirname(__file__))
from kernel_cases import NAN, laid_out, wide


def arranged(values, layout):
    """`inner`: channels_last, channels_last_3d or the like of [N, C, L]; `reversed`: dense, other strides."""
    if layout == "inner":
        return values.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "reversed":
        order = tuple(reversed(range(values.dim())))
        return values.permute(order).contiguous().permute(order)
    return laid_out(values, layout)


def make(shape, layout, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return arranged((torch.randn(shape, dtype=torch.float64, generator=generator) * 2 + 3).to(dtype), layout)


def close_to(got, want, bound, stored=None):
    """|got - want| <= bound, plus the rounding to `stored` (the dtype of got); NaN where and only where want is."""
    stored = stored or got.dtype
    want, got = want.double(), got.double()
    assert got.shape == want.shape
    finite = want.isfinite()
    assert torch.equal(got.isfinite(), finite), (got[got.isfinite() != finite], want[got.isfinite() != finite])
    allowed = bound + 0.501 * torch.finfo(stored).eps * want.abs() + torch.finfo(stored).smallest_normal * 1e-3
    off = ((got - want).abs() > allowed) & finite
    assert not off.any(), (got[off][:5], want[off][:5], allowed.expand_as(want)[off][:5])


def same_layout(out, x):
    """Channels stay innermost where they are, else the output is contiguous."""
    inner = x.dim() > 2 and x.movedim(1, -1).is_contiguous() and not x.is_contiguous()
    assert out.dtype == x.dtype and out.shape == x.shape
    assert (out.movedim(1, -1) if inner else out).is_contiguous()


def moments(x, weights=None, correction=0):
    """Mean and variance [C] over images and positions, image n counted weights[n] times: the definition."""
    values = x.double().flatten(2) if x.dim() > 2 else x.double()[:, :, None]
    share = torch.ones(len(x), dtype=torch.float64) if weights is None else weights.double()
    chosen = share != 0
    values, share = values[chosen], share[chosen][:, None, None]
    count = share.sum() * values.shape[2]
    if count <= 0:
        return torch.full((2, x.shape[1]), NAN, dtype=torch.float64)
    mean = (share * values).sum((0, 2)) / count
    squares = (share * (values - mean[:, None]).square()).sum((0, 2))
    return mean, squares / (count - correction) if count > correction else torch.full_like(mean, NAN)


def instance_moments(x):
    values = x.double().flatten(2) if x.dim() > 2 else x.double()[:, :, None]
    mean = values.mean(2)
    return mean, (values - mean[:, :, None]).square().mean(2)


def class_moments(x, labels, classes, weights=None):
    share = torch.ones(len(x), dtype=torch.float64) if weights is None else weights.double()
    count, total = torch.zeros(classes, dtype=torch.int64), torch.zeros(classes, dtype=torch.float64)
    mean, var = torch.zeros(2, classes, x.shape[1], dtype=torch.float64)
    for k in range(classes):
        inside = (labels == k) & (share != 0)
        count[k], total[k] = inside.sum(), share[inside].sum()
        if inside.any():
            mean[k], var[k] = moments(x[inside], share[inside])
    return count, total, mean, var


def assert_statistics(got, wanted, dtype):
    """Mean within 1e-5 spreads and its own rounding, variance within 1e-5 of itself; float64: 1e-12."""
    (mean, var), (true_mean, true_var) = got, wanted
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert mean.dtype == var.dtype == wide(dtype)
    rounding = 2 * torch.finfo(wide(dtype)).eps * true_mean.abs()
    close_to(mean, true_mean, tolerance * true_var.abs().sqrt().nan_to_num(0.0) + rounding)
    close_to(var, true_var, tolerance * true_var.abs().nan_to_num(0.0))


def random_labels(images, classes):
    """-1 and `classes` are outside; the last class stays empty."""
    labels = torch.randint(-1, classes - 1, (images,))
    return torch.where(torch.rand(images) < 0.1, classes, labels)


def hard_data():
    noise = torch.randn(10, 3, 28, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    outlier = noise.clone()
    outlier[0, :, 0, 0] = 1e6
    return {
        **{f"offset {offset:g}": noise + offset for offset in (1e3, 1e4, 1e5)},
        "outlier first": outlier,
        "offset per image": noise + 1e4 * torch.arange(10)[:, None, None, None],
        "squares overflow float32": noise * 1e18 + 1e20,
        "large": noise * 1e17,
        "nearly constant": noise * 1e-20,
        "constant": torch.full_like(noise, 1234.567),
    }


def parameters_of(channels, dtype):
    weight, bias, mean = torch.randn(3, channels, dtype=wide(dtype)).unbind()
    return weight, bias, mean, torch.rand(channels, dtype=wide(dtype)) + 0.1, 1e-5


def per_position(rows, x):
    """[N, C] or [1, C] against [N, C, *spatial], float64."""
    return rows.double().reshape(*rows.shape, *(1,) * (x.dim() - 2))


def row_sets(n, c, dtype):
    """center, grad_mean and grad_var: per image, per channel, mixed; dense, columns of a wider matrix, transposed."""
    kind, room = wide(dtype), torch.randn(3, n, 2 * c + 5, dtype=wide(dtype))
    one = torch.randn(3, 1, c, dtype=kind)
    sets = {
        "images": torch.randn(3, n, c, dtype=kind).unbind(),
        "channels": one.unbind(),
        "columns": room[:, :, c : 2 * c].unbind(),
        "mixed": (one[0], room[1, :, 1 : c + 1], one[2]),
        "expanded": (room[0, :, :c], one[1].expand(n, c), torch.randn(c, n, dtype=kind).t()),
    }
    return {name: tuple(rows) for name, rows in sets.items()}


def own_gradient(x, center, grad_mean, grad_var, mean_factor, var_factor):
    """dx and the size of its terms, float64."""
    dx = size = torch.zeros(x.shape, dtype=torch.float64)
    if grad_var is not None:
        a = per_position(grad_var, x) * var_factor
        dx = torch.where(a == 0, 0.0, a * (x.double() - per_position(center, x)))
        size = dx.abs()
    if grad_mean is not None:
        b = per_position(grad_mean, x) * mean_factor
        dx, size = dx + b, size + b.abs()
    return dx, size
