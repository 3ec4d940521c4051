"""Shared by the tests of EMACodebook."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from clusterq.nn import EMACodebook

D, K = 8, 32


def codebook(**settings: Any) -> EMACodebook:
    """The same one at every call; no dead entries are revived unless asked for."""
    torch.manual_seed(0)
    return EMACodebook(D, K, **{"threshold_ema_dead_code": 0, **settings}).train()


def latents(step: int, heads: int = 1, batch: int = 4, length: int = 25) -> Tensor:
    """[b, n, D], or [H, b, n, D] for several heads; they drift, as an encoder's do."""
    random = torch.Generator().manual_seed(step)
    x = 0.4 * torch.randn(heads, batch, length, D, generator=random) + 0.01 * step
    return x if heads > 1 else x[0]


def assert_same_state(theirs: nn.Module, ours: nn.Module) -> None:
    wanted, got = theirs.state_dict(), ours.state_dict()
    assert list(wanted) == list(got)
    for name in wanted:
        assert wanted[name].dtype == got[name].dtype
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
