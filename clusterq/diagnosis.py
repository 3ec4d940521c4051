"""What works here and what does not: versions, the kernel behind every op, the last build, and a self-check per op.

A self-check runs an op on a small input through the dispatcher and compares every result with the op's reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clusterq.op_cases import OP_CASES
from clusterq.ops import _library
from clusterq.ops._build import build_record, stale_libraries
from clusterq.versions import machine, versions


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
    """Everything `clusterq doctor` shows; `healthy` when no self-check failed.

    `stale` names the libraries (`cpp`, `cuda`) that were built from other sources than csrc/ holds now.
    """

    versions: dict[str, str]
    machine: dict[str, Any]
    build: dict[str, Any]
    stale: list[str]
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
    backend = _library.requested_backend()
    return Diagnosis(versions(), machine(), build_record(), stale_libraries(), backend, states, healthy)


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
    build = [f"{name}: {_short(value)}" for name, value in diagnosis.build.items() if not name.endswith("_digest")]
    build = build or ["none: install with `pip install -e .`"]
    remedy = "run `make build` or `pip install -e .`"
    build += [f"WARNING: csrc/ has changed since {name} was built: {remedy}" for name in diagnosis.stale]
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
    if name not in OP_CASES:
        return "failed", "no self-check exists for this op"
    for case in OP_CASES[name]:
        arguments = _on(case.arguments(), device)
        expected_arguments = case.arguments()
        try:
            with torch.no_grad():
                actual = getattr(torch.ops.clusterq, name).default(*arguments)
                expected = _library._ops[name].reference(*expected_arguments)
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
