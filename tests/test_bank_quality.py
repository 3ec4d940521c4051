"""Measures of a bank against the same ones computed pair by pair and layer by layer in float64."""

from __future__ import annotations

import math
import os
import sys

import pytest
import torch
from torch import Tensor, nn

from clusterq.bank_quality import describe, diversity, inspect_images
from clusterq.synthesis import Teacher

sys.path.insert(0, os.path.dirname(__file__))
from small_network import network


def _inputs_of_batch_norm(model: nn.Module, images: Tensor) -> list[tuple[nn.BatchNorm2d, Tensor]]:
    """Every BatchNorm layer with what enters it, by hooks on the network itself."""
    found: list[tuple[nn.BatchNorm2d, Tensor]] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, inputs: found.append((module, inputs[0].detach())))
        for module in model.modules()
        if isinstance(module, nn.BatchNorm2d)
    ]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return found


@pytest.fixture
def images() -> tuple[Tensor, Tensor]:
    return torch.randn(11, 1, 8, 8), torch.tensor([0, 0, 0, 1, 1, 3, 3, 3, 3, 3, 0])


def test_alignment_confidence_and_counts(images: tuple[Tensor, Tensor]) -> None:
    model = network().double().eval()
    pictures, labels = images[0].double(), images[1]
    quality = inspect_images(Teacher(model, (1, 8, 8)), pictures, labels, batch_size=4)
    for (layer, entered), found in zip(_inputs_of_batch_norm(model, pictures), quality.layers, strict=True):
        values = entered.double().transpose(0, 1).flatten(1)
        remembered = (layer.running_var + layer.eps).double().sqrt()
        mean_error = (values.mean(1) - layer.running_mean).abs() / remembered
        std_error = (values.std(1, correction=0) - remembered).abs() / remembered
        assert found.channels == len(remembered)
        # Statistics of single images arrive as float32.
        assert found.mean_error == pytest.approx(float(mean_error.mean()), rel=1e-5)
        assert found.std_error == pytest.approx(float(std_error.mean()), rel=1e-5)
    with torch.no_grad():
        chances = model(pictures).softmax(1)
    assert quality.counts == [4, 2, 0, 5]
    assert quality.label_accuracy == pytest.approx(100 * float((chances.argmax(1) == labels).double().mean()))
    own = [float(chance[label]) for chance, label in zip(chances, labels, strict=True)]
    assert quality.label_confidence == pytest.approx(100 * sum(own) / 11)
    assert quality.top_confidence == pytest.approx(100 * float(chances.amax(1).mean()))


def test_images_that_are_what_batch_norm_remembers_have_no_error(images: tuple[Tensor, Tensor]) -> None:
    model = network().eval()
    for layer, _ in _inputs_of_batch_norm(model, images[0]):
        # Layer by layer: what enters the second depends on the statistics of the first.
        entered = next(values for found, values in _inputs_of_batch_norm(model, images[0]) if found is layer)
        layer.running_mean.copy_(entered.mean((0, 2, 3)))
        layer.running_var.copy_(entered.var((0, 2, 3), correction=0) - layer.eps)
    quality = inspect_images(Teacher(model, (1, 8, 8)), *images)
    for found in quality.layers:
        assert found.mean_error < 1e-5 and found.std_error < 1e-5


def test_diversity_counts_every_pair_once() -> None:
    features = torch.randn(300, 5, dtype=torch.float64)
    labels = torch.randint(0, 4, (300,))
    sums = {True: [], False: []}
    for i in range(0, 300):
        for j in range(i):
            sums[bool(labels[i] == labels[j])].append(math.dist(features[i].tolist(), features[j].tolist()))
    within, between = diversity(features, labels)
    assert within == pytest.approx(sum(sums[True]) / len(sums[True]), rel=1e-12)
    assert between == pytest.approx(sum(sums[False]) / len(sums[False]), rel=1e-12)


def test_diversity_of_copies_and_where_there_are_no_pairs(images: tuple[Tensor, Tensor]) -> None:
    features = torch.eye(3, dtype=torch.float64)
    assert diversity(features, torch.tensor([0, 1, 2]))[0] is None
    assert diversity(features, torch.tensor([1, 1, 1]))[1] is None
    copies = images[0][images[1]]
    quality = inspect_images(Teacher(network(), (1, 8, 8)), copies, images[1])
    assert quality.within == pytest.approx(0, abs=1e-6) and quality.diversity == pytest.approx(0, abs=1e-6)
    one = inspect_images(Teacher(network(), (1, 8, 8)), copies[:1], images[1][:1])
    assert one.diversity is None and "diversity - " in describe(one)


def test_diversity_does_not_change_with_the_scale_of_a_channel(images: tuple[Tensor, Tensor]) -> None:
    model = network().eval()
    first = inspect_images(Teacher(model, (1, 8, 8)), *images)
    conv, norm = model[0], model[1]
    with torch.no_grad():
        # The same function: what enters the layer and what it remembers are 8 times as large. eps is negligible.
        conv.weight[2] *= 8
        norm.running_mean[2] *= 8
        norm.running_var[2] *= 64
    second = inspect_images(Teacher(model, (1, 8, 8)), *images)
    assert second.diversity == pytest.approx(first.diversity, rel=1e-4)


def test_pixels_beyond_real_ones() -> None:
    pictures = torch.tensor([0.0, 1.0, -1.0, 3.0]).view(1, 1, 2, 2).repeat(2, 1, 4, 4)
    teacher, labels = Teacher(network(), (1, 8, 8)), torch.tensor([0, 1])
    # Real pixels 0..1 become -0.5 to 1.5: two values of four lie outside.
    found = inspect_images(teacher, pictures, labels, mean=(0.25,), std=(0.5,)).pixels
    assert found == {"min": -1.0, "max": 3.0, "mean": 0.75, "std": pytest.approx(math.sqrt(2.1875)), "outside": 50.0}
    assert inspect_images(teacher, pictures, labels).pixels["outside"] is None


def test_images_that_do_not_fit() -> None:
    teacher = Teacher(network(), (1, 8, 8))
    with pytest.raises(ValueError, match=r"wanted \[N, \(1, 8, 8\)\]"):
        inspect_images(teacher, torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="wanted 0 to 3"):
        inspect_images(teacher, torch.zeros(2, 1, 8, 8), torch.tensor([0, 4]))
