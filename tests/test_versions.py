"""Facts of the machine and of the code that results are compared by."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import clusterq
from clusterq import versions

ROOT = Path(clusterq.__file__).resolve().parent


def test_the_gpu_in_use_is_the_one_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    assert [versions.machine(device)["gpu"] for device in ("cuda:1", "cuda", "cpu")] == ["GPU 1", "GPU 0", "GPU 0"]
    assert versions.machine()["gpu"] == "GPU 0"
    assert versions.environment("cuda:1")["gpu"] == "GPU 1" and "gpu" not in versions.environment("cpu")
    assert versions.environment("cpu")["code"] == dict(versions.code_identity())["sha256"]


def test_code_identity_knows_what_makes_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "clusterq"
    (package / "qat").mkdir(parents=True)
    for name in ("__init__.py", "report.py", "qat/finetune.py"):
        (package / name).write_text("a = 1\n")
    monkeypatch.setattr(clusterq, "__file__", str(package / "__init__.py"))

    def digest() -> str | None:
        return dict(versions.code_identity.__wrapped__())["sha256"]

    first = digest()
    (package / "report.py").write_text("a = 2\n")
    assert digest() == first
    (package / "qat" / "finetune.py").write_text("a = 2\n")
    second = digest()
    assert second != first
    monkeypatch.setattr(versions, "build_record", lambda: {"source_digest": {"cpu": "other kernels"}})
    assert digest() not in (first, second)
    for name in versions._SHOWING:
        assert (ROOT / name).is_file(), name
