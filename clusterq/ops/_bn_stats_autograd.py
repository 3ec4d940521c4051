"""Autograd of the BatchNorm statistics: every backward is one affine pass over x, `a * (x - center) + b`.

Where a second derivative may be asked for (`create_graph=True`, torch.func) the same formula runs as torch operations:
the center is the mean that the forward returned, so that its own dependence on x is part of the graph.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from clusterq.ops import _bn_stats_ops as op
from clusterq.ops import _bn_stats_reference as reference
from clusterq.ops._checks import ordered_sum
from clusterq.ops.merge_statistics import reciprocal


def spatial_size(x: Tensor) -> int:
    return math.prod(x.shape[2:])


def _scaled(grad: Tensor | None, factor: Any) -> Tensor | None:
    return None if grad is None else grad * factor


def _with_factors(
    grad_mean: Tensor | None, grad_var: Tensor | None, mean_factor: Any, var_factor: Any
) -> tuple[Tensor | None, Tensor | None, float, float]:
    """The last arguments of the backward ops."""
    if torch.compiler.is_compiling() or isinstance(mean_factor, torch.SymFloat):
        # Of a traced size: a number that an op takes would be burned into the graph, one that multiplies is not.
        return _scaled(grad_mean, mean_factor), _scaled(grad_var, var_factor), 1.0, 1.0
    return grad_mean, grad_var, mean_factor, var_factor


def _backward(name: str) -> Any:
    """The op of a backward, or its reference where the backward itself has to be differentiable; torch.compile refuses
    to differentiate twice by itself.
    """
    return getattr(reference if torch.is_grad_enabled() and not torch.compiler.is_compiling() else op, name)


class InstanceStatistics(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Any:
        return op.instance_statistics(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0], output[0])

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor | None, grad_var: Tensor | None) -> Any:
        if grad_mean is None and grad_var is None:
            return None
        x, mean = ctx.saved_tensors
        factor = reciprocal(spatial_size(x))
        return _backward("statistics_backward")(x, mean, *_with_factors(grad_mean, grad_var, factor, 2 * factor))


class InstanceStatisticsList(torch.autograd.Function):
    @staticmethod
    def forward(*xs: Tensor) -> Any:
        return op.instance_statistics_list(list(xs))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[0], *inputs)

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor | None, grad_var: Tensor | None) -> Any:
        mean, *xs = ctx.saved_tensors
        if grad_mean is None and grad_var is None:
            return (None,) * len(xs)
        # Layers that need no gradient are often the first ones, or all of a frozen part.
        wanted = list(ctx.needs_input_grad)
        if not all(wanted):
            ends = list(itertools.accumulate(x.shape[1] for x in xs))
            columns = [
                None
                if t is None
                else torch.cat([t[:, e - x.shape[1] : e] for x, e, w in zip(xs, ends, wanted, strict=True) if w], 1)
                for t in (mean, grad_mean, grad_var)
            ]
            xs, (mean, grad_mean, grad_var) = [x for x, w in zip(xs, wanted, strict=True) if w], columns
        found = iter(_backward("statistics_backward_list")(xs, mean, grad_mean, grad_var))
        return tuple(next(found) if needed else None for needed in wanted)


class BatchNormStatistics(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, correction: int, weights: Tensor | None) -> Any:
        return op.batch_norm_statistics(x, correction, weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, ctx.correction, weights = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, output[0], weights)

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor | None, grad_var: Tensor | None) -> Any:
        if grad_mean is None and grad_var is None:
            return None, None, None
        x, mean, weights = ctx.saved_tensors
        spatial = spatial_size(x)
        if weights is None:
            values = x.shape[0] * spatial
            by_mean, by_var = (None if t is None else t[None] for t in (grad_mean, grad_var))
            own = _with_factors(by_mean, by_var, reciprocal(values), 2 * reciprocal(values - ctx.correction))
            return _backward("statistics_backward")(x, mean[None], *own), None, None
        total = ordered_sum(weights.double(), [0]) * spatial
        free = total - ctx.correction
        mean_share = (weights / total).to(mean.dtype)[:, None]
        var_share = (2 * weights / torch.where(free > 0, free, math.nan)).to(mean.dtype)[:, None]
        # Images left out: their gradient is 0, whatever the statistics are.
        inside = weights[:, None] != 0
        grads = [
            None if t is None else torch.where(inside, t * share, 0)
            for t, share in ((grad_mean, mean_share), (grad_var, var_share))
        ]
        return _backward("statistics_backward")(x, mean[None], *grads, 1.0, 1.0), None, None


class ClassStatistics(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, labels: Tensor, num_classes: int, weights: Tensor | None) -> Any:
        return op.class_statistics(x, labels, num_classes, weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, labels, _, weights = inputs
        count, total, mean, _ = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(count, total)
        ctx.save_for_backward(x, labels, weights, count, total, mean)

    @staticmethod
    def backward(ctx: Any, _: Any, __: Any, grad_mean: Tensor | None, grad_var: Tensor | None) -> Any:
        if grad_mean is None and grad_var is None:
            return None, None, None, None
        x, labels, weights, count, total, mean = ctx.saved_tensors
        classes = mean.shape[0]
        index = labels.clamp(0, classes - 1)
        inside = (labels >= 0) & (labels < classes)
        # The share of an image in its class; 0 for one of no class, where x then does not enter.
        share = reciprocal(spatial_size(x)) / torch.where(count > 0, total, 1)[index]
        share = torch.where(inside, share if weights is None else share * weights, 0)[:, None]
        grads = [None if t is None else torch.where(share == 0, 0, t[index] * share) for t in (grad_mean, grad_var)]
        return _backward("statistics_backward")(x, mean[index], *grads, 1.0, 2.0), None, None, None


class BatchNormWithStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        eps: float,
        per_image: bool,
    ) -> Any:
        kernel = op.batch_norm_instance_statistics if per_image else op.batch_norm_batch_statistics
        return kernel(x, weight, bias, running_mean, running_var, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, _, running_mean, running_var, ctx.eps, ctx.per_image = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, running_mean, running_var, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_mean: Tensor | None, grad_var: Tensor | None) -> Any:
        x, weight, running_mean, running_var, mean = ctx.saved_tensors
        x_needed, weight_needed, bias_needed = ctx.needs_input_grad[:3]
        dx = dweight = dbias = None
        if x_needed and not (grad is None and grad_mean is None and grad_var is None):
            factor = reciprocal(spatial_size(x) if ctx.per_image else x.shape[0] * spatial_size(x))
            if not ctx.per_image:
                mean = mean[None]
                grad_mean, grad_var = (None if t is None else t[None] for t in (grad_mean, grad_var))
            own = (mean, *_with_factors(grad_mean, grad_var, factor, 2 * factor))
            if grad is None:
                dx = _backward("statistics_backward")(x, *own)
            else:
                backward = _backward("batch_norm_statistics_backward")
                dx = backward(grad, x, weight, running_var, ctx.eps, *own)
        if grad is not None and (weight_needed or bias_needed):
            backward = _backward("batch_norm_parameter_backward")
            dweight, dbias = backward(grad, x, running_mean, running_var, ctx.eps)
        return dx, dweight if weight_needed else None, dbias if bias_needed else None, None, None, None, None
