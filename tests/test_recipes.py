"""Recipes of a bank's images: what they start from and how they are looked at."""

from dataclasses import replace

import pytest
import torch

from clusterq.config import SynthesisConfig
from clusterq.synthesis.recipes import ImageRecipe, draw_recipes, initial_images, shifted
from clusterq.synthesis.stored import subset

PLAIN = ImageRecipe(roughness=0.0, contrast=0.0, temperature=1.0, shift=0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_settings_are_drawn_from_their_ranges():
    config = SynthesisConfig(
        roughness=(0.2, 0.4), contrast=(0.1, 0.1), ce_temperature=(2.0, 5.0), shift=3, shifted_share=0.25
    )
    recipes = draw_recipes(config, 400, seeded())
    assert all(0.2 <= r.roughness <= 0.4 and r.contrast == 0.1 and 2 <= r.temperature <= 5 for r in recipes)
    temperatures = torch.tensor([r.temperature for r in recipes])
    # Uniform on [2, 5]: mean 3.5, deviation 3 / sqrt(12); 5 standard errors.
    assert abs(temperatures.mean() - 3.5) < 5 * 3 / 12**0.5 / 400**0.5
    shares = sum(r.shift == 3 for r in recipes) / 400
    assert {r.shift for r in recipes} == {0, 3} and abs(shares - 0.25) < 5 * (0.25 * 0.75 / 400) ** 0.5
    assert draw_recipes(config, 400, seeded()) == recipes != draw_recipes(config, 400, seeded(1))


def test_plain_images_are_white_noise():
    images = initial_images(PLAIN, (6, 3, 8, 10), seeded())
    assert torch.equal(images, torch.randn(6, 3, 8, 10, generator=seeded()))


@pytest.mark.parametrize("roughness", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("size", [(32, 32), (15, 24)])
def test_the_spectrum_falls_as_a_power_of_frequency(roughness, size):
    images = initial_images(replace(PLAIN, roughness=roughness), (512, 3, *size), seeded()).double()
    assert images.std() == pytest.approx(1, abs=1e-5)
    power = torch.fft.fft2(images).abs().square().mean((0, 1))
    rows, columns = torch.fft.fftfreq(size[0])[:, None], torch.fft.fftfreq(size[1])[None]
    frequency = torch.sqrt(rows**2 + columns**2).double()
    # Slope of log power over log frequency, the constant part left out: -2 a.
    x, y = frequency.flatten()[1:].log(), power.flatten()[1:].log()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    assert slope == pytest.approx(-2 * roughness, abs=0.02)


@pytest.mark.parametrize(
    ("share", "flags"), [(0.0, "00000000"), (0.5, "01010101"), (0.25, "00010001"), (1.0, "11111111")]
)
def test_leaves_are_spread_evenly(share, flags):
    recipes = draw_recipes(SynthesisConfig(leaves_share=share), 8, seeded())
    assert "".join(str(int(r.leaves)) for r in recipes) == flags
    assert [replace(r, leaves=False) for r in recipes] == draw_recipes(SynthesisConfig(leaves_share=0.0), 8, seeded())


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (96, 96)])
def test_dead_leaves_have_edges_and_even_surfaces(size):
    """What Lee, Mumford and Huang (2001) ask of images of the world, and noise of no spectrum has: heavy tails."""
    recipe = replace(PLAIN, leaves=True)
    images = initial_images(recipe, (64, 3, *size), seeded()).double()
    assert images.std() == pytest.approx(1, abs=1e-5) and images.mean().abs() < 0.2
    noise = initial_images(replace(PLAIN, roughness=1.0), (64, 3, *size), seeded()).double()

    def kurtosis(x):
        steps = x.diff(dim=3)
        return steps.pow(4).mean() / steps.square().mean().square()

    assert kurtosis(noise) < 3.5 and kurtosis(images) > 7
    smooth = [(x.diff(dim=3).abs() < 0.3).double().mean() for x in (noise, images)]
    assert smooth[1] > 0.6 > smooth[0]
    # The border is as varied as the middle.
    spread = images.square().mean((0, 1))
    border = torch.cat([spread[0], spread[-1], spread[:, 0], spread[:, -1]]).mean()
    middle = spread[size[0] // 4 : -size[0] // 4, size[1] // 4 : -size[1] // 4].mean()
    assert border.item() == pytest.approx(middle.item(), rel=0.15)
    again = initial_images(replace(recipe, roughness=1.5), (64, 3, *size), seeded()).double()
    assert torch.equal(again, images)
    assert not torch.equal(initial_images(recipe, (64, 3, *size), seeded(1)).double(), images)


def test_dead_leaves_look_alike_at_every_scale():
    """Means of 2 x 2 pixels have the spread that pixels have, but for the noise of single pixels and small leaves."""
    images = initial_images(replace(PLAIN, leaves=True), (64, 3, 64, 64), seeded()).double()
    halved = torch.nn.functional.avg_pool2d(images, 2)
    ratio = halved.std() / images.std()
    assert 0.9 < ratio < 1
    kurtosis = [(d.pow(4).mean() / d.square().mean().square()) for d in (images.diff(dim=2), halved.diff(dim=2))]
    assert kurtosis[1] > 5


def test_contrast_and_brightness_vary_between_images():
    images = initial_images(replace(PLAIN, contrast=0.5), (2000, 3, 8, 8), seeded()).double()
    spread = images.std((2, 3)).mean(1).log()
    brightness = images.mean((1, 2, 3))
    assert spread.std() == pytest.approx(0.5, abs=0.03)
    # Brightness 0.5, a third of the variance of each of three colours at 0.25, and the mean of the noise itself.
    noise = images.std() / (3 * 64) ** 0.5
    assert brightness.std() == pytest.approx((0.5**2 + 0.25**2 / 3 + noise.item() ** 2) ** 0.5, abs=0.03)


def test_images_move_together_with_zeros_moving_in():
    images = torch.arange(1.0, 1 + 2 * 3 * 5 * 6).view(2, 3, 5, 6)
    seen = set()
    random = seeded()
    for _ in range(300):
        moved = shifted(images, 2, random)
        found = [
            (dy, dx, flip)
            for dy in range(-2, 3)
            for dx in range(-2, 3)
            for flip in (False, True)
            if torch.equal(moved, moved_by(images, dy, dx, flip))
        ]
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) == 5 * 5 * 2


def moved_by(images: torch.Tensor, dy: int, dx: int, flip: bool) -> torch.Tensor:
    out = torch.zeros_like(images)
    height, width = images.shape[2:]
    for y in range(height):
        for x in range(width):
            if 0 <= y + dy < height and 0 <= x + dx < width:
                out[:, :, y, x] = images[:, :, y + dy, x + dx]
    return out.flip(3) if flip else out


def test_gradient_reaches_the_images_where_they_were():
    images = torch.randn(2, 1, 6, 6, requires_grad=True)
    moved = shifted(images, 2, seeded(3))
    moved.sum().backward()
    assert images.grad is not None and images.grad.sum() == (moved != 0).sum()


@pytest.mark.parametrize(("total", "count"), [(10, 4), (7, 7), (5, 9), (1, 1)])
def test_a_subset_has_no_image_twice(total, count):
    taken = subset(total, count)
    assert len(taken.unique()) == len(taken) == min(count, total)
    assert taken.min() >= 0 and taken.max() < total and torch.equal(taken, subset(total, count))


def test_a_subset_takes_of_every_batch_and_class():
    taken = subset(1024, 256)
    # 32 of each of 8 batches and 25.6 of each of 10 classes expected; 4 deviations of a hypergeometric draw at most.
    assert (torch.bincount(taken // 128, minlength=8) - 32).abs().max() <= 4 * (32 * 7 / 8 * 3 / 4) ** 0.5
    assert (torch.bincount(taken % 10, minlength=10) - 25.6).abs().max() <= 4 * (25.6 * 0.9 * 3 / 4) ** 0.5
