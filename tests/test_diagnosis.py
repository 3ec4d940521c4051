"""`clusterq doctor`: a row and a self-check for every op, and a failing kernel is noticed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from clusterq import diagnosis
from clusterq.cli import main
from clusterq.ops import _library


def test_op_without_a_case_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(diagnosis.OP_CASES, "quantize")
    failed = [state for state in diagnosis.doctor().ops if state.check == "failed"]
    assert [(state.op, state.detail) for state in failed] == [("quantize", "no self-check exists for this op")]


def test_all_self_checks_pass_here() -> None:
    found = diagnosis.doctor()
    assert found.healthy, [state for state in found.ops if state.check == "failed"]
    assert {(state.op, state.device) for state in found.ops} == {
        (op, device) for op in _library._ops for device in ("cpu", "cuda")
    }
    on_cpu = [state for state in found.ops if state.device == "cpu"]
    assert all(state.check == ("ran" if state.kernel == "reference" else "passed") for state in on_cpu)


def test_every_missing_kernel_has_a_reason() -> None:
    for state in diagnosis.doctor().ops:
        if state.kernel == "reference":
            assert state.missing and all(state.missing.values())


def _wrong_reference(monkeypatch: pytest.MonkeyPatch, name: str, change: object) -> None:
    op = _library._ops[name]
    monkeypatch.setitem(_library._ops, name, replace(op, reference=change))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["fake_quantize", "quantize", "batch_norm_statistics", "nearest_centroid"])
def test_disagreement_with_the_reference_fails(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    original = _library._ops[name].reference

    def changed(*arguments: object) -> object:
        result = original(*arguments)
        return tuple(t + 1 for t in result) if isinstance(result, tuple) else result + 1

    _wrong_reference(monkeypatch, name, changed)
    found = diagnosis.doctor()
    assert not found.healthy
    assert [state.op for state in found.ops if state.check == "failed"] == [name]
    assert f"FAILED: {name}" in diagnosis.describe(found)


def test_disagreement_in_an_argument_changed_in_place_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def idle(*arguments: object) -> None:
        return None

    _wrong_reference(monkeypatch, "move_centroids_", idle)
    failed = [state for state in diagnosis.doctor().ops if state.check == "failed"]
    assert [state.op for state in failed] == ["move_centroids_"]


def test_raising_kernel_fails_with_its_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("no such luck\nsecond line")

    _wrong_reference(monkeypatch, "dequantize", broken)
    failed = [state for state in diagnosis.doctor().ops if state.check == "failed"]
    assert [(state.op, state.detail) for state in failed] == [("dequantize", "no such luck")]


def test_changed_sources_are_a_warning_and_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "WARNING" not in diagnosis.describe(replace(diagnosis.doctor(), stale=[]))
    monkeypatch.setattr(diagnosis, "stale_libraries", lambda: ["cpp"])
    found = diagnosis.doctor()
    assert found.healthy and found.stale == ["cpp"]
    assert "WARNING: csrc/ has changed since cpp was built" in diagnosis.describe(found)


def test_nan_at_another_place_is_a_difference() -> None:
    one, nan = torch.tensor([1.0, 2.0]), torch.tensor([1.0, float("nan")])
    assert diagnosis._difference(one, nan) and diagnosis._difference(nan, one)
    assert diagnosis._difference(nan, nan) == ""
    assert diagnosis._difference(torch.tensor([1]), torch.tensor([2]))
    assert diagnosis._difference(one, one + 1e-3)


def test_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "all self-checks passed" in text
    assert f"torch {torch.__version__}" in text
    for op in _library._ops:
        assert f"\n{op} " in text


def test_command_json_and_exit_code(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["doctor", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["healthy"] and len(data["ops"]) == 2 * len(_library._ops)
    _wrong_reference(monkeypatch, "quantize", lambda *arguments: torch.zeros(1))
    assert main(["doctor"]) == 1


def test_no_arguments_is_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "self-check" in capsys.readouterr().out
