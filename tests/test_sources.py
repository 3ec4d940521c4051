"""Teacher, objective and image sources on a tiny trained network."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from clusterq.config import SynthesisConfig
from clusterq.errors import DivergenceError, ModelError
from clusterq.synthesis import (
    BankSource,
    GeneratorSource,
    StoredImages,
    SynthesisObjective,
    Teacher,
    project_statistics,
    semantic_start,
)
from clusterq.synthesis.sources import generator_rate
from clusterq.synthesis.stored import balanced_labels

SHAPE = (1, 8, 8)
CLASSES = 4
BANK = SynthesisConfig(
    num_images=24, batch_size=12, image_steps=20, alignment_weight=0.5, diversity_weight=0.1, warmup_steps=5,
    autocast=False,
)  # fmt: skip
GENERATOR = replace(
    BANK, source="generator", warmup_steps=4, steps=4, latent_dim=8, generator_width=8, noise_relative=True
)


class Net(nn.Module):
    """Five BatchNorm layers; module order differs from execution order."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(12, CLASSES)
        self.shortcut = nn.Sequential(nn.Conv2d(6, 12, 1, stride=2, bias=False), nn.BatchNorm2d(12))
        self.norms = nn.ModuleList([nn.BatchNorm2d(6), nn.BatchNorm2d(6), nn.BatchNorm2d(12), nn.BatchNorm2d(12)])
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(1, 6, 3, padding=1, bias=False),
                nn.Conv2d(6, 6, 3, padding=1, bias=False),
                nn.Conv2d(6, 12, 3, stride=2, padding=1, bias=False),
                nn.Conv2d(12, 12, 3, padding=1, bias=False),
            ]
        )

    def forward(self, x):
        for conv, norm in zip(self.convs[:2], self.norms[:2], strict=True):
            x = F.relu(norm(conv(x)))
        y = F.relu(self.norms[2](self.convs[2](x)))
        y = self.norms[3](self.convs[3](y)) + self.shortcut(x)
        return self.head(F.relu(y).mean((2, 3)))


@pytest.fixture(scope="module")
def network():
    """Trained to tell four noisy patterns apart."""
    torch.manual_seed(0)
    patterns = torch.randn(CLASSES, *SHAPE)
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(60):
        labels = torch.randint(0, CLASSES, (64,))
        x = patterns[labels] + 0.7 * torch.randn(64, *SHAPE)
        loss = F.cross_entropy(net(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    net.zero_grad()
    return net


@pytest.fixture
def teacher(network):
    return Teacher(network, SHAPE)


def snapshot(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def test_teacher_reports_batch_norm_inputs_in_execution_order(network):
    teacher = Teacher(network, SHAPE)
    assert teacher.num_classes == CLASSES
    assert teacher.channels == (6, 6, 12, 12, 12)
    x = torch.randn(5, *SHAPE)
    inputs = []
    plain = copy.deepcopy(network).eval()
    for norm in [m for m in plain.modules() if isinstance(m, nn.BatchNorm2d)]:
        norm.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach().double()))
    with torch.no_grad():
        logits = plain(x)
    output = teacher(x)
    torch.testing.assert_close(output.logits, logits, rtol=1e-4, atol=1e-5)
    mean = torch.cat([a.mean((2, 3)) for a in inputs], 1)
    var = torch.cat([a.var((2, 3), correction=0) for a in inputs], 1)
    torch.testing.assert_close(output.mean.double(), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.var.double(), var, rtol=1e-4, atol=1e-5)
    norms = [*network.norms[:3], network.norms[3], network.shortcut[1]]
    assert torch.equal(teacher.running_mean, torch.cat([n.running_mean for n in norms]))
    assert torch.equal(teacher.running_var, torch.cat([n.running_var for n in norms]))


def test_input_shape_is_any_sequence_of_three(network):
    assert Teacher(network, list(SHAPE)).input_shape == SHAPE
    assert Teacher(network, torch.Size(SHAPE)).input_shape == SHAPE
    for bad in ([1, 8], (1, 0, 8)):
        with pytest.raises(ValueError, match=r"input_shape is \(1, .*wanted positive"):
            Teacher(network, bad)


@pytest.mark.parametrize(("layers", "start"), [(21, 9), (20, 8), (53, 25), (27, 12), (13, 5), (3, 0), (2, 0), (1, 0)])
def test_semantic_layers_follow_the_published_rule(layers, start):
    assert semantic_start(layers) == start


def test_semantic_start_is_checked():
    assert semantic_start(5, 4) == 4
    with pytest.raises(ValueError, match="semantic_start is 5"):
        semantic_start(5, 5)


class NoNorm(nn.Module):
    def forward(self, x):
        return x.flatten(1)


class Spatial(Net):
    def forward(self, x):
        return self.norms[0](self.convs[0](x))


@pytest.mark.parametrize(
    ("make", "shape", "message"),
    [
        (NoNorm, SHAPE, "has no BatchNorm"),
        (Net, (3, 8, 8), r"does not accept images of shape \(3, 8, 8\)"),
        (Spatial, SHAPE, r"wanted \[2, classes\]"),
    ],
)
def test_unusable_networks_get_one_clear_sentence(make, shape, message):
    with pytest.raises(ModelError, match=message):
        Teacher(make(), shape)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("make", ["bank", "generator"])
def test_synthesis_leaves_the_teacher_alone(network, make, autocast):
    before = snapshot(network)
    teacher = Teacher(network, SHAPE)
    inside = snapshot(teacher.model)
    if make == "bank":
        source = BankSource(teacher, replace(BANK, autocast=autocast, image_steps=8), seed=0)
    else:
        source = GeneratorSource(teacher, replace(GENERATOR, autocast=autocast), seed=0)
    source.fit()
    assert all(not p.requires_grad and p.grad is None for p in teacher.model.parameters())
    assert all(p.grad is None for p in network.parameters())
    for now, then in ((snapshot(network), before), (snapshot(teacher.model), inside)):
        assert all(torch.equal(now[k], then[k]) for k in then)
    assert source.images().isfinite().all() and source.images().dtype == torch.float32
    assert all(math.isfinite(value) for record in source.metrics for value in record.values())


def test_loss_is_the_weighted_sum_of_its_terms(teacher):
    config = replace(BANK, ce_weight=2.0, bns_weight=0.3, alignment_weight=0.9, diversity_weight=0.6)
    objective = SynthesisObjective(teacher, config, seed=0)
    images, labels = torch.randn(12, *SHAPE), torch.arange(12) % CLASSES
    objective.initialise_centroids([(torch.randn(12, *SHAPE), labels)])
    result = objective(images, labels)
    t = result.terms
    assert t["alignment"] > 0 and t["diversity"] > 0
    expected = 2 * t["ce"] + 0.3 * t["bns"] + 0.9 * t["alignment"] + 0.6 * t["diversity"]
    torch.testing.assert_close(result.total.detach(), expected)
    warmup = objective(images, labels, use_classes=False)
    assert set(warmup.terms) == {"ce", "bns", "label_accuracy"}
    torch.testing.assert_close(t["ce"], F.cross_entropy(teacher.model(images), labels))


@pytest.mark.parametrize("temperature", [1.0, 3.5])
def test_the_cross_entropy_has_a_temperature_and_its_square(teacher, temperature):
    images = torch.randn(12, *SHAPE, requires_grad=True)
    labels = torch.arange(12) % CLASSES
    objective = SynthesisObjective(
        teacher, replace(BANK, bns_weight=0.0, alignment_weight=0, diversity_weight=0), seed=0
    )
    result = objective(images, labels, temperature=temperature)
    chances = torch.softmax(teacher.model(images).double() / temperature, 1)
    expected = -(temperature**2) * chances[torch.arange(12), labels].log().mean()
    torch.testing.assert_close(result.terms["ce"].double(), expected.detach(), rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(result.total, images)
    (wanted,) = torch.autograd.grad(expected, images)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-7)


def test_every_chunk_is_asked_at_the_temperature_of_its_recipe(teacher):
    config = replace(BANK, image_steps=1, warmup_steps=0, alignment_weight=0, diversity_weight=0, shift=0)
    source = BankSource(teacher, replace(config, ce_temperature=(1.0, 6.0)), seed=0)
    images, labels = source.images().clone(), source.labels()
    temperatures = [recipe.temperature for recipe in source.recipes]
    assert len(temperatures) == 2 and abs(temperatures[0] - temperatures[1]) > 0.5
    source.fit()
    for chunk, t in enumerate(temperatures):
        part = slice(12 * chunk, 12 * chunk + 12)
        with torch.no_grad():
            expected = t**2 * F.cross_entropy(teacher.model(images[part]) / t, labels[part])
        assert source.metrics[chunk]["ce"] == pytest.approx(float(expected), rel=1e-5)


def test_centroids_follow_their_own_class(teacher):
    """The published centroids are one constant vector for all classes."""
    objective = SynthesisObjective(teacher, replace(BANK, assignment="label"), seed=0)
    images, labels = torch.randn(12, *SHAPE), torch.arange(12) % CLASSES
    objective.initialise_centroids([(images[:6], labels[:6]), (images[6:], labels[6:])])
    bank = objective.bank
    assert bank.initialised.all()
    assert torch.pdist(bank.table).min() > 0.1
    before = bank.table.clone()
    moved = images.clone()
    moved[labels == 1] = 3 * moved[labels == 1]
    objective.update_centroids(objective(moved, labels))
    change = (bank.table - before).norm(dim=1)
    assert change[1] > 0.1
    assert change[[0, 2, 3]].max() < 1e-4


@pytest.mark.parametrize("assignment", ["teacher", "label", "nearest"])
def test_assignment_decides_which_images_form_a_class(teacher, assignment):
    config = replace(BANK, assignment=assignment)
    objective = SynthesisObjective(teacher, config, seed=0)
    images = torch.randn(40, *SHAPE)
    labels = torch.arange(40) % CLASSES
    objective.initialise_centroids([(images, labels)])
    with torch.no_grad():
        agreed = teacher.model(images).argmax(1) == labels
    statistics = objective(images, labels).statistics
    if assignment == "label":
        expected = torch.ones(40, dtype=torch.bool)
    elif assignment == "teacher":
        expected = agreed
    else:
        output = teacher(images)
        offset = sum(teacher.channels[: objective.first_layer])
        mean, std = output.mean[:, offset:].double(), (output.var[:, offset:].double() + 1e-10).sqrt()
        table = objective.bank.table.double()
        size = table.shape[1] // 2
        layers = teacher.channels[objective.first_layer :]
        share = torch.cat([torch.full((c,), 1 / (len(layers) * c), dtype=torch.float64) for c in layers])
        scale = share / (teacher.running_var[offset:].double() + 1e-5)
        nearest = []
        for i in range(40):
            scores = [
                (scale * ((mean[i] - table[k, :size]) ** 2 + (std[i] - table[k, size:]) ** 2)).sum()
                for k in range(CLASSES)
            ]
            nearest.append(min(range(CLASSES), key=lambda k: scores[k]))
        expected = torch.tensor(nearest) == labels
        assert 0 < expected.sum() < 40
    counts = [int(((labels == k) & expected).sum()) for k in range(CLASSES)]
    assert statistics.samples.tolist() == counts


def test_bank_lowers_the_loss_and_reaches_its_labels(teacher):
    source = BankSource(teacher, replace(BANK, image_steps=60), seed=0)
    start = source.images().clone()
    progress = []
    source.fit(progress=lambda done, total: progress.append((done, total)))
    assert progress[-1] == (120, 120)
    first, last = source.metrics[0], source.metrics[-1]
    assert last["bns"] < 0.3 * first["bns"]
    assert last["alignment"] < source.metrics[10]["alignment"]
    assert teacher.label_accuracy(source.images(), source.labels()) >= 0.95
    assert not torch.equal(start, source.images())
    assert torch.bincount(source.labels()).tolist() == [6] * CLASSES


def test_generator_learns_its_labels(teacher):
    config = replace(
        GENERATOR, warmup_steps=40, steps=60, batch_size=16, latent_dim=4, generator_lr=1e-2, bns_weight=0.1
    )
    source = GeneratorSource(teacher, config, seed=0)
    source.fit()
    records = source.metrics
    assert "alignment" not in records[39] and "alignment" in records[40]
    # Chance is 0.25.
    assert sum(r["label_accuracy"] for r in records[-20:]) / 20 > 0.7
    assert sum(r["bns"] for r in records[-10:]) < sum(r["bns"] for r in records[:10])


def test_generator_statistics_survive_sampling(teacher):
    source = GeneratorSource(teacher, GENERATOR, seed=0)
    source.fit()
    before = snapshot(source.generator)
    first, second = source.sample(6), source.sample(6)
    assert torch.equal(first.images(), second.images())
    assert all(torch.equal(v, before[k]) for k, v in source.generator.state_dict().items())
    assert source.generator.training


def test_stream_trains_while_it_is_drawn(teacher):
    source = GeneratorSource(teacher, replace(GENERATOR, warmup_steps=3), seed=0, stream=True)
    source.fit()
    assert source.step == 3 and source.objective.bank.initialised.all()
    before = snapshot(source.generator)
    table = source.objective.bank.table.clone()
    images, labels = source.batch(0)
    assert images.shape == (12, *SHAPE) and labels.shape == (12,) and not images.requires_grad
    assert source.step == 4
    assert any(not torch.equal(v, before[k]) for k, v in source.generator.state_dict().items())
    assert not torch.equal(table, source.objective.bank.table)


@pytest.mark.parametrize("stream", [False, True])
def test_the_generator_follows_its_schedule(teacher, stream):
    config = replace(GENERATOR, warmup_steps=3, steps=5, generator_lr=0.5, generator_schedule="step")
    source = GeneratorSource(teacher, config, seed=0, stream=stream)
    rates = []
    source._optimizer.register_step_post_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    source.fit()
    if stream:
        for step in range(6):  # one more than planned
            source.batch(step)
    expected = [0.5, 0.5, 0.05, 0.05, 0.005, 0.005, 0.0005, 0.0005, 0.0005]
    assert rates == pytest.approx(expected if stream else expected[:8])
    assert generator_rate(replace(config, generator_schedule="constant"), 7) == 0.5
    assert generator_rate(replace(config, warmup_steps=0, steps=0), 7) == 0.5


@pytest.mark.parametrize("make", ["bank", "generator"])
def test_same_seed_same_bits_and_resuming_changes_nothing(network, make):
    def build(seed=3):
        teacher = Teacher(network, SHAPE)
        if make == "bank":
            # Every look at the images draws a shift, whose random state has to come back too.
            return BankSource(teacher, replace(BANK, image_steps=8, shifted_share=1.0), seed=seed)
        return GeneratorSource(teacher, GENERATOR, seed=seed)

    torch.manual_seed(1)
    whole = build()
    saved = {}

    def interrupt(done, total):
        if done == 6:
            saved["state"] = copy.deepcopy(whole.state_dict())

    whole.fit(progress=interrupt)
    torch.manual_seed(2)
    again = build()
    again.fit()
    assert torch.equal(whole.images(), again.images()) and torch.equal(whole.labels(), again.labels())
    assert whole.metrics == again.metrics
    resumed = build(seed=3)
    resumed.load_state_dict(saved["state"])
    resumed.fit()
    assert torch.equal(whole.images(), resumed.images())
    assert whole.metrics == resumed.metrics
    other = build(seed=4)
    other.fit()
    assert not torch.equal(whole.images(), other.images())


def test_metrics_reach_the_callback_once_each(teacher):
    seen = []
    source = BankSource(teacher, replace(BANK, image_steps=15), seed=0)
    source.fit(on_step=lambda step, terms: seen.append((step, dict(terms))))
    assert [step for step, _ in seen] == list(range(30))
    assert seen[-1][1] == {k: v for k, v in source.metrics[-1].items() if k != "step"}


def test_divergence_names_step_and_term(teacher):
    source = BankSource(teacher, replace(BANK, image_lr=1e30), seed=0)
    with pytest.raises(DivergenceError, match=r"loss term '(ce|bns)' became (nan|inf) at step \d+"):
        source.fit()


def test_dead_channels_stay_finite(network):
    dead = copy.deepcopy(network)
    with torch.no_grad():
        dead.convs[3].weight[:3] = 0
        dead.norms[3].running_mean[:3] = 0
        dead.norms[3].running_var[:3] = 0
    config = replace(BANK, assignment="nearest", noise_relative=True)
    source = BankSource(Teacher(dead, SHAPE), config, seed=0)
    source.fit()
    assert source.images().isfinite().all()
    assert all(math.isfinite(v) for record in source.metrics for v in record.values())


def test_more_classes_than_a_batch_holds(network):
    wide = copy.deepcopy(network)
    wide.head = nn.Linear(12, 40)
    teacher = Teacher(wide, SHAPE)
    source = GeneratorSource(teacher, replace(GENERATOR, assignment="label"), seed=0)
    source.fit()
    assert source.objective.bank.initialised.all()
    assert source.objective.bank.table.shape[0] == 40
    source = BankSource(teacher, replace(BANK, image_steps=7), seed=0)
    source.fit()
    assert len(set(source.labels().tolist())) == 24


def test_stored_images_are_drawn_in_epochs():
    stored = StoredImages(torch.arange(10.0).reshape(10, 1, 1, 1), torch.arange(10), 4, seed=1)
    drawn = [stored.batch(step)[1] for step in range(5)]
    epochs = torch.cat(drawn)
    assert sorted(epochs[:10].tolist()) == list(range(10)) and sorted(epochs[10:].tolist()) == list(range(10))
    assert epochs[:10].tolist() != epochs[10:].tolist()
    again = StoredImages(torch.arange(10.0).reshape(10, 1, 1, 1), torch.arange(10), 4, seed=1)
    for step in (4, 2):  # any step, in any order
        images, labels = again.batch(step)
        assert torch.equal(labels, drawn[step]) and torch.equal(images.flatten().long(), labels)
    large = StoredImages(torch.zeros(3, 1, 1, 1), torch.arange(3), 8)
    assert torch.bincount(large.batch(0)[1]).tolist() in ([3, 3, 2], [3, 2, 3], [2, 3, 3])


class Transfers(TorchDispatchMode):
    """Counts copies from one device to another."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


def test_the_order_moves_to_the_device_once_per_epoch():
    stored = StoredImages(torch.empty(12, 1, 1, 1, device="meta"), torch.empty(12, dtype=torch.int64, device="meta"), 4)
    with Transfers() as transfers:
        counts = []
        for step in range(6):
            assert stored.batch(step)[0].device.type == "meta"
            counts.append(transfers.count)
    assert counts == [1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(
    ("images", "labels", "batch", "message"),
    [(3, 2, 1, "one label for each of the 3 images"), (0, 0, 1, "empty"), (2, 2, 0, "batch_size is 0")],
)
def test_stored_images_are_checked(images, labels, batch, message):
    with pytest.raises(ValueError, match=message):
        StoredImages(torch.zeros(images, 1, 1, 1), torch.zeros(labels, dtype=torch.int64), batch)


def test_labels_are_balanced():
    random = torch.Generator().manual_seed(0)
    counts = torch.bincount(balanced_labels(23, 5, random), minlength=5)
    assert sorted(counts.tolist()) == [4, 4, 5, 5, 5]
    few = balanced_labels(7, 1000, random)
    assert len(set(few.tolist())) == 7 and few.max() > 50


def test_projection_separates_classes(network, teacher):
    source = BankSource(teacher, replace(BANK, image_steps=60), seed=0)
    source.fit()
    points = project_statistics(teacher, source.images(), layers=(3, 5))
    assert points.shape == (24, 2)
    torch.testing.assert_close(points.mean(0), torch.zeros(2), atol=1e-4, rtol=0)
    assert points[:, 0].var() >= points[:, 1].var()
    labels = source.labels()
    inside = torch.stack([points[labels == k].var(0, correction=0).sum() for k in range(CLASSES)]).mean()
    assert inside < 0.5 * points.var(0, correction=0).sum()
    assert torch.equal(points, project_statistics(teacher, source.images(), layers=(3, 5)))
    with pytest.raises(ValueError, match="at least 2"):
        project_statistics(teacher, source.images()[:1])
    with pytest.raises(ValueError, match="layers is"):
        project_statistics(teacher, source.images(), layers=(3, 9))
