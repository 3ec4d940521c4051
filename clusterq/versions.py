"""Versions and machine facts that go into every result."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from typing import Any

import torch

import clusterq

_OPTIONAL = ("numpy", "safetensors", "triton", "torchvision", "timm", "pytorchcv", "scikit-learn", "matplotlib")


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


def machine() -> dict[str, Any]:
    """Processor, instruction set in use by torch, cores, threads of this process, GPU."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
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
    found, here = versions(), machine()
    names = ("processor", "cpu_capability", "threads") if device == "cpu" else ("gpu",)
    return {"clusterq": found["clusterq"], "torch": str(found["torch"]), **{name: here[name] for name in names}}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor()
