"""Schemas of the BatchNorm-statistics ops. What they compute: `bn_stats.py`; how, in PyTorch: `_bn_stats_reference.py`.

Statistics, parameters of BatchNorm and gradients of statistics have the statistics' dtype: float32, float64 for
float64 data. Gradients of statistics and centers are [N, C] or [1, C]; rows need not lie side by side, so that columns
of a wider matrix do without a copy.
"""

from __future__ import annotations

from clusterq.ops import _bn_stats_reference as reference
from clusterq.ops._bn_stats_reference import empty_output, empty_pair
from clusterq.ops._library import register_op

instance_statistics = register_op(
    "instance_statistics(Tensor x) -> (Tensor, Tensor)",
    reference=reference.instance_statistics,
    fake=lambda x: empty_pair(x, x.shape[0], x.shape[1]),
    triton="bn_stats:instance_statistics",
)
instance_statistics_list = register_op(
    "instance_statistics_list(Tensor[] xs) -> (Tensor, Tensor)",
    reference=reference.instance_statistics_list,
    fake=lambda xs: empty_pair(xs[0], xs[0].shape[0], sum(x.shape[1] for x in xs)),
    triton="bn_stats:instance_statistics_list",
)
batch_norm_statistics = register_op(
    "batch_norm_statistics(Tensor x, int correction, Tensor? weights) -> (Tensor, Tensor)",
    reference=reference.batch_norm_statistics,
    fake=lambda x, correction, weights: empty_pair(x, x.shape[1]),
    triton="bn_stats:batch_norm_statistics",
)
class_statistics = register_op(
    "class_statistics(Tensor x, Tensor labels, int num_classes, Tensor? weights) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.class_statistics,
    fake=lambda x, labels, num_classes, weights: (
        labels.new_empty(num_classes),
        empty_pair(x, num_classes)[0],
        *empty_pair(x, num_classes, x.shape[1]),
    ),
    triton="bn_stats:class_statistics",
)
batch_norm_instance_statistics = register_op(
    "batch_norm_instance_statistics(Tensor x, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, "
    "float eps) -> (Tensor, Tensor, Tensor)",
    reference=reference.batch_norm_instance_statistics,
    fake=lambda x, weight, bias, running_mean, running_var, eps: (
        empty_output(x),
        *empty_pair(x, x.shape[0], x.shape[1]),
    ),
    triton="bn_stats:batch_norm_instance_statistics",
)
batch_norm_batch_statistics = register_op(
    "batch_norm_batch_statistics(Tensor x, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, "
    "float eps) -> (Tensor, Tensor, Tensor)",
    reference=reference.batch_norm_batch_statistics,
    fake=lambda x, weight, bias, running_mean, running_var, eps: (empty_output(x), *empty_pair(x, x.shape[1])),
    triton="bn_stats:batch_norm_batch_statistics",
)
statistics_backward = register_op(
    "statistics_backward(Tensor x, Tensor center, Tensor? grad_mean, Tensor? grad_var, float mean_factor, "
    "float var_factor) -> Tensor",
    reference=reference.statistics_backward,
    fake=lambda x, center, grad_mean, grad_var, mean_factor, var_factor: empty_output(x),
    triton="bn_stats:statistics_backward",
)
statistics_backward_list = register_op(
    "statistics_backward_list(Tensor[] xs, Tensor center, Tensor? grad_mean, Tensor? grad_var) -> Tensor[]",
    reference=reference.statistics_backward_list,
    fake=lambda xs, center, grad_mean, grad_var: [empty_output(x) for x in xs],
    triton="bn_stats:statistics_backward_list",
)
batch_norm_statistics_backward = register_op(
    "batch_norm_statistics_backward(Tensor grad, Tensor x, Tensor? weight, Tensor running_var, float eps, "
    "Tensor center, Tensor? grad_mean, Tensor? grad_var, float mean_factor, float var_factor) -> Tensor",
    reference=reference.batch_norm_statistics_backward,
    fake=lambda grad, x, *_: empty_output(x),
    triton="bn_stats:batch_norm_statistics_backward",
)
batch_norm_parameter_backward = register_op(
    "batch_norm_parameter_backward(Tensor grad, Tensor x, Tensor running_mean, Tensor running_var, float eps) "
    "-> (Tensor, Tensor)",
    reference=reference.batch_norm_parameter_backward,
    fake=lambda grad, x, running_mean, running_var, eps: empty_pair(x, x.shape[1]),
    triton="bn_stats:batch_norm_parameter_backward",
)
