"""Centroids: different per class, moved by the average of (5), untouched where a class was not seen."""

import pytest
import torch

from clusterq import ops
from clusterq.synthesis.centroid_bank import CentroidBank
from clusterq.synthesis.losses import ClassStatistics

K, D = 4, 3


def rows(seed, count=K):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, D, generator=random), torch.rand(count, D, generator=random)


def observed(classes, samples, seed):
    mean, spread = rows(seed, len(classes))
    return ClassStatistics(torch.tensor(classes), torch.tensor(samples, dtype=torch.float32), mean, spread)


def test_first_observation_is_the_centroid():
    bank = CentroidBank(K, D, 0.8)
    seen = observed([0, 1, 2, 3], [5, 0, 2, 1], seed=0)
    bank.update_(seen)
    assert bank.initialised.tolist() == [True, False, True, True]
    torch.testing.assert_close(bank.mean[[0, 2, 3]], seen.mean[[0, 2, 3]])
    torch.testing.assert_close(bank.spread[[0, 2, 3]], seen.spread[[0, 2, 3]])
    assert not torch.equal(bank.mean[0], bank.mean[2])


def test_moving_average_weights_the_old_value_by_decay():
    bank = CentroidBank(K, D, 0.8)
    expected_mean = torch.zeros(K, D, dtype=torch.float64)
    expected_spread = torch.zeros(K, D, dtype=torch.float64)
    known = [False] * K
    for step in range(6):
        samples = [(step + k) % 3 for k in range(K)]
        seen = observed([0, 1, 2, 3], samples, seed=step)
        for k in range(K):
            if samples[k] == 0:
                continue
            beta = 0.2 if known[k] else 1.0
            expected_mean[k] += beta * (seen.mean[k].double() - expected_mean[k])
            expected_spread[k] += beta * (seen.spread[k].double() - expected_spread[k])
            known[k] = True
        bank.update_(seen)
    assert bank.initialised.tolist() == known
    torch.testing.assert_close(bank.mean.double(), expected_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bank.spread.double(), expected_spread, rtol=1e-5, atol=1e-6)


def test_absent_classes_keep_their_bits():
    bank = CentroidBank(K, D, 0.9)
    bank.update_(observed([0, 1, 2, 3], [1, 1, 1, 1], seed=1))
    before = bank.table.clone()
    bank.update_(observed([2, 0, -1, -1], [3, 0, 0, 0], seed=2))
    assert torch.equal(bank.table[[0, 1, 3]], before[[0, 1, 3]])
    assert not torch.equal(bank.table[2], before[2])


def test_update_is_in_place_and_takes_no_gradient():
    bank = CentroidBank(K, D, 0.5)
    table = bank.table
    mean, spread = rows(3)
    mean.requires_grad_()
    bank.update_(ClassStatistics(torch.arange(K), torch.ones(K), mean, spread))
    assert bank.table is table and not table.requires_grad


def test_initialise_prefers_images_the_teacher_agrees_with():
    bank = CentroidBank(3, D, 0.8)
    mean, spread = rows(4, 6)
    var = spread.square()
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    correct = torch.tensor([True, False, True, False, False, False])
    bank.initialise_(mean, var, labels, correct)
    assert bank.initialised.tolist() == [True, True, False]
    for k, members in ((0, [0, 2]), (1, [3, 4, 5])):
        m, v = mean[members].double(), var[members].double()
        # law of total variance over images with as many pixels each
        expected = (v + m.square()).mean(0) - m.mean(0).square()
        torch.testing.assert_close(bank.mean[k].double(), m.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(bank.spread[k].double(), expected.sqrt(), rtol=1e-4, atol=1e-5)


def test_lookup_marks_unused_slots_and_unseen_classes():
    bank = CentroidBank(K, D, 0.8)
    bank.update_(observed([1, 3], [1, 1], seed=5))
    mean, spread, exists = bank.lookup(torch.tensor([3, 0, -1, 1]))
    assert exists.tolist() == [True, False, False, True]
    torch.testing.assert_close(mean[0], bank.mean[3])
    torch.testing.assert_close(spread[3], bank.spread[1])


def test_nearest_ignores_classes_without_centroid():
    bank = CentroidBank(3, D, 0.8)
    center, scale = torch.zeros(2 * D), torch.ones(2 * D)
    mean, spread = rows(6, 2)
    assert bank.nearest(mean, spread, center=center, scale=scale).tolist() == [-1, -1]
    # Class 0 would lie at the origin of the table, nearer than class 2, had it been seen.
    bank.update_(ClassStatistics(torch.tensor([2]), torch.ones(1), torch.full((1, D), 9.0), torch.full((1, D), 9.0)))
    assert bank.nearest(torch.zeros(2, D), torch.zeros(2, D), center=center, scale=scale).tolist() == [2, 2]


def test_nearest_uses_the_scale():
    bank = CentroidBank(2, 2, 0.8)
    mean = torch.tensor([[0.0, 10.0], [1.0, 0.0]])
    bank.update_(ClassStatistics(torch.arange(2), torch.ones(2), mean, torch.zeros(2, 2)))
    image = torch.tensor([[0.0, 0.0]]), torch.zeros(1, 2)
    center = torch.zeros(4)
    assert bank.nearest(*image, center=center, scale=torch.ones(4)).item() == 1
    assert bank.nearest(*image, center=center, scale=torch.tensor([1.0, 0.01, 1.0, 1.0])).item() == 0


def test_state_round_trip_and_shape_check():
    bank = CentroidBank(K, D, 0.8)
    bank.update_(observed([0, 1, 2, 3], [1, 0, 1, 1], seed=7))
    other = CentroidBank(K, D, 0.8)
    other.load_state_dict(bank.state_dict())
    assert torch.equal(other.table, bank.table) and torch.equal(other.initialised, bank.initialised)
    bank.update_(observed([0, 1, 2, 3], [1, 0, 1, 1], seed=8))
    assert not torch.equal(other.table, bank.table)
    with pytest.raises(ValueError, match="table has shape"):
        CentroidBank(K, D + 1, 0.8).load_state_dict(bank.state_dict())


def test_decay_outside_its_range_is_refused():
    with pytest.raises(ValueError, match="decay is 1"):
        CentroidBank(K, D, 1.0)


def test_class_centroids_of_real_statistics_differ_per_class():
    """The published code copies the same BatchNorm buffer into the centroid of every class."""
    random = torch.Generator().manual_seed(9)
    labels = torch.arange(12) % K
    mean = torch.randn(12, D, generator=random) + labels[:, None]
    var = torch.rand(12, D, generator=random)
    bank = CentroidBank(K, D, 0.8)
    bank.initialise_(mean, var, labels, torch.ones(12, dtype=torch.bool))
    assert torch.cdist(bank.table, bank.table).fill_diagonal_(1.0).min() > 0.1
    before = bank.table.clone()
    count, class_mean, class_var = ops.merge_class_statistics(mean + 1, var, labels, K)
    bank.update_(ClassStatistics(torch.arange(K), count, class_mean, class_var))
    torch.testing.assert_close(bank.mean, before[:, :D] + 0.2, rtol=1e-5, atol=1e-5)
