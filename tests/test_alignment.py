"""The alignment loss against a float64 definition that autograd differentiates."""

import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from clusterq import ops
from clusterq.nn import replace_batch_norm
from clusterq.ops import AlignmentTargets, ClassTargets, alignment_loss

CHANNELS = (3, 65, 16)


class Layer(NamedTuple):
    """As a recorder reports it."""

    mean: torch.Tensor
    var: torch.Tensor
    spatial: int
    running_mean: torch.Tensor
    running_var: torch.Tensor


WIDTH = sum(CHANNELS)
IMAGES = 11
SLOTS = 4


def statistics(dtype=torch.float32, images=IMAGES):
    torch.manual_seed(0)
    mean, var = torch.randn(images, WIDTH, dtype=dtype), torch.rand(images, WIDTH, dtype=dtype) + 0.1
    running = torch.randn(WIDTH, dtype=dtype), torch.rand(WIDTH, dtype=dtype) + 0.1
    return mean, var, *running


def class_targets(first, dtype=torch.float32, terms=2, **options):
    torch.manual_seed(1)
    rows = (terms, SLOTS, sum(CHANNELS[first:]))
    labels = torch.tensor([0, 2, 2, -1, 0, 4, 2, 0, 1, 2, 0])
    return ClassTargets(
        labels, torch.randn(rows, dtype=dtype), torch.rand(rows, dtype=dtype), (0.9, 0.6)[:terms], **options
    )


def definition(mean, var, running_mean, running_var, classes=None, *, reduction, spread, first, weight, layer_weights,
               class_reduction, factors):  # fmt: skip
    """The loss and its terms, layer by layer and class by class, in float64."""

    def form(v):
        return torch.sqrt(v + 1e-10) if spread == "std" else v

    def merged(rows_mean, rows_var):
        center = rows_mean.mean(0)
        return center, (rows_var + (rows_mean - center) ** 2).mean(0)

    def squares(layer, m, s, goal_mean, goal_spread, how, layers):
        value = ((m - goal_mean) ** 2).sum() + ((s - goal_spread) ** 2).sum()
        return value / (CHANNELS[layer] * layers) if how == "mean" else value

    ends = torch.tensor(CHANNELS).cumsum(0).tolist()
    starts = [e - c for e, c in zip(ends, CHANNELS, strict=True)]
    batch = mean.new_zeros(())
    for layer, (a, b) in enumerate(zip(starts, ends, strict=True)):
        m, v = merged(mean[:, a:b], var[:, a:b])
        s, goal = form(v * factors[layer]), form(running_var[a:b])
        if reduction == "norm":
            term = torch.linalg.vector_norm(m - running_mean[a:b]) + torch.linalg.vector_norm(s - goal)
        else:
            term = squares(layer, m, s, running_mean[a:b], goal, reduction, len(CHANNELS))
        batch = batch + layer_weights[layer] * term
    terms = []
    total = weight * batch
    for t, tau in enumerate(classes.weights if classes is not None else ()):
        values = []
        for k in range(SLOTS):
            chosen = classes.labels == k
            if classes.mask is not None:
                chosen = chosen & classes.mask
            if not chosen.any() or (classes.known is not None and not classes.known[k]):
                continue
            value = mean.new_zeros(())
            for layer in range(first, len(CHANNELS)):
                a, b = starts[layer], ends[layer]
                m, v = merged(mean[chosen, a:b], var[chosen, a:b])
                goals = (g[t, k, a - starts[first] : b - starts[first]] for g in (classes.mean, classes.spread))
                value = value + squares(layer, m, form(v), *goals, class_reduction, len(CHANNELS) - first)
            values.append(value)
        term = sum(values, mean.new_zeros(())) / (max(len(values), 1) if classes.average else 1)
        terms.append(term)
        total = total + tau * term
    return total, batch, terms


def compare(dtype, classes, **how):
    mean, var, *running = statistics(dtype)
    first = how["first"]
    targets = AlignmentTargets(
        CHANNELS, *running, reduction=how["reduction"], layer_weights=how["layer_weights"], spread=how["spread"],
        weight=how["weight"], first=first if classes is not None else None, class_reduction=how["class_reduction"],
    )  # fmt: skip
    leaves = [t.clone().requires_grad_() for t in (mean, var)]
    result = targets(*leaves, classes, var_factors=how["factors"])
    grads = torch.autograd.grad(result.total, leaves)
    wide = [t.double().requires_grad_() for t in (mean, var)]
    exact = classes and classes._replace(mean=classes.mean.double(), spread=classes.spread.double())
    total, batch, terms = definition(*wide, *(t.double() for t in running), exact, **how)
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-6, "atol": 2e-6}
    torch.testing.assert_close(result.total.double(), total, **tolerance)
    torch.testing.assert_close(result.batch.double(), batch, **tolerance)
    torch.testing.assert_close(
        result.classes.double(), torch.stack(terms) if terms else result.classes.double(), **tolerance
    )
    assert len(result.classes) == len(terms)
    for grad, wanted in zip(grads, torch.autograd.grad(total, wide), strict=True):
        torch.testing.assert_close(grad.double(), wanted, **tolerance)
    return result


HOW = {
    "reduction": "sum", "spread": "std", "first": 1, "weight": 0.7, "layer_weights": (1.0, 0.5, 2.0),
    "class_reduction": "sum", "factors": (1.0, 1.0, 1.0),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", ["std", "var"])
@pytest.mark.parametrize("reduction", ["sum", "mean", "norm"])
def test_batch_term(reduction, spread, dtype):
    compare(dtype, None, **HOW | {"reduction": reduction, "spread": spread, "factors": (1.25, 1.0, 1.02)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("class_reduction", ["sum", "mean"])
@pytest.mark.parametrize("options", ["plain", "mask", "known", "average"])
def test_class_terms(first, class_reduction, options, dtype):
    given = {
        "plain": {},
        "mask": {"mask": torch.arange(IMAGES) % 3 != 0},
        "known": {"known": torch.tensor([True, True, False, True]), "average": True},
        "average": {"average": True},
    }[options]
    for spread in ("std", "var"):
        how = HOW | {"first": first, "class_reduction": class_reduction, "spread": spread}
        result = compare(dtype, class_targets(first, dtype, **given), **how)
        mask = given.get("mask", torch.ones(IMAGES, dtype=torch.bool))
        labels = class_targets(first).labels
        assert result.images.tolist() == [int(((labels == k) & mask).sum()) for k in range(SLOTS)]
        start = sum(CHANNELS[:first])
        mean, var, *_ = statistics(dtype)
        wanted = ops.merge_class_statistics(mean[:, start:], var[:, start:], labels, SLOTS, mask)
        torch.testing.assert_close(result.class_mean, wanted[1])
        spreads = torch.sqrt(wanted[2] + 1e-10) if spread == "std" else wanted[2]
        torch.testing.assert_close(result.class_spread, spreads)


def test_one_term_and_no_valid_image():
    compare(torch.float64, class_targets(1, torch.float64, terms=1), **HOW)
    empty = class_targets(1, mask=torch.zeros(IMAGES, dtype=torch.bool), average=True)
    result = compare(torch.float32, empty, **HOW)
    assert torch.equal(result.classes, torch.zeros(2)) and torch.equal(
        result.images, torch.zeros(SLOTS, dtype=torch.int64)
    )


def test_targets_of_a_class_that_enters_no_term_may_be_anything():
    """Class 1 is unknown and class 3 has no image."""
    mean, var, *running = statistics()
    targets = AlignmentTargets(CHANNELS, *running, first=1)
    classes = class_targets(1, known=torch.tensor([True, False, True, True]), average=True)
    clean = targets(mean, var, classes)
    spoiled = classes._replace(mean=classes.mean.clone(), spread=classes.spread.clone())
    for goal in (spoiled.mean, spoiled.spread):
        goal[:, 1] = torch.nan
        goal[:, 3] = torch.inf
    leaves = [t.clone().requires_grad_() for t in (mean, var)]
    result = targets(*leaves, spoiled)
    assert torch.equal(result.total, clean.total)
    assert all(g.isfinite().all() for g in torch.autograd.grad(result.total, leaves))


def test_a_layer_that_fits_has_no_norm_and_no_gradient():
    mean = torch.zeros(3, 2, dtype=torch.float64)
    leaves = [mean.clone().requires_grad_(), torch.ones_like(mean).requires_grad_()]
    targets = AlignmentTargets((2,), torch.zeros(2).double(), torch.ones(2).double(), reduction="norm", spread="var")
    total = targets(*leaves).total
    assert total == 0 and all(torch.equal(g, mean) for g in torch.autograd.grad(total, leaves))


def test_the_gradients_are_derivatives():
    mean, var, *running = statistics(torch.float64, 5)
    labels = torch.tensor([0, 1, 1, 0, 2])
    for reduction in ("mean", "norm"):
        targets = AlignmentTargets(CHANNELS, *running, reduction=reduction, first=2)
        rows = torch.randn(3, CHANNELS[2]).double()
        classes = ClassTargets(labels, rows, rows.abs(), (0.5,))
        assert gradcheck(
            lambda m, v, t=targets, c=classes: t(m, v, c).total, (mean.requires_grad_(), var.requires_grad_())
        )


def test_second_derivatives():
    mean, var, *running = statistics(torch.float64, 5)
    labels = torch.tensor([0, 1, 1, 0, 2])
    rows = torch.randn(2, 3, CHANNELS[2]).double()
    classes = ClassTargets(labels, rows, rows.abs(), (0.5, 0.3), average=True)
    leaves = [t.requires_grad_() for t in (mean, var)]
    for reduction in ("sum", "norm"):
        targets = AlignmentTargets(CHANNELS, *running, reduction=reduction, first=2)
        assert gradgradcheck(lambda m, v, t=targets: t(m, v, classes).total, leaves)


def test_columns_of_a_wider_matrix():
    mean, var, *running = statistics()
    wide = torch.randn(IMAGES, 2 * WIDTH)
    wide[:, :WIDTH], wide[:, WIDTH:] = mean, var
    targets = AlignmentTargets(CHANNELS, *running)
    assert torch.equal(targets(wide[:, :WIDTH], wide[:, WIDTH:]).total, targets(mean, var).total)
    every = torch.stack([mean, var], 2)
    assert torch.equal(targets(every[..., 0], every[..., 1]).total, targets(mean, var).total)


def test_results_do_not_depend_on_the_thread_count():
    torch.manual_seed(0)
    channels = (64, 512, 1024)
    mean, var = torch.randn(200, 1600), torch.rand(200, 1600)
    targets = AlignmentTargets(channels, torch.zeros(1600), torch.ones(1600), first=1)
    rows = torch.rand(10, 1536)
    classes = ClassTargets(torch.arange(200) % 10, rows, rows)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = [t.clone().requires_grad_() for t in (mean, var)]
            result = targets(*leaves, classes)
            runs.append([*result, *torch.autograd.grad(result.total, leaves)])
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4))
    with torch.no_grad():
        for _ in range(20):
            net(torch.randn(16, 3, 12, 12))
    return net.eval()


@pytest.mark.parametrize("correction", [0, 1])
def test_of_a_network_is_the_published_loss(correction):
    """DeepInversion's feature regularisation, by hooks and plain autograd."""
    net = network()
    images = torch.randn(2, 3, 9, 9, requires_grad=True)
    seen = []
    norms = [m for m in net if isinstance(m, nn.BatchNorm2d)]
    handles = [m.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for m in norms]
    logits = net(images)
    for handle in handles:
        handle.remove()
    wanted = torch.zeros(())
    for x, m in zip(seen, norms, strict=True):
        wanted = wanted + torch.linalg.vector_norm(x.mean((0, 2, 3)) - m.running_mean)
        var = x.transpose(0, 1).flatten(1).var(1, correction=correction)
        wanted = wanted + torch.linalg.vector_norm(var - m.running_var)
    (gradient,) = torch.autograd.grad(wanted + logits.square().mean(), images)

    recorder = replace_batch_norm(net)
    with recorder.record() as layers:
        logits = net(images)
    loss = alignment_loss(layers, reduction="norm", spread="var", correction=correction).total
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(torch.autograd.grad(loss + logits.square().mean(), images)[0], gradient)


def test_compiles_without_graph_breaks():
    mean, var, *running = statistics()
    targets = AlignmentTargets(CHANNELS, *running, first=1)
    classes = class_targets(1)
    targets(mean, var, classes)

    def loss(mean, var):
        return targets(mean, var, classes).total

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaves = [t.clone().requires_grad_() for t in (mean, var)]
    other = [t.clone().requires_grad_() for t in (mean, var)]
    torch.testing.assert_close(compiled(*leaves), loss(*other))
    for a, b in zip(
        torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(loss(*other), other), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_compiles_without_gradients_and_with_targets_made_inside():
    mean, var, *running = statistics()
    targets = AlignmentTargets(CHANNELS, *running)
    compiled = torch.compile(lambda m, v: targets(m, v).total, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(mean, var), targets(mean, var).total)
    ends = torch.tensor(CHANNELS).cumsum(0).tolist()
    parts = [slice(e - c, e) for e, c in zip(ends, CHANNELS, strict=True)]

    def loss(mean, var):
        layers = [
            Layer(mean=mean[:, p], var=var[:, p], spatial=4, running_mean=running[0][p], running_var=running[1][p])
            for p in parts
        ]
        return alignment_loss(layers, correction=1).total

    given = [t.clone().requires_grad_() for t in (mean, var)]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), loss(*given))


def test_targets_are_copies():
    mean, var, *running = statistics()
    for spread in ("std", "var"):
        targets = AlignmentTargets(CHANNELS, *running, spread=spread)
        before = targets(mean, var).total
        for buffer in running:
            buffer.add_(1)
        assert torch.equal(targets(mean, var).total, before)


def test_statistics_of_offset_data_are_as_good_as_documented():
    """The merge of float32 instance statistics, against float64."""
    x = torch.randn(64, 4, 16, 16) + 1e4
    mean, var = ops.instance_statistics(x)
    labels = torch.arange(64) % 8
    targets = AlignmentTargets((4,), torch.zeros(4), torch.ones(4), spread="var", first=0)
    result = targets(mean, var, ClassTargets(labels, torch.zeros(8, 4), torch.zeros(8, 4)))
    exact = torch.stack([x[labels == k].double().var((0, 2, 3), correction=0) for k in range(8)])
    assert ((result.class_spread.double() - exact).abs() <= 1e-4 * exact).all()


WORKER = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from test_alignment import CHANNELS, class_targets, statistics
from clusterq.ops import AlignmentTargets
rank, port = int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=3)
mean, var, *running = statistics()
classes = class_targets(1, average=True, mask=torch.arange(11) != 4)
targets = AlignmentTargets(CHANNELS, *running, first=1, reduction=sys.argv[4])
# Unequal shares, and class 1 on one process only.
part = [slice(0, 2), slice(2, 7), slice(7, 11)][rank]
leaves = [t[part].clone().requires_grad_() for t in (mean, var)]
own = classes._replace(labels=classes.labels[part], mask=classes.mask[part])
result = targets(*leaves, own, group=dist.group.WORLD)
grads = torch.autograd.grad(result.total, leaves)
every = [None] * 3
dist.all_gather_object(every, [*result])
assert all(torch.equal(a, b) for other in every for a, b in zip(other, every[0], strict=True)), "ranks differ"
whole = [t.clone().requires_grad_() for t in (mean, var)]
wanted = targets(*whole, classes)
for a, b in zip(result, wanted, strict=True):
    torch.testing.assert_close(a, b)
for a, b in zip(grads, torch.autograd.grad(wanted.total, whole), strict=True):
    torch.testing.assert_close(a, b[part])
print("ok")
"""


@pytest.mark.parametrize("reduction", ["sum", "norm"])
def test_processes_share_one_batch(reduction, tmp_path):
    import socket
    from pathlib import Path

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = str(Path(__file__).parent)
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, here, str(rank), str(port), reduction],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    outputs = [worker.communicate(timeout=120) for worker in workers]
    assert all(out.strip() == "ok" for out, _ in outputs), [err[-2000:] for _, err in outputs]


def layers(*images):
    """One of two channels for each number of images."""
    zero = torch.zeros(2)
    return [
        Layer(mean=torch.zeros(n, 2), var=torch.ones(n, 2), spatial=4, running_mean=zero, running_var=zero + 1)
        for n in images
    ]


def test_bad_arguments_are_named():
    mean, var, *running = statistics()
    targets = AlignmentTargets(CHANNELS, *running, first=1)
    classes = class_targets(1)
    for error, name, call in [
        (ValueError, "layers is empty", lambda: alignment_loss([])),
        (ValueError, "reduction is 'max'", lambda: AlignmentTargets(CHANNELS, *running, reduction="max")),
        (ValueError, "class_reduction is 'norm'", lambda: AlignmentTargets(CHANNELS, *running, class_reduction="norm")),
        (ValueError, "spread is 'sd'", lambda: AlignmentTargets(CHANNELS, *running, spread="sd")),
        (ValueError, "layer_weights has 1", lambda: AlignmentTargets(CHANNELS, *running, layer_weights=[1.0])),
        (ValueError, "running_mean has shape", lambda: AlignmentTargets((3, 4), *running)),
        (ValueError, "first is 4", lambda: AlignmentTargets(CHANNELS, *running, first=4)),
        (ValueError, "mean has shape", lambda: targets(mean[:, 1:], var)),
        (ValueError, "var has shape", lambda: targets(mean, var[1:])),
        (TypeError, "mean has dtype", lambda: targets(mean.double(), var)),
        (ValueError, "var_factors has 2", lambda: targets(mean, var, var_factors=[1, 1])),
        (ValueError, "classes.mean has shape", lambda: targets(mean, var, classes._replace(mean=classes.mean[:1]))),
        (ValueError, "labels has shape", lambda: targets(mean, var, classes._replace(labels=classes.labels[1:]))),
        (ValueError, "known has shape", lambda: targets(mean, var, classes._replace(known=torch.ones(1).bool()))),
        (TypeError, "known has dtype", lambda: targets(mean, var, classes._replace(known=torch.ones(SLOTS)))),
        (ValueError, "mean has no images", lambda: targets(mean[:0], var[:0])),
        (TypeError, "first is 1.5", lambda: alignment_loss(layers(3, 3), first=1.5)),
        (ValueError, "first is 3", lambda: alignment_loss(layers(3, 3), first=3)),
        (ValueError, r"layers\[1\] has 4 images; wanted 3", lambda: alignment_loss(layers(3, 4))),
        (ValueError, "correction is not 0", lambda: alignment_loss(layers(3, 3), correction=1, group=object())),
    ]:
        with pytest.raises(error, match=name):
            call()


def test_in_front_of_a_loss_of_the_logits():
    """The docstring's lines, down to the gradient of the images."""
    net = network()
    images, labels = torch.randn(4, 3, 9, 9, requires_grad=True), torch.tensor([0, 1, 2, 3])
    recorder = replace_batch_norm(net)
    with recorder.record() as layers:
        logits = net(images).mean((2, 3))
    loss = F.cross_entropy(logits, labels) + alignment_loss(layers, reduction="norm", spread="var").total
    loss.backward()
    assert images.grad.isfinite().all() and images.grad.abs().sum() > 0
