"""The BatchNorm ops under torch.compile, and the same bits on any threads and instruction sets."""

import os
import subprocess
import sys

import pytest
import torch

from clusterq import ops
from clusterq.testing import cpu_levels, layouts

OPS = torch.ops.clusterq


def op_arguments(x):
    """Arguments of every op for this x."""
    n, c = x.shape[:2]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = [torch.rand(n, c, dtype=dtype) - 0.5 for _ in range(3)]
    weight, bias, mean = [torch.rand(c, dtype=dtype) - 0.5 for _ in range(3)]
    var = torch.rand(c, dtype=dtype) + 0.1
    labels, weights = torch.arange(n) % 3, torch.arange(n).to(dtype) % 3
    grad = (torch.rand(x.shape) - 0.5).to(x.dtype)
    return {
        "instance_statistics": (x,),
        "instance_statistics_list": ([x, x],),
        "batch_norm_statistics": (x, 0, None),
        "class_statistics": (x, labels, 4, weights),
        "batch_norm_instance_statistics": (x, weight, bias, mean, var, 1e-5),
        "batch_norm_batch_statistics": (x, weight, bias, mean, var, 1e-5),
        "statistics_backward": (x, *rows, 0.5, 0.25),
        "statistics_backward_list": ([x, x], *(torch.cat([t, t], 1) for t in rows)),
        "batch_norm_statistics_backward": (grad, x, weight, var, 1e-5, mean[None], rows[0], rows[1], 0.5, 0.25),
        "batch_norm_parameter_backward": (grad, x, mean, var, 1e-5),
    }


def results(x):
    """Every output of every op, flat."""
    torch.manual_seed(1)
    flat = []
    for name, arguments in op_arguments(x).items():
        out = getattr(OPS, name)(*arguments)
        flat += out if isinstance(out, (tuple, list)) else [out]
    return flat


@pytest.mark.parametrize("shape", [(33, 20, 14, 14), (2, 40, 40, 40), (3000, 24), (1, 1, 300, 301), (20, 1, 70, 70)])
def test_results_do_not_depend_on_the_thread_count(shape):
    x = torch.randn(shape) + 3
    before = torch.get_num_threads()
    try:
        for y in layouts(x).values():
            torch.set_num_threads(1)
            single = results(y)
            for threads in (2, 3):
                torch.set_num_threads(threads)
                for actual, wanted in zip(results(y), single, strict=True):
                    assert torch.equal(actual, wanted)
    finally:
        torch.set_num_threads(before)


def test_merged_instances_do_not_depend_on_the_thread_count():
    mean, var = torch.rand(60_000, 1, dtype=torch.float64), torch.rand(60_000, 1, dtype=torch.float64)
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(ops.merge_instance_statistics(mean, var, 25))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


DIGEST = """
import hashlib, sys, torch
sys.path.insert(0, sys.argv[1])
from test_bn_stats_registration import results
torch.manual_seed(0)
digest = hashlib.sha256()
for shape in [(3, 20, 7, 7), (4, 33), (2, 3, 70, 70), (5, 16, 4, 4), (40, 20, 5, 5)]:
    # Uniform: torch's own normal generator gives other values on other instruction sets.
    base = torch.rand(shape) * 9 + 1
    base.view(-1)[::37] *= 1e-37
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for x in (base.to(dtype), base.to(dtype).movedim(1, -1).contiguous().movedim(-1, 1)):
            for out in results(x):
                digest.update(out.contiguous().view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


@pytest.mark.skipif(
    not any(b.op == "instance_statistics" and b.kernel == "cpp" for b in ops.backends()), reason="needs the C++ kernels"
)
def test_every_instruction_set_gives_the_same_bits():
    here = os.path.dirname(os.path.abspath(__file__))
    digests = {
        capability: subprocess.run(
            [sys.executable, "-c", DIGEST, here],
            env={**os.environ, "CLUSTERQ_CPU_CAPABILITY": capability},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for capability in cpu_levels()
    }
    assert len(set(digests.values())) == 1, digests


def alignment(x, weight, bias, mean, var, labels):
    """A loss through every public function."""
    y, m, v = ops.batch_norm_with_instance_statistics(x, weight, bias, mean, var, 1e-5)
    spatial = x.shape[2] * x.shape[3]
    batch = ops.merge_instance_statistics(m, v, spatial)
    classes = ops.merge_class_statistics(m, v, labels, 3)[1:]
    direct = [
        *ops.batch_norm_statistics(x, correction=1),
        *ops.class_statistics(x, labels, 3)[1:],
        *ops.instance_statistics(x),
    ]
    return y.square().mean() + sum(t.square().sum() for t in (*batch, *classes, *direct))


def test_compiles_without_graph_breaks_for_any_size():
    compiled = torch.compile(alignment, fullgraph=True, dynamic=True, backend="aot_eager")
    weight, bias = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    mean, var = torch.randn(4), torch.rand(4) + 0.1
    for n, side in ((4, 6), (7, 5)):
        x = torch.randn(n, 4, side, side + 1, requires_grad=True)
        arguments = (x, weight, bias, mean, var, torch.arange(n) % 3)
        wanted, actual = alignment(*arguments), compiled(*arguments)
        torch.testing.assert_close(actual, wanted)
        leaves = (x, weight, bias)
        for a, b in zip(torch.autograd.grad(actual, leaves), torch.autograd.grad(wanted, leaves), strict=True):
            torch.testing.assert_close(a, b)
