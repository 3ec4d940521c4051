"""Differentiable ops: fake-quantize, BatchNorm statistics, nearest centroid.

Every op runs on any device through its PyTorch reference; `backends()` shows where a faster kernel serves it.
"""

from clusterq.ops._library import Backend, backends, load_backends
from clusterq.ops.alignment import Alignment, AlignmentTargets, ClassTargets, alignment_loss
from clusterq.ops.bn_stats import (
    batch_norm_statistics,
    batch_norm_with_instance_statistics,
    batch_norm_with_statistics,
    class_statistics,
    instance_statistics,
    instance_statistics_list,
    merge_class_statistics,
    merge_instance_statistics,
)
from clusterq.ops.centroids import (
    assign_and_update_,
    nearest_centroid,
    two_nearest_centroids,
    undecided_rows,
    update_centroids_,
)
from clusterq.ops.fake_quant import (
    dequantize,
    fake_quantize,
    fake_quantize_weight,
    fake_quantize_weights,
    quantize,
)
from clusterq.ops.fake_quant_ranges import finite_range, mse_range, observe_fake_quantize, range_to_qparams
from clusterq.ops.kmeans import KMeansResult, kmeans
from clusterq.ops.packing import pack_codes, unpack_codes

load_backends()

__all__ = [
    "Alignment",
    "AlignmentTargets",
    "Backend",
    "ClassTargets",
    "KMeansResult",
    "alignment_loss",
    "assign_and_update_",
    "backends",
    "batch_norm_statistics",
    "batch_norm_with_instance_statistics",
    "batch_norm_with_statistics",
    "class_statistics",
    "dequantize",
    "fake_quantize",
    "fake_quantize_weight",
    "fake_quantize_weights",
    "finite_range",
    "instance_statistics",
    "instance_statistics_list",
    "kmeans",
    "merge_class_statistics",
    "merge_instance_statistics",
    "mse_range",
    "nearest_centroid",
    "observe_fake_quantize",
    "pack_codes",
    "quantize",
    "range_to_qparams",
    "two_nearest_centroids",
    "undecided_rows",
    "unpack_codes",
    "update_centroids_",
]
