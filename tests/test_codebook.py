"""What EMACodebook does by itself; `test_codebook_peer.py` compares it with vector-quantize-pytorch."""

from __future__ import annotations

import copy
import io
import os
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from clusterq.nn import EMACodebook, commitment_loss, straight_through
from clusterq.nn._revival import offer_rows

sys.path.insert(0, os.path.dirname(__file__))
from codebook_cases import D, K, assert_same_state, codebook, latents

INF, NAN = float("inf"), float("nan")


def with_dead_entries() -> EMACodebook:
    ours = codebook(threshold_ema_dead_code=1.5, decay=0.6)
    # Twelve entries that no row comes near to.
    ours.embed[:, 5:17] += 100
    ours.embed_avg[:, 5:17] += 100
    return ours


@pytest.mark.parametrize("shape", [(7, D), (2, 7, D), (1, 2, 3, 7, D), (0, 7, D)])
def test_shapes_of_inputs(shape: tuple[int, ...]) -> None:
    ours = codebook()
    x = torch.randn(shape)
    before = ours.embed.clone()
    quantized, index, _ = ours(x)
    assert quantized.shape == shape and index.shape == shape[:-1]
    assert torch.equal(quantized, before[0][index])


def test_indices_of_padding_are_left_out() -> None:
    ours, other = codebook(), codebook()
    x, index = latents(1)[0], torch.randint(0, K, (25,))
    ours.update_indices(x, torch.where(torch.arange(25) < 20, index, -1))
    other.update_indices(x[:20], index[:20])
    assert_same_state(other, ours)


def test_k_means_initialisation_looks_at_rows_that_count() -> None:
    ours = codebook(kmeans_init=True).eval()
    x = latents(0)
    x[0, 0], x[1, 1, 3], x[2] = NAN, INF, 1e6
    ours(x, mask=(torch.arange(4) != 2)[:, None].expand(4, 25))
    assert torch.isfinite(ours.embed).all() and ours.embed.abs().max() < 10
    assert ours.cluster_size.sum() == 73
    with pytest.raises(ValueError, match="no row to start k-means from"):
        codebook(kmeans_init=True)(x * NAN)


def test_a_revived_entry_stays_where_it_was_put() -> None:
    """Where the stale average is kept, the next step pulls the entry back."""
    ours = with_dead_entries()
    ours(latents(1))
    revived = ours.embed[0, 5:17].clone()
    ours.update_indices(latents(1)[0], torch.zeros(25, dtype=torch.int64))
    # Smoothing by 1e-5 aside, an entry without rows does not move; those that have died again are others.
    same = (ours.embed[0, 5:17] - revived).abs().amax(1) < 1e-3
    died = ours.cluster_size[0, 5:17] == 1.5
    assert (same | died).all()
    ours.has_dead_code_replacement = False
    kept = ours.embed[0, 5:17].clone()
    for _ in range(5):
        ours.update_indices(latents(1)[0], torch.zeros(25, dtype=torch.int64))
    torch.testing.assert_close(ours.embed[0, 5:17], kept, rtol=1e-3, atol=1e-3)


def test_entries_without_rows_decay() -> None:
    ours = codebook(decay=0.9)
    ours.update_indices(latents(1)[0], torch.full((25,), 3))
    assert torch.allclose(ours.cluster_size[0, 4:], torch.tensor(0.9))
    assert ours.cluster_size[0, 3] == pytest.approx(0.9 + 2.5)


def test_more_dead_entries_than_rows_wait_for_their_turn() -> None:
    ours = codebook(threshold_ema_dead_code=5)
    rows = torch.randn(6, D)
    ours(rows)
    taken = (ours.embed[0][:, None] == rows).all(-1)
    assert taken.any(1).sum() == 6 and (taken.sum(0) == 1).all()
    assert (ours.cluster_size == 5).sum() == 6
    empty = codebook(threshold_ema_dead_code=5)
    empty(rows[:0])
    assert torch.isfinite(empty.embed).all()


def test_rows_that_may_not_be_taken() -> None:
    x = latents(1)
    x[0, :5], x[1, 2, 3] = NAN, INF
    mask = torch.rand(4, 25) < 0.5
    mask[1, 2] = False
    usable = mask & torch.isfinite(x).all(-1)
    ours = codebook(threshold_ema_dead_code=50, decay=1.0)
    index = ours(x, mask=mask)[1]
    assert (index[0, :5] == -1).all()
    got = ours.embed[0][ours.cluster_size[0] == 50]
    assert len(got) == min(K, int(usable.sum())) and (got[:, None] == x[usable]).all(-1).any(1).all()
    ours = codebook(threshold_ema_dead_code=50)
    ours.expire_codes_(x, seq_mask=mask.reshape(1, -1))
    assert (ours.embed[0][:, None] == x[usable]).all(-1).any(1).all()
    before = ours.embed.clone()
    ours.eval().expire_codes_(x)
    assert torch.equal(ours.embed, before)


def test_every_row_is_as_likely() -> None:
    rows = torch.arange(13.0).view(1, 13, 1)
    usable = torch.arange(13)[None] % 4 != 3
    wanted = torch.tensor([[True, False, True, True]])
    counts = torch.zeros(3, 13, dtype=torch.float64)
    for _ in range(4000):
        offers = offer_rows(rows, usable, wanted, 0, 1)
        assert offers[0, 1].tolist() == [0, 0] and (offers[0, [0, 2, 3], 1] == 1).all()
        counts[torch.arange(3), offers[0, [0, 2, 3], 0].long()] += 1
    assert not counts[:, ~usable[0]].any()
    # 99.9 % quantile of chi-squared with nine degrees of freedom
    expected = 4000 / 10
    assert ((counts[:, usable[0]] - expected).square() / expected).sum(1).max() < 27.9
    assert all(offer_rows(rows, usable & False, wanted, 0, 1).flatten() == 0)


def test_offers_of_processes_add_up() -> None:
    wanted = torch.rand(2, 20) < 0.6
    rows = [torch.randn(2, n, D) for n in (30, 3, 0)]
    offers = [
        offer_rows(part, torch.ones(part.shape[:2], dtype=torch.bool), wanted, t, 3) for t, part in enumerate(rows)
    ]
    found = torch.stack([o[..., -1] for o in offers])
    assert (found.sum(0) <= 1).all() and not found[:, ~wanted].any()
    assert found[1].sum(-1).tolist() == [3, 3] and not found[2].any()
    for t in range(2):
        for h in range(2):
            got = offers[t][h][found[t, h] > 0][:, :-1].float()
            assert (got[:, None] == rows[t][h]).all(-1).any(1).all() and len(torch.unique(got, dim=0)) == len(got)
    assert (found[0] > 0).sum(-1).tolist() == [(int(w) + 2) // 3 for w in wanted.sum(-1)]


def test_seed_decides_and_rows_with_nan_are_marked() -> None:
    x = latents(1)
    x[2, 3, 4] = NAN
    runs = []
    for seed in (1, 1, 2):
        ours = with_dead_entries()
        torch.manual_seed(seed)
        quantized, index, _ = ours(x)
        runs.append(ours.embed)
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert (
        index[2, 3] == -1
        and quantized[2, 3].isnan().all()
        and (quantized.isnan().sum(), ours.embed.isnan().sum()) == (D, 0)
    )


def test_losses() -> None:
    x, quantized = torch.randn(2, 5, D, dtype=torch.float64), torch.randn(2, 5, D, dtype=torch.float64)
    mask = torch.tensor([[True, True, False, False, True], [False] * 4 + [True]])
    x.requires_grad_(), quantized.requires_grad_()
    loss = commitment_loss(x, quantized, mask)
    torch.testing.assert_close(loss, functional.mse_loss(x, quantized, reduction="none")[mask].mean())
    torch.testing.assert_close(commitment_loss(x, quantized), functional.mse_loss(x, quantized))
    wanted = (2 * (x - quantized) * mask[..., None] / (4 * D)).detach()
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], wanted)
    assert commitment_loss(x, quantized, mask & False) == 0
    out = straight_through(x, quantized)
    torch.testing.assert_close(out, quantized)
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.ones_like(x))
    # A masked row may hold anything.
    broken = x.detach().clone()
    broken[0, 2] = NAN
    broken.requires_grad_()
    masked = commitment_loss(broken, quantized, mask)
    torch.testing.assert_close(masked, loss)
    assert torch.equal(torch.autograd.grad(masked, broken)[0], wanted)


def test_an_infinite_row_does_not_stay_in_the_state() -> None:
    ours, other = codebook(), codebook()
    x = latents(1)
    x[0, 0, 0], x[1, 5, 2] = INF, -INF
    index = ours(x)[1]
    hit = sorted({int(index[0, 0]), int(index[1, 5])})
    kept = torch.ones(4, 25, dtype=torch.bool)
    kept[0, 0] = kept[1, 5] = False
    other(x, mask=kept & ~torch.isin(index, torch.tensor(hit)))
    assert torch.isfinite(ours.embed_avg).all() and torch.isfinite(ours.embed).all()
    assert_same_state(other, ours)


@pytest.mark.parametrize("convert", ["half", "bfloat16", "double", "to"])
def test_state_stays_float32(convert: str) -> None:
    model = nn.Sequential(nn.Linear(D, D), codebook())
    before = copy.deepcopy(model[1].state_dict())
    model = model.to(torch.bfloat16) if convert == "to" else getattr(model, convert)()
    assert model[0].weight.dtype != torch.float32
    for name, tensor in model[1].state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
    moved = copy.deepcopy(model).to("meta")
    assert moved[1].embed.is_meta and moved[1].embed.dtype == torch.float32
    assert moved.to_empty(device="cpu")[1].embed.device.type == "cpu"


def test_autocast_changes_nothing() -> None:
    plain, cast = codebook(), codebook()
    encoder = nn.Linear(D, D)
    for step in range(5):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = encoder(latents(step))
            assert x.dtype == torch.bfloat16
            quantized, _, loss = cast.quantize(x)
        plain(x)
        (quantized.float().square().mean() + loss).backward()
        assert quantized.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert_same_state(plain, cast)
    assert encoder.weight.grad is not None and encoder.weight.grad.any()


@pytest.mark.parametrize("dead", [0, 2])
@pytest.mark.parametrize("training", [True, False])
def test_compiles_whole(training: bool, dead: float) -> None:
    torch._dynamo.reset()
    eager, traced = (codebook(threshold_ema_dead_code=dead).train(training) for _ in range(2))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(traced.quantize, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for step in range(4):
        x = latents(step, length=20 + 3 * step)
        mask = torch.rand(x.shape[:2]) < 0.8
        grads, outputs = [], []
        for run in (eager.quantize, compiled):
            torch.manual_seed(step)
            leaf = x.clone().requires_grad_()
            result = run(leaf, mask)
            outputs.append(result)
            if training:
                grads.append(torch.autograd.grad(result[0].square().sum() + result[2], leaf)[0])
        for a, b in zip(*outputs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        if training:
            torch.testing.assert_close(*grads, rtol=0, atol=1e-6)
        assert_same_state(eager, traced)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1] > 0, "another size was compiled again"


@pytest.mark.compiler
def test_inductor_compiles_a_training_step() -> None:
    torch._dynamo.reset()
    eager, traced = codebook(), codebook()
    compiled = torch.compile(traced, fullgraph=True)
    for step in range(3):
        wanted, got = eager(latents(step)), compiled(latents(step))
        assert torch.equal(got[1], wanted[1])
        torch.testing.assert_close(got[0], wanted[0], rtol=0, atol=1e-6)
    assert_same_state(eager, traced)


def test_compiled_before_its_entries_are_set() -> None:
    torch._dynamo.reset()
    ours = codebook(kmeans_init=True)
    with pytest.raises(Exception, match="call the codebook once before"):
        torch.compile(ours, fullgraph=True, backend="eager")(latents(0))
    ours(latents(0))
    torch._dynamo.reset()
    assert torch.compile(ours, fullgraph=True, backend="eager")(latents(0))[1].shape == (4, 25)
    # A loaded state counts, and one that is not initialised is initialised by the next call.
    loaded = codebook(kmeans_init=True)
    unset = copy.deepcopy(loaded.state_dict())
    loaded.load_state_dict(ours.state_dict())
    assert torch.equal(
        torch.compile(loaded.eval(), fullgraph=True, backend="eager")(latents(1))[1], ours(latents(1))[1]
    )
    loaded.load_state_dict(unset)
    loaded(latents(2))
    assert loaded.initted and loaded.embed.any()


def test_steps_never_wait_for_the_device() -> None:
    waits = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.masked_select.default,
        torch.ops.aten.is_nonzero.default,
        torch.ops.aten.equal.default,
    )
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            assert func not in waits, func
            result = func(*args, **(kwargs or {}))
            for value in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(value, Tensor):
                    largest = max(largest, value.numel())
            return result

    ours = EMACodebook(4, 512, threshold_ema_dead_code=2)
    x = torch.randn(8, 500, 4)
    with Watch():
        _, _, loss = ours.quantize(x.requires_grad_(), mask=torch.rand(8, 500) < 0.9)
        loss.backward()
        ours.eval()(x)
    # Rows and entries, 16,000 and 2,048 numbers; a matrix of distances would have 2 million.
    assert 16000 <= largest < 2 * 16000


def test_copies_and_files() -> None:
    ours = codebook()
    ours(latents(0))
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    loaded = codebook()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for other in (loaded, copy.deepcopy(ours)):
        other(latents(1))
    ours(latents(1))
    assert_same_state(ours, loaded)
    assert "codebook_size=32" in repr(ours)


@pytest.mark.parametrize(
    ("error", "text", "call"),
    [
        (ValueError, "dim is 0", lambda: EMACodebook(0, K)),
        (ValueError, "codebook_size is 0", lambda: EMACodebook(D, 0)),
        (ValueError, "num_codebooks is 0", lambda: EMACodebook(D, K, 0)),
        (ValueError, "decay is 1.5", lambda: EMACodebook(D, K, decay=1.5)),
        (ValueError, "eps is -1", lambda: EMACodebook(D, K, eps=-1.0)),
        (ValueError, "threshold_ema_dead_code is -1", lambda: EMACodebook(D, K, threshold_ema_dead_code=-1)),
        (ValueError, "kmeans_iters is 0", lambda: EMACodebook(D, K, kmeans_iters=0)),
        (ValueError, "precision is 'half'", lambda: EMACodebook(D, K, precision="half")),
        (ValueError, r"x has shape \(5, 7\)", lambda: EMACodebook(D, K)(torch.ones(5, 7))),
        (ValueError, r"x has shape \(8,\)", lambda: EMACodebook(D, K)(torch.ones(D))),
        (ValueError, r"wanted \[2, b, n, 8\]", lambda: EMACodebook(D, K, 2)(torch.ones(2, 5, D))),
        (TypeError, "x has dtype torch.int64", lambda: EMACodebook(D, K)(torch.ones(5, D).long())),
        (TypeError, "mask has dtype", lambda: EMACodebook(D, K)(torch.ones(2, 5, D), mask=torch.ones(2, 5))),
        (
            ValueError,
            r"mask has shape \(2, 4\)",
            lambda: EMACodebook(D, K)(torch.ones(2, 5, D), mask=torch.ones(2, 4) > 0),
        ),
        # of as many rows, but not theirs
        (
            ValueError,
            r"mask has shape \(5, 2\)",
            lambda: EMACodebook(D, K)(torch.ones(2, 5, D), mask=torch.ones(5, 2) > 0),
        ),
        (ValueError, "topk is given", lambda: EMACodebook(D, K)(torch.ones(5, D), topk=2)),
        (ValueError, "accum_ema_update is given", lambda: EMACodebook(D, K)(torch.ones(5, D), accum_ema_update=True)),
        (
            ValueError,
            "ema_update_weight is given",
            lambda: EMACodebook(D, K)(torch.ones(5, D), ema_update_weight=torch.ones(K)),
        ),
    ],
)
def test_bad_arguments_are_named(error: type[Exception], text: str, call: Any) -> None:
    with pytest.raises(error, match=text):
        call()
