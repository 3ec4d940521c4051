"""Kernels give the same bits at every instruction set of this processor."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from clusterq import ops
from clusterq.testing import cpu_levels

DIGEST = """
import hashlib, torch
import clusterq.ops
op = torch.ops.clusterq
torch.manual_seed(0)
digest = hashlib.sha256()
def put(*tensors):
    for tensor in tensors:
        if tensor.is_floating_point():
            # Which of the many NaN it is does not matter.
            tensor = torch.where(tensor.isnan(), torch.full_like(tensor, torch.nan), tensor)
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
SPECIAL = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 6.0, 1e-7, -1e-7, 65000.0])
for shape, axis in (((3, 20, 7, 7), 1), ((3, 5, 40, 41), 1), ((70, 9, 3, 3), 0), ((4, 33), 1), ((200001,), None)):
    # Uniform: torch's own normal generator gives other values on other instruction sets.
    base, cotangent = torch.rand(shape) * 9 - 4, torch.rand(shape)
    base.view(-1)[5 : 5 + len(SPECIAL)] = SPECIAL
    channels = 1 if axis is None else shape[axis]
    steps = torch.rand(5, channels) * 0.1 + 0.02
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        scale, zero = steps[0].to(wide), torch.full((channels,), 3.0, dtype=wide)
        variants = [base.to(dtype)]
        if len(shape) == 4:
            variants.append(variants[0].to(memory_format=torch.channels_last))
        for x in variants:
            # Of the same layout, and of another one.
            grad = cotangent.to(dtype)
            like = torch.empty_like(x).copy_(grad)
            for activation in ("none", "relu", "relu6"):
                put(op.fake_quantize(x, scale, zero, 0, 15, axis, activation))
                put(op.fake_quantize_backward(grad, x, scale, zero, 0, 15, axis, activation))
                put(*op.fake_quantize_learned_backward(grad, x, scale, zero, 0, 15, axis, activation))
                put(*op.fake_quantize_learned_backward(like, x, scale, zero, 0, 15, axis, activation))
                put(*op.finite_range(x, axis, activation))
                for rule in ("codes", "real", "activation"):
                    put(*op.fake_quantize_masked(x, scale, zero, 0, 15, axis, activation, rule))
            codes = op.quantize(x, scale, zero, 0, 255, axis)
            put(codes, op.dequantize(codes, scale, zero, axis, dtype))
            put(op.quantization_error(x, steps.to(wide), torch.full_like(steps, 3.0, dtype=wide), 0, 15, axis))
            low, high = torch.full((channels,), torch.inf, dtype=wide), torch.full((channels,), -torch.inf, dtype=wide)
            put(*op.observe_fake_quantize(x, low, high, 0, 15, 0.9, True, False, axis, "none"), low, high)
            put(*op.delayed_fake_quantize(x, low, high, 0, 15, 0.9, False, axis, "relu", "codes"), low, high)
            if axis is not None:
                put(*op.fake_quantize_weight(x, -8, 7, axis, False))
# Extremes that are zeros of both signs, in another order for every thread and vector lane.
for shape, axis in (((5000, 8), 1), ((64, 700), 0), ((90000,), None)):
    zeros = torch.where(torch.rand(shape) < 0.5, -0.0, 0.0)
    for x in (zeros, zeros + (torch.rand(shape) < 0.1)):
        channels = 1 if axis is None else shape[axis]
        put(*op.finite_range(x, axis, "none"))
        for delayed in (False, True):
            low, high = torch.full((channels,), torch.inf), torch.full((channels,), -torch.inf)
            if delayed:
                op.delayed_fake_quantize(x, low, high, 0, 15, 0.9, False, axis, "none", "codes")
            else:
                op.observe_fake_quantize(x, low, high, 0, 15, 0.9, True, False, axis, "none")
            put(low, high)
            assert not (low.signbit() & (low == 0)).any() and not (high.signbit() & (high == 0)).any()
print(digest.hexdigest())
"""

# Every op of the registry in every dtype; the families' own tests go deeper.
EVERY_OP = """
import hashlib, sys, torch
sys.path.insert(0, "tests")
from op_contract import CASES, laid_out, overload, tensors
from clusterq.testing import FLOAT_DTYPES
digest = hashlib.sha256()
for name, case in CASES:
    # Which rows the fast search leaves to float64 depends on its rounding, and is documented to.
    if name == "undecided_rows":
        continue
    shape = {2: (70, 33), 3: (2, 70, 19), 4: (3, 20, 11, 13)}[len(case.shape)]
    for dtype, layout in [(d, l) for d in FLOAT_DTYPES for l in ("contiguous", "channels_last", "sliced")]:
        arguments = laid_out(name, case.arguments(shape, dtype), layout)
        for out in [*tensors(overload(name)(*arguments)), *tensors(arguments)]:
            out = torch.where(out.isnan(), torch.nan, out) if out.is_floating_point() else out
            digest.update(out.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


@pytest.mark.parametrize("program", [DIGEST, EVERY_OP], ids=["fake_quantize", "every_op"])
@pytest.mark.skipif(
    not any(row.op == "fake_quantize" and row.kernel == "cpp" for row in ops.backends()), reason="needs the C++ kernels"
)
def test_every_level_gives_the_same_bits(program):
    digests = {
        level: subprocess.run(
            [sys.executable, "-c", program],
            cwd=Path(__file__).parents[1],
            env={**os.environ, "CLUSTERQ_CPU_CAPABILITY": level},
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        ).stdout.strip()
        for level in cpu_levels()
    }
    assert all(len(value) == 64 for value in digests.values())
    assert len(set(digests.values())) == 1, digests
