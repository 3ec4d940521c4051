"""The one place where ops are defined, given their default kernel, and bound to compiled or Triton kernels.

An op module calls `register_op` once per op: the schema string lives there and nowhere else. The pure PyTorch reference
becomes the op's default kernel (`CompositeExplicitAutograd`), so every device works; `csrc/cpu` and `csrc/cuda`
register faster kernels for the same schema when their library loads; Triton launchers are attached to the CUDA key
where no compiled kernel is present. `backends()` says which of them serves each op and why the others do not.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from clusterq.ops._build import build_record, schema_digest, stale_libraries

_NAMESPACE = "clusterq"
_BACKENDS = ("auto", "reference", "cpp", "cuda", "triton")

# torch.library carries no types.
_library: Any = torch.library
_lib = _library.Library(_NAMESPACE, "DEF")


@dataclass(frozen=True)
class _Op:
    name: str
    schema: str
    reference: Callable[..., Any]
    triton: str | None


_ops: dict[str, _Op] = {}
# library name ("cpp", "cuda", "triton") -> why it is not in use; absent when it is
_missing: dict[str, str] = {}


def requested_backend() -> str:
    """The backend asked for by `CLUSTERQ_BACKEND`, `"auto"` when unset. Raises ValueError for an unknown name."""
    name = os.environ.get("CLUSTERQ_BACKEND", "auto")
    if name not in _BACKENDS:
        raise ValueError(f"CLUSTERQ_BACKEND={name!r} is not one of {', '.join(_BACKENDS)}")
    return name


def _default_kernel(op: _Op) -> Callable[..., Any]:
    warned: set[str] = set()

    @functools.wraps(op.reference)
    def kernel(*args: Any, **kwargs: Any) -> Any:
        device = next((a.device.type for a in args if isinstance(a, torch.Tensor)), "cpu")
        if device != "cpu" and device not in warned and requested_backend() != "reference":
            warned.add(device)
            reason = "; ".join(f"{k}: {v}" for k, v in _missing.items() if k != "cpp") or "no kernel for this device"
            message = f"clusterq::{op.name} runs on the PyTorch reference for device {device!r} ({reason})"
            if os.environ.get("CLUSTERQ_STRICT") == "1":
                raise RuntimeError(message + "; CLUSTERQ_STRICT=1 forbids this")
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        # Without no_grad, ordinary autograd would leak through the default kernel on some devices and not on others.
        with torch.no_grad():
            return op.reference(*args, **kwargs)

    return kernel


def _version_kernel(overload: Any, mutated: tuple[int, ...]) -> Callable[..., Any]:
    """Kernel of the ADInplaceOrView key: counts the write for autograd, then calls the kernel of the device.

    C++ and Triton kernels write through raw pointers. Without this a tensor saved for backward could change in between
    and its gradient be wrong without an error.
    """
    # Private, but what torch.library.custom_op itself redispatches with.
    below = torch._C._after_ADInplaceOrView_keyset

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        # Arguments that the schema does not make keyword-only arrive by position.
        torch._C._increment_version([args[i] for i in mutated if args[i] is not None])
        return overload.redispatch(keyset & below, *args, **kwargs)

    return kernel


def register_op(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    triton: str | None = None,
) -> Callable[..., Any]:
    """Define `clusterq::<name>` and return its callable overload.

    Args:
        schema: the op's schema without namespace, e.g. `"scale(Tensor x, float factor) -> Tensor"`. A string literal:
            `setup.py` reads it from the source to notice a stale build.
        reference: pure PyTorch implementation with the schema's signature; becomes the default kernel.
        fake: shape and dtype propagation; allocates contiguous outputs, never aliases an input.
        triton: `"module:launcher"` inside `clusterq.kernels`, imported on first call only.
    """
    name = schema.split("(", 1)[0]
    op = _Op(name, schema, reference, triton)
    _ops[name] = op
    _lib.define(schema)
    _lib.impl(name, _default_kernel(op), "CompositeExplicitAutograd")
    _library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=_lib)
    overload: Any = getattr(getattr(torch.ops, _NAMESPACE), name).default
    mutated = tuple(i for i, a in enumerate(overload._schema.arguments) if a.alias_info and a.alias_info.is_write)
    if mutated:
        _lib.impl(name, _version_kernel(overload, mutated), "ADInplaceOrView", with_keyset=True)
    kernel: Callable[..., Any] = overload
    return kernel


def _load(module: str, record: dict[str, Any], key: str) -> str | None:
    """Import a compiled library; returns the reason when it cannot be used."""
    if key not in record:
        return "no build record: install with `pip install -e .` to build the extensions"
    if record[key] != "built":
        return str(record[key])
    if record.get("schema_digest") != schema_digest([op.schema for op in _ops.values()]):
        return "built for other op schemas; run `make build` or `pip install -e .` again"
    try:
        importlib.import_module(module)
    except (ImportError, OSError) as error:
        return f"{module} failed to load: {error}"
    return None


def _triton_launcher(op: _Op) -> Callable[..., Any]:
    assert op.triton is not None
    module, function = op.triton.split(":")

    def launcher(*args: Any) -> Any:
        return getattr(importlib.import_module(f"clusterq.kernels.{module}"), function)(*args)

    return launcher


def _has_kernel(op: str, key: str) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"{_NAMESPACE}::{op}", key))


def load_backends() -> None:
    """Load the compiled libraries and attach Triton. Called once, after every op module has registered its ops."""
    wanted = requested_backend()
    record = build_record()
    excluded = f"CLUSTERQ_BACKEND={wanted}"
    interpret = os.environ.get("TRITON_INTERPRET") == "1"

    def note(key: str, reason: str | None) -> None:
        if reason is not None:
            _missing[key] = reason

    use_cpp = wanted in ("auto", "cpp", "cuda") or (wanted == "triton" and not interpret)
    note("cpp", _load("clusterq._C", record, "cpp") if use_cpp else excluded)
    if torch.version.cuda is None:
        note("cuda", "this PyTorch is built without CUDA")
    else:
        note("cuda", _load("clusterq._C_cuda", record, "cuda") if wanted in ("auto", "cuda") else excluded)
    if wanted in ("reference", "cpp", "cuda"):
        note("triton", excluded)
    elif importlib.util.find_spec("triton") is None:
        note("triton", "the triton package is not installed")
    else:
        for op in _ops.values():
            if op.triton is None:
                continue
            if interpret and wanted == "triton":
                _lib.impl(op.name, _triton_launcher(op), "CPU")
            if not _has_kernel(op.name, "CUDA"):
                _lib.impl(op.name, _triton_launcher(op), "CUDA")
    if wanted in ("cpp", "cuda", "triton") and wanted in _missing:
        raise ImportError(f"CLUSTERQ_BACKEND={wanted} asks for a backend that is missing: {_missing[wanted]}")
    if wanted == "auto" and "cpp" in _missing:
        warnings.warn(
            f"clusterq runs without its compiled CPU kernels, on the slower PyTorch reference: {_missing['cpp']}. "
            "`clusterq doctor` tells more.",
            RuntimeWarning,
            stacklevel=2,
        )
    stale = [library for library in stale_libraries() if library not in _missing]
    if stale:
        warnings.warn(
            f"csrc/ has changed since the {' and '.join(stale)} kernels of clusterq were built: run `make build` or "
            "`pip install -e .`",
            stacklevel=2,
        )


@dataclass(frozen=True)
class Backend:
    """Which kernel serves an op on a device type: `cpp`, `cuda`, `triton` or `reference`, and why no other."""

    op: str
    device: str
    kernel: str
    missing: dict[str, str]


def backends() -> list[Backend]:
    """One row per op and device type (`"cpu"`, `"cuda"`): the kernel in use and the reason each other one is not."""
    rows = []
    interpret = os.environ.get("TRITON_INTERPRET") == "1" and requested_backend() == "triton"
    for op in _ops.values():
        reasons = dict(_missing)
        if op.triton is None:
            reasons["triton"] = "no Triton kernel for this op"
        cpu = ("triton" if interpret and op.triton else "cpp") if _has_kernel(op.name, "CPU") else "reference"
        if cpu == "reference" and "cpp" not in _missing:
            reasons["cpp"] = "no C++ kernel for this op"
        rows.append(Backend(op.name, "cpu", cpu, {k: v for k, v in reasons.items() if k == "cpp" and cpu != "cpp"}))
        compiled = _has_kernel(op.name, "CUDA") and "cuda" not in _missing and op.name in _cuda_ops()
        gpu = "cuda" if compiled else "triton" if _has_kernel(op.name, "CUDA") else "reference"
        if gpu != "cuda" and "cuda" not in _missing:
            reasons["cuda"] = "no CUDA C++ kernel for this op"
        if gpu == "cuda":
            reasons.setdefault("triton", "compiled CUDA has precedence")
        rows.append(Backend(op.name, "cuda", gpu, {k: v for k, v in reasons.items() if k not in ("cpp", gpu)}))
    return rows


def _cuda_ops() -> set[str]:
    """Names of the ops that the compiled CUDA library registers (its own list: the dispatcher does not tell)."""
    try:
        module = importlib.import_module("clusterq._C_cuda")
    except (ImportError, OSError):
        return set()
    return set(module.ops())
