"""The alignment loss of data-free methods: statistics of all layers against what BatchNorm remembers and class targets.

With the statistics of layer l over the batch, mean_l and var_l [C_l], and the running ones mu_l and sigma_l^2:

    "sum"   sum_l w_l sum_c (mean - mu)^2 + (spread - target)^2                  ClusterQ (9)
    "mean"  (1 / L) sum_l w_l / C_l sum_c (mean - mu)^2 + (spread - target)^2    every layer counts alike
    "norm"  sum_l w_l (||mean_l - mu_l||_2 + ||spread_l - target_l||_2)          DeepInversion

spread is the standard deviation, sqrt(var + 1e-10), or the variance. Class terms compare, in the same way and always
squared, the statistics of the images of each class with targets of that class, ClusterQ (4) and (6).

ZeroQ's paper has the form of ClusterQ (9); its code compares single images. The statistics are merged from instance
means in float32: where the mean is 10^4 times the spread, the variance of a class is off by about 3e-5 of itself, of
the batch by less than 1e-5. `batch_norm_statistics` and `class_statistics` read x itself and keep the digits.

Everything that follows the instance statistics [N, C_l] of the layers, merges, losses, gradients and their sum, is one
kernel on matrices [N, D], D = sum of the C_l. The gradients are computed with the loss, so a backward is two products.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from clusterq.ops import _alignment_op as op
from clusterq.ops import _alignment_reference as reference
from clusterq.ops._autograd import apply, wants_gradient
from clusterq.ops._checks import check_device, check_integer, check_shape, check_tensor
from clusterq.ops.merge_statistics import (
    check_labels,
    check_vector,
    merge_class_statistics,
    merge_instance_statistics,
    reciprocal,
)

__all__ = ["Alignment", "AlignmentTargets", "ClassTargets", "alignment_loss"]

Reduction = Literal["sum", "mean", "norm"]
Spread = Literal["std", "var"]

# Keeps the derivative of the square root finite for a constant channel; 1e-5 as a standard deviation.
VARIANCE_FLOOR = 1e-10
_STATISTICS = (torch.float32, torch.float64)


class ReportedLayer(Protocol):
    """What `alignment_loss` reads of a layer; `clusterq.nn.LayerStatistics` has it."""

    @property
    def mean(self) -> Tensor: ...
    @property
    def var(self) -> Tensor: ...
    @property
    def spatial(self) -> int: ...
    @property
    def running_mean(self) -> Tensor: ...
    @property
    def running_var(self) -> Tensor: ...


class Alignment(NamedTuple):
    """One evaluation.

    Attributes:
        total: scalar to differentiate; its gradient reaches the instance statistics.
        batch: the unweighted batch term, detached.
        classes: [T] the unweighted class terms, detached.
        images: [S] int64 how many images every class has.
        class_mean, class_spread: [S, D'] statistics of every class in the columns of the class terms, detached; those
            of a class without images are 0 and the spread of variance 0.
    """

    total: Tensor
    batch: Tensor
    classes: Tensor
    images: Tensor
    class_mean: Tensor
    class_spread: Tensor


class ClassTargets(NamedTuple):
    """Class terms of an alignment loss.

    Attributes:
        labels: [N] int64 class of every image; outside [0, S) for none. Over a process group a number has to mean the
            same class in every process.
        mean, spread: [T, S, D'] targets of T terms, or [S, D'] of one; no gradient. D' columns from the first semantic
            layer on.
        weights: T weights of the terms in the total; on a GPU T is at most 4.
        mask: [N] bool, False: the image belongs to no class.
        known: [S] bool, False: the class has no target and enters no term; None: all have.
        average: a term is the mean over the classes that enter it, else their sum.
    """

    labels: Tensor
    mean: Tensor
    spread: Tensor
    weights: tuple[float, ...] = (1.0,)
    mask: Tensor | None = None
    known: Tensor | None = None
    average: bool = False


class _AlignmentLoss(torch.autograd.Function):
    @staticmethod
    def forward(mean: Tensor, var: Tensor, *arguments: Any) -> Any:
        return op.alignment_loss(mean, var, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        mean, var, *ctx.rest = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(mean, var, output[2], output[3])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        mean, var, by_mean, by_var = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # For a second derivative: the same gradients, as torch operations on mean and var.
            if ctx.rest[-1] is not None:
                raise NotImplementedError("an alignment loss over a process group has no second derivative")
            by_mean, by_var = reference.alignment_loss(mean, var, *ctx.rest)[2:4]
        return by_mean * grad, by_var * grad, *(None,) * len(ctx.rest)


@functools.lru_cache(maxsize=256)
def _columns(
    channels: tuple[int, ...],
    weights: tuple[float, ...],
    factors: tuple[float, ...],
    class_weights: tuple[float, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """`columns` and `starts` of the op from one number per layer."""
    # Made on the CPU, whatever the default device is.
    repeats = torch.tensor(channels, device="cpu")
    rows = torch.tensor([weights, factors, class_weights], dtype=torch.float64, device="cpu")
    starts = torch.cat([repeats.new_zeros(1), repeats.cumsum(0)])
    columns = rows.repeat_interleave(repeats, 1, output_size=sum(channels))
    return columns.to(device, dtype), starts.to(device)


def _layer_weights(
    channels: Sequence[int], reduction: Reduction, weights: Sequence[float] | None, name: str = "layer_weights"
) -> tuple[float, ...]:
    if reduction not in ("sum", "mean", "norm"):
        raise ValueError(f"reduction is {reduction!r}; wanted 'sum', 'mean' or 'norm'")
    given = [1.0] * len(channels) if weights is None else [float(w) for w in weights]
    if len(given) != len(channels):
        raise ValueError(f"{name} has {len(given)} numbers; wanted {len(channels)}, one per layer")
    if reduction == "mean":
        given = [w / (len(channels) * max(c, 1)) for w, c in zip(given, channels, strict=True)]
    return tuple(given)


class AlignmentTargets:
    """What the batch statistics of a network are compared with, and how; made once, called on every batch.

    Args:
        channels: C_l of every layer.
        running_mean, running_var: [D] what the layers remember, float32 or float64.
        reduction: `"sum"`, `"mean"` or `"norm"`, see the module.
        layer_weights: w_l of the batch term; None: 1.
        spread: compare `"std"` or `"var"`.
        weight: of the batch term in the total.
        first: index of the first layer with class terms; None: none has.
        class_reduction: `"sum"` or `"mean"` over the channels and layers of the class terms.

    Raises:
        TypeError, ValueError: an argument has another type, shape or value.
    """

    def __init__(
        self,
        channels: Sequence[int],
        running_mean: Tensor,
        running_var: Tensor,
        *,
        reduction: Reduction = "sum",
        layer_weights: Sequence[float] | None = None,
        spread: Spread = "std",
        weight: float = 1.0,
        first: int | None = None,
        class_reduction: Reduction = "sum",
    ) -> None:
        self.channels = tuple(channels)
        self.width = sum(self.channels)
        for name, tensor in (("running_mean", running_mean), ("running_var", running_var)):
            check_tensor(name, tensor, _STATISTICS)
            check_shape(name, tensor, (self.width,))
        if spread not in ("std", "var"):
            raise ValueError(f"spread is {spread!r}; wanted 'std' or 'var'")
        if class_reduction not in ("sum", "mean"):
            raise ValueError(f"class_reduction is {class_reduction!r}; wanted 'sum' or 'mean'")
        self.first = len(self.channels) if first is None else first
        check_integer("first", self.first, 0, len(self.channels))
        self.offset = sum(self.channels[: self.first])
        self.floor = VARIANCE_FLOOR if spread == "std" else None
        self.squared = reduction != "norm"
        self.weight = float(weight)
        check_device("running_var", running_var, running_mean.device, "running_mean")
        # Copies: what a layer does to its running statistics later changes nothing here.
        self.mean = running_mean.detach().clone()
        self.spread = running_var.detach().to(running_mean.dtype, copy=True)
        if spread == "std":
            self.spread = torch.sqrt(self.spread + VARIANCE_FLOOR)
        self._weights = _layer_weights(self.channels, reduction, layer_weights)
        semantic = self.channels[self.first :]
        self._class_weights = (0.0,) * self.first + _layer_weights(semantic, class_reduction, None)
        self._columns = self._columns_of((1.0,) * len(self.channels))

    def _columns_of(self, factors: tuple[float, ...]) -> tuple[Tensor, Tensor]:
        return _columns(self.channels, self._weights, factors, self._class_weights, self.mean.dtype, self.mean.device)

    def __call__(
        self,
        mean: Tensor,
        var: Tensor,
        classes: ClassTargets | None = None,
        *,
        var_factors: Sequence[float] | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> Alignment:
        """Compare instance statistics mean, var [N, D] with the targets; differentiable with respect to both.

        Args:
            mean, var: [N, D] of the layers side by side, the variances biased.
            classes: class terms, None for none.
            var_factors: per layer, on the biased variance of the batch (not of classes): M / (M - 1) compares unbiased
                variances; None: 1. Over a group M counts the values of all its processes.
            group: processes whose images form one batch; every one gets the loss of all images and the gradient of
                its own. The sum over the processes is the gradient of a parameter: what averages gradients, as
                DistributedDataParallel does, divides it by their number.

        Raises:
            TypeError, ValueError: an argument has another dtype, shape or device.
            NotImplementedError: in a second backward, with a group.
        """
        check_tensor("mean", mean, (self.mean.dtype,))
        check_tensor("var", var, (self.mean.dtype,))
        if mean.dim() != 2 or mean.shape[1] != self.width:
            raise ValueError(f"mean has shape {tuple(mean.shape)}; wanted [N, {self.width}]")
        if mean.shape[0] == 0 and group is None:
            raise ValueError("mean has no images; wanted at least one")
        check_shape("var", var, mean.shape)
        check_device("mean", mean, self.mean.device, "the targets")
        columns, starts = self._columns
        if var_factors is not None:
            if len(var_factors) != len(self.channels):
                raise ValueError(
                    f"var_factors has {len(var_factors)} numbers; wanted {len(self.channels)}, one per layer"
                )
            columns, starts = self._columns_of(tuple(float(f) for f in var_factors))
        labels = mask = known = goal_mean = goal_spread = None
        slots, class_weights, average = 0, [], False
        if classes is not None:
            labels, mask, known, average = classes.labels, classes.mask, classes.known, classes.average
            goal_mean, goal_spread = (t.detach() for t in (classes.mean, classes.spread))
            if goal_mean.dim() == 2:
                goal_mean, goal_spread = goal_mean[None], goal_spread[None]
            class_weights = [float(w) for w in classes.weights]
            slots = goal_mean.shape[1]
            check_labels(labels, slots, mask, mean.shape[0], mean.device)
            wanted = (len(class_weights), slots, self.width - self.offset)
            for name, goal in (("classes.mean", goal_mean), ("classes.spread", goal_spread)):
                check_tensor(name, goal, (mean.dtype,))
                check_shape(name, goal, wanted)
                check_device(name, goal, mean.device, "mean")
            if known is not None:
                check_vector("known", known, slots, mean.device, (torch.bool,))
        merged: Any = (None, None, None)
        if group is not None:
            merged = _merged_over(group, mean.detach(), var.detach(), labels, mask, slots)
        arguments = (
            self.mean, self.spread, columns, starts, self.weight, self.squared, self.floor, labels, mask, slots,
            self.offset, goal_mean, goal_spread, known, class_weights, average, *merged,
        )  # fmt: skip
        if wants_gradient(mean, var):
            outputs = apply(_AlignmentLoss, mean, var, *arguments)
        else:
            outputs = op.alignment_loss(mean, var, *arguments)
        total, terms, _, _, count, class_mean, class_spread = outputs
        return Alignment(total, terms[0], terms[1:], count, class_mean, class_spread)


def _merged_over(
    group: dist.ProcessGroup,
    mean: Tensor,
    var: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    slots: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of batch and classes over all processes, the same bits in each: one gather, merged in rank order.

    Chan's rule on (count, mean, M2): torch's SyncBatchNorm once exchanged 1 / std and lost digits.
    """
    if mean.shape[0] > 0:
        center, variance = (t[None] for t in merge_instance_statistics(mean.double(), var.double(), 1))
    else:
        center = variance = mean.new_zeros(1, mean.shape[1], dtype=torch.float64)
    count = center.new_full((1,), mean.shape[0])
    if labels is not None:
        own_count, *own_moments = merge_class_statistics(mean.double(), var.double(), labels, slots, mask)
        count = torch.cat([count, own_count.double()])
        center, variance = (torch.cat(pair) for pair in zip((center, variance), own_moments, strict=True))
    own = torch.cat([count[:, None], center, variance * count[:, None]], 1)
    every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, own, group)
    count, center, squares = every[0].tensor_split([1, 1 + mean.shape[1]], 1)
    for other in every[1:]:
        more, other_center, other_squares = other.tensor_split([1, 1 + mean.shape[1]], 1)
        total = count + more
        share = torch.where(total > 0, more / total, 0)
        offset = other_center - center
        center = center + offset * share
        squares = squares + other_squares + offset.square() * count * share
        count = total
    return count[:, 0].contiguous(), center.contiguous(), squares / count.clamp(min=1)


def alignment_loss(
    layers: Sequence[ReportedLayer],
    *,
    reduction: Reduction = "sum",
    layer_weights: Sequence[float] | None = None,
    spread: Spread = "std",
    correction: int = 0,
    classes: ClassTargets | None = None,
    first: int = 0,
    class_reduction: Reduction = "sum",
    group: dist.ProcessGroup | None = None,
) -> Alignment:
    """Distance of the statistics of all layers from what their BatchNorm remembers, and from class targets.

        recorder = replace_batch_norm(teacher.eval())
        with recorder.record() as layers:
            logits = teacher(images)
        loss = F.cross_entropy(logits, labels) + alignment_loss(layers, reduction="norm", spread="var").total

    Args:
        layers: what the layers saw, such as the list that `StatisticsRecorder.record()` yields; all with the images of
            one batch.
        reduction, layer_weights, spread: see the module.
        correction: 0 compares the biased variance of the batch; 1 the unbiased one, which the running variance follows.
            Class terms have the biased one.
        classes: class terms for the columns of `layers[first:]`.
        first, class_reduction: as for `AlignmentTargets`.
        group: as for `AlignmentTargets.__call__`; with `correction=0` only, as no process knows how many images the
            others have.

    Returns:
        `Alignment`, with `total` to differentiate. Data that do not change, such as the running statistics, can be
        prepared once with `AlignmentTargets`.

    Raises:
        TypeError, ValueError: no layers, or an argument of another type, shape or value.
    """
    if len(layers) == 0:
        raise ValueError("layers is empty; wanted the statistics of at least one layer")
    check_integer("correction", correction, 0)
    check_integer("first", first, 0, len(layers))
    if group is not None and correction != 0:
        raise ValueError("correction is not 0 with a group; give AlignmentTargets the var_factors of the whole batch")
    for i, layer in enumerate(layers):
        if layer.mean.shape[0] != layers[0].mean.shape[0]:
            raise ValueError(
                f"layers[{i}] has {layer.mean.shape[0]} images; wanted {layers[0].mean.shape[0]}, as layers[0] has"
            )
    mean = torch.cat([layer.mean for layer in layers], 1)
    var = torch.cat([layer.var for layer in layers], 1)
    targets = AlignmentTargets(
        [layer.mean.shape[1] for layer in layers],
        torch.cat([layer.running_mean.detach() for layer in layers]).to(mean.dtype),
        torch.cat([layer.running_var.detach() for layer in layers]).to(mean.dtype),
        reduction=reduction,
        layer_weights=layer_weights,
        spread=spread,
        first=first if classes is not None else None,
        class_reduction=class_reduction,
    )
    factors = None
    if correction != 0:
        values = [layer.mean.shape[0] * layer.spatial for layer in layers]
        factors = [m * reciprocal(m - correction) for m in values]
    return targets(mean, var, classes, var_factors=factors, group=group)
