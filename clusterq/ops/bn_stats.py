"""Statistics of a BatchNorm input: per channel, per image and channel, per class, and fused with eval-mode BatchNorm.

With x [N, C, *spatial], S values per image and channel and M = N * S values per channel:

    instance   mean[n, c] = sum_s x / S        var[n, c] = sum_s (x - mean[n, c])^2 / S
    batch      mean[c]    = sum_ns x / M       var[c]    = sum_ns (x - mean[c])^2 / (M - correction)
    class k    the biased batch statistics over the images labelled k

With a weight w_n per image, every sum over n gains the factor w_n and M becomes S * sum_n w_n: a weight of 2 counts an
image twice, a weight of 0 leaves it out.

Groups merge by Chan's rule, M2 = sum_n M2_n + sum_n S * (mean_n - mean)^2; E[x^2] - E[x]^2 appears nowhere, because it
loses every digit once the mean is large against the spread. With incoming gradients gm and gv every backward is one
affine pass,

    dx = a * (x - center) + b,   a = 2 * gv / (M - correction),   b = gm / M,   center = mean,

whose coefficients are per channel for batch statistics and per image and channel for the other two. They stay in the
statistics' dtype and the result is rounded once, so half-precision inputs do not lose gradients of size 1/M.

NaN and infinity in x make non-finite the statistics that they enter and no other: one channel, of one image or one
class. An image that is masked or has weight 0 enters nothing, and its gradient is 0 whatever it holds.

Statistics are float32, float64 for float64 input. Outputs shaped like x keep x's layout when its channels are innermost
and dense (channels_last, channels_last_3d) and are contiguous otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from clusterq.ops import _bn_stats_autograd as autograd
from clusterq.ops import _bn_stats_ops as op
from clusterq.ops._autograd import apply, wants_gradient
from clusterq.ops._checks import (
    FLOATING,
    check_device,
    check_integer,
    check_number,
    check_tensor,
    compute_dtype,
)
from clusterq.ops.merge_statistics import (
    check_labels,
    check_vector,
    image_weights,
    merge_class_statistics,
    merge_instance_statistics,
)

__all__ = [
    "batch_norm_statistics",
    "batch_norm_with_instance_statistics",
    "batch_norm_with_statistics",
    "class_statistics",
    "instance_statistics",
    "instance_statistics_list",
    "merge_class_statistics",
    "merge_instance_statistics",
]


def _check_input(x: Tensor, name: str = "x") -> None:
    check_tensor(name, x, FLOATING)
    if not 2 <= x.dim() <= 5:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; wanted [N, C], [N, C, L], [N, C, H, W] or [N, C, D, H, W]"
        )


def instance_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every image and channel, in one read of x.

    Args:
        x: [N, C], [N, C, L], [N, C, H, W] or [N, C, D, H, W]; float32, bfloat16, float16 or float64, any layout.

    Returns:
        mean [N, C] and var [N, C], float32 (float64 for float64 x). var is 0 for [N, C] input; both are NaN where the
        spatial extent is 0. NaN or infinity in x makes its own image and channel non-finite and no other.

    Raises:
        TypeError, ValueError: x is no tensor of these dtypes and ranks.
    """
    _check_input(x)
    mean, var = apply(autograd.InstanceStatistics, x) if wants_gradient(x) else op.instance_statistics(x)
    return mean, var


def instance_statistics_list(xs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """`instance_statistics` of the inputs of several layers, in one launch on a GPU.

    Args:
        xs: L tensors [N, C_l, *spatial_l] with one N, dtype and device.

    Returns:
        mean [N, D] and var [N, D], D = sum of the C_l: the layers' columns side by side, in their order.

    Raises:
        TypeError, ValueError: no tensor at all, or one of another kind than the first.
    """
    if isinstance(xs, Tensor) or len(xs) == 0:
        raise ValueError("xs is empty or a single Tensor; wanted a sequence of at least one [N, C, *spatial]")
    for i, x in enumerate(xs):
        _check_input(x, f"xs[{i}]")
        if x.dtype != xs[0].dtype or x.shape[0] != xs[0].shape[0]:
            raise ValueError(
                f"xs[{i}] is {x.dtype} {tuple(x.shape)}; wanted {xs[0].dtype} and {xs[0].shape[0]} images, as xs[0]"
            )
        check_device(f"xs[{i}]", x, xs[0].device, "xs[0]")
    if wants_gradient(*xs):
        mean, var = apply(autograd.InstanceStatisticsList, *xs)
    else:
        mean, var = op.instance_statistics_list(list(xs))
    return mean, var


def batch_norm_statistics(
    x: Tensor, *, correction: int = 0, mask: Tensor | None = None, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and variance of every channel over images and positions, in one read of x.

    Args:
        x: [N, C, *spatial] as for `instance_statistics`.
        correction: 0 for the biased variance that BatchNorm normalises with, 1 for the unbiased one that its running
            variance follows. Compare like with like: at 49 values per channel the two differ by 2 %.
        mask: [N] bool, False leaves an image out.
        weights: [N] floating point, how often an image counts; 0 or more and finite, not checked. No gradient.

    Returns:
        mean [C] and var [C], float32 (float64 for float64 x). With M = prod(spatial) * (N, or the sum of the weights)
        values per channel, mean is NaN for M = 0 and var, with its gradient, is NaN for M <= correction.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape or device; correction is negative.
    """
    _check_input(x)
    check_integer("correction", correction, 0)
    share = image_weights(mask, weights, x)
    if wants_gradient(x):
        mean, var = apply(autograd.BatchNormStatistics, x, correction, share)
    else:
        mean, var = op.batch_norm_statistics(x, correction, share)
    return mean, var


def class_statistics(
    x: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance of every class and channel, in one read of x (ClusterQ eq. 4 and 5 use them).

    Args:
        x: [N, C, *spatial] as for `instance_statistics`.
        labels: [N] int64, any order. An image whose label is outside [0, num_classes) belongs to no class.
        num_classes: K.
        mask: [N] bool, False leaves an image out (for instance one that the network misclassifies).
        weights: [N] as for `batch_norm_statistics`.

    Returns:
        count [K] int64, the images of each class with a weight above 0; mean [K, C] and var [K, C], float32 (float64
        for float64 x), 0 for a class without images.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape or device; num_classes < 1.
    """
    _check_input(x)
    check_labels(labels, num_classes, mask, x.shape[0], x.device)
    share = image_weights(mask, weights, x)
    if wants_gradient(x):
        count, _, mean, var = apply(autograd.ClassStatistics, x, labels, num_classes, share)
    else:
        count, _, mean, var = op.class_statistics(x, labels, num_classes, share)
    return count, mean, var


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    per_image: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_input(x)
    vectors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    for name, vector in vectors.items():
        if vector is not None:
            check_vector(name, vector, x.shape[1], x.device, FLOATING)
        elif name.startswith("running"):
            raise TypeError(f"{name} is None; BatchNorm in eval mode wants its running statistics")
    check_number("eps", eps, 0)
    dtype = compute_dtype(x.dtype)
    own = [None if t is None else t.to(dtype) for t in (weight, bias)]
    center, spread = running_mean.detach().to(dtype), running_var.detach().to(dtype)
    if wants_gradient(*(t for t in (x, *own) if t is not None)):
        y, mean, var = apply(autograd.BatchNormWithStatistics, x, *own, center, spread, float(eps), per_image)
    else:
        kernel = op.batch_norm_instance_statistics if per_image else op.batch_norm_batch_statistics
        y, mean, var = kernel(x, *own, center, spread, float(eps))
    return y, mean, var


def batch_norm_with_instance_statistics(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """BatchNorm in eval mode and the instance statistics of its input: one read, one write.

    Batch and class statistics follow through `merge_instance_statistics` and `merge_class_statistics`. The backward
    adds the gradients of y and of the statistics in one pass. A result that nothing depends on costs nothing, and
    weight and bias are reduced only where they require gradients.

    Args:
        x: [N, C, *spatial] as for `instance_statistics`.
        weight, bias: [C] or None for 1 and 0.
        running_mean, running_var: [C], constants: no gradient flows into them.
        eps: added to running_var, 0 or more.

    Returns:
        y like x, `(x - running_mean) / sqrt(running_var + eps) * weight + bias` rounded once from float32; mean [N, C]
        and biased var [N, C] of x, float32 (float64 for float64 x).

    Raises:
        TypeError, ValueError: an argument has another dtype, shape or device.
    """
    return _batch_norm(x, weight, bias, running_mean, running_var, eps, per_image=True)


def batch_norm_with_statistics(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """BatchNorm in eval mode and the biased batch statistics of its input: one read, one write.

    Arguments, y and errors as for `batch_norm_with_instance_statistics`; mean [C] and var [C] as for
    `batch_norm_statistics(x)`.
    """
    return _batch_norm(x, weight, bias, running_mean, running_var, eps, per_image=False)
