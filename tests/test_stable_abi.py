"""The library built against the torch of this environment, loaded by an older torch: the same bits from every op."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clusterq.op_cases import OP_CASES

ROOT = Path(__file__).resolve().parent.parent

PROBE = """
import clusterq, hashlib, json, torch
from clusterq import ops
from clusterq.op_cases import OP_CASES, positive, values
from clusterq.testing import FLOAT_DTYPES, layouts

def flat(values):
    # All tensors in nested sequences.
    parts = ([v] if isinstance(v, torch.Tensor) else flat(v) if isinstance(v, (list, tuple)) else [] for v in values)
    return [t for part in parts for t in part]

def digest(*values):
    sha = hashlib.sha256()
    for t in flat(values):
        sha.update(f"{t.dtype} {tuple(t.shape)} {t.stride()}".encode())
        sha.update(t.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()

found = {}
for name, cases in OP_CASES.items():
    op = getattr(torch.ops.clusterq, name)
    for number, case in enumerate(cases):
        for dtype in FLOAT_DTYPES:
            for layout in layouts(torch.empty(case.shape)):
                arguments = [
                    layouts(a)[layout] if isinstance(a, torch.Tensor) and a.dim() == len(case.shape) else a
                    for a in case.arguments(dtype=dtype)
                ]
                out = op(*arguments)
                out = () if out is None else (out,) if isinstance(out, torch.Tensor) else out
                # The arguments too: some ops write into them.
                found[f"{name} {number} {dtype} {layout}"] = digest(out, arguments)

def gradients(name, function, *leaves):
    leaves = [leaf.requires_grad_() for leaf in leaves]
    outputs = [t for t in function(*leaves) if t.requires_grad]
    grads = torch.autograd.grad(outputs, leaves, [values(t.shape, t.dtype, 9) for t in outputs])
    found["gradients of " + name] = digest(*outputs, *grads)

x, channel = values((4, 3, 6, 5)), (3,)
scale, zero = 0.2 * positive(channel), values(channel, seed=1)
constants = values(channel, seed=2), positive(channel, seed=3), 1e-5
labels = torch.tensor([0, 2, 2, -1])
gradients("fake_quantize", lambda x: [ops.fake_quantize(x, scale, 0, -8, 7, axis=1)], x.clone())
gradients(
    "fake_quantize, learned",
    lambda x, s, z: [ops.fake_quantize(x, s, z, -8, 7, axis=1, gradient="learned")],
    x.clone(), scale.clone(), zero.clone(),
)
gradients("fake_quantize_weight", lambda w: [ops.fake_quantize_weight(w, 4, gradient="clipped")], x.clone())
gradients(
    "observe_fake_quantize",
    lambda x: ops.observe_fake_quantize(x, -torch.ones(1), torch.ones(1), 4, activation="relu"),
    x.clone(),
)
gradients(
    "observe_fake_quantize, delayed",
    lambda x: ops.observe_fake_quantize(x * 1, -torch.ones(1), torch.ones(1), 4, delayed=True),
    x.clone(),
)
gradients("fake_quantize, mask", lambda x: [ops.fake_quantize(x * 1, scale, 0, -8, 7, axis=1, save="mask")], x.clone())
gradients(
    "fake_quantize_weights",
    lambda v, w: ops.fake_quantize_weights([v, w], 4, gradient="clipped")[0],
    x.clone(), values((5, 2)),
)
gradients("instance_statistics", ops.instance_statistics, x.clone())
gradients("batch_norm_statistics", ops.batch_norm_statistics, x.clone())
gradients("class_statistics", lambda x: ops.class_statistics(x, labels, 3), x.clone())
for function in (ops.batch_norm_with_statistics, ops.batch_norm_with_instance_statistics):
    gradients(
        function.__name__, lambda x, w, b: function(x, w, b, *constants), x.clone(), positive(channel), values(channel)
    )
gradients("nearest_centroid", ops.nearest_centroid, values((12, 4)), values((5, 4), seed=1))
print(json.dumps({
    "torch": torch.__version__,
    "package": clusterq.__file__,
    "kernels": sorted({r.kernel for r in ops.backends() if r.device == "cpu"}),
    "found": found,
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


def test_library_gives_the_same_bits_in_an_older_torch():
    old = os.environ.get("CLUSTERQ_OLD_PYTHON")
    if not old:
        pytest.skip("CLUSTERQ_OLD_PYTHON names no interpreter with an older torch (`make test-old-torch` sets it)")
    here, there = probe(sys.executable), probe(old)
    release = [int(part) for part in there["torch"].split("+")[0].split(".")[:2]]
    assert release < [int(part) for part in torch.__version__.split("+")[0].split(".")[:2]], "not an older torch"
    # One library: `make test-wheel` installs another one in the environment of the older torch.
    assert here["package"] == there["package"] and here["kernels"] == there["kernels"] == ["cpp"]
    assert {name.split()[0] for name in here["found"]} >= set(OP_CASES)
    assert len(here["found"]) == len(there["found"])
    different = [name for name, bits in here["found"].items() if there["found"].get(name) != bits]
    assert not different
