"""Modules on top of `clusterq.ops`: quantizers, quantized layers, BatchNorm that reports its statistics."""

from clusterq.nn.layers import QuantizedConv2d, QuantizedLinear
from clusterq.nn.quantizers import ActivationQuantizer, WeightQuantizer, set_quantization
from clusterq.nn.statistics import (
    LayerStatistics,
    StatisticsBatchNorm1d,
    StatisticsBatchNorm2d,
    StatisticsBatchNorm3d,
    StatisticsRecorder,
    replace_batch_norm,
)

__all__ = [
    "ActivationQuantizer",
    "LayerStatistics",
    "QuantizedConv2d",
    "QuantizedLinear",
    "StatisticsBatchNorm1d",
    "StatisticsBatchNorm2d",
    "StatisticsBatchNorm3d",
    "StatisticsRecorder",
    "WeightQuantizer",
    "replace_batch_norm",
    "set_quantization",
]
