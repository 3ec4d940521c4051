"""The fine-tuning loop."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from clusterq.config import FinetuneConfig, QuantizationConfig
from clusterq.errors import DivergenceError
from clusterq.nn.layers import QuantizedConv2d
from clusterq.nn.quantizers import ActivationQuantizer
from clusterq.qat.calibrate import calibrate
from clusterq.qat.finetune import Finetuner, finetune, learning_rate, random_crop_and_flip, width_factor
from clusterq.qat.prepare import prepare

CONFIG = FinetuneConfig(steps=8, batch_size=16, temperature=4.0, autocast=False, lr=1e-2, rate_by_width=False)
LOW = QuantizationConfig(weight_bits=3, activation_bits=3)


class Images:
    def __init__(self) -> None:
        random = torch.Generator().manual_seed(5)
        self.images = torch.randn(64, 3, 8, 8, generator=random)
        self.labels = torch.randint(0, 4, (64,), generator=random)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        index = torch.arange(16 * step, 16 * step + 16) % 64
        return self.images[index], self.labels[index]


def teacher() -> nn.Sequential:
    torch.manual_seed(7)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5),
        nn.Conv2d(8, 8, 3, 2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4),
    )  # fmt: skip
    network(Images().images)
    with torch.no_grad():
        network[-1].weight.mul_(20)
    return network.eval()


def student(config: QuantizationConfig = LOW) -> nn.Module:
    network = prepare(teacher(), config)
    calibrate(network, Images().images[:32])
    return network


def trained(config: FinetuneConfig = CONFIG, quantization: QuantizationConfig = LOW) -> tuple[nn.Module, list]:
    network = student(quantization)
    return network, finetune(network, teacher(), Images(), config, seed=3)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "quantization",
    [
        LOW,
        QuantizationConfig(weight_bits=4, activation_bits=8, layer_bits={"4": 2}),
        replace(LOW, learned_scale=False),
        replace(LOW, learned_scale=False, activation_range="ema", weight_range="minmax", gradient="pass_through"),
    ],
    ids=["learned", "w4a8", "fixed", "ema"],
)
def test_the_student_learns(quantization: QuantizationConfig, autocast: bool) -> None:
    # A layer of two bits of this tiny network diverges at 1e-2 under bfloat16 on a processor without AVX-512.
    lr = 3e-3 if quantization.layer_bits else CONFIG.lr
    config = replace(CONFIG, steps=120, augment=False, autocast=autocast, lr=lr)
    network, metrics = trained(config, quantization)
    losses = [m["loss"] for m in metrics]
    assert len(losses) == 120 and sum(losses[-8:]) < 0.7 * sum(losses[:8])
    assert not network.training and all(p.dtype == torch.float32 for p in network.parameters())


def test_the_same_seed_gives_the_same_bits() -> None:
    (first, one), (second, two) = trained(), trained()
    assert one == two
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    network = student()
    other = finetune(network, teacher(), Images(), CONFIG, seed=4)
    assert [m["loss"] for m in other] != [m["loss"] for m in one]


def test_no_global_random_numbers_are_used() -> None:
    network, model = student(), teacher()
    before = torch.get_rng_state()
    finetune(network, model, Images(), CONFIG, seed=3)
    assert torch.equal(before, torch.get_rng_state())


def test_an_interrupted_run_continues_bit_for_bit() -> None:
    for quantization in (LOW, replace(LOW, learned_scale=False, activation_range="ema", range_steps=6)):
        whole, metrics = trained(quantization=quantization)
        half = Finetuner(student(quantization), teacher(), Images(), CONFIG, seed=3)
        states = []
        half.run(lambda done, _, h=half, s=states: s.append(h.state_dict()) if done == 5 else None)
        rest = Finetuner(student(quantization), teacher(), Images(), CONFIG, seed=99)
        rest.load_state_dict(states[0])
        assert rest.step == 5
        rest.run()
        assert rest.metrics == metrics
        for (name, a), b in zip(whole.state_dict().items(), rest.student.state_dict().values(), strict=True):
            assert torch.equal(a, b), name


def test_a_loaded_state_takes_the_place_of_steps_not_logged_yet() -> None:
    saved = Finetuner(student(), teacher(), Images(), CONFIG, seed=3)
    for _ in range(2):
        saved.train_step()
    run = Finetuner(student(), teacher(), Images(), CONFIG, seed=4)
    for _ in range(3):
        run.train_step()
    run.load_state_dict(saved.state_dict())
    run.run()
    assert [m["step"] for m in run.metrics] == list(range(8))
    assert run.metrics[:2] == saved.metrics


def test_distillation_takes_temperature_and_reduction_from_the_settings() -> None:
    first = {}
    for reduction in ("batchmean", "mean"):
        config = replace(CONFIG, steps=1, kd_reduction=reduction, augment=False)
        first[reduction] = finetune(student(), teacher(), Images(), config, seed=0)[0]["kd"]
    images, _ = Images().batch(0)
    with torch.no_grad():
        p, q = (network(images).double().div(4).softmax(1) for network in (teacher(), student().eval()))
    expected = 16 * (p * (p.log() - q.log())).sum(1).mean().item()
    assert first["batchmean"] == pytest.approx(expected, rel=1e-4)
    assert first["mean"] == pytest.approx(expected / 4, rel=1e-4)


def test_the_teacher_takes_no_gradient_and_keeps_its_mode() -> None:
    model = teacher().train()
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    finetune(student(), model, Images(), CONFIG, seed=0)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training and not model[1].training


def test_batch_norm_statistics_stay_and_gamma_trains_by_setting() -> None:
    for train in (True, False):
        network = student()
        before = copy.deepcopy(network.state_dict())
        finetune(network, teacher(), Images(), replace(CONFIG, train_batch_norm=train), seed=0)
        after = network.state_dict()
        for statistic in ("running_mean", "running_var", "num_batches_tracked"):
            assert torch.equal(before[f"1.{statistic}"], after[f"1.{statistic}"])
        assert torch.equal(before["1.weight"], after["1.weight"]) != train
        assert not torch.equal(before["0.weight"], after["0.weight"])


def test_moving_ranges_stop_after_their_steps() -> None:
    quantization = replace(LOW, learned_scale=False, activation_range="ema", range_steps=5)
    network, _ = trained(quantization=quantization)
    counts = {int(m.observations) for m in network.modules() if isinstance(m, ActivationQuantizer)}
    assert counts == {5}


def test_learned_steps_have_their_own_rate_and_no_decay() -> None:
    still = student()
    before = copy.deepcopy(still.state_dict())
    finetune(still, teacher(), Images(), replace(CONFIG, scale_lr_factor=0.0, weight_decay=10.0), seed=0)
    after = still.state_dict()
    assert torch.equal(before["2.scale"], after["2.scale"])
    assert torch.equal(before["0.weight_quantizer.scale"], after["0.weight_quantizer.scale"])
    assert after["0.weight"].norm() < 0.9 * before["0.weight"].norm()
    moving, _ = trained()
    assert not torch.equal(before["2.scale"], moving.state_dict()["2.scale"])


def test_a_diverging_loss_names_step_and_term() -> None:
    class Spoiled(Images):
        def batch(self, step: int) -> tuple[Tensor, Tensor]:
            images, labels = super().batch(step)
            return (images * float("nan") if step == 3 else images), labels

    with pytest.raises(DivergenceError, match="'kd' became nan at step 3"):
        finetune(student(), teacher(), Spoiled(), CONFIG, seed=0)
    short = replace(CONFIG, steps=4, kd_weight=0.0, ce_weight=1.0)
    with pytest.raises(DivergenceError, match="'ce' became nan at step 3"):
        finetune(student(), teacher(), Spoiled(), short, seed=0)


def test_metrics_and_callbacks() -> None:
    seen, done = [], []
    config = replace(CONFIG, ce_weight=0.5, optimizer="adam", grad_clip=1.0, steps=13)
    metrics = finetune(
        student(), teacher(), Images(), config, seed=0,
        progress=lambda a, b: done.append((a, b)), on_step=lambda step, terms: seen.append((step, dict(terms))),
    )  # fmt: skip
    assert done == [(i + 1, 13) for i in range(13)] and [s for s, _ in seen] == list(range(13))
    for record in metrics:
        assert record["loss"] == pytest.approx(record["kd"] + 0.5 * record["ce"], rel=1e-5)
        assert 0 <= record["agreement"] <= 1


def test_gradient_clipping_bounds_the_update() -> None:
    config = replace(CONFIG, steps=1, momentum=0.0, weight_decay=0.0, grad_clip=1e-3, lr=1.0, schedule="constant")
    config = replace(config, scale_lr_factor=1.0)
    network = student()
    before = {n: p.detach().clone() for n, p in network.named_parameters()}
    finetune(network, teacher(), Images(), config, seed=0)
    moved = math.sqrt(sum((p.detach() - before[n]).square().sum().item() for n, p in network.named_parameters()))
    assert moved == pytest.approx(1e-3, rel=1e-2)


def test_no_steps_is_calibration_only() -> None:
    network = student()
    before = copy.deepcopy(network.state_dict())
    assert finetune(network, teacher(), Images(), replace(CONFIG, steps=0), seed=0) == []
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_schedules() -> None:
    config = FinetuneConfig(steps=100, lr=1.0)
    assert learning_rate(config, 0) == 1.0
    assert learning_rate(config, 50) == pytest.approx(0.5)
    stepped = replace(config, schedule="step")
    rates = [learning_rate(stepped, s) for s in (0, 24, 25, 50, 75, 99)]
    assert rates == pytest.approx([1, 1, 0.1, 0.01, 0.001, 0.001])
    assert learning_rate(replace(config, schedule="constant"), 99) == 1.0


@pytest.mark.parametrize(
    ("weights", "activations", "factor"),
    [(4, 4, 1), (8, 8, 1 / 16), (4, 8, 1 / 4), (3, 3, 2), (2, 2, 2), (5, 4, 2**-0.5)],
)
def test_rate_of_a_width(weights: int, activations: int, factor: float) -> None:
    quantization = QuantizationConfig(weight_bits=weights, activation_bits=activations)
    assert width_factor(quantization) == pytest.approx(factor)
    config = replace(CONFIG, steps=1, momentum=0.0, weight_decay=0.0, grad_clip=0.0, lr=0.1, schedule="constant")
    moved = []
    for by_width in (True, False):
        network = student(quantization)
        before = {n: p.detach().clone() for n, p in network.named_parameters()}
        finetune(network, teacher(), Images(), replace(config, rate_by_width=by_width), seed=0)
        moved.append(torch.cat([(p.detach() - before[n]).flatten() for n, p in network.named_parameters()]))
    assert moved[1].norm() > 0
    torch.testing.assert_close(moved[0], moved[1] * factor, rtol=1e-3, atol=1e-6)


def test_every_image_is_cropped_and_flipped_on_its_own() -> None:
    images = torch.arange(1.0, 1 + 50 * 2 * 16 * 16).view(50, 2, 16, 16)
    out = random_crop_and_flip(images, torch.Generator().manual_seed(0))
    padded = nn.functional.pad(images, (2, 2, 2, 2))
    found = set()
    for i in range(50):
        views = {
            (top, left, flip): padded[i, :, top : top + 16, left : left + 16].flip(2) if flip else
            padded[i, :, top : top + 16, left : left + 16]
            for top in range(5) for left in range(5) for flip in (False, True)
        }  # fmt: skip
        matches = [key for key, view in views.items() if torch.equal(view, out[i])]
        assert len(matches) == 1
        found.add(matches[0])
    assert len(found) > 20
    again = random_crop_and_flip(images, torch.Generator().manual_seed(0))
    assert torch.equal(out, again) and out.is_contiguous()


def test_quantized_weights_stay_on_their_grid_after_training() -> None:
    network, _ = trained()
    layer = next(m for m in network.modules() if isinstance(m, QuantizedConv2d))
    assert all(len(torch.unique(channel)) <= 8 for channel in layer.quantized_weight())
