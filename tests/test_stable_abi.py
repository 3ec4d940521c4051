"""The library built against the torch of this environment, loaded by an older torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

PROBE = """
import json, sys, torch
from clusterq import ops
x = torch.linspace(-3, 3, 4 * 3 * 5 * 5).reshape(4, 3, 5, 5).requires_grad_()
scale = torch.tensor([0.1, 0.2, 0.3])
y = ops.fake_quantize(x, scale, 0, -8, 7, axis=1)
y.square().sum().backward()
mean, var = ops.batch_norm_statistics(x.detach())
index, distance = ops.nearest_centroid(x.detach().reshape(12, 25), x.detach().reshape(12, 25)[:5])
print(json.dumps({
    "torch": torch.__version__,
    "cpu": sorted({r.kernel for r in ops.backends() if r.device == "cpu"}),
    "values": [y.sum().item(), x.grad.sum().item(), mean.tolist(), var.tolist(), index.tolist(), distance.tolist()],
}))
"""


def probe(python):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("CLUSTERQ_BACKEND", None)
    done = subprocess.run(
        [python, "-c", PROBE], env=environment, cwd=ROOT / "tests", capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_library_loads_in_an_older_torch_with_the_same_results():
    old = os.environ.get("CLUSTERQ_OLD_PYTHON")
    if not old:
        pytest.skip("CLUSTERQ_OLD_PYTHON names no interpreter with an older torch (`make test-old-torch` sets it)")
    here, there = probe(sys.executable), probe(old)
    release = [int(part) for part in there["torch"].split("+")[0].split(".")[:2]]
    assert release < [int(part) for part in torch.__version__.split("+")[0].split(".")[:2]], "not an older torch"
    assert here["cpu"] == there["cpu"] == ["cpp"]
    assert here["values"] == there["values"]
