"""Ranges set from images, and rounding alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from clusterq.config import QuantizationConfig
from clusterq.nn.quantizers import ActivationQuantizer
from clusterq.qat.calibrate import calibrate, round_only
from clusterq.qat.prepare import prepare

CONFIG = QuantizationConfig(scheme="paper")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(96, 3)).eval()


def images(count: int = 8) -> torch.Tensor:
    return torch.randn(count, 2, 8, 8, generator=torch.Generator().manual_seed(1))


def test_ranges_are_those_of_the_network_in_floating_point() -> None:
    model = network()
    student = prepare(model, replace(CONFIG, activation_bits=2, weight_bits=2))
    x = images()
    calibrate(student, x, replace(CONFIG, activation_range="minmax"))
    with torch.no_grad():
        for index in (2, 4):
            highest = model[: index + 1](x).max().item()
            assert student[index].qparams()[0].item() == pytest.approx(highest / 3)
        assert student[:4](x).relu().max() != pytest.approx(model[:4](x).relu().max().item(), rel=1e-3)


@pytest.mark.parametrize("corrected", [True, False])
def test_batch_norm_is_corrected_where_the_settings_say_so(corrected: bool) -> None:
    model = network()
    student = prepare(model, CONFIG)
    calibrate(student, images(), replace(CONFIG, correct_batch_norm=corrected))
    same = torch.equal(student[1].running_var, model[1].running_var)
    assert same is not corrected
    assert student[0].weight_quantizer.enabled and student[6].weight_quantizer.enabled


def test_min_max_over_batches_spans_all_images() -> None:
    x = images(9)
    together, apart = prepare(network(), CONFIG), prepare(network(), CONFIG)
    settings = replace(CONFIG, activation_range="minmax")
    calibrate(together, x, settings)
    calibrate(apart, x, settings, batch_size=4)
    assert torch.equal(together[2].qparams()[0], apart[2].qparams()[0])


def test_settings_default_to_those_of_the_preparation() -> None:
    x = images()
    ranges = {}
    for method, corrected in (("mse", True), ("minmax", False)):
        settings = replace(CONFIG, weight_range=method, activation_range=method, correct_batch_norm=corrected)
        student = prepare(network(), settings)
        calibrate(student, x)
        explicit = prepare(network(), CONFIG)
        calibrate(explicit, x, settings)
        for name, value in student.state_dict().items():
            assert torch.equal(value, explicit.state_dict()[name]), name
        ranges[method] = student[0].weight_quantizer.scale.sum() + student[2].scale.sum()
    assert ranges["mse"] < ranges["minmax"]


def test_moving_ranges_start_from_the_extremes_and_then_move() -> None:
    settings = replace(CONFIG, learned_scale=False, activation_range="ema")
    model = network()
    student = prepare(model, settings)
    x = images()
    calibrate(student, x)
    with torch.no_grad():
        highest = model[:2](x).max().item()
        assert student[2].running_max.item() == pytest.approx(highest)
        student.train()(2 * x)
        batch = student[:2](2 * x).max().item()
    assert student[2].running_max.item() == pytest.approx(0.9 * highest + 0.1 * batch)


def test_mode_and_gradients_are_left_alone() -> None:
    student = prepare(network(), CONFIG).train()
    student[4].eval()
    calibrate(student, images())
    assert student.training and not student[4].training and student[2].calibration is None
    assert all(p.grad is None for p in student.parameters())


def test_rounding_alone_gets_better_with_bits_and_least_squared_error() -> None:
    # Cubed for heavy tails, which extreme values fit badly.
    model, x = network(), images(32) ** 3
    with torch.no_grad():
        exact = model(x)
        errors = {
            (bits, ranges): (
                round_only(model, QuantizationConfig(weight_bits=bits, activation_bits=bits), x, ranges)(x) - exact
            )
            .square()
            .mean()
            .item()
            for bits in (3, 4, 8)
            for ranges in ("mse", "minmax")
        }
    assert errors[3, "mse"] > errors[4, "mse"] > errors[8, "mse"]
    assert errors[3, "mse"] < errors[3, "minmax"]
    assert not any("scale" in n for n, p in round_only(model, CONFIG, x).named_parameters() if p.requires_grad)


def test_images_are_checked() -> None:
    student = prepare(network(), CONFIG)
    with pytest.raises(ValueError, match="images is empty"):
        calibrate(student, images()[:0])
    bad = images()
    bad[3, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        calibrate(student, bad)


def test_quantizers_that_no_image_reaches_are_named() -> None:
    student = prepare(network(), CONFIG)
    student.add_module("stray", ActivationQuantizer(4))
    student.forward = lambda x: nn.Sequential(*list(student)[:-1])(x)  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="stray"):
        calibrate(student, images())
