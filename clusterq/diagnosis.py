"""What works here and what does not: versions, the kernel behind every op, the last build, and a self-check per op.

A self-check runs an op on a small input through the dispatcher and compares every result with the op's reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clusterq.ops import _library
from clusterq.versions import machine, versions

Inputs = Callable[[], tuple[Any, ...]]


@dataclass(frozen=True)
class OpState:
    """One op on one kind of device.

    Attributes:
        op, device: name and device type.
        kernel: what serves it: `cpp`, `cuda`, `triton` or `reference`.
        missing: other kernel -> why it is not in use.
        check: `passed`, `failed`, `ran` (the reference itself: nothing to compare with), or `no device`.
        detail: of a failure.
    """

    op: str
    device: str
    kernel: str
    missing: dict[str, str]
    check: str
    detail: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """Everything `clusterq doctor` shows; `healthy` when no self-check failed."""

    versions: dict[str, str]
    machine: dict[str, Any]
    build: dict[str, Any]
    backend: str
    ops: list[OpState]
    healthy: bool


def doctor() -> Diagnosis:
    """Look at the installation and run every self-check this machine can run."""
    states = []
    for row in _library.backends():
        check, detail = _check(row.op, row.device, row.kernel)
        states.append(OpState(row.op, row.device, row.kernel, dict(row.missing), check, detail))
    healthy = all(state.check != "failed" for state in states)
    return Diagnosis(versions(), machine(), _library.build_record(), _library.requested_backend(), states, healthy)


def describe(diagnosis: Diagnosis) -> str:
    """The diagnosis as text for a terminal."""
    facts = diagnosis.machine
    lines = [
        "versions   " + ", ".join(f"{name} {version}" for name, version in diagnosis.versions.items()),
        f"machine    {facts['processor'] or 'unknown processor'}, {facts['system']}",
        f"           {facts['cpu_capability']}, {facts['cores']} cores, {facts['threads']} threads, "
        f"GPU: {facts['gpu'] or 'none'}",
        f"backend    {diagnosis.backend} (CLUSTERQ_BACKEND)",
    ]
    build = [f"{name}: {_short(value)}" for name, value in diagnosis.build.items()]
    build = build or ["none: install with `pip install -e .`"]
    lines += [f"{'build' if i == 0 else '':<11}{line}" for i, line in enumerate(build)]
    lines.append("")
    lines += _table(diagnosis.ops)
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for state in diagnosis.ops:
        for kernel, why in state.missing.items():
            reasons.setdefault((state.device, kernel, why), []).append(state.op)
    if reasons:
        lines += ["", "not in use"]
    for (device, kernel, why), names in reasons.items():
        count = sum(state.device == device for state in diagnosis.ops)
        which = "all ops" if len(names) == count else ", ".join(names)
        lines.append(f"  {kernel} on {device}: {why} ({which})")
    failed = [state.op for state in diagnosis.ops if state.check == "failed"]
    lines += ["", f"FAILED: {', '.join(failed)}" if failed else "all self-checks passed"]
    return "\n".join(lines)


def _table(states: list[OpState]) -> list[str]:
    """One line per op, kernel and self-check side by side for every device."""
    devices = list(dict.fromkeys(state.device for state in states))
    rows = [["op"] + [text for device in devices for text in (device, "self-check")]]
    for op in dict.fromkeys(state.op for state in states):
        own = {state.device: state for state in states if state.op == op}
        rows.append([op] + [text for device in devices for text in (own[device].kernel, own[device].check)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return lines + [f"{s.op} on {s.device} failed: {s.detail}" for s in states if s.check == "failed"]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 100 else text[:97] + "..."


def _check(name: str, device: str, kernel: str) -> tuple[str, str]:
    if device == "cuda" and not torch.cuda.is_available():
        return "no device", ""
    inputs = CASES.get(name)
    if inputs is None:
        return "failed", "no self-check exists for this op"
    reference = _library._ops[name].reference
    arguments = _on(inputs(), device)
    expected_arguments = _on(inputs(), "cpu")
    try:
        with torch.no_grad():
            actual = getattr(torch.ops.clusterq, name).default(*arguments)
            expected = reference(*expected_arguments)
    except (RuntimeError, TypeError, ValueError) as error:
        return "failed", str(error).splitlines()[0]
    detail = _difference(actual, expected) or _difference(_tensors(arguments), _tensors(expected_arguments))
    if detail:
        return "failed", detail
    return ("ran" if kernel == "reference" else "passed"), ""


def _on(values: tuple[Any, ...], device: str) -> tuple[Any, ...]:
    return tuple(v.to(device) if isinstance(v, Tensor) else v for v in values)


def _tensors(values: Any) -> tuple[Tensor, ...]:
    values = (values,) if isinstance(values, Tensor) else tuple(values or ())
    return tuple(v for v in values if isinstance(v, Tensor))


def _difference(actual: Any, expected: Any) -> str:
    """Empty when results agree: integers exactly, floats within 1e-5 of the largest magnitude."""
    pairs = list(zip(_tensors(actual), _tensors(expected), strict=True))
    for index, (got, wanted) in enumerate(pairs):
        got = got.cpu()
        if got.shape != wanted.shape or got.dtype != wanted.dtype:
            return f"result {index} is {got.dtype} {list(got.shape)}; wanted {wanted.dtype} {list(wanted.shape)}"
        if not wanted.is_floating_point():
            if not torch.equal(got, wanted):
                return f"result {index} differs from the reference"
            continue
        if not torch.equal(got.isnan(), wanted.isnan()):
            return f"result {index} has NaN at other places than the reference"
        finite = wanted.isfinite()
        error = (got[finite].double() - wanted[finite].double()).abs().max().item() if bool(finite.any()) else 0.0
        scale = wanted[finite].double().abs().max().item() if bool(finite.any()) else 0.0
        if error > 1e-5 * max(scale, 1e-3):
            return f"result {index} is off by {error:.2e}"
    return ""


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _positive(*shape: int, seed: int = 0) -> Tensor:
    return _normal(*shape, seed=seed).abs() + 0.5


def _grid() -> tuple[Tensor, Tensor, Tensor, int, int, int]:
    """Input, per-channel scale and zero point, range, axis."""
    return _normal(2, 3, 5, 7), 0.2 * _positive(3), torch.tensor([0.0, 3.0, 7.0]), 0, 15, 1


def _statistics() -> tuple[Any, ...]:
    return (_normal(4, 3, 5, 7),)


def _clusters() -> tuple[Tensor, Tensor, Tensor]:
    """Centroids [1, 5, 4], cluster sizes [1, 5], rows [1, 11, 4]."""
    return _normal(1, 5, 4, seed=1), _positive(1, 5, seed=2), _normal(1, 11, 4)


# Arguments of every op, in the order of its schema.
CASES: dict[str, Inputs] = {
    "fake_quantize": lambda: (*_grid(), "relu"),
    "fake_quantize_backward": lambda: (_normal(2, 3, 5, 7, seed=1), *_grid(), "none"),
    "fake_quantize_learned_backward": lambda: (_normal(2, 3, 5, 7, seed=1), *_grid(), "none"),
    "quantize": _grid,
    "dequantize": lambda: (
        torch.arange(16, dtype=torch.uint8).reshape(4, 4),
        0.2 * _positive(4),
        torch.zeros(4),
        0,
        torch.float32,
    ),
    "fake_quantize_weight": lambda: (_normal(4, 3, 3, 3), -8, 7, 0, True),
    "observe_fake_quantize": lambda: (
        _normal(2, 3, 5, 7),
        torch.full((1,), -1.0),
        torch.full((1,), 1.0),
        0,
        15,
        0.9,
        True,
        False,
        None,
        "none",
    ),
    "quantization_error": lambda: (_normal(4, 9), 0.2 * _positive(6, 4), torch.zeros(6, 4), -8, 7, 0),
    "instance_statistics": _statistics,
    "batch_norm_statistics": lambda: (*_statistics(), 1),
    "class_statistics": lambda: (_normal(6, 3), torch.tensor([0, 2, 2, 1, 0, 2]), 4, torch.arange(6) != 3),
    "batch_norm_instance_statistics": lambda: (*_statistics(), _normal(3, seed=1), _positive(3), _normal(3, seed=2)),
    "batch_norm_batch_statistics": lambda: (*_statistics(), _normal(3, seed=1), _positive(3), _normal(3, seed=2)),
    "statistics_backward": lambda: (
        *_statistics(),
        _normal(4, 3, seed=1),
        _normal(4, 3, seed=2),
        _normal(4, 3, seed=3),
    ),
    "batch_norm_statistics_backward": lambda: (
        _normal(4, 3, 5, 7, seed=4),
        *_statistics(),
        _positive(3),
        _normal(4, 3, seed=1),
        _normal(4, 3, seed=2),
        _normal(4, 3, seed=3),
    ),
    "batch_norm_parameter_backward": lambda: (_normal(4, 3, 5, 7, seed=1), *_statistics(), _normal(3), _positive(3)),
    "nearest_centroid": lambda: (_normal(1, 11, 4), _normal(1, 5, 4, seed=1)),
    "nearest_centroid_backward": lambda: (
        _positive(1, 11),
        _normal(1, 11, 4),
        _normal(1, 5, 4, seed=1),
        torch.arange(11)[None] % 6 - 1,
    ),
    "update_centroids_": lambda: (*_clusters(), torch.arange(11)[None] % 4 - 1, _positive(1, 11), 0.8, "mean"),
    "assign_and_update_": lambda: (*_clusters(), None, 0.8, "codebook"),
}
