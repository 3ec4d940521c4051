"""What every accelerated kernel of the alignment loss must do, on the device CLUSTERQ_TEST_DEVICE.

Run as `kernel_cases.py` is. Expected values: statistics of the merged groups, losses as they are defined and their
gradients by autograd, all in float64.
"""

from __future__ import annotations

import itertools
import os
import sys

import pytest
import torch

import clusterq.ops

sys.path.insert(0, os.path.dirname(__file__))
from kernel_cases import (
    DEVICE,
    INF,
    NAN,
    quiet_numpy,  # noqa: F401 (a fixture that every case uses)
)
from kernel_cases import fq as ops


def merged(mean, var, inside):
    """Moments of a group of images, each a group of equally many values with these moments; 0 for no image."""
    count = int(inside.sum())
    if count == 0:
        return mean.new_zeros(mean.shape[1]), mean.new_zeros(mean.shape[1])
    center = mean[inside].sum(0) / count
    return center, (var[inside] + (mean[inside] - center).square()).sum(0) / count


def membership(labels, mask, slots):
    inside = labels[:, None] == torch.arange(slots)
    return inside if mask is None else inside & mask[:, None]


def groups(mean, var, labels, mask, slots):
    """Counts [1 + S], means and variances [1 + S, D] of the batch and of its classes."""
    members = [torch.ones(len(mean), dtype=torch.bool)]
    members += [] if labels is None else list(membership(labels, mask, slots).unbind(1))
    moments = [merged(mean, var, inside) for inside in members]
    return torch.stack([m.sum() for m in members]).double(), *map(torch.stack, zip(*moments, strict=True))


def norm(difference):
    squares = difference.square().sum()
    return squares.sqrt() if squares > 0 else squares


def truth(inputs, mean, var):
    """(total, terms) as the losses are defined, differentiable; mean and var of the whole batch, float64."""
    of = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    labels, mask = of["all_labels"], of["all_mask"]
    count, center, variance = groups(mean, var, labels, mask, of["slots"])
    weight, factor, class_weight = of["columns"]
    form = (lambda v: v) if of["floor"] is None else (lambda v: (v + of["floor"]).sqrt())
    offset, excess = center[0] - of["target_mean"], form(variance[0] * factor) - of["target_spread"]
    if of["squared"]:
        batch = (weight * (offset.square() + excess.square())).sum()
    else:
        starts = of["starts"].tolist()
        layers = [slice(*ends) for ends in itertools.pairwise(starts)]
        batch = sum(weight[s.start] * (norm(offset[s]) + norm(excess[s])) for s in layers)
    terms, total = [batch], of["weight"] * batch
    for t, tau in enumerate(of["class_weights"]):
        rows = []
        for k in range(of["slots"]):
            if count[1 + k] == 0 or (of["known"] is not None and not of["known"][k]):
                continue
            difference = center[1 + k, of["first"] :] - of["class_mean"][t, k]
            spread = form(variance[1 + k, of["first"] :]) - of["class_spread"][t, k]
            rows.append((class_weight[of["first"] :] * (difference.square() + spread.square())).sum())
        term = sum(rows, mean.new_zeros(())) / (max(len(rows), 1) if of["class_average"] else 1)
        terms.append(term)
        total = total + tau * term
    return total, torch.stack([torch.as_tensor(t) for t in terms])


def check(inputs, dtype, parts=1):
    """Against the truth; with `parts` > 1 every part of the batch gets the statistics of the whole, as a process."""
    mean, var = inputs["mean"], inputs["var"]
    leaves = [t.double().clone().requires_grad_() for t in (mean, var)]
    total, terms = truth(inputs, *leaves)
    grads = torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad else (None, None)
    labels, mask, slots, first = inputs["all_labels"], inputs["all_mask"], inputs["slots"], inputs["first"]
    count, center, variance = groups(*(t.detach() for t in leaves), labels, mask, slots)
    form = (lambda v: v) if inputs["floor"] is None else (lambda v: (v + inputs["floor"]).sqrt())
    tolerance = 1e-11 if dtype == torch.float64 else 2e-7
    for rows in torch.arange(len(mean)).tensor_split(parts):
        own = {k: v for k, v in inputs.items() if not k.startswith("all_")}
        own |= {"mean": mean[rows] if parts > 1 else mean, "var": var[rows] if parts > 1 else var}
        own |= {"labels": None if labels is None else labels[rows], "mask": None if mask is None else mask[rows]}
        own |= dict.fromkeys(("merged_count", "merged_mean", "merged_var"))
        if parts > 1:
            own |= {"merged_count": count, "merged_mean": center, "merged_var": variance}
        schema = torch.ops.clusterq.alignment_loss.default._schema.arguments
        got = ops.alignment_loss(*(own[argument.name] for argument in schema))
        wanted = (total, terms, *grads, count[1:].long(), center[1:, first:], form(variance[1:, first:]))
        for index, (ours, theirs) in enumerate(zip(got, wanted, strict=True)):
            theirs = torch.zeros(mean.shape).double() if theirs is None else theirs.detach()
            theirs = theirs[rows] if index in (2, 3) else theirs
            assert ours.dtype == (torch.int64 if index == 4 else dtype), index
            assert ours.shape == theirs.shape, index
            size = theirs.double().abs()[theirs.isfinite()]
            atol = tolerance * (size.max().item() if size.numel() else 1.0)
            torch.testing.assert_close(ours.double(), theirs.double(), rtol=tolerance, atol=atol, equal_nan=True)


def problem(images=12, layers=(3, 16, 1, 65), slots=5, terms=1, dtype=torch.float32, classes=True, **changes):
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    columns, starts = sum(layers), torch.tensor([0, *layers]).cumsum(0)
    first = changes.pop("first", 3)
    slots, terms = (slots, terms) if classes else (0, 0)
    rows = (terms, slots, columns - first)
    per_layer = torch.rand(3, len(layers), generator=generator, dtype=torch.float64) + 0.5
    labels = torch.randint(-1, max(slots, 1), (images,), generator=generator)
    inputs = {
        "mean": normal(images, columns), "var": normal(images, columns).square() + 0.1,
        "target_mean": normal(columns), "target_spread": normal(columns).abs(),
        "columns": per_layer.repeat_interleave(torch.tensor(layers), 1).to(dtype), "starts": starts,
        "weight": 0.75, "squared": True, "floor": 1e-5,
        "all_labels": torch.where(labels == 1, slots + 2, labels) if classes else None, "all_mask": None,
        "slots": slots, "first": first, "class_mean": normal(*rows) if terms else None,
        "class_spread": normal(*rows).abs() if terms else None, "known": None,
        "class_weights": tuple((0.5, -0.25, 2.0)[:terms]), "class_average": False,
    }  # fmt: skip
    return inputs | changes


def test_a_kernel_serves_the_op():
    kernels = {row.op: row.kernel for row in clusterq.ops.backends() if row.device == DEVICE}
    wanted = {"triton"} if os.environ.get("CLUSTERQ_BACKEND") == "triton" else {"cuda", "triton"}
    assert kernels["alignment_loss"] in wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("floor", [None, 1e-5])
@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("classes", [False, True])
def test_the_losses(classes, squared, floor, parts, dtype, poisoned):
    check(problem(squared=squared, floor=floor, classes=classes, dtype=dtype), dtype, parts)


@pytest.mark.parametrize(
    "changes",
    [
        {"class_average": True},
        {"terms": 3},
        {"terms": 3, "class_average": True, "first": 0},
        {"terms": 0},
        {"all_mask": torch.arange(12) % 3 > 0},
        {"all_mask": torch.zeros(12, dtype=torch.bool), "class_average": True},
        {"known": torch.tensor([True, False, True, True, False])},
        {"known": torch.zeros(5, dtype=torch.bool), "class_average": True},
        {"images": 1},
        {"images": 300, "layers": (5, 3), "slots": 37},
        {"layers": (1,), "first": 0},
        {"layers": (290, 13, 60), "squared": False, "terms": 2},
        {"layers": (4, 3), "first": 7},
        {"weight": 0.0},
    ],
)
def test_every_option(changes, poisoned):
    for parts in (1,) if changes.get("images") == 1 else (1, 2):
        check(problem(**changes), torch.float32, parts)


def test_rows_with_strides():
    """mean and var are columns of a wider matrix; parameters and targets are slices too."""
    inputs, room = problem(), torch.randn(12, 200)
    inputs["mean"], inputs["var"] = room[:, 7:92], room.square()[:, 100:185]
    inputs["columns"] = torch.rand(85, 3).t()
    inputs["target_mean"] = torch.randn(85, 2)[:, 0]
    check(inputs, torch.float32)
    check(inputs, torch.float32, 2)


def test_without_images():
    inputs = problem(images=0)
    check(inputs, torch.float32)
    check(problem(images=0, squared=False, classes=False), torch.float32)


def test_a_layer_on_its_target_has_no_slope():
    """The derivative of a norm at 0 is 0, not NaN."""
    inputs = problem(images=1, squared=False, floor=None, classes=False)
    inputs["columns"][1] = 1.0
    inputs["target_mean"][3:19] = inputs["mean"][0, 3:19]
    inputs["target_spread"][19:20] = inputs["var"][0, 19:20]
    check(inputs, torch.float32)


def test_targets_nobody_asks_for_may_be_anything():
    """Targets of classes that are unknown or without images; the truth leaves them out."""
    inputs = problem(known=torch.tensor([True, True, False, True, True]), terms=2, class_average=True)
    for name in ("class_mean", "class_spread"):
        # Class 1 has no image, class 2 no target.
        inputs[name][:, 1], inputs[name][:, 2] = NAN, INF
    check(inputs, torch.float32)
    check(inputs, torch.float32, 3)


def test_offsets_do_not_cost_digits():
    """Means around 1e4 whose spread over the images is 1: squares of float32 sums would lose it."""
    inputs = problem(images=64, terms=1)
    inputs["mean"] += 1e4
    inputs["target_mean"] += 1e4
    inputs["class_mean"] += 1e4
    check(inputs, torch.float32)


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_bad_image_outside_the_classes_stays_outside(bad):
    clean = problem(all_mask=torch.arange(12) != 4)
    inputs = clean | {"mean": clean["mean"].clone(), "var": clean["var"].clone(), "labels": clean["all_labels"]}
    inputs |= {"mask": clean["all_mask"], **dict.fromkeys(("merged_count", "merged_mean", "merged_var"))}
    names = [argument.name for argument in torch.ops.clusterq.alignment_loss.default._schema.arguments]
    wanted = ops.alignment_loss(*((inputs | clean)[name] for name in names))
    inputs["mean"][4, 9], inputs["var"][4, 50] = bad, bad
    got = ops.alignment_loss(*(inputs[name] for name in names))
    assert not got[0].isfinite() and not got[1][0].isfinite()
    assert torch.equal(got[1][1:], wanted[1][1:])
    for ours, theirs in zip(got[4:], wanted[4:], strict=True):
        assert torch.equal(ours, theirs)
    keep = [d for d in range(85) if d not in (9, 50)]
    assert torch.equal(got[2][:, keep], wanted[2][:, keep]) and torch.equal(got[3][:, keep], wanted[3][:, keep])


def test_the_same_bits_every_time():
    inputs = problem(layers=(50, 90), terms=2, squared=False)
    inputs |= {"labels": inputs["all_labels"], "mask": None}
    inputs |= dict.fromkeys(("merged_count", "merged_mean", "merged_var"))
    names = [argument.name for argument in torch.ops.clusterq.alignment_loss.default._schema.arguments]
    first = ops.alignment_loss(*(inputs[name] for name in names))
    for ours, theirs in zip(ops.alignment_loss(*(inputs[name] for name in names)), first, strict=True):
        assert torch.equal(ours, theirs)
