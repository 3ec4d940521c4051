"""Differentiable ops of ClusterQ: fake-quantize, BatchNorm statistics, nearest centroid."""
import importlib
from pathlib import Path

from clusterq.ops._library import Backend, backends, load_backends

__all__ = ["Backend", "backends"]
for _m in ("fake_quant", "bn_stats", "centroids"):
    if (Path(__file__).parent / f"{_m}.py").exists():
        _mod = importlib.import_module(f"clusterq.ops.{_m}")
        for _n in getattr(_mod, "__all__", []):
            globals()[_n] = getattr(_mod, _n)
            __all__.append(_n)
load_backends()
