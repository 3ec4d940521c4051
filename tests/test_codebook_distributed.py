"""EMACodebook in a process group: all processes move alike, as one that has all rows does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROCESS = """
import copy, sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[3])
from codebook_cases import assert_same_state, codebook, latents
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)

def equal_everywhere(book):
    every = [None] * 2
    dist.all_gather_object(every, book.state_dict())
    for name, tensor in every[0].items():
        assert torch.equal(tensor, every[1][name]), name

calls, all_reduce = [], dist.all_reduce
def counted(*args, **kwargs):
    calls.append(args)
    return all_reduce(*args, **kwargs)
dist.all_reduce = counted

# Unequal shares, and at last none for the second process; another seed in each.
for heads in (1, 2):
    alone, shared = codebook(num_codebooks=heads), codebook(num_codebooks=heads, use_ddp=True)
    calls.clear()
    for step in range(12):
        x = latents(step, heads).reshape(heads, 1, 100, -1)
        mask = torch.rand(1, 100, generator=torch.Generator().manual_seed(step)) < 0.7
        cut = 70 if step < 10 else 100
        part = slice(0, cut) if rank == 0 else slice(cut, None)
        torch.manual_seed(1000 * rank + step)
        wanted, got = alone(x, mask=mask), shared(x[:, :, part], mask=mask[:, part])
        assert torch.equal(got[1], wanted[1][..., part])
    assert_same_state(alone, shared)
    assert len(calls) == 12
    equal_everywhere(shared)

# Dead entries: both offer rows, and all processes take the same; an entry is a row of one of them.
# No whole number: an entry that lives cannot come to have it by its rows.
reviving = codebook(use_ddp=True, threshold_ema_dead_code=5.5)
for step in range(6):
    x = latents(step)[2 * rank : 2 * rank + 2]
    calls.clear()
    reviving(x)
    assert len(calls) == 1
    equal_everywhere(reviving)
    revived = reviving.embed[0][reviving.cluster_size[0] == 5.5]
    places = (revived[:, None] == latents(step).reshape(-1, 8)).all(-1)
    assert len(revived) > 8 and places.any(1).all() and places.sum(0).max() == 1, step
    assert places[:, :50].any() and places[:, 50:].any()
    # A process without rows takes part all the same.
    reviving(x if rank == 0 else x[:0])
    equal_everywhere(reviving)
reviving.expire_codes_(latents(9)[2 * rank : 2 * rank + 2])
equal_everywhere(reviving)

for heads in (1, 2):
    started = codebook(num_codebooks=heads, use_ddp=True, kmeans_init=True)
    started(latents(0, heads)[..., 2 * rank : 2 * rank + 2, :, :])
    equal_everywhere(started)
    assert started.initted and started.embed.abs().amin((1, 2)).max() > 0 and started.cluster_size.sum() > 90

# Inside DistributedDataParallel, whose buffers are the state.
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.book = torch.nn.Linear(8, 8), codebook(use_ddp=True, threshold_ema_dead_code=2)
    def forward(self, x):
        quantized, _, loss = self.book.quantize(self.encoder(x))
        return quantized.square().mean() + loss
parallel = torch.nn.parallel.DistributedDataParallel(Model())
for step in range(3):
    parallel(latents(step)[2 * rank : 2 * rank + 2]).backward()
    equal_everywhere(parallel.module.book)

dist.all_reduce = all_reduce
# Compiled: the all_reduce is part of the one graph.
eager, traced = codebook(use_ddp=True), codebook(use_ddp=True)
compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
for step in range(2):
    x = latents(step)[2 * rank : 2 * rank + 2]
    assert torch.equal(eager(x)[1], compiled(x)[1])
assert_same_state(eager, traced)
equal_everywhere(traced)
print("equal")
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_processes_move_alike(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROCESS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    children = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store"), str(Path(__file__).parent)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    outputs = [child.communicate(timeout=300) for child in children]
    assert all(out.strip() == "equal" for out, _ in outputs), [err[-3000:] for _, err in outputs]
