"""Versions and machine facts that go into every result."""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import clusterq
from clusterq.ops._build import build_record

_OPTIONAL = ("numpy", "safetensors", "triton", "torchvision", "timm", "pytorchcv", "scikit-learn", "matplotlib")

# Code that reads settings or shows numbers: a change there changes no number.
_SHOWING = (
    "ablation/page.py", "ablation/plot.py", "ablation/pool.py", "ablation/results.py", "ablation/rows.py",
    "ablation/run.py", "ablation/table.py", "bank_quality.py", "cli.py", "cli_method.py", "cli_options.py",
    "diagnosis.py", "export.py", "figures.py", "progress.py", "report.py",
)  # fmt: skip
_SHOWING_FOLDERS = ("deploy",)


def versions() -> dict[str, str]:
    """Python, torch, this package and the optional packages that are installed."""
    found = {"clusterq": clusterq.__version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in _OPTIONAL:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def now() -> str:
    """The time in UTC to the second, ISO 8601."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


@functools.lru_cache(maxsize=1)
def code_identity() -> tuple[tuple[str, str | None], ...]:
    """`version`, `commit` of the checkout (None where there is none) and `sha256` of the code that makes numbers.

    The hash stands for the commit where results are compared: it tells uncommitted changes too, and a commit to the
    documentation makes no difference. Code that only shows numbers is left out, compiled kernels are in by their
    sources.
    """
    package = Path(clusterq.__file__).resolve().parent
    digest = hashlib.sha256(json.dumps(build_record().get("source_digest", {}), sort_keys=True).encode())
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        if name not in _SHOWING and name.split("/", 1)[0] not in _SHOWING_FOLDERS:
            digest.update(f"{name}\n".encode() + path.read_bytes())
    return (("version", clusterq.__version__), ("commit", _commit(package.parent)), ("sha256", digest.hexdigest()))


def machine(device: str = "cuda") -> dict[str, Any]:
    """Processor, instruction set in use by torch, cores, threads of this process, GPU: the first, or the one given."""
    gpu = None
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_name(torch.device(device).index or 0)
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def environment(device: str) -> dict[str, Any]:
    """What the bits of a computation on `device` can depend on beside its input."""
    found, here = versions(), machine(device)
    names = ("processor", "cpu_capability", "threads") if device == "cpu" else ("gpu",)
    code = {"clusterq": found["clusterq"], "torch": str(found["torch"]), "code": dict(code_identity())["sha256"]}
    return {**code, **{name: here[name] for name in names}}


def _commit(folder: Path) -> str | None:
    if not (folder / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor()
