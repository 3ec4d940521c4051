"""Modules on top of `clusterq.ops`: quantizers, quantized layers, BatchNorm that reports its statistics, codebooks.

`FakeQuantize`, `FusedMovingAvgObsFakeQuantize` and `LearnableFakeQuantize` stand in for torch.ao's modules of these
names; they are imported when they are first asked for.
"""

from typing import TYPE_CHECKING, Any

from clusterq.nn.codebook import EMACodebook, commitment_loss, straight_through
from clusterq.nn.layers import QuantizedConv2d, QuantizedLinear
from clusterq.nn.quantizers import ActivationQuantizer, WeightQuantizer, set_quantization
from clusterq.nn.same_padding import SamePadConv2d
from clusterq.nn.statistics import (
    LayerStatistics,
    StatisticsBatchNorm1d,
    StatisticsBatchNorm2d,
    StatisticsBatchNorm3d,
    StatisticsRecorder,
    replace_batch_norm,
)

if TYPE_CHECKING:
    from clusterq.nn.fake_quantize import FakeQuantize, FusedMovingAvgObsFakeQuantize, LearnableFakeQuantize

__all__ = [
    "ActivationQuantizer",
    "EMACodebook",
    "FakeQuantize",
    "FusedMovingAvgObsFakeQuantize",
    "LayerStatistics",
    "LearnableFakeQuantize",
    "QuantizedConv2d",
    "QuantizedLinear",
    "SamePadConv2d",
    "StatisticsBatchNorm1d",
    "StatisticsBatchNorm2d",
    "StatisticsBatchNorm3d",
    "StatisticsRecorder",
    "WeightQuantizer",
    "commitment_loss",
    "replace_batch_norm",
    "set_quantization",
    "straight_through",
]

# Need torch.ao.quantization, which torch announces to drop.
_DROP_INS = {"FakeQuantize", "FusedMovingAvgObsFakeQuantize", "LearnableFakeQuantize"}


def __getattr__(name: str) -> Any:
    if name in _DROP_INS:
        from clusterq.nn import fake_quantize

        return getattr(fake_quantize, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
