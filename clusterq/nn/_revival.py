"""Rows of a batch for dead codebook entries, chosen without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor


def offer_rows(rows: Tensor, usable: Tensor, wanted: Tensor, turn: int, processes: int) -> Tensor:
    """A row for each entry that wants one; no row twice.

    Entry number r of the R wanted ones gets a random one of the M usable rows from number r M / R to (r + 1) M / R,
    counted from a random one on: parts that do not overlap, and are empty for some where M < R. Of several processes
    this one, number `turn`, serves every `processes`-th wanted entry: their offers add up to one for each entry.

    Args:
        rows: [H, N, D], any floating dtype.
        usable: bool [H, N].
        wanted: bool [H, K].

    Returns:
        [H, K, D + 1] float64: the row, then 1; all 0 for an entry without one.
    """
    count, features = rows.shape[1:]
    if count == 0:
        return rows.new_zeros((*wanted.shape, features + 1), dtype=torch.float64)
    order = wanted.cumsum(-1) - 1
    mine = wanted & (order % processes == turn)
    place, parts = order // processes, mine.sum(-1, keepdim=True).clamp(min=1)
    ends = usable.cumsum(-1)
    total = ends[:, -1:]
    low, high = place * total // parts, (place + 1) * total // parts
    random = torch.rand((wanted.shape[0], wanted.shape[1] + 1), device=rows.device, dtype=torch.float64)
    pick = low + (random[:, 1:] * (high - low)).to(torch.int64)
    pick = (pick + (random[:, :1] * total).to(torch.int64)) % total.clamp(min=1)
    row = torch.searchsorted(ends, pick, right=True).clamp(max=count - 1)
    taken = rows.gather(1, row[..., None].expand(*row.shape, features)).double()
    found = (mine & (high > low))[..., None]
    return torch.where(found, torch.cat([taken, torch.ones_like(taken[..., :1])], -1), 0)
