"""The quantized twin of a network: preparing it, setting its ranges, training it against its teacher."""

from clusterq.qat.calibrate import calibrate, round_only
from clusterq.qat.distill import classification_loss, distillation_loss
from clusterq.qat.finetune import Finetuner, ImageSource, finetune, learning_rate, random_crop_and_flip
from clusterq.qat.prepare import (
    Row,
    freeze_batch_norm_statistics,
    is_prepared_with,
    prepare,
    prepared_with,
    report,
    unreached,
)

__all__ = [
    "Finetuner",
    "ImageSource",
    "Row",
    "calibrate",
    "classification_loss",
    "distillation_loss",
    "finetune",
    "freeze_batch_norm_statistics",
    "is_prepared_with",
    "learning_rate",
    "prepare",
    "prepared_with",
    "random_crop_and_flip",
    "report",
    "round_only",
    "unreached",
]
