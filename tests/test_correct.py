"""BatchNorm correction: outputs of the quantized network keep the mean and variance of the one in floating point."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from clusterq.checkpoint import load, save
from clusterq.config import ClusterQConfig, QuantizationConfig
from clusterq.qat.calibrate import calibrate
from clusterq.qat.correct import BatchNormCorrection
from clusterq.qat.prepare import prepare


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in ((2, 6), (6, 6), (6, 5)):
        norm = nn.BatchNorm2d(outputs)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.running_mean, std=0.2)
        nn.init.uniform_(norm.running_var, 0.2, 2.0)
        layers += [nn.Conv2d(inputs, outputs, 3), norm, nn.ReLU()]
    return nn.Sequential(*layers).eval()


def images(count: int = 32) -> Tensor:
    return torch.randn(count, 2, 12, 12, generator=torch.Generator().manual_seed(1))


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    return mean, var


def quantized(model: nn.Sequential, x: Tensor, *, corrected: bool, batch_size: int | None = None) -> nn.Sequential:
    settings = QuantizationConfig(scheme="paper", weight_bits=2, activation_bits=2, correct_batch_norm=corrected)
    student = prepare(model, settings)
    calibrate(student, x, settings, batch_size=batch_size)
    assert isinstance(student, nn.Sequential)
    return student


@torch.no_grad()
def test_outputs_keep_mean_and_variance_in_every_layer() -> None:
    model, x = network(), images()
    student, plain = quantized(model, x, corrected=True), quantized(model, x, corrected=False)
    for end in (2, 5, 8):
        mean, var = moments(model[:end](x))
        got_mean, got_var = moments(student[:end](x))
        torch.testing.assert_close(got_mean, mean, rtol=0, atol=1e-5)
        # The smoothing leaves up to a thousandth of what the running variance stands for in the output, gamma^2.
        torch.testing.assert_close(got_var, var, rtol=1e-5, atol=1e-3)
        assert (moments(plain[:end](x))[1] / var - 1).abs().max() > 0.05


@torch.no_grad()
def test_correction_brings_the_outputs_closer() -> None:
    model, x = network(), images()
    fresh = images(64)[32:]
    errors = [(quantized(model, x, corrected=c)(fresh) - model(fresh)).square().mean() for c in (False, True)]
    assert errors[1] < 0.8 * errors[0]


@torch.no_grad()
def test_only_what_quantization_changed_is_corrected_not_the_images() -> None:
    model = network()
    strange = 3 + 5 * images()
    settings = QuantizationConfig(scheme="paper", weight_bits=8, activation_bits=8)
    student = prepare(model, settings)
    calibrate(student, strange, settings)
    for layer in (1, 4, 7):
        torch.testing.assert_close(student[layer].running_var, model[layer].running_var, rtol=0.05, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_calibrating_again_starts_from_the_statistics_as_trained(dtype: torch.dtype) -> None:
    model, x = network().to(dtype), images().to(dtype)
    settings = QuantizationConfig(scheme="paper", weight_bits=2, activation_bits=2)
    once, twice = prepare(model, settings), prepare(model, settings)
    calibrate(once, x)
    calibrate(twice, 2 * x + 1)
    calibrate(twice, x)
    for name, value in once.state_dict().items():
        assert torch.equal(value, twice.state_dict()[name]), name
    assert not torch.equal(once[1].running_var, model[1].running_var)


@torch.no_grad()
def test_small_batches_correct_on_the_first_of_them() -> None:
    model, x = network(), images(32)
    student = quantized(model, x, corrected=True, batch_size=12)
    first = x[:12]
    for end in (2, 5, 8):
        torch.testing.assert_close(moments(student[:end](first))[0], moments(model[:end](first))[0], rtol=0, atol=1e-5)


def test_a_loaded_network_is_not_corrected_twice(tmp_path: Path) -> None:
    settings = QuantizationConfig(scheme="paper", weight_bits=2, activation_bits=2)
    model = nn.Sequential(*network(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    student = prepare(model, settings)
    calibrate(student, images())
    config = ClusterQConfig(quantization=settings)
    save(student, tmp_path / "student", config=config, input_shape=(2, 12, 12))
    loaded = load(tmp_path / "student", model)
    with pytest.raises(ValueError, match="corrected before it was saved"):
        calibrate(loaded, images())


@torch.no_grad()
def test_constant_and_dead_channels_stay_finite_and_bounded() -> None:
    model, x = network(), images()
    model[0].weight[0] = 0.0  # constant in floating point
    model[3].weight[1] *= 1e-20
    model[4].running_var[1] = 0.0
    student = quantized(model, x, corrected=True)
    for layer in (1, 4, 7):
        width = model[layer].running_var.double() + model[layer].eps
        changed = (student[layer].running_var.double() + student[layer].eps) / width
        assert torch.isfinite(student[layer].running_mean).all() and torch.isfinite(changed).all()
        assert ((changed > 0.06) & (changed < 16.1)).all()
    assert torch.isfinite(student(x)).all()


class Shared(nn.Module):
    """One BatchNorm layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.second(self.norm(self.first(x)).relu()))
        return out


@torch.no_grad()
def test_a_layer_called_twice_compares_like_with_like() -> None:
    torch.manual_seed(2)
    model = Shared().eval()
    # The two calls see very different values.
    model.first.weight *= 10
    x = images()
    errors = []
    for corrected in (False, True):
        settings = QuantizationConfig(scheme="paper", weight_bits=3, activation_bits=8, correct_batch_norm=corrected)
        student = prepare(model, settings, example_input=x)
        calibrate(student, x)
        errors.append(((student(x) - model(x)).square().mean() / model(x).square().mean()).sqrt())
    assert errors[1] < 1.1 * errors[0] < 0.5


@torch.no_grad()
def test_one_dimensional_batch_norm() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8)).eval()
    x = torch.randn(64, 6)
    student = prepare(model, QuantizationConfig(scheme="paper", weight_bits=2, activation_bits=2))
    calibrate(student, x)
    mean, got = model(x).double().mean(0), student(x).double().mean(0)
    torch.testing.assert_close(got, mean, rtol=0, atol=1e-5)


def test_layers_without_running_statistics_or_never_reached_are_left_alone() -> None:
    model = nn.ModuleDict({"used": nn.BatchNorm2d(2), "bare": nn.BatchNorm2d(2, track_running_stats=False)}).eval()
    model["idle"] = nn.BatchNorm2d(2).eval()
    before = model["idle"].running_var.clone()
    correction = BatchNormCorrection(model)
    with torch.no_grad():
        with correction.observing():
            model["used"](images())
        with correction.correcting():
            model["used"](2 * images())
            model["idle"](images())
    assert torch.equal(model["idle"].running_var, before)
    assert model["used"].running_var.tolist() == pytest.approx([4.0, 4.0], rel=1e-2)
