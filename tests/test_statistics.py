"""Reporting BatchNorm layers against forward hooks and the textbook formulas in float64."""

import copy

import pytest
import torch
from torch import nn

from clusterq.nn.statistics import StatisticsBatchNorm2d, replace_batch_norm


class Block(nn.Module):
    """The shortcut's norm is declared first and runs last; `shared` runs twice."""

    def __init__(self):
        super().__init__()
        self.shortcut = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6))
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.shared = nn.BatchNorm2d(6)
        self.again = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x):
        y = self.shared(self.conv(x)).relu()
        y = self.shared(self.again(y)).relu()
        return y + self.shortcut(x)


class NormAct(nn.BatchNorm2d):
    """A norm with an activation of its own, as some libraries have it."""

    def forward(self, x):
        return super().forward(x).relu()


def trained(model, dtype=torch.float64):
    """Away from the initial running statistics and affine parameters, frozen, in eval mode."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model.to(dtype).eval().requires_grad_(False)


def hooked(model, x):
    """(name, input) of every BatchNorm call in execution order, as forward hooks see them."""
    inputs = []
    handles = [
        module.register_forward_hook(lambda m, args, out, name=name: inputs.append((name, args[0])))
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    y = model(x)
    for handle in handles:
        handle.remove()
    return y, inputs


def test_matches_hooks_in_execution_order():
    model = trained(Block())
    x = torch.randn(5, 3, 8, 7, dtype=torch.float64)
    wanted, inputs = hooked(copy.deepcopy(model), x)
    recorder = replace_batch_norm(model)
    with recorder.record() as layers:
        actual = model(x)
    torch.testing.assert_close(actual, wanted)
    assert [recorder.names[layer.module] for layer in layers] == [name for name, _ in inputs]
    assert [name for name, _ in inputs] == ["shared", "shared", "shortcut.1"]
    labels, mask = torch.tensor([0, 2, 0, 2, 2]), torch.tensor([True, True, True, True, False])
    for layer, (_, value) in zip(layers, inputs, strict=True):
        assert layer.spatial == 56
        torch.testing.assert_close(layer.mean, value.mean([2, 3]))
        torch.testing.assert_close(layer.var, value.var([2, 3], correction=0))
        for correction in (0, 1):
            mean, var = layer.batch(correction)
            torch.testing.assert_close(mean, value.mean([0, 2, 3]))
            torch.testing.assert_close(var, value.var([0, 2, 3], correction=correction))
        count, mean, var = layer.classes(labels, 3, mask)
        assert count.tolist() == [2, 0, 2]
        torch.testing.assert_close(mean[2], value[[1, 3]].mean([0, 2, 3]))
        torch.testing.assert_close(var[2], value[[1, 3]].var([0, 2, 3], correction=0))


def test_gradient_of_an_alignment_loss_matches_hooks():
    model = trained(Block())
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([1, 0, 1, 1])

    y, inputs = hooked(copy.deepcopy(model), x)
    loss = y.square().mean()
    for _, value in inputs:
        loss = loss + value.mean([0, 2, 3]).square().sum() + value.std([0, 2, 3], correction=1).square().sum()
        loss = loss + value[labels == 1].var([0, 2, 3], correction=0).sum()
    (wanted,) = torch.autograd.grad(loss, x)

    recorder = replace_batch_norm(model)
    with recorder.record() as layers:
        loss = model(x).square().mean()
    for layer in layers:
        mean, var = layer.batch(1)
        loss = loss + mean.square().sum() + var.sqrt().square().sum() + layer.classes(labels, 2)[2][1].sum()
    (actual,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(actual, wanted)


def test_swap_is_in_place_and_silent_until_recording():
    model = trained(Block(), torch.float32)
    before, norm = copy.deepcopy(model.state_dict()), model.shared
    x = torch.randn(2, 3, 5, 5)
    wanted = model(x)
    recorder = replace_batch_norm(model)
    assert model.shared is norm and isinstance(norm, StatisticsBatchNorm2d)
    assert list(model.state_dict()) == list(before)
    assert torch.equal(model(x), wanted)
    assert recorder.layers is None
    with recorder.record() as layers:
        model(x)
        model(x)
    assert len(layers) == 6
    assert recorder.layers is None
    with recorder.record() as layers:
        model(x)
    assert len(layers) == 3
    model.load_state_dict(before)


def test_recording_ends_with_an_exception_and_does_not_nest():
    recorder = replace_batch_norm(trained(Block()))
    with pytest.raises(KeyError), recorder.record():
        raise KeyError
    with recorder.record(), pytest.raises(RuntimeError, match="already being recorded"), recorder.record():
        pass
    assert recorder.layers is None


def test_replacing_again_hands_over_to_the_new_recorder():
    model = trained(Block())
    first, second = replace_batch_norm(model), replace_batch_norm(model)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    with first.record() as old, second.record() as new:
        model(x)
    assert (len(old), len(new)) == (0, 3)


def test_frozen_parameters_get_no_gradient_and_trainable_ones_do():
    model = trained(nn.Sequential(nn.BatchNorm2d(3)))
    recorder = replace_batch_norm(model)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    with recorder.record() as layers:
        y = model(x)
    (y.sum() + layers[0].mean.sum()).backward()
    assert model[0].weight.grad is None
    model.requires_grad_(True)
    with recorder.record():
        y = model(x.detach())
    y.square().sum().backward()
    normed = (x.detach() - model[0].running_mean[:, None, None]) / (model[0].running_var + 1e-5).sqrt()[:, None, None]
    torch.testing.assert_close(model[0].weight.grad, (2 * y.detach() * normed).sum([0, 2, 3]))
    torch.testing.assert_close(model[0].bias.grad, 2 * y.detach().sum([0, 2, 3]))


def test_training_mode_normalises_with_the_batch_and_still_reports():
    model = trained(nn.Sequential(nn.BatchNorm2d(3))).train()
    twin = copy.deepcopy(model)
    recorder = replace_batch_norm(model)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    with recorder.record() as layers:
        y = model(x)
    torch.testing.assert_close(y, twin(x))
    torch.testing.assert_close(model[0].running_mean, twin[0].running_mean)
    torch.testing.assert_close(layers[0].batch()[0], x.mean([0, 2, 3]))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d(3), (4, 3)),
        (nn.BatchNorm1d(3), (4, 3, 5)),
        (nn.BatchNorm3d(3), (2, 3, 4, 3, 2)),
        (NormAct(3), (4, 3, 5, 5)),
    ],
)
def test_other_batch_norms(layer, shape):
    model = trained(layer)
    x = torch.randn(shape, dtype=torch.float64)
    wanted = model(x)
    recorder = replace_batch_norm(model)
    with recorder.record() as layers:
        y = model(x)
    torch.testing.assert_close(y, wanted)
    mean, var = layers[0].batch()
    dims = [0, *range(2, x.dim())]
    torch.testing.assert_close(mean, x.mean(dims))
    torch.testing.assert_close(var, x.var(dims, correction=0))
    assert isinstance(model, type(layer))


def test_half_precision_and_autocast():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), torch.float32)
    recorder = replace_batch_norm(model)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    with recorder.record() as layers, torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
        loss = y.float().sum() + sum(t.sum() for t in layers[0].batch())
    assert layers[0].mean.dtype == layers[0].batch()[1].dtype == torch.float32
    loss.backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_compiles_without_graph_breaks():
    model = trained(Block(), torch.float32)
    recorder = replace_batch_norm(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (2, 3):
        x = torch.randn(n, 3, 6, 5, requires_grad=True)
        results = []
        for run in (compiled, model):
            with recorder.record() as layers:
                y = run(x)
            loss = y.square().sum() + sum(t.square().sum() for layer in layers for t in layer.batch())
            results.append((len(layers), loss, *torch.autograd.grad(loss, x)))
        assert results[0][0] == results[1][0] == 3
        torch.testing.assert_close(results[0][1:], results[1][1:])
    torch.testing.assert_close(compiled(x), model(x))


def test_copies_record_on_their_own():
    model = trained(Block())
    recorder = replace_batch_norm(model)
    twin = copy.deepcopy(model)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    with recorder.record() as layers:
        twin(x)
    assert layers == []
    with replace_batch_norm(twin).record() as layers:
        twin(x)
    assert len(layers) == 3


def test_networks_that_cannot_be_aligned_are_refused():
    with pytest.raises(ValueError, match="Linear has no BatchNorm layer"):
        replace_batch_norm(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="without running statistics: 1"):
        replace_batch_norm(nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2, track_running_stats=False)))
