"""Images where the network's inputs lie: any affine range, and layers whose weights have any size."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from clusterq.config import SynthesisConfig, preset
from clusterq.method import ClusterQ
from clusterq.qat import random_crop_and_flip
from clusterq.synthesis import BankSource, GeneratorSource, SynthesisObjective, Teacher
from clusterq.synthesis.input_range import InputRange, find_input_range
from clusterq.synthesis.objective import statistics_unit
from clusterq.synthesis.recipes import ImageRecipe, initial_images, shifted

SHAPE = (3, 12, 12)
FAST = SynthesisConfig(num_images=16, batch_size=8, image_steps=4, autocast=False)


def natural(count: int = 256, seed: int = 1) -> Tensor:
    """Images [N, 3, 12, 12] of mean 0 and deviation 1 with the spectrum of photographs."""
    recipe = ImageRecipe(roughness=1.0, contrast=0.3, temperature=1.0, shift=0)
    images = initial_images(recipe, (count, *SHAPE), torch.Generator().manual_seed(seed))
    return (images - images.mean()) / images.std()


def network(front: str = "conv", padding: int = 1) -> nn.Module:
    """Untrained; its statistics are still to be set."""
    torch.manual_seed(0)
    first: list[nn.Module] = {
        "conv": [nn.Conv2d(3, 8, 3, padding=padding, bias=False)],
        "biased": [nn.Conv2d(3, 8, 3, padding=padding)],
        "bent": [nn.Conv2d(3, 8, 3, padding=padding), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)],
        "data": [],
    }[front]
    width = 3 if front == "data" else 8
    layers = [*first, nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 8, 3, padding=1), nn.BatchNorm2d(8)]
    return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def remember(model: nn.Module, images: Tensor) -> nn.Module:
    """Running statistics are those of the images, in evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(images)
    return model.eval()


RANGES = [(0.0, 1.0), (0.1, 1.1), (120.0, 62.0), (0.47, 0.25), (3.6, 3.5)]
FAR = [(-100.0, 25.0), (0.0, 1e-3)]


@pytest.mark.parametrize(
    ("front", "center", "scale"),
    [(front, *where) for front in ("conv", "biased", "data") for where in RANGES + FAR]
    # A ReLU before the first BatchNorm bends what brighter images do to it.
    + [("bent", *where) for where in RANGES],
)
def test_range_of_the_images_is_found(front: str, center: float, scale: float) -> None:
    model = remember(network(front), center + scale * natural())
    found = find_input_range(Teacher(model, SHAPE))
    assert scale / 2 <= found.scale <= scale * 2
    assert abs(found.center - center) <= scale
    if (center, scale) in ((0.0, 1.0), (0.1, 1.1)):
        assert found == (0.0, 1.0)


def test_dead_channels_say_nothing_of_the_range() -> None:
    model = remember(network(), 120 + 62 * natural())
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
    norm.running_mean[:3], norm.running_var[:3] = 0, 1e-14
    found = find_input_range(Teacher(model, SHAPE))
    assert found.scale in (32, 64, 128) and abs(found.center - 120) <= 62
    norm.running_mean[:], norm.running_var[:] = 0, 0
    assert find_input_range(Teacher(model, SHAPE)) == (0.0, 1.0)


def in_range(model: nn.Module, center: float, scale: float) -> nn.Module:
    """The network that gives for `center + scale * x` what `model` gives for x; its first layer does not pad."""
    moved = copy.deepcopy(model)
    conv = moved[0]
    assert isinstance(conv, nn.Conv2d) and conv.padding == (0, 0) and conv.bias is not None
    with torch.no_grad():
        conv.weight /= scale
        conv.bias -= center * conv.weight.sum((1, 2, 3))
    return moved


def banks(center: float, scale: float) -> tuple[BankSource, BankSource]:
    """Of a network and of the same one for images in another range, filled."""
    plain = remember(network("biased", padding=0), natural())
    config = replace(FAST, shifted_share=1.0)
    plain_bank, bank = (BankSource(Teacher(m, SHAPE), config, seed=0) for m in (plain, in_range(plain, center, scale)))
    plain_bank.fit()
    bank.fit()
    assert bank.teacher.input_range == (center, scale)
    return plain_bank, bank


def test_images_of_a_scaled_network_are_the_scaled_images_bit_for_bit() -> None:
    plain, bank = banks(0.0, 64.0)
    assert torch.equal(bank.images(), 64 * plain.images())


def test_images_of_a_network_for_pixels_of_0_to_255() -> None:
    plain, bank = banks(128.0, 64.0)
    torch.testing.assert_close((bank.images() - 128) / 64, plain.images(), rtol=0, atol=1e-2)


def test_the_generator_makes_images_in_the_range() -> None:
    """In training its last layer gives mean 0 and deviation 1; what it stores so early varies less."""
    model = remember(network(), 120 + 62 * natural())
    config = replace(FAST, source="generator", warmup_steps=1, steps=1, generator_width=8, num_images=64)
    source = GeneratorSource(Teacher(model, SHAPE), config, seed=0, stream=True)
    source.fit()
    images, _ = source.batch(0)
    assert float(images.mean()) == pytest.approx(128, abs=1) and float(images.std()) == pytest.approx(64, rel=0.05)
    assert float(source.images().mean()) == pytest.approx(128, abs=30)


def test_pixels_that_move_in_are_those_of_the_center() -> None:
    images = torch.full((4, 1, 8, 8), 128.0)
    random = torch.Generator().manual_seed(0)
    assert all(torch.equal(shifted(images, 2, random, 128.0), images) for _ in range(4))
    assert torch.equal(random_crop_and_flip(images, random, fill=128.0), images)
    assert not torch.equal(random_crop_and_flip(images, random), images)
    assert InputRange().apply(images) is images


def test_the_student_sees_the_center_move_in(monkeypatch: pytest.MonkeyPatch) -> None:
    model = remember(network(), 120 + 62 * natural())
    method = ClusterQ(model, "default", input_shape=SHAPE)
    method.config = replace(method.config, synthesis=FAST, finetune=replace(method.config.finetune, steps=1))
    blanks = []
    monkeypatch.setattr("clusterq.method.qat.finetune", lambda *a, blank, **k: blanks.append(blank) or [])
    with pytest.warns(UserWarning, match="near chance"):
        method.finetune()
    assert len(blanks) == 1 and torch.equal(blanks[0], torch.full((1, *SHAPE), 128.0))


def scaled(model: nn.Module, factor: float) -> nn.Module:
    """The same function with the first layer's weights `factor` times as large, and its BatchNorm fitting."""
    other = copy.deepcopy(model)
    conv, norm = other[0], other[1]
    assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None and norm.running_var is not None
    with torch.no_grad():
        conv.weight *= factor
        norm.running_mean *= factor
        norm.running_var *= factor**2
    norm.eps *= factor**2
    return other


@pytest.mark.parametrize("spread", ["std", "var"])
def test_the_size_of_a_layers_weights_does_not_decide_its_weight_in_the_loss(spread: str) -> None:
    """Beyond the range in which statistics are taken as they are; within it the loss is the printed one."""
    plain = remember(network(), natural())
    teacher = Teacher(plain, SHAPE)
    limits = FAST.deviation_limits
    assert statistics_unit(teacher, limits) is None
    large = Teacher(scaled(plain, 2.0**10), SHAPE)
    # `paper` and `gdfq` keep the losses as printed.
    assert statistics_unit(large, limits) is not None and statistics_unit(large, None) is None
    assert preset("paper").synthesis.deviation_limits is preset("gdfq").synthesis.deviation_limits is None
    images, labels = natural(8, seed=3), torch.arange(8) % 4
    config = replace(FAST, spread=spread, alignment_weight=1.0, warmup_steps=1)
    totals, gradients = [], []
    for factor in (1.0, 2.0**10, 2.0**20, 2.0**-10):
        objective = SynthesisObjective(Teacher(scaled(plain, factor), SHAPE), config, seed=0)
        objective.initialise_centroids([(natural(8, seed=4), labels)])
        leaf = images.clone().requires_grad_()
        terms = objective(leaf, labels)
        terms.total.backward()
        totals.append(float(terms.total.detach()))
        gradients.append(leaf.grad)
    assert totals[1] == totals[2] and torch.equal(gradients[1], gradients[2])
    assert totals[3] < totals[0] < totals[1] < 100 * totals[0]
