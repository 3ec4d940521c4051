"""`bench/gpu_check.sh` where there is no GPU: its plan, and with a stand-in for Python what it makes of its stages."""

from __future__ import annotations

import importlib
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
BENCH, TESTS = ROOT / "bench", ROOT / "tests"
if not BENCH.is_dir():
    pytest.skip("tests of the checkout: bench not beside tests/", allow_module_level=True)
for folder in (BENCH, TESTS):
    sys.path.insert(0, str(folder))
import gpu_ready  # noqa: E402
import gpu_table  # noqa: E402
import gpu_timers  # noqa: E402
import harness  # noqa: E402

SCRIPT = BENCH / "gpu_check.sh"
STAGES = ("BUILD", "TESTS", "TESTS_TRITON", "PROPERTIES", "CONTRACT", "SANITIZE", "BENCH_FAKE_QUANT", "BENCH_BN_STATS",
          "BENCH_CENTROIDS", "OFFLINE")  # fmt: skip
# Notes its arguments; fails, hangs or passes by a word in them. The table is the real one.
STAND_IN = """#!{python}
import os, sys, time
words = " ".join(sys.argv[1:])
with open(os.environ["NOTES"], "a") as notes:
    notes.write(words + "\\n")
if "gpu_table" in words:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
if os.environ.get("HANG", "\\0") in words:
    time.sleep(60)
sys.exit(3 if os.environ.get("FAIL", "\\0") in words else 0)
"""
# Reports the canary it is asked for with its exit status; BLIND reports none.
SANITIZER = """#!{python}
import os, subprocess, sys
tool = sys.argv[sys.argv.index("--tool") + 1]
said = {{"memcheck": "Invalid __global__ write", "racecheck": "Race reported",
         "initcheck": "Uninitialized __global__ memory read"}}[tool]
if sys.argv[-2].endswith("/canary"):
    if os.environ.get("BLIND") == tool:
        sys.exit(0)
    print(said)
    sys.exit(9)
sys.exit(subprocess.run(sys.argv[sys.argv.index("9") + 1:]).returncode)
"""


class Machine:
    """One output folder and a PATH on which nothing is real."""

    def __init__(self, folder: Path) -> None:
        self.out, self.notes, self.bin = folder / "out", folder / "notes", folder / "bin"
        self.bin.mkdir()
        for name, text in (("python", STAND_IN), ("compute-sanitizer", SANITIZER), ("nvcc", "#!{python}\n")):
            path = self.bin / name
            path.write_text(text.format(python=sys.executable))
            path.chmod(0o755)

    def run(self, **environment: str) -> subprocess.CompletedProcess[str]:
        self.notes.write_text("")
        own = {"PYTHON": str(self.bin / "python"), "OUT": str(self.out), "NOTES": str(self.notes)}
        path = f"{self.bin}:{os.environ['PATH']}"
        return subprocess.run(["bash", SCRIPT], env={**os.environ, **own, "PATH": path, **environment},
                              capture_output=True, text=True, timeout=120)  # fmt: skip

    def done(self) -> set[str]:
        return {path.stem.upper() for path in self.out.glob("*.done")}


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_the_plan_of_everything_without_a_gpu(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path / "none"), "CUDA_VISIBLE_DEVICES": ""}
    child = subprocess.run(["bash", SCRIPT, "--dry-run"], env=environment, capture_output=True, text=True, timeout=600)
    assert child.returncode == 0, child.stdout + child.stderr
    assert "FAILED" not in child.stdout
    assert [line.split()[1].rstrip(":") for line in child.stdout.splitlines() if "leaves it out" in line] == [*STAGES]
    for check in ("memcheck", "racecheck", "initcheck"):
        # The canary, and the cases by both providers.
        assert child.stdout.count(f"--tool {check}") == 3
    for suite in ("fake_quant", "bn_stats", "centroids"):
        assert f"ok bench {suite}: " in child.stdout and f"gpu_{suite}.py --json" in child.stdout
    assert "CLUSTERQ_BACKEND=triton" in child.stdout and "tests collected" in child.stdout
    # A plan leaves nothing behind.
    assert not (tmp_path / "none").exists()


def test_a_plan_that_cannot_work_fails(machine: Machine) -> None:
    environment = {**os.environ, "PYTHON": str(machine.bin / "python"), "NOTES": str(machine.notes), "FAIL": "--plan"}
    child = subprocess.run(["bash", SCRIPT, "--dry-run"], env=environment, capture_output=True, text=True, timeout=120)
    assert child.returncode == 1 and child.stdout.count("FAILED bench") == 3


def test_finished_stages_are_not_run_again(machine: Machine) -> None:
    first = machine.run()
    assert first.returncode == 0, first.stdout + first.stderr
    assert machine.done() == {*STAGES}
    ran = machine.notes.read_text()
    assert ran.count("tests/gpu_cases.py") == 2 and "bench/gpu_centroids.py --json" in ran

    again = machine.run()
    assert again.returncode == 0 and again.stdout.count("finished before") == len(STAGES)
    # Only whether the build still serves here, and the table.
    assert [line.split()[0] for line in machine.notes.read_text().splitlines()] == [
        "bench/gpu_ready.py", "bench/gpu_table.py",
    ]  # fmt: skip

    forced = machine.run(FORCE="1")
    assert "finished before" not in forced.stdout and machine.notes.read_text() == ran


def test_a_stage_of_other_sources_runs_again(machine: Machine) -> None:
    machine.run()
    (machine.out / "tests.done").write_text("of other sources\n")
    assert "TESTS: finished" not in machine.run().stdout
    assert "kernel_mask_cases" in machine.notes.read_text()


def test_results_of_another_folder_are_taken_over_but_not_its_build(machine: Machine, tmp_path: Path) -> None:
    machine.run()
    before, machine.out = machine.out, tmp_path / "fresh"
    # As on a fresh machine, where nothing is built.
    child = machine.run(RESUME_FROM=str(before), FAIL="gpu_ready.py")
    assert "BUILD: finished before" not in child.stdout and child.returncode == 1
    child = machine.run(RESUME_FROM=str(before))
    assert child.returncode == 0 and "TESTS: finished before" in child.stdout


def test_a_failing_stage_is_reported_and_the_others_run(machine: Machine) -> None:
    child = machine.run(FAIL="gpu_bn_stats.py")
    assert child.returncode == 1
    assert "BENCH_BN_STATS failed" in child.stderr and "failed: BENCH_BN_STATS" in child.stdout
    assert machine.done() == {*STAGES} - {"BENCH_BN_STATS"}
    assert machine.run().returncode == 0 and "gpu_bn_stats.py --json" in machine.notes.read_text()


def test_one_failing_provider_fails_its_stage(machine: Machine) -> None:
    child = machine.run(FAIL="tests/gpu_cases.py")
    assert child.stdout.endswith("failed: PROPERTIES\n") and machine.notes.read_text().count("tests/gpu_cases.py") == 2


def test_nothing_runs_without_the_build(machine: Machine) -> None:
    child = machine.run(FAIL="pip install")
    assert child.returncode == 1 and machine.done() == set()
    assert "kernel_cases" not in machine.notes.read_text()


@pytest.mark.parametrize("check", ["memcheck", "racecheck", "initcheck"])
def test_a_check_that_misses_its_canary_fails(machine: Machine, check: str) -> None:
    child = machine.run(BLIND=check)
    assert child.returncode == 1 and "failed: SANITIZE" in child.stdout
    assert f"{check} did not report its canary" in child.stdout


def test_a_hanging_stage_ends_with_the_budget(machine: Machine) -> None:
    start = time.monotonic()
    child = machine.run(HANG="gpu_fake_quant.py", BUDGET="14", **{f"SKIP_{name}": "1" for name in STAGES[1:6]})
    assert time.monotonic() - start < 40
    assert child.returncode == 2, child.stdout + child.stderr
    assert "left: BENCH_FAKE_QUANT BENCH_BN_STATS BENCH_CENTROIDS OFFLINE" in child.stdout
    assert "BENCH_FAKE_QUANT" not in machine.done()


def test_a_wrong_option_is_refused() -> None:
    assert subprocess.run(["bash", SCRIPT, "--dryrun"], capture_output=True).returncode == 64


FACTS = harness.Facts(
    command="", torch="2.15", clusterq="0.1", threads=1, repeats=3, quick=False, processor="a card",
    cpu_capability="", kernels={}, date="2026-01-01", load_average=0.0, ceilings={"copy GB/s": 4000.0},
)  # fmt: skip


def row(ratio: float, bar: harness.Bar | None, detail: str = "[8, 3] bfloat16 channels_last") -> harness.Row:
    return harness.Row("forward", detail, "clusterq triton", {"clusterq triton": 1.0, "clone": ratio},
                       {"clone": ratio}, bar)  # fmt: skip


def test_the_table_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bar = harness.Bar("clone", 0.9)
    rows = [row(0.95, bar), row(0.5, bar, "N=4 D=2 K=3 float32"), row(0.7, None)]
    harness.Record("gpu_bn_stats", FACTS, rows).write(tmp_path / "bn_stats.json")
    assert gpu_table.main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "a card" in lines[2] and "copy GB/s 4000" in lines[2]
    assert [gpu_table.line(r).cells for r in rows[:2]] == [
        ("forward", "clusterq triton", "[8, 3]", "bfloat16", "channels_last", "0.95 of clone", "0.9x of clone", "met"),
        ("forward", "clusterq triton", "N=4 D=2 K=3", "float32", "contiguous", "0.50 of clone", "0.9x of clone",
         "MISSED"),
    ]  # fmt: skip
    assert [line.split()[-1] for line in lines[4:6]] == ["met", "MISSED"]
    assert "1 of 2 bars met, 3 rows" in lines and "fake_quant: not run here" in lines
    assert gpu_table.main([str(tmp_path), "--all"]) == 0 and "0.70 of clone" in capsys.readouterr().out
    assert gpu_table.main([str(tmp_path / "none")]) == 2


def test_what_is_missing_for_a_gpu_run() -> None:
    from clusterq.ops import Backend

    good = [Backend("op", "cpu", "reference", {}), Backend("op", "cuda", "cuda", {})]
    assert gpu_ready.problems(True, good, []) == []
    assert gpu_ready.problems(False, good, ["cuda"]) == [
        "torch sees no CUDA device", "the cuda library was built from other sources",
    ]  # fmt: skip
    assert gpu_ready.problems(True, [replace(good[1], kernel="triton", missing={"cuda": "why"})], []) == [
        "op runs on triton: {'cuda': 'why'}"
    ]


def test_ceilings_are_rates() -> None:
    found = gpu_timers.ceilings("cpu", copied=1 << 20, matrix=64, rounds=3)
    assert found.keys() == {"copy GB/s", *(f"matmul {name} TFLOP/s" for name in ("bfloat16", "float16", "float32"))}
    # A megabyte is copied in more than 100 ns and less than a second.
    assert 2e-3 < found["copy GB/s"] < 2e4


def test_cold_calls_take_turns_and_are_flushed_before() -> None:
    flushed, seen = torch.ones(8, dtype=torch.uint8), []

    def call(name: str) -> None:
        seen.append((name, int(flushed.sum())))
        flushed.fill_(1)

    times = gpu_timers.cold({name: lambda n=name: call(n) for name in "ab"}, 3, flushed)
    assert seen == [("a", 0), ("b", 0)] * 3
    assert all(len(t.rounds) == 3 and 0 < t.median < math.inf for t in times.values())


def test_rows_of_other_ways_to_time_have_no_bar() -> None:
    gpu_harness = importlib.import_module("gpu_harness")
    case = harness.Case(
        "forward", "[4] float32", {"clusterq": int, "torch": int, "lost": int}, harness.Bar("torch", 1.0)
    )
    times = {"clusterq": gpu_timers.timing([2.0, 2.0]), "torch": gpu_timers.timing([4.0, 6.0])}
    (made,) = gpu_harness.rows_of(case, times, "CUDA graph", "not captured: lost")
    assert made.case == "forward, CUDA graph" and made.met is None and made.note == "not captured: lost"
    assert made.ratio == {"torch": 2.5} and made.costs == {"clusterq": 2000.0, "torch": 5000.0}


def test_the_contract_cases_run_on_any_device() -> None:
    """Those of one op of each family, on this CPU; a GPU runs all of them."""
    environment = {**os.environ, "CLUSTERQ_TEST_DEVICE": "cpu"}
    names = ("fake_quantize-0", "whole_for_any_size and observe", "statistics_backward-0", "nearest_centroid-0")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib"]
    child = subprocess.run([*command, "tests/gpu_contract_cases.py", "-k", " or ".join(names)], cwd=ROOT,
                           env=environment, capture_output=True, text=True, timeout=300)  # fmt: skip
    assert child.returncode == 0 and " passed" in child.stdout, child.stdout + child.stderr


def test_contract_cases_asked_for_a_gpu_do_not_pass_without_one() -> None:
    environment = {**os.environ, "CLUSTERQ_TEST_DEVICE": "cuda", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib"]
    child = subprocess.run([*command, "tests/gpu_contract_cases.py"], cwd=ROOT, env=environment, capture_output=True,
                           text=True, timeout=300)  # fmt: skip
    assert child.returncode != 0 and "torch sees no GPU" in child.stdout


def test_the_gpu_cases_expect_what_a_cpu_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The inputs and the expectations of the cases that need a GPU, in small where they are large there."""
    cases, statistics, centroids = map(
        importlib.import_module, ("gpu_cases", "gpu_statistics_cases", "gpu_centroid_cases")
    )
    for module in (cases, statistics, centroids):
        monkeypatch.setattr(module, "CUDA", torch.device("cpu"))
    for form, call in cases.forms().items():
        x = torch.zeros(4095, dtype=torch.bfloat16)
        edges = torch.tensor([0, 1000, 2047, 2048, 4094])
        x[edges] = 1.1
        y = call(x)
        assert y[edges].tolist() == [1.0] * 5 and int((y != 0).sum()) == 5, form
    for run in (
        lambda: cases.step(*cases.prepared(3)),
        lambda: statistics.step(statistics.targets(), *statistics.prepared(3)),
        lambda: centroids.step(*centroids.inputs(3)),
    ):
        for ours, again in zip(run(), run(), strict=True):
            torch.testing.assert_close(ours, again, rtol=0, atol=0, equal_nan=True)
