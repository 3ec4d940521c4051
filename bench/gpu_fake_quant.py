"""Fake-quantize on a GPU: bytes per second of every kernel against a copy and against torch's own ops.

    python bench/gpu_fake_quant.py --json FILE

Device time from CUDA events around one call, median of the repeats, the caches flushed before each. Every kernel is
checked against the PyTorch reference on the same data before it is timed. `share` is the part of the measured copy
bandwidth.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import clusterq.ops
from clusterq.kernels import fake_quant as triton_kernels
from clusterq.ops import _fake_quant_reference as reference

DEVICE = torch.device("cuda")
SHAPES = {"activation": ((64, 64, 56, 56), 1), "weight": ((512, 512, 3, 3), 0), "large": ((256, 256, 56, 56), 1)}
LOW, HIGH = -8, 7


def milliseconds(call: Callable[[], Any], repeats: int) -> float:
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def copy_bandwidth(repeats: int) -> float:
    """GB/s of a copy of 1 GiB, bytes read plus bytes written."""
    x = torch.randn(1 << 28, device=DEVICE)
    y = torch.empty_like(x)
    return 2 * x.nbytes / milliseconds(lambda: y.copy_(x), repeats) / 1e6


def check(ours: Any, wanted: Any) -> None:
    ours, wanted = (t if isinstance(t, tuple) else (t,) for t in (ours, wanted))
    torch.testing.assert_close(ours[0], wanted[0], rtol=0, atol=0)
    for a, b in zip(ours[1:], wanted[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    torch.manual_seed(0)
    copy = copy_bandwidth(options.repeats)
    registered = {row.op: row.kernel for row in clusterq.ops.backends() if row.device == "cuda"}
    rows = []
    for name, (shape, axis) in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            x, grad = (torch.randn(shape, device=DEVICE).to(dtype) for _ in range(2))
            for channel in (None, axis):
                count = 1 if channel is None else shape[channel]
                scale = torch.rand(count, device=DEVICE) * 0.1 + 0.2
                zero = torch.randint(-3, 4, (count,), device=DEVICE).float()
                settings = (scale, zero, LOW, HIGH, channel, "none")
                calls = {
                    "fake_quantize": ((x, *settings), 2),
                    "fake_quantize_backward": ((grad, x, *settings), 3),
                    "fake_quantize_learned_backward": ((grad, x, *settings), 3),
                }
                if channel is not None and name == "weight":
                    calls["fake_quantize_weight"] = ((x, LOW, HIGH, channel, True), 2)
                for op, (arguments, passes) in calls.items():
                    wanted = getattr(reference, op)(*arguments)
                    providers = {
                        f"op ({registered[op]})": getattr(torch.ops.clusterq, op),
                        "triton": getattr(triton_kernels, op),
                    }
                    for provider, function in providers.items():
                        # The reference on a GPU divides by a number as a product: ranges differ in the last bit.
                        if op != "fake_quantize_weight":
                            check(function(*arguments), wanted)
                        time = milliseconds(lambda f=function, a=arguments: f(*a), options.repeats)
                        rows.append((op, provider, name, dtype, channel, passes * x.nbytes, time))
                if channel is None and dtype == torch.float32:
                    whole = zero.int()
                    time = milliseconds(
                        lambda x=x, s=scale, z=whole: torch.fake_quantize_per_tensor_affine(x, s, z, LOW, HIGH),
                        options.repeats,
                    )
                    rows.append(("fake_quantize", "torch", name, dtype, channel, 2 * x.nbytes, time))
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy_GBps": copy,
        "rows": [
            {
                "op": op, "provider": provider, "case": case, "dtype": str(dtype), "axis": channel, "ms": time,
                "GBps": moved / time / 1e6, "share": moved / time / 1e6 / copy,
            }
            for op, provider, case, dtype, channel, moved, time in rows
        ],
    }  # fmt: skip
    options.json.write_text(json.dumps(result, indent=2) + "\n")
    for row in result["rows"]:
        place = f"{row['case']} {row['dtype'][6:]} axis {row['axis']}"
        print(f"{row['op']:32}{row['provider']:14}{place:28}{row['ms']:9.4f} ms {row['share']:7.1%} of copy")


if __name__ == "__main__":
    main()
