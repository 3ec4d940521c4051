"""Losses of the student."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from clusterq.qat.distill import classification_loss, distillation_loss


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_distillation_is_the_scaled_divergence_per_sample(temperature: float) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 9) * 4, torch.randn(6, 9) * 4
    p = functional.softmax(teacher.double() / temperature, 1)
    q = functional.softmax(student.double() / temperature, 1)
    expected = temperature**2 * (p * (p.log() - q.log())).sum(1).mean()
    assert distillation_loss(student, teacher, temperature).item() == pytest.approx(expected.item(), rel=1e-4)
    # torch.nn.KLDivLoss by default: over batch and classes.
    weak = distillation_loss(student, teacher, temperature, reduction="mean")
    assert weak.item() == pytest.approx(expected.item() / 9, rel=1e-4)


def test_distillation_gradient_reaches_the_student_only() -> None:
    torch.manual_seed(1)
    student = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    distillation_loss(student, teacher, 3.0).backward()
    p, q = (functional.softmax(v.detach() / 3.0, 1) for v in (teacher, student))
    torch.testing.assert_close(student.grad, 3.0 * (q - p) / 5)
    assert teacher.grad is None


def test_equal_logits_cost_nothing_and_far_ones_stay_finite() -> None:
    x = torch.randn(4, 10)
    assert abs(distillation_loss(x, x.clone(), 20.0).item()) < 1e-4
    far = torch.tensor([[1e4, -1e4]])
    assert distillation_loss(-far, far, 1.0).item() == pytest.approx(2e4)


def test_low_precision_logits_are_widened() -> None:
    x, y = torch.randn(4, 10).bfloat16(), torch.randn(4, 10).bfloat16()
    assert distillation_loss(x, y, 20.0).dtype == torch.float32
    assert torch.equal(distillation_loss(x, y, 20.0), distillation_loss(x.float(), y.float(), 20.0))
    labels = torch.arange(4)
    assert torch.equal(classification_loss(x, labels), functional.cross_entropy(x.float(), labels))


def test_arguments_are_checked() -> None:
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match="temperature is 0"):
        distillation_loss(x, x, 0)
    with pytest.raises(ValueError, match="reduction is 'sum'"):
        distillation_loss(x, x, 1.0, reduction="sum")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"student_logits has shape \(2, 3\)"):
        distillation_loss(x, x[:1], 1.0)
