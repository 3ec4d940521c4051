"""Conditional generators: shapes, the published layer order and constants, and how the label enters."""

import pytest
import torch
from torch import nn

from clusterq.synthesis.generator import (
    CategoricalConditionalBatchNorm2d,
    ConditionalNormGenerator,
    EmbeddingGenerator,
    build_generator,
)

FORMS = ["embedding", "conditional_norm"]
CPU = torch.device("cpu")


def build(form, shape=(3, 8, 8), classes=5, seed=0):
    return build_generator(form, classes, shape, 10, 8, seed=seed, device=CPU)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 8, 8), (3, 10, 7), (1, 28, 28), (3, 1, 1)])
@pytest.mark.parametrize("form", FORMS)
def test_images_have_the_asked_shape(form, shape):
    generator = build(form, shape)
    images = generator(torch.randn(6, 10), torch.arange(6) % 5)
    assert images.shape == (6, *shape)


@pytest.mark.parametrize("form", FORMS)
def test_images_leave_normalised(form):
    images = build(form)(torch.randn(64, 10), torch.arange(64) % 5)
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(images.var((0, 2, 3), correction=0), torch.ones(3), atol=5e-2, rtol=0)


@pytest.mark.parametrize("form", FORMS)
def test_the_label_changes_the_image_once_trained(form):
    """Conditional norms start as the identity for every class, so one gradient step comes first."""
    generator = build(form)
    optimizer = torch.optim.SGD(generator.parameters(), lr=1.0)
    noise = torch.randn(10, 10)
    target = torch.randn(10, 3, 8, 8)
    (generator(noise, torch.arange(10) % 5) - target).square().mean().backward()
    optimizer.step()
    generator.eval()
    one = generator(noise[:1], torch.tensor([0]))
    other = generator(noise[:1], torch.tensor([1]))
    assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_inner_norms_carry_the_published_eps(form):
    generator = build(form)
    inner = [generator.norm0, generator.norm1, generator.norm2]
    eps = [m.norm.eps if isinstance(m, CategoricalConditionalBatchNorm2d) else m.eps for m in inner]
    assert eps == [1e-5, 0.8, 0.8]
    assert not generator.norm3.affine


@pytest.mark.parametrize("form", FORMS)
def test_every_parameter_takes_part(form):
    generator = build(form)
    images = generator(torch.randn(10, 10), torch.arange(10) % 5)
    (images * torch.randn(images.shape)).sum().backward()
    # A convolution's bias is removed by the BatchNorm after it, so its gradient is rounding error, but it exists.
    assert all(p.grad is not None for p in generator.parameters())


def test_conditional_norm_uses_the_row_of_its_class():
    norm = CategoricalConditionalBatchNorm2d(3, 2)
    assert (norm.gamma.weight == 1).all() and (norm.beta.weight == 0).all()
    with torch.no_grad():
        norm.gamma.weight[1] = torch.tensor([2.0, 3.0])
        norm.beta.weight[1] = torch.tensor([-1.0, 4.0])
    x = torch.randn(8, 2, 3, 3)
    labels = torch.tensor([0, 1] * 4)
    y = norm(x, labels)
    expected = nn.functional.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(y[::2], expected[::2])
    scaled = expected[1::2] * torch.tensor([2.0, 3.0])[:, None, None] + torch.tensor([-1.0, 4.0])[:, None, None]
    torch.testing.assert_close(y[1::2], scaled)


def test_auto_chooses_the_form_by_image_and_classes():
    def chosen(classes, shape):
        return type(build_generator("auto", classes, shape, 4, 4, seed=0, device=CPU))

    assert chosen(10, (3, 32, 32)) is EmbeddingGenerator
    assert chosen(100, (3, 32, 32)) is EmbeddingGenerator
    assert chosen(10, (3, 64, 64)) is ConditionalNormGenerator
    assert chosen(1000, (3, 32, 32)) is ConditionalNormGenerator


def test_weights_depend_on_the_seed_and_leave_the_global_state_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = build("embedding", seed=1)
    assert torch.equal(torch.rand(3), expected)
    again, other = build("embedding", seed=1), build("embedding", seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.linear.weight, other.linear.weight)


@pytest.mark.parametrize("name", ["cuda", "xpu", "mps"])
def test_seeding_leaves_accelerators_alone(monkeypatch, name):
    seeded = []
    for function in ("manual_seed", "manual_seed_all"):
        if hasattr(getattr(torch, name), function):
            monkeypatch.setattr(getattr(torch, name), function, seeded.append)
    build("embedding", seed=1)
    assert seeded == []
    torch.cuda.manual_seed_all(5)
    assert seeded == ([5] if name == "cuda" else [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("square", 5, (3, 8, 8), 10, 8), "form is 'square'"),
        (("auto", 0, (3, 8, 8), 10, 8), "num_classes is 0"),
        (("auto", 5, (3, 0, 8), 10, 8), "image_shape is"),
        (("auto", 5, (3, 8, 8), 0, 8), "latent_dim is 0"),
        (("auto", 5, (3, 8, 8), 10, 0), "width is 0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_generator(*arguments, seed=0, device=CPU)
