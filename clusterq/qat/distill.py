"""Losses of the student: distillation from the teacher (13) and cross-entropy to the label (12) of ClusterQ."""

from __future__ import annotations

import typing

from torch import Tensor
from torch.nn import functional

from clusterq.config import DistillationReduction


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float,
    *,
    reduction: DistillationReduction = "batchmean",
) -> Tensor:
    """`T^2 * KL(softmax(teacher / T) || softmax(student / T))`, averaged over the batch.

    Equation (13) of ClusterQ (arXiv 2205.00179v1) with the temperature of Hinton et al. 2015 (arXiv 1503.02531, section
    2). Computed in float32 (float64 for float64 logits) from log-probabilities, so that far-apart logits stay finite.

    Args:
        student_logits, teacher_logits: [N, classes], any floating dtype; no gradient flows to the teacher.
        temperature: T > 0.
        reduction: `"batchmean"` sums over classes, which is the divergence; `"mean"` averages over classes too, as
            `torch.nn.KLDivLoss` does by default and GDFQ with it: the same divided by the number of classes.

    Returns a scalar. Raises ValueError for a temperature that is not positive, an unknown reduction, or shapes that
    differ.
    """
    if reduction not in typing.get_args(DistillationReduction):
        raise ValueError(f"reduction is {reduction!r}; wanted batchmean or mean")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; wanted a number above 0")
    if student_logits.shape != teacher_logits.shape or student_logits.dim() != 2:
        raise ValueError(
            f"student_logits has shape {tuple(student_logits.shape)} and teacher_logits {tuple(teacher_logits.shape)}; "
            "wanted the same [N, classes]"
        )
    student = functional.log_softmax(_wide(student_logits) / temperature, 1)
    teacher = functional.log_softmax(_wide(teacher_logits.detach()) / temperature, 1)
    divergence = functional.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2
    return divergence / student_logits.shape[1] if reduction == "mean" else divergence


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy (12) of logits [N, classes] to labels int64 [N], in float32 (float64 for float64 logits)."""
    return functional.cross_entropy(_wide(logits), labels)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.element_size() == 8 else logits.float()
