"""EMACodebook against the codebook of vector-quantize-pytorch, alone and inside its VectorQuantize."""

from __future__ import annotations

import copy
import os
import sys
from typing import Any

import pytest
import torch

from clusterq.nn import EMACodebook
from clusterq.ops.kmeans import plus_plus_start

sys.path.insert(0, os.path.dirname(__file__))
from codebook_cases import D, K, assert_same_state, latents

STATE = ["initted", "cluster_size", "embed_avg", "embed"]

peer = pytest.importorskip(
    "vector_quantize_pytorch.vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed"
)


def pair(**settings: Any) -> tuple[Any, EMACodebook]:
    """Theirs and ours from one seed."""
    settings = {"threshold_ema_dead_code": 0, **settings}
    books = []
    for make in (peer.Codebook, EMACodebook):
        torch.manual_seed(0)
        books.append(make(D, K, **settings).train())
    return books[0], books[1]


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("settings", [{}, {"decay": 0.99, "eps": 1e-2}, {"decay": 0.5, "eps": 1e-8}])
def test_a_hundred_steps_are_those_of_the_library(settings: dict[str, float], masked: bool, heads: int) -> None:
    theirs, ours = pair(num_codebooks=heads, **settings)
    assert list(ours.state_dict()) == STATE
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), "another start"
    start = ours.embed.clone()
    for step in range(100):
        x = latents(step, heads)
        mask = torch.rand(4, 25) < 0.7 if masked else None
        wanted, wanted_index, _ = theirs(x, mask=mask)
        quantized, index, distances = ours(x, mask=mask)
        assert torch.equal(index, wanted_index) and distances is None
        torch.testing.assert_close(quantized, wanted, rtol=1e-5, atol=1e-6)
    assert_same_state(theirs, ours)
    assert (ours.embed - start).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_inputs_of_other_dtypes(dtype: torch.dtype) -> None:
    theirs, ours = pair()
    for step in range(20):
        x = latents(step).to(dtype)
        wanted, quantized = theirs(x), ours(x)
        assert torch.equal(quantized[1], wanted[1]) and quantized[0].dtype == wanted[0].dtype == torch.float32
    assert_same_state(theirs, ours)


def test_checkpoints_go_both_ways() -> None:
    theirs, ours = pair(num_codebooks=2)
    for step in range(5):
        theirs(latents(step, 2))
    ours.load_state_dict(theirs.state_dict())
    for step in range(5, 10):
        ours(latents(step, 2))
    back = pair(num_codebooks=2)[0]
    back.load_state_dict(ours.state_dict())
    for step in range(5, 10):
        theirs(latents(step, 2))
    assert_same_state(theirs, back)
    for step in range(10, 15):
        theirs(latents(step, 2))
        back(latents(step, 2))
        ours(latents(step, 2))
    assert_same_state(theirs, back)
    assert_same_state(theirs, ours)


@pytest.mark.parametrize("how", ["eval", "freeze_codebook", "update_usage", "ema_update"])
def test_nothing_moves(how: str) -> None:
    theirs, ours = pair()
    arguments: dict[str, Any] = {}
    if how == "eval":
        ours.eval(), theirs.eval()
    else:
        arguments[how] = how == "freeze_codebook"
    before = copy.deepcopy(ours.state_dict())
    wanted, got = theirs(latents(1), **arguments), ours(latents(1), **arguments)
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
    assert all(torch.equal(before[name], tensor) for name, tensor in ours.state_dict().items())


def test_manual_updates_and_known_indices() -> None:
    theirs, ours = pair(manual_ema_update=True)
    start = ours.embed.clone()
    for step in range(8):
        theirs(latents(step)), ours(latents(step))
        assert torch.equal(ours.embed, start)
        if step % 3 == 2:
            theirs.update_ema(), ours.update_ema()
            assert_same_state(theirs, ours)
            start = ours.embed.clone()
    theirs, ours = pair(num_codebooks=2)
    for step in range(4):
        index = torch.randint(0, K, (2, 4, 25))
        mask = torch.rand(4, 25) < 0.5
        theirs.update_indices(latents(step, 2), index, mask=mask)
        ours.update_indices(latents(step, 2), index, mask=mask)
    assert_same_state(theirs, ours)


@pytest.mark.parametrize("heads", [1, 2])
def test_k_means_initialisation(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From our start, which replaces their random rows, the library's own iterations lead to the same state."""
    theirs, ours = pair(num_codebooks=heads, kmeans_init=True, kmeans_iters=7)
    assert not ours.initted and not ours.embed.any()
    x = latents(0, heads)
    torch.manual_seed(5)
    start = plus_plus_start(x.reshape(heads, -1, D), torch.ones(heads, 100), K, None)
    monkeypatch.setattr(theirs, "sample_fn", lambda *_: start)
    torch.manual_seed(5)
    for step in range(3):
        wanted, got = theirs(latents(step, heads)), ours(latents(step, heads))
        assert torch.equal(got[1], wanted[1])
    assert_same_state(theirs, ours)
    assert ours.initted
    # A state that is initialised is not initialised again.
    other = pair(num_codebooks=heads, kmeans_init=True)[1]
    other.load_state_dict(ours.state_dict())
    assert torch.equal(other.eval()(x)[1], ours.eval()(x)[1]) and torch.equal(other.embed, ours.embed)


def dead_pair(**settings: Any) -> tuple[Any, EMACodebook]:
    theirs, ours = pair(threshold_ema_dead_code=1.5, decay=0.6, **settings)
    # Twelve entries that no row comes near to.
    for book in (theirs, ours):
        book.embed[:, 5:17] += 100
        book.embed_avg[:, 5:17] += 100
    return theirs, ours


@pytest.mark.parametrize("reset", [None, 4.0])
@pytest.mark.parametrize("heads", [1, 2])
def test_dead_entries_become_rows(heads: int, reset: float | None) -> None:
    """The same entries as in the library die; the rows that they become are drawn, all else is equal."""
    theirs, ours = dead_pair(num_codebooks=heads, reset_cluster_size=reset)
    x = latents(1, heads, length=50)
    rows = x.reshape(heads, -1, D)
    quiet = dead_pair(num_codebooks=heads)[1]
    quiet.has_dead_code_replacement = False
    theirs(x), ours(x), quiet(x)
    dead = quiet.cluster_size < 1.5
    assert dead[:, 5:17].all() and not dead.all()
    for h in range(heads):
        for book in (theirs, ours):
            got = book.embed[h][dead[h]]
            assert (got[:, None] == rows[h]).all(-1).any(1).all(), "not a row of the batch"
            assert len(torch.unique(got, dim=0)) == len(got), "a row was taken twice"
            assert (book.cluster_size[h][dead[h]] == (reset or 1.5)).all()
            assert torch.equal(book.embed_avg[h][dead[h]], got * (reset or 1.5))
        for name in ("embed", "embed_avg", "cluster_size"):
            alive, wanted = getattr(ours, name)[h][~dead[h]], getattr(theirs, name)[h][~dead[h]]
            torch.testing.assert_close(alive, wanted, rtol=1e-5, atol=1e-6)
            assert torch.equal(alive, getattr(quiet, name)[h][~dead[h]])


INSIDE: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "rotation trick": ({}, (2, 30, D)),
    "straight-through": ({"rotation_trick": False}, (2, 30, D)),
    "frozen": ({"freeze_codebook": True}, (2, 30, D)),
    "separate heads": (
        {"heads": 2, "separate_codebook_per_head": True, "dim": 2 * D, "codebook_dim": D},
        (2, 30, 2 * D),
    ),
    "shared heads": ({"heads": 2, "dim": 2 * D, "codebook_dim": D}, (2, 30, 2 * D)),
    "projections": ({"dim": 20, "codebook_dim": D}, (2, 30, 20)),
    "channels first": ({"channel_last": False}, (2, D, 30)),
    "images": ({"accept_image_fmap": True}, (2, D, 5, 6)),
    "one token": ({}, (30, D)),
}


def vq_pair(name: str, **more: Any) -> tuple[Any, Any]:
    settings = {"dim": D, "codebook_size": K, **INSIDE[name][0], **more}
    torch.manual_seed(0)
    theirs = peer.VectorQuantize(**settings).train()
    ours = copy.deepcopy(theirs)
    ours._codebook = EMACodebook.from_codebook(ours._codebook)
    return theirs, ours


# With a mask where their module takes one together with a commitment loss.
@pytest.mark.parametrize(
    ("name", "masked"),
    [(name, False) for name in INSIDE] + [(name, True) for name in ("rotation trick", "straight-through", "frozen")],
)
def test_inside_their_module(name: str, masked: bool) -> None:
    shape = INSIDE[name][1]
    theirs, ours = vq_pair(name)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    mask = torch.rand(shape[:2]) < 0.6 if masked else None
    for step in range(6):
        if step == 4:
            theirs.eval(), ours.eval()
        x = 0.4 * torch.randn(shape)
        slope = torch.randn(shape)
        results = []
        for vq in (theirs, ours):
            leaf = x.clone().requires_grad_()
            quantized, index, loss = vq(leaf, mask=mask)
            grads = torch.autograd.grad((quantized * slope).sum() + 3 * loss, leaf) if vq.training else []
            results.append([quantized, index, loss, *grads])
        for got, wanted in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            ours.get_codes_from_indices(index.clamp(min=0)), theirs.get_codes_from_indices(index.clamp(min=0))
        )
    assert_same_state(theirs, ours)


def test_masks_with_heads_in_their_module() -> None:
    """Their commitment loss fails with a mask and separate heads, so without it."""
    for name in ("separate heads", "shared heads"):
        theirs, ours = vq_pair(name, commitment_weight=0.0)
        for _ in range(4):
            x = 0.4 * torch.randn(2, 30, 2 * D)
            mask = torch.rand(2, 30) < 0.6
            for got, wanted in zip(ours(x, mask=mask), theirs(x, mask=mask), strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
        assert_same_state(theirs, ours)


def test_inside_their_residual_quantizer() -> None:
    from vector_quantize_pytorch import ResidualVQ

    torch.manual_seed(0)
    theirs = ResidualVQ(dim=D, codebook_size=K, num_quantizers=3).train()
    ours = copy.deepcopy(theirs)
    for layer in ours.layers:
        layer._codebook = EMACodebook.from_codebook(layer._codebook)
    for _ in range(5):
        x = 0.4 * torch.randn(2, 30, D)
        for got, wanted in zip(ours(x), theirs(x), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert_same_state(theirs, ours)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantize_is_their_module_with_straight_through(dtype: torch.dtype, masked: bool) -> None:
    theirs = vq_pair("straight-through", commitment_weight=0.3)[0]
    ours = EMACodebook.from_codebook(theirs._codebook)
    for step in range(6):
        if step == 4:
            theirs.eval(), ours.eval()
        x, slope = (0.4 * torch.randn(2, 30, D)).to(dtype), torch.randn(2, 30, D)
        mask = torch.rand(2, 30) < 0.6 if masked else None
        results = []
        for run, weight in ((theirs, {}), (ours.quantize, {"commitment_weight": 0.3})):
            leaf = x.clone().requires_grad_()
            quantized, index, loss = run(leaf, mask=mask, **weight)
            assert quantized.dtype == dtype
            grads = torch.autograd.grad((quantized * slope).sum() + loss, leaf) if ours.training else []
            results.append([quantized, index, loss.to(dtype), *grads])
        for got, wanted in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(got, wanted)
    assert_same_state(theirs._codebook, ours)


@pytest.mark.parametrize("option", ["commitment_use_cross_entropy_loss", "codebook_diversity_loss_weight"])
def test_losses_on_all_distances_fail_instead_of_being_wrong(option: str) -> None:
    vq = vq_pair("straight-through", **{option: True})[1]
    with pytest.raises(Exception, match=r"NoneType|None"):
        vq(torch.randn(2, 30, D))


def test_options_without_a_counterpart_are_refused() -> None:
    for settings, name in [
        ({"learnable_codebook": True, "ema_update": False}, "learnable_codebook"),
        ({"use_cosine_sim": True}, "use_cosine_sim"),
        ({"affine_param": True}, "affine_param"),
        ({"stochastic_sample_codes": True}, "stochastic"),
    ]:
        vq = peer.VectorQuantize(dim=D, codebook_size=K, **settings)
        with pytest.raises(ValueError, match=f"codebook has {name}"):
            EMACodebook.from_codebook(vq._codebook)
