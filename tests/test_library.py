"""Registration, dispatch and its report: `clusterq.ops._library`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clusterq import ops
from clusterq.ops import _build, _library


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_every_op_has_a_default_kernel_and_a_row_per_device():
    rows = {(row.op, row.device): row for row in ops.backends()}
    assert {op for op, _ in rows} == set(_library._ops) and len(rows) == 2 * len(_library._ops)
    for name in _library._ops:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"clusterq::{name}", "CompositeExplicitAutograd")


def test_a_row_gives_a_reason_for_every_faster_kernel_it_lacks():
    for row in ops.backends():
        wanted = {"cpu": ["cpp"], "cuda": ["cuda", "triton"]}[row.device]
        for kernel in wanted:
            if row.kernel == kernel:
                break
            assert row.missing.get(kernel), f"{row.op} on {row.device} does not say why {kernel} is not used"


def test_reference_can_be_forced():
    done = run("from clusterq import ops; print({r.kernel for r in ops.backends()})", CLUSTERQ_BACKEND="reference")
    assert done.stdout.strip() == "{'reference'}", done.stderr


def test_unknown_backend_is_refused():
    done = run("import clusterq.ops", CLUSTERQ_BACKEND="fpga")
    assert done.returncode != 0 and "CLUSTERQ_BACKEND='fpga' is not one of" in done.stderr


def test_forced_backend_that_is_missing_is_an_error_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("CLUSTERQ_BACKEND", "cpp")
    monkeypatch.setattr(_build, "RECORD", tmp_path / "absent.json")
    monkeypatch.setattr(_library, "_missing", {})
    with pytest.raises(ImportError, match="CLUSTERQ_BACKEND=cpp asks for a backend that is missing: no build record"):
        _library.load_backends()


def test_stale_build_is_noticed(tmp_path, monkeypatch):
    record = tmp_path / "build.json"
    record.write_text(json.dumps({"cpp": "built", "schema_digest": "0" * 64}))
    monkeypatch.setattr(_build, "RECORD", record)
    reason = _library._load("clusterq._C", _build.build_record(), "cpp")
    assert reason is not None and "built for other op schemas" in reason


def test_build_reason_is_passed_on(tmp_path, monkeypatch):
    record = tmp_path / "build.json"
    record.write_text(json.dumps({"cpp": "no C++ compiler found"}))
    monkeypatch.setattr(_build, "RECORD", record)
    assert _library._load("clusterq._C", _build.build_record(), "cpp") == "no C++ compiler found"


@pytest.mark.parametrize(
    ("file", "stale"),
    [("cpu/a.cpp", ["cpp"]), ("cuda/a.cu", ["cuda"]), ("check.h", ["cpp", "cuda"]), ("cpu/new.h", ["cpp"])],
)
def test_changed_sources_are_noticed(tmp_path, monkeypatch, file, stale):
    csrc = tmp_path / "csrc"
    for name in ("module.cpp", "check.h", "cpu/a.cpp", "cuda/a.cu"):
        (csrc / name).parent.mkdir(parents=True, exist_ok=True)
        (csrc / name).write_text("int a;\n")
    record = tmp_path / "clusterq" / "_build.json"
    record.parent.mkdir()
    digests = {library: _build.source_digest(csrc, library) for library in ("cpp", "cuda")}
    record.write_text(json.dumps({"cpp": "built", "cuda": "built", "source_digest": digests}))
    monkeypatch.setattr(_build, "PACKAGE", record.parent)
    monkeypatch.setattr(_build, "RECORD", record)
    assert _build.stale_libraries() == []
    (csrc / file).write_text("int b;\n")
    assert _build.stale_libraries() == stale
    # Installed without sources, or built before there was a digest: nothing to compare with.
    (csrc / "module.cpp").unlink()
    assert _build.stale_libraries() == []
    (csrc / "module.cpp").write_text("")
    record.write_text(json.dumps({"cpp": "built"}))
    assert _build.stale_libraries() == []


def test_import_warns_of_changed_sources(monkeypatch):
    monkeypatch.setenv("CLUSTERQ_BACKEND", "auto")
    monkeypatch.setattr(_library, "_missing", {})
    monkeypatch.setattr(_library, "_load", lambda *arguments: None)
    monkeypatch.setattr(_library, "stale_libraries", lambda: ["cpp"])
    with pytest.warns(UserWarning, match="csrc/ has changed since the cpp kernels of clusterq were built"):
        _library.load_backends()


def test_import_brings_in_torch_only():
    done = run(
        "import sys, torch\nbefore = set(sys.modules)\nimport clusterq\n"
        "heavy = ('triton', 'torchvision', 'matplotlib', 'sklearn', 'PIL', 'onnx')\n"
        "print([m for m in heavy if m in set(sys.modules) - before])"
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_ops_that_write_in_place_count_their_writes(backend):
    """Eagerly and from a compiled graph; inference tensors have no counter and pass."""
    done = run(
        """
import torch
from clusterq import ops

x, centroids, size = torch.randn(9, 3), torch.randn(4, 3), torch.ones(4)
low, high = torch.full((1,), float("inf")), torch.full((1,), float("-inf"))
written = (centroids, size, low, high)

def step():
    index, _ = ops.assign_and_update_(centroids, size, x, 0.5)
    ops.update_centroids_(centroids, size, x, index, 0.5)
    ops.observe_fake_quantize(x, low, high, 4)

for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
    before = [t._version for t in written]
    function()
    assert all(t._version > b for t, b in zip(written, before, strict=True)), [t._version for t in written]
with torch.inference_mode():
    ops.assign_and_update_(torch.randn(4, 3), torch.ones(4), x, 0.5)
""",
        CLUSTERQ_BACKEND=backend,
    )
    assert done.returncode == 0, done.stderr


def test_schemas_are_frozen():
    """A schema may gain a trailing argument with a default within a major version, nothing else."""
    frozen = json.loads((Path(__file__).parent / "schemas_v0.json").read_text())
    assert {name: op.schema for name, op in _library._ops.items()} == frozen
