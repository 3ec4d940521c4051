"""The whole method on a small network for scikit-learn-sized images: presets, reuse of images, errors, determinism."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clusterq.config import ClusterQConfig, FinetuneConfig, QuantizationConfig, SynthesisConfig, preset
from clusterq.errors import DivergenceError, ModelError
from clusterq.method import ClusterQ, quantize
from clusterq.synthesis import BankSource, GeneratorSource, StoredImages
from clusterq.synthesis.sources import generator_rate

SHAPE = (1, 8, 8)
CLASSES = 4
W3A3 = QuantizationConfig(weight_bits=3, activation_bits=3)
TINY = ClusterQConfig(
    quantization=QuantizationConfig(weight_bits=4, activation_bits=4),
    synthesis=SynthesisConfig(
        num_images=24, batch_size=12, image_steps=10, latent_dim=8, generator_width=8, autocast=False
    ),
    finetune=FinetuneConfig(steps=6, batch_size=8, calibration_images=16, autocast=False),
    seed=1,
)


def network_and_data():
    torch.manual_seed(0)
    patterns = torch.randn(CLASSES, *SHAPE)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, CLASSES),
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)

    def draw(count):
        labels = torch.randint(0, CLASSES, (count,))
        return patterns[labels] + 0.7 * torch.randn(count, *SHAPE), labels

    for _ in range(60):
        x, labels = draw(64)
        loss = F.cross_entropy(net(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.zero_grad()
    return net.eval(), draw(256)


@pytest.fixture(scope="module")
def trained():
    return network_and_data()


@pytest.fixture
def network(trained):
    return trained[0]


def same_state(a, b):
    first, second = a.state_dict(), b.state_dict()
    return all(torch.equal(first[k], second[k]) for k in first)


def shortened(name):
    config = preset(name)
    return replace(
        config,
        synthesis=replace(
            config.synthesis,
            batch_size=12,
            num_images=24,
            image_steps=6,
            warmup_steps=min(config.synthesis.warmup_steps, 3),
            steps=min(config.synthesis.steps, 3),
            generator_width=8,
            latent_dim=8,
        ),
        finetune=replace(config.finetune, steps=4, batch_size=8, calibration_images=16),
    )


@pytest.mark.parametrize("name", ["default", "paper", "gdfq"])
def test_every_preset_runs_end_to_end(network, name):
    before = {k: v.clone() for k, v in network.state_dict().items()}
    config = shortened(name)
    result = ClusterQ(network, config, input_shape=SHAPE, num_classes=CLASSES).run()
    logits = result.student(torch.randn(5, *SHAPE))
    assert logits.shape == (5, CLASSES) and logits.isfinite().all()
    assert not result.student.training
    assert result.images.shape == (24, *SHAPE) and result.labels.shape == (24,)
    assert 0 <= result.label_accuracy <= 1
    assert set(result.seconds) == {"synthesis", "calibration", "finetune"}
    assert all(v > 0 for v in result.seconds.values())
    if name == "default":
        assert result.samples_seen == {"synthesis": 6 * 24, "finetune": 4 * 8}
        assert len(result.metrics["synthesis"]) == 12
    else:
        # 3 warm-up steps, then one generator step for each of the 4 student steps
        assert result.samples_seen == {"synthesis": 7 * 12, "finetune": 4 * 12}
        assert len(result.metrics["synthesis"]) == 7
        assert ("diversity" in result.metrics["synthesis"][-1]) == (name == "paper")
    assert len(result.metrics["finetune"]) == 4
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())


def test_same_seed_same_student_bits(network):
    torch.manual_seed(1)
    first = ClusterQ(network, TINY, input_shape=SHAPE).run()
    torch.manual_seed(2)
    second = ClusterQ(network, TINY, input_shape=SHAPE).run()
    assert torch.equal(first.images, second.images)
    assert same_state(first.student, second.student)
    third = ClusterQ(network, replace(TINY, seed=2), input_shape=SHAPE).run()
    assert not torch.equal(first.images, third.images)


@pytest.mark.parametrize("stream", [False, True])
def test_other_bits_reuse_the_same_images(network, stream):
    synthesis = replace(TINY.synthesis, source="generator", warmup_steps=3, steps=3)
    finetune = replace(TINY.finetune, images="stream" if stream else "bank")
    config = replace(TINY, synthesis=synthesis, finetune=finetune)
    method = ClusterQ(network, config, input_shape=SHAPE)
    first = method.run()
    images = first.images.clone()
    assert isinstance(method.source, GeneratorSource) and method.streaming == stream
    second = method.finetune(W3A3)
    assert torch.equal(images, second.images)
    assert second.metrics["synthesis"] == first.metrics["synthesis"] and second.samples_seen == first.samples_seen
    for result, wanted in ((first, TINY.quantization), (second, W3A3)):
        # What scheme "auto" became.
        assert result.config.quantization == replace(wanted, scheme="deploy")
    assert not same_state(first.student, second.student)
    again = method.finetune()
    assert same_state(first.student, again.student)


def test_generator_can_fill_a_bank(network):
    synthesis = replace(TINY.synthesis, source="generator", warmup_steps=2, steps=3)
    method = ClusterQ(network, replace(TINY, synthesis=synthesis), input_shape=SHAPE)
    result = method.run()
    assert not method.streaming
    assert len(result.metrics["synthesis"]) == 5
    assert result.samples_seen["synthesis"] == 5 * 12


def test_calibration_alone_gives_an_untrained_student(network):
    method = ClusterQ(network, TINY, input_shape=SHAPE)
    rounded = method.calibrate()
    assert isinstance(method.source, BankSource)
    weights = [m.weight for m in rounded.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    originals = [m.weight for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(weights) == len(originals) == 4
    assert all(torch.equal(a, b) for a, b in zip(weights, originals, strict=True))
    x = torch.randn(4, *SHAPE)
    assert not torch.equal(rounded(x), network(x))
    trained = method.finetune().student
    assert not same_state(trained, rounded)


def test_a_calibrated_student_is_trained_in_place_and_gives_the_same(network):
    method = ClusterQ(network, TINY, input_shape=SHAPE)
    student = method.calibrate()
    result = method.finetune(student=student)
    assert result.student is student
    assert same_state(student, method.finetune().student)
    with pytest.raises(ValueError, match="another quantization"):
        method.finetune(W3A3, student=method.calibrate())


def test_changing_the_network_afterwards_changes_nothing(network):
    first = ClusterQ(network, TINY, input_shape=SHAPE)
    second = ClusterQ(network, TINY, input_shape=SHAPE)
    expected = first.run().student
    with torch.no_grad():
        next(network.parameters()).mul_(2)
    assert same_state(second.run().student, expected)


def test_images_made_earlier_can_be_used(network):
    method = ClusterQ(network, TINY, input_shape=SHAPE)
    first = method.run()
    other = ClusterQ(network, TINY, input_shape=SHAPE)
    source = other.use_images(first.images.detach(), first.labels)
    assert isinstance(source, StoredImages)
    second = other.finetune()
    assert same_state(first.student, second.student)
    assert second.metrics["synthesis"] == [] and second.samples_seen["synthesis"] == 0
    with pytest.raises(ValueError, match="images has shape"):
        other.use_images(torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64))
    for labels in (torch.zeros(2), torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.bool)):
        with pytest.raises(ValueError, match=f"labels has dtype {labels.dtype}; wanted torch.int64"):
            other.use_images(torch.zeros(2, *SHAPE), labels)
    with pytest.raises(ValueError, match="labels range from 0 to 4"):
        other.use_images(torch.zeros(2, *SHAPE), torch.tensor([0, 4]))


def test_labels_near_chance_are_warned_of(network, trained):
    images = torch.zeros(8, *SHAPE)
    worthless = torch.arange(8) % CLASSES
    method = ClusterQ(network, TINY, input_shape=SHAPE)
    method.use_images(images, worthless)
    # One class for all images: a quarter of the balanced labels is right by chance.
    with pytest.warns(UserWarning, match=r"assigns 25\.0% of the images to their label, near chance \(25\.0%\)"):
        assert method.finetune().label_accuracy == 0.25
    blind = copy.deepcopy(network)
    with torch.no_grad():
        blind[-1].weight.zero_()
    with pytest.warns(UserWarning, match="near chance"):
        ClusterQ(blind, TINY, input_shape=SHAPE).synthesize()
    real, labels = trained[1]
    method.use_images(real, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert method.finetune().label_accuracy > 0.9


def test_a_streaming_generator_is_scheduled_over_the_student_steps(network):
    config = shortened("paper")
    config = replace(config, finetune=replace(config.finetune, steps=9))
    method = ClusterQ(network, config, input_shape=list(SHAPE))
    method.run()
    # 3 steps of warm-up and 9 beside the student: the rate falls before steps 3, 6 and 9.
    assert method.source.config.steps == 9 and method.source.step == 12
    assert [round(generator_rate(method.source.config, s) / 1e-3, 9) for s in (2, 3, 6, 9)] == [1, 0.1, 0.01, 0.001]
    assert method.source._optimizer.param_groups[0]["lr"] == pytest.approx(1e-6)


def test_distillation_brings_the_student_closer_to_the_network(trained):
    network, (images, _) = trained
    config = replace(
        TINY,
        quantization=QuantizationConfig(weight_bits=2, activation_bits=3),
        # Two small batches of one kind: the data of this network are white noise, moved by no pixel.
        synthesis=replace(
            TINY.synthesis,
            num_images=48,
            batch_size=24,
            image_steps=50,
            roughness=(0.0, 0.0),
            contrast=(0.0, 0.0),
            ce_temperature=(1.0, 1.0),
            shift=0,
        ),
        finetune=replace(TINY.finetune, steps=100, batch_size=24, lr=3e-3, augment=False),
    )
    method = ClusterQ(network, config, input_shape=SHAPE)
    rounded = method.calibrate()
    student = method.finetune().student
    with torch.no_grad():
        wanted = F.softmax(network(images), 1)

        def distance(model):
            return F.kl_div(F.log_softmax(model(images), 1), wanted, reduction="batchmean").item()

        assert distance(student) < 0.7 * distance(rounded)


def test_quantize_is_one_call(network):
    student = quantize(network, input_shape=SHAPE, weight_bits=3, activation_bits=3, preset=TINY)
    expected = ClusterQ(network, replace(TINY, quantization=W3A3), input_shape=SHAPE).run().student
    assert same_state(student, expected) and not student.training


def test_callbacks_name_their_phase(network):
    progress, steps = [], []
    ClusterQ(
        network,
        TINY,
        input_shape=SHAPE,
        progress=lambda phase, done, total: progress.append((phase, done, total)),
        on_step=lambda phase, step, terms: steps.append((phase, step, dict(terms))),
    ).run()
    assert ("synthesis", 20, 20) in progress and ("finetune", 6, 6) in progress
    assert [step for phase, step, _ in steps if phase == "synthesis"] == list(range(20))
    assert [step for phase, step, _ in steps if phase == "finetune"] == list(range(6))


def test_progress_bar_goes_to_standard_error(network, capsys):
    ClusterQ(network, TINY, input_shape=SHAPE, progress=True).run()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "synthesis" in captured.err and "finetune" in captured.err


def test_unusable_requests_get_one_clear_sentence(network):
    with pytest.raises(ModelError, match="num_classes is 7; the network puts out 4 classes"):
        ClusterQ(network, TINY, input_shape=SHAPE, num_classes=7)
    with pytest.raises(ModelError, match="no BatchNorm"):
        ClusterQ(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), TINY, input_shape=SHAPE)
    with pytest.raises(ModelError, match="does not accept images"):
        ClusterQ(network, TINY, input_shape=(3, 8, 8))
    with pytest.raises(ValueError, match="preset 'best'"):
        ClusterQ(network, "best", input_shape=SHAPE)
    method = ClusterQ(network, replace(TINY, synthesis=replace(TINY.synthesis, image_lr=1e30)), input_shape=SHAPE)
    with pytest.raises(DivergenceError):
        method.run()
    assert method.source is None
