"""Memory: huge pages under large outputs, and the allocator that keeps what is freed."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clusterq import ops

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
LARGE = (1 << 23) + 4321  # float32 values, just above 32 MiB

PROBE = f"""
import torch
from clusterq import ops
def flags(t):
    inside = False
    for line in open("/proc/self/smaps"):
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            low, high = (int(v, 16) for v in head.split("-"))
            inside = low <= t.data_ptr() + t.nbytes // 2 < high
        elif inside and head == "VmFlags:":
            return line.split()[1:]
def asked(count):
    y = ops.fake_quantize(torch.zeros(count), torch.tensor([0.1]), 0, -8, 7)
    return "hg" in flags(y)
print(asked({LARGE}), asked(1 << 21))
"""


def kernel() -> str:
    return next(b.kernel for b in ops.backends() if (b.op, b.device) == ("fake_quantize", "cpu"))


@pytest.mark.skipif(not THP.exists(), reason="this system has no transparent huge pages")
@pytest.mark.parametrize(("setting", "expected"), [(None, "True False"), ("0", "False False")])
def test_only_large_outputs_ask_and_only_if_allowed(setting: str | None, expected: str) -> None:
    if kernel() != "cpp":
        pytest.skip("the compiled CPU library is not in use")
    environment = {k: v for k, v in os.environ.items() if k != "CLUSTERQ_HUGE_PAGES"}
    if setting is not None:
        environment["CLUSTERQ_HUGE_PAGES"] = setting
    # glibc alone may not ask: that of PyTorch's allocator and of malloc's own tunable are left out.
    environment.pop("THP_MEM_ALLOC_ENABLE", None)
    environment.pop("GLIBC_TUNABLES", None)
    done = subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == expected


def test_a_large_tensor_is_quantized_to_the_same_values() -> None:
    x = torch.linspace(-2.0, 2.0, LARGE)
    y = ops.fake_quantize(x, torch.tensor([0.1]), 0, -8, 7)
    for part in (slice(0, 5000), slice(LARGE // 2, LARGE // 2 + 5000), slice(LARGE - 5000, LARGE)):
        expected = torch.fake_quantize_per_tensor_affine(x[part], 0.1, 0, -8, 7)
        torch.testing.assert_close(y[part], expected, rtol=1e-6, atol=1e-7)


FAULTS = """
import ctypes, resource, sys
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
if sys.argv[1] == "keep":
    from clusterq.allocator import keep_freed_memory
    assert keep_freed_memory()
def step(size=20 << 20):
    blocks = [libc.malloc(size) for _ in range(4)]
    for block in blocks:
        libc.memset(block, 1, size)
    for block in blocks:
        libc.free(block)
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    plain = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    plain.pop("THP_MEM_ALLOC_ENABLE", None)
    faults = {}
    for mode in ("keep", "plain"):
        command = [sys.executable, "-c", FAULTS, mode]
        done = subprocess.run(command, env=plain, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        faults[mode] = int(done.stdout)
    assert faults["keep"] < 200 and faults["plain"] > 10 * max(faults["keep"], 100), faults
