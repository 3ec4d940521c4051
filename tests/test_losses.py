"""Losses on feature statistics against loops over layers, classes and samples, written from the paper's equations."""

import math

import pytest
import torch

from clusterq.ops import AlignmentTargets, ClassTargets
from clusterq.synthesis.losses import class_slots, diversity_targets, to_spread

CHANNELS = (3, 5)
NUM_CLASSES = 4


def feature_maps(samples=10, seed=0, dtype=torch.float64):
    """One map per layer, of different spatial sizes, with class-dependent offsets."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, NUM_CLASSES, (samples,), generator=random)
    labels[labels == 2] = 1  # class 2 is absent from the batch
    maps = []
    for channels, size in zip(CHANNELS, (6, 3), strict=True):
        x = torch.randn(samples, channels, size, size, generator=random, dtype=torch.float64)
        maps.append((x * 1.7 + labels[:, None, None, None] * 0.5).to(dtype))
    return maps, labels


def per_image(maps):
    mean = torch.cat([x.mean((2, 3)) for x in maps], 1)
    var = torch.cat([x.var((2, 3), correction=0) for x in maps], 1)
    return mean.float(), var.float()


def remembered(seed=1):
    random = torch.Generator().manual_seed(seed)
    total = sum(CHANNELS)
    return torch.randn(total, generator=random), torch.rand(total, generator=random) + 0.2


def aligned(statistics, labels, *terms, running=None, mask=None, reduction="sum", spread="std", channels=CHANNELS):
    """The op on instance statistics (mean, var): the batch term, of weight 0 without `running`, and one class term of
    weight 1 for each (mean, spread) in `terms`."""
    width = sum(channels)
    targets = AlignmentTargets(
        channels,
        *(running or (torch.zeros(width), torch.ones(width))),
        reduction=reduction,
        class_reduction=reduction,
        spread=spread,
        weight=0.0 if running is None else 1.0,
        first=0,
    )
    classes = None
    if terms:
        goals = (torch.stack(part) for part in zip(*terms, strict=True))
        classes = ClassTargets(labels, *goals, (1.0,) * len(terms), mask=mask, average=reduction == "mean")
    return targets(*statistics, classes)


def spread_of(values, spread):
    var = values.var(correction=0)
    return var.sqrt() if spread == "std" else var


def expected_bns(maps, running_mean, running_var, reduction, spread):
    """Equation (9), one channel at a time."""
    total, first = 0.0, 0
    for x in maps:
        layer = 0.0
        for c in range(x.shape[1]):
            values = x[:, c].reshape(-1)
            target = running_var[first + c].double()
            layer += (values.mean() - running_mean[first + c].double()) ** 2
            layer += (spread_of(values, spread) - (target.sqrt() if spread == "std" else target)) ** 2
        total += layer / (len(maps) * x.shape[1]) if reduction == "mean" else layer
        first += x.shape[1]
    return total


def expected_class(maps, labels, mask, target_mean, target_spread, reduction, spread):
    """Equation (4), one class, layer and channel at a time."""
    total, present = 0.0, 0
    for k in range(NUM_CLASSES):
        members = [i for i in range(len(labels)) if labels[i] == k and mask[i]]
        if not members:
            continue
        present += 1
        first = 0
        for x in maps:
            layer = 0.0
            for c in range(x.shape[1]):
                values = x[members, c].reshape(-1)
                layer += (values.mean() - target_mean[k, first + c].double()) ** 2
                layer += (spread_of(values, spread) - target_spread[k, first + c].double()) ** 2
            total += layer / (len(maps) * x.shape[1]) if reduction == "mean" else layer
            first += x.shape[1]
    return total / present if reduction == "mean" else total


@pytest.mark.parametrize("spread", ["std", "var"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_bns_loss_follows_equation_9(reduction, spread):
    maps, _ = feature_maps()
    running_mean, running_var = remembered()
    result = aligned(per_image(maps), None, running=(running_mean, running_var), reduction=reduction, spread=spread)
    loss = result.batch
    assert torch.equal(loss, result.total)
    torch.testing.assert_close(
        loss.double(), expected_bns(maps, running_mean, running_var, reduction, spread), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("spread", ["std", "var"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_class_alignment_follows_equation_4(reduction, spread, masked):
    maps, labels = feature_maps()
    mask = torch.arange(len(labels)) % 3 != 0 if masked else torch.ones(len(labels), dtype=torch.bool)
    random = torch.Generator().manual_seed(2)
    target_mean = torch.randn(NUM_CLASSES, sum(CHANNELS), generator=random)
    target_spread = torch.rand(NUM_CLASSES, sum(CHANNELS), generator=random)
    goal, chosen = (target_mean, target_spread), mask if masked else None
    loss = aligned(per_image(maps), labels, goal, mask=chosen, reduction=reduction, spread=spread).total
    expected = expected_class(maps, labels, mask, target_mean, target_spread, reduction, spread)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)


def test_gradients_match_the_loops():
    """Through per-image statistics down to the feature maps, for all three losses together."""
    maps, labels = feature_maps()
    running_mean, running_var = remembered()
    random = torch.Generator().manual_seed(3)
    target = [torch.rand(NUM_CLASSES, sum(CHANNELS), generator=random) for _ in range(2)]
    noisy = [torch.rand(NUM_CLASSES, sum(CHANNELS), generator=random) for _ in range(2)]
    mask = torch.ones(len(labels), dtype=torch.bool)

    exact = [x.clone().requires_grad_() for x in maps]
    loss = expected_bns(exact, running_mean, running_var, "sum", "std")
    loss = loss + expected_class(exact, labels, mask, *target, "sum", "std")
    loss = loss + expected_class(exact, labels, mask, *noisy, "sum", "std")
    loss.backward()

    ours = [x.clone().requires_grad_() for x in maps]
    aligned(per_image(ours), labels, target, noisy, running=(running_mean, running_var)).total.backward()
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_images_outside_the_mask_get_no_class_gradient():
    maps, labels = feature_maps()
    ours = [x.clone().requires_grad_() for x in maps]
    mask = torch.ones(len(labels), dtype=torch.bool)
    mask[[1, 4]] = False
    zero = torch.zeros(NUM_CLASSES, 8)
    aligned(per_image(ours), labels, (zero, zero), mask=mask).total.backward()
    for x in ours:
        norms = x.grad.flatten(1).norm(dim=1)
        assert (norms[~mask] == 0).all()
        assert (norms[mask] > 0).all()


def test_empty_batch_of_valid_samples_costs_nothing():
    maps, labels = feature_maps()
    ours = [x.clone().requires_grad_() for x in maps]
    one, mask = torch.ones(NUM_CLASSES, 8), torch.zeros(len(labels), dtype=torch.bool)
    loss = aligned(per_image(ours), labels, (one, one), mask=mask, reduction="mean").total
    loss.backward()
    assert loss.item() == 0
    assert all((x.grad == 0).all() for x in ours)


def test_diversity_gradient_is_alignment_gradient_plus_noise():
    """The published code's targets move with the statistics, so its gradient is exactly 0; here it is not, and its mean
    over many draws is the gradient of class alignment."""
    maps, labels = feature_maps()
    random = torch.Generator().manual_seed(4)
    centroid_mean = torch.randn(NUM_CLASSES, sum(CHANNELS), generator=random)
    centroid_spread = torch.rand(NUM_CLASSES, sum(CHANNELS), generator=random)
    mean, var = (part.requires_grad_() for part in per_image(maps))
    total = aligned((mean, var), labels, (centroid_mean, centroid_spread)).total
    (alignment,) = torch.autograd.grad(total, mean)
    gradients = []
    for _ in range(400):
        targets = diversity_targets(centroid_mean, centroid_spread, 0.5, 1.0, random)
        assert not any(t.requires_grad for t in targets)
        gradients.append(torch.autograd.grad(aligned((mean, var), labels, targets).total, mean)[0])
    draws = torch.stack(gradients)
    assert draws.abs().max() > 0
    # The gradient is linear in the target, so the error of the mean is Gaussian: 5 standard errors.
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - alignment).abs() <= 5 * error + 1e-7).all()


def test_diversity_targets_have_the_asked_deviation():
    random = torch.Generator().manual_seed(5)
    centroid = torch.full((50, 200), 3.0)
    scale = torch.linspace(0.1, 2.0, 200)
    mean, spread = diversity_targets(centroid, centroid, 0.5 * scale, 1.0, random)
    measured = (mean - 3).std(0)
    assert ((measured / (0.5 * scale)).mean() - 1).abs() < 0.02
    assert abs((spread - 3).std().item() - 1.0) < 0.03
    assert not torch.equal(mean, diversity_targets(centroid, centroid, 0.5 * scale, 1.0, random)[0])


def test_constant_channels_give_finite_values_and_gradients():
    x = torch.ones(4, 3, 2, 2, requires_grad=True)
    mean, var = x.mean((2, 3)), x.var((2, 3), correction=0)
    zero = torch.zeros(2, 3)
    labels = torch.tensor([0, 0, 1, 1])
    loss = aligned((mean, var), labels, (zero, zero), running=(zero[0], zero[0]), channels=(3,)).total
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()
    assert to_spread(torch.zeros(3), "std").max() <= 1e-5


def test_class_slots_number_the_classes_that_are_present():
    labels = torch.tensor([700, 3, 700, 999, 3])
    slot, classes = class_slots(labels, 1000)
    assert classes.tolist() == [3, 700, 999, -1, -1]
    assert classes[slot].tolist() == labels.tolist()
    slot, classes = class_slots(labels % 4, 4)
    assert classes.tolist() == [0, 1, 2, 3] and slot.tolist() == (labels % 4).tolist()


def test_compact_and_dense_class_numbers_give_the_same_loss():
    maps, labels = feature_maps()
    target = torch.rand(50, sum(CHANNELS), generator=torch.Generator().manual_seed(6))
    dense = aligned(per_image(maps), labels, (target[:NUM_CLASSES], target[:NUM_CLASSES])).total
    slot, classes = class_slots(labels, 50)  # 50 classes in 10 slots
    assert len(classes) == len(labels)
    rows = target[classes.clamp(min=0)]
    torch.testing.assert_close(dense, aligned(per_image(maps), slot, (rows, rows)).total)
