"""Ops under threads, forks and worker processes; `tests/test_threads.py` starts it with the name of a function.

A process of its own, so that a crash or a hang is a failed test, and that the first calls of all come from threads.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.utils.data import DataLoader, Dataset

from clusterq import ops
from clusterq.op_cases import OP_CASES, values

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from op_contract import overload, tensors

THREADS = 6
# Large enough for several parts of `parallel_for`.
SHAPES = {2: (300, 24), 3: (2, 300, 12), 4: (4, 12, 24, 25)}
NAMES = sorted(OP_CASES)


def digest(name: str) -> str:
    """Of what an op returns and of the arguments it may write into, over its cases."""
    found = hashlib.sha256()
    for case in OP_CASES[name]:
        arguments = case.arguments(SHAPES[len(case.shape)])
        for tensor in [*tensors(overload(name)(*arguments)), *tensors(arguments)]:
            found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def threads() -> None:
    """Each thread takes the ops in another order: different ones and the same ones meet."""
    torch.set_num_threads(2)
    start = threading.Barrier(THREADS)

    def work(number: int) -> dict[str, str]:
        start.wait()
        shift = number * len(NAMES) // THREADS // 2
        return {name: digest(name) for name in NAMES[shift:] + NAMES[:shift]}

    with ThreadPoolExecutor(THREADS) as pool:
        runs = list(pool.map(work, range(THREADS)))
    serial = {name: digest(name) for name in NAMES}
    for run in runs:
        different = [name for name in NAMES if run[name] != serial[name]]
        assert not different, different


def fork() -> None:
    """A child of a process whose thread pool is running. It has one thread: torch's own pool survives no fork."""
    torch.set_num_threads(2)
    before = {name: digest(name) for name in NAMES}
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        different = [name for name in NAMES if digest(name) != before[name]]
        print(*different, file=sys.stderr, flush=True)
        os._exit(1 if different else 0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert {name: digest(name) for name in NAMES} == before


class Quantized(Dataset):
    """Item i is made by three ops."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = values((64, 48), seed=i)
        index, _ = ops.nearest_centroid(x, values((9, 48)))
        return ops.quantize(x, 0.1, 0, -8, 7), ops.instance_statistics(x[..., None, None])[0], index


def workers(method: str) -> None:
    """A loader whose items run ops: the same from two worker processes as from this one."""
    torch.set_num_threads(2)
    data = Quantized()
    here = [data[i] for i in range(len(data))]
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context=method, timeout=60)
    there = list(loader)
    assert len(there) == len(here)
    for ours, theirs in zip(here, there, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def daemon() -> None:
    """The interpreter ends, and the library's static objects go, while a daemon thread is inside a kernel.

    One call of seconds, none of which is to come back in time: CPython before 3.14 unwinds a thread that comes back
    during the exit, and torch's own ops (tried: `torch.sort`) abort on that.
    """
    torch.set_num_threads(2)
    x, centroids = torch.rand(1_000_000, 64), torch.rand(4096, 64)
    inside, returned = threading.Event(), []

    def work() -> None:
        inside.set()
        ops.nearest_centroid(x, centroids)
        returned.append(True)

    threading.Thread(target=work, daemon=True).start()
    inside.wait()
    # Python's part before the kernel takes well under this.
    time.sleep(0.2)
    assert not returned


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
    print("done")
