"""What may not throw fine-tuning off: dead filters, BatchNorm in front of convolutions, images far from 0."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from clusterq.config import FinetuneConfig, QuantizationConfig
from clusterq.nn import folding
from clusterq.nn.layers import QuantizedConv2d
from clusterq.qat import Finetuner, calibrate, finetune, prepare
from clusterq.qat.centering import Centering
from clusterq.qat.dead_filters import DeadFilters
from clusterq.synthesis import StoredImages

SHAPE = (3, 8, 8)
CENTER = 128.0
PAPER, DEPLOY = (QuantizationConfig(weight_bits=4, activation_bits=4, scheme=s) for s in ("paper", "deploy"))
CONFIG = FinetuneConfig(steps=12, batch_size=16, autocast=False)
SMALL = 1e-6


class PreActivation(nn.Module):
    """A residual sum that BatchNorm and another sum read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm1, self.conv1 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm2, self.fc = nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv1(functional.relu(self.norm1(x)))
        return self.fc(functional.relu(self.norm2(x)).mean((2, 3)))  # type: ignore[no-any-return]


def images(center: float = 0.0, scale: float = 1.0) -> Tensor:
    return center + scale * torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(1))


def network(x: Tensor) -> nn.Module:
    """Two convolutions, their statistics those of the images."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    layers += [nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    last = nn.Linear(8, 4)
    # Logits as large as a trained network's.
    nn.init.normal_(last.weight, std=1.0)
    return remember(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), last), x)


def remember(model: nn.Module, x: Tensor) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(x)
    return model.eval()


def student_of(model: nn.Module, x: Tensor, config: QuantizationConfig) -> nn.Module:
    student = prepare(model, config, example_input=x[:1])
    calibrate(student, x)
    return student


def losses(model: nn.Module, x: Tensor, config: QuantizationConfig, **settings: Any) -> list[float]:
    source = StoredImages(x, torch.arange(len(x)) % 4, CONFIG.batch_size)
    metrics = finetune(student_of(model, x, config), model, source, CONFIG, seed=0, **settings)
    return [m["kd"] for m in metrics]


def killed(model: nn.Module) -> nn.Module:
    """Its first three filters put out next to nothing, and BatchNorm remembers that."""
    dead = copy.deepcopy(model)
    conv, norm = dead[0], dead[1]
    assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None and norm.running_var is not None
    with torch.no_grad():
        conv.weight[:3] *= SMALL
        norm.running_mean[:3] *= SMALL
        norm.running_var[:3] *= SMALL**2
        norm.bias[:3] = 0.3
    return dead


@pytest.mark.parametrize("config", [PAPER, DEPLOY], ids=["paper", "deploy"])
def test_dead_filters_stay_dead(config: QuantizationConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    x = images()
    model = killed(network(x))
    student = student_of(model, x, config)
    source = StoredImages(x, torch.arange(len(x)) % 4, CONFIG.batch_size)
    run = Finetuner(student, model, source, CONFIG, seed=0)
    run.run()
    weight = student.get_submodule("0").weight.detach()
    assert float(weight[:3].abs().max()) < 100 * SMALL
    kept = [m["kd"] for m in run.metrics]
    monkeypatch.setattr(DeadFilters, "limit_", lambda self: None)
    loose = losses(model, x, config)
    assert max(kept[1:]) < 2 * kept[0] < 0.1 * max(loose[1:])


def test_gradients_of_living_filters_pass_unchanged() -> None:
    x = images()
    student = student_of(killed(network(x)), x, PAPER)
    limits = DeadFilters(student)
    functional.cross_entropy(student(x), torch.arange(len(x)) % 4).backward()
    parameters = [p for p in student.parameters() if p.grad is not None]
    before = [p.grad.clone() for p in parameters if p.grad is not None]
    limits.limit_()
    changed = [(b != p.grad).flatten(1).any(1) for b, p in zip(before, parameters, strict=True) if p.dim() == 4]
    assert changed[0].tolist() == [True] * 3 + [False] * 5 and not changed[1].any()
    weight = student.get_submodule("0").weight
    assert bool((weight.grad.flatten(1).norm(dim=1) <= 2.001 * weight.detach().flatten(1).norm(dim=1))[:3].all())


def test_batch_norm_in_front_of_a_layer_trains_as_it_does_in_floating_point() -> None:
    """In scheme deploy gamma and beta train, with the gradients they have without quantizers, not a convolution."""
    x = images()
    torch.manual_seed(0)
    model = remember(PreActivation(), x)
    student = prepare(model, QuantizationConfig(weight_bits=8, activation_bits=8, sum_bits=8, scheme="deploy"))
    calibrate(student, x)
    conv, norm = student.norm1[0], student.norm1[1]
    assert isinstance(conv, QuantizedConv2d) and folding.integer_norm_of(norm) is conv
    assert not any(p.requires_grad for p in conv.parameters())
    assert torch.equal(conv.quantized_weight(), torch.ones(8, 1, 1, 1))
    student(x).square().mean().backward()
    model(x).square().mean().backward()
    for name in ("weight", "bias"):
        torch.testing.assert_close(getattr(norm, name).grad, getattr(model.norm1, name).grad, rtol=0.3, atol=0.01)
    torch.testing.assert_close(student(x), model(x), rtol=0.1, atol=0.05)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_identity_is_exact_at_every_width(bits: int, symmetric: bool) -> None:
    config = QuantizationConfig(weight_bits=bits, activation_bits=8, scheme="deploy", weight_symmetric=symmetric)
    student = student_of(remember(PreActivation(), images()), images(), config)
    torch.testing.assert_close(student.norm1[0].quantized_weight(), torch.ones(8, 1, 1, 1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("config", [PAPER, DEPLOY], ids=["paper", "deploy"])
def test_training_on_images_far_from_zero(config: QuantizationConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    x = images(CENTER, 6.0)
    model = network(x)
    blank = torch.full((1, *SHAPE), CENTER)
    kept = losses(model, x, config, blank=blank)
    monkeypatch.setattr("clusterq.qat.centering._first_layer", lambda student, blank: None)
    loose = losses(model, x, config, blank=blank)
    assert kept[0] == loose[0] and sum(kept[1:]) < 0.5 * sum(loose[1:])


@pytest.mark.parametrize("config", [PAPER, DEPLOY], ids=["paper", "deploy"])
def test_an_interrupted_run_continues_bit_for_bit(config: QuantizationConfig) -> None:
    """What layer and filters began with is not in the state: the calibrated student says it again."""
    x = images(CENTER, 6.0)
    model = killed(network(x))
    source, blank = StoredImages(x, torch.arange(len(x)) % 4, CONFIG.batch_size), torch.full((1, *SHAPE), CENTER)

    def begin() -> Finetuner:
        return Finetuner(student_of(model, x, config), model, source, CONFIG, seed=0, blank=blank)

    whole, first, second = begin(), begin(), begin()
    whole.run()
    states: list[dict[str, Any]] = []

    def stop(done: int, total: int) -> None:
        if done == 5:
            states.append(first.state_dict())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.run(stop)
    second.load_state_dict(states[0])
    second.run()
    assert second.metrics == whole.metrics
    for (name, a), b in zip(whole.student.state_dict().items(), second.student.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def still(layers: Iterator[nn.Module]) -> list[Tensor]:
    return [m.running_mean.clone() for m in layers if isinstance(m, nn.BatchNorm2d) and m.running_mean is not None]


@pytest.mark.parametrize("config", [PAPER, DEPLOY], ids=["paper", "deploy"])
def test_what_the_layer_moved_goes_into_the_running_mean(config: QuantizationConfig) -> None:
    """The function that was trained is the function that is left, and calibrating again keeps it."""
    x = images(CENTER, 64.0)
    student = student_of(network(x), x, config)
    layer, norm = student.get_submodule("0"), student.get_submodule("1")
    assert isinstance(layer, QuantizedConv2d)
    centering = Centering(student, torch.full((1, *SHAPE), CENTER))
    means = [norm.running_mean.clone(), norm.uncorrected_mean.clone()]
    with centering, torch.no_grad():
        before = student(x)
        layer.weight += 0.05
        during = student(x)
    with torch.no_grad():
        after = student(x)
    assert not torch.equal(before, during)
    # A few values are rounded to the neighbouring code.
    assert float((after - during).abs().mean()) < 0.02 * float((before - during).abs().mean())
    moved = [now - then for now, then in zip((norm.running_mean, norm.uncorrected_mean), means, strict=True)]
    assert bool((moved[0] > 1).all())
    torch.testing.assert_close(moved[0], moved[1])
    with centering:
        pass
    torch.testing.assert_close(norm.running_mean - means[0], moved[0])


def test_where_something_else_reads_the_first_layer_nothing_moves() -> None:
    x = images(CENTER, 64.0)
    for model in (remember(PreActivation(), x), nn.Sequential(nn.Flatten(), nn.Linear(192, 4))):
        student = student_of(model, x, PAPER)
        before = still(student.modules())
        state = {k: v.clone() for k, v in student.state_dict().items()}
        with Centering(student, torch.full((1, *SHAPE), CENTER)):
            assert not any(m._forward_hooks for m in student.modules())
            if before:
                with torch.no_grad():
                    student.stem.weight += 0.05
        assert all(torch.equal(a, b) for a, b in zip(before, still(student.modules()), strict=True))
        assert all(torch.equal(v, state[k]) for k, v in student.state_dict().items() if k != "stem.weight")


def test_nothing_is_looked_for_when_images_lie_around_zero() -> None:
    student = student_of(network(images()), images(), PAPER)
    for blank in (None, torch.zeros(1, *SHAPE)):
        with Centering(student, blank):
            assert not any(m._forward_hooks for m in student.modules())
