"""Memory of a process that measures: where allocations come from, page faults of a call, peak bytes of a call."""

from __future__ import annotations

import os
import platform
import resource
import sys
from collections.abc import Callable
from typing import Literal

Allocator = Literal["kept", "system"]
_TUNABLES = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=2147483647:glibc.malloc.tcache_count=0"


def set_allocator(allocator: Allocator) -> None:
    """Choose what all contestants of a process pay for their memory; may start the process anew with its arguments.

    `kept`: glibc takes every block from its heap and never hands the heap back, so that after the warm-up no call has
    page faults, neither ours nor a peer's. It cannot be told while it runs: its cache for threads keeps the few bytes
    that align a block, and next to them the same block does not fit a second time (glibc 2.36: the heap grows by the
    size of the result with every `clone`), hence the new start without that cache.

    `system`: the process as Python starts it. Blocks above 32 MiB are then mapped afresh for every tensor and smaller
    ones fall prey to the above, which hits contestants unevenly: 12,544 faults for the result of `clone` of [64, 64,
    56, 56], 281 for ours, which asks for huge pages.
    """
    if allocator == "kept" and platform.libc_ver()[0] == "glibc" and os.environ.get("GLIBC_TUNABLES") != _TUNABLES:
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "GLIBC_TUNABLES": _TUNABLES})


def minor_faults(call: Callable[[], object]) -> int:
    """Pages that the system mapped during one call, in all threads."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def peak_bytes(call: Callable[[], object]) -> int:
    """The most memory that one call holds at a time beyond what existed before it, its result included.

    The profiler reports every block that torch's CPU allocator hands out or takes back, kernels of the dispatcher, of
    autograd and of compiled code alike; the peak is that of their running sum. It depends on neither clock nor
    allocator and repeats to the byte. Not seen: what C++ code takes from elsewhere, such as a `std::vector` of partial
    sums.
    """
    # The profiler's own log, an error where there is no GPU, is read no later than its first use.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    import torch
    from torch.profiler import ProfilerActivity, profile

    # What is made once and kept, such as a buffer of autograd, is no part of a later call.
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    del result
    results = profiler.profiler.kineto_results  # type: ignore[union-attr]
    events = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    held = torch.tensor([size for _, size in events], dtype=torch.int64).cumsum(0)
    return int(held.max()) if len(events) else 0
