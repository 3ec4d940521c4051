"""The benches: a bar's verdict, the one statistic of ratios, reports from stored results, and every suite in small."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import math
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from clusterq import cli
from clusterq.nn.quantizers import WeightQuantizer
from clusterq.testing import Timing

BENCH = Path(__file__).resolve().parent.parent / "bench"
SUITES = sorted(path.stem.removeprefix("bench_") for path in BENCH.glob("bench_*.py"))

if not BENCH.is_dir():
    pytest.skip("tests of the checkout: bench not beside tests/", allow_module_level=True)
# The suites are scripts: they find `harness` in their own folder.
sys.path.insert(0, str(BENCH))
import harness  # noqa: E402
import report  # noqa: E402

FASTER, OF_THE_TIME, OVER = "at least x faster", "at most x of the time", "at most x microseconds over"
FACTS = harness.Facts(
    command="python bench/bench_toy.py --threads 1 --repeats 3",
    torch="2.15",
    clusterq="0.1",
    threads=1,
    repeats=3,
    quick=False,
    processor="a processor",
    cpu_capability="avx2",
    kernels={"fake_quantize": "cpp"},
    date="2026-01-01T00:00:00+00:00",
    load_average=0.25,
)


def make_row(ours: float, case: str = "forward", bar: harness.Bar | None = None, peer: float = 10.0) -> harness.Row:
    return harness.Row(case, "[4, 4]", "clusterq", {"clusterq": ours, "torch": peer}, {"torch": peer / ours}, bar)


def store(folder: Path, *rows: harness.Row, suite: str = "toy", **facts: object) -> Path:
    folder.mkdir(exist_ok=True)
    harness.Record(suite, replace(FACTS, **facts), rows).write(folder / f"{suite}.json")
    return folder


@pytest.mark.parametrize(
    ("direction", "limit", "ratio", "met"),
    [
        (FASTER, 2.0, 1.99, False),
        (FASTER, 2.0, 2.0, True),
        (FASTER, 2.0, 2.01, True),
        (FASTER, 2.0, math.nan, False),
        # The ratio is peer / ours: 0.8 means 1.25 times the peer's time.
        (OF_THE_TIME, 1.25, 0.79, False),
        (OF_THE_TIME, 1.25, 0.8, True),
        (OF_THE_TIME, 1.25, 0.81, True),
        (OF_THE_TIME, 1.25, math.nan, False),
    ],
)
def test_verdict_of_a_bar(direction: str, limit: float, ratio: float, met: bool) -> None:
    bar = harness.Bar("torch", limit, direction)
    assert bar.met(ratio) is met
    row = harness.Row("forward", "[4]", "clusterq", {"clusterq": 1.0, "torch": 1.0}, {"torch": ratio}, bar)
    assert row.met is met
    assert str(row).endswith(f"[bar {bar}: {'met' if met else 'MISSED'}]")


def test_verdict_of_a_difference() -> None:
    """A bar in microseconds over a peer of 3: ours at 15 meets a bar of 12, at 15.1 it does not."""
    bar = harness.Bar("empty op", 12.0, OVER)
    assert bar.measured(3 / 15, 0.003) == pytest.approx(12) and bar.measured(2.0, 0.003) == pytest.approx(-1.5)
    for ours, met in ((0.0149, True), (0.0151, False)):
        costs = {"clusterq": ours, "empty op": 0.003}
        row = harness.Row("call", "[4]", "clusterq", costs, {"empty op": 0.003 / ours}, bar)
        assert row.met is met and row.measured == pytest.approx(1e3 * (ours - 0.003))
        assert str(row).endswith(f"[bar at most 12 microseconds over empty op: {'met' if met else 'MISSED'}]")
    assert bar.met(math.nan, 0.003) is False and bar.met(0.5) is False


def test_bars_that_cannot_be_judged_are_refused() -> None:
    with pytest.raises(ValueError, match="direction"):
        harness.Bar("torch", 2.0, "faster")
    with pytest.raises(ValueError, match="eager"):
        harness.Case("forward", "[4]", {"clusterq": int, "torch": int}, harness.Bar("eager", 2.0))
    with pytest.raises(ValueError, match="clusterq"):
        harness.Case("forward", "[4]", {"ours": int, "torch": int})
    with pytest.raises(ValueError, match="clusterq fast"):
        harness.Case("forward", "[4]", {"clusterq": int, "torch": int}, {"clusterq fast": harness.Bar("torch", 2.0)})


def test_ratio_is_the_median_of_the_ratios_within_the_rounds() -> None:
    ours = Timing(2.0, 1.0, 30.0, (1.0, 2.0, 30.0))
    peer = Timing(6.0, 3.0, 6.0, (3.0, 6.0, 6.0))
    assert peer.ratio_to(ours) == 3.0
    with pytest.raises(ValueError):
        peer.ratio_to(Timing(1.0, 1.0, 1.0, (1.0,)))


def test_measured_rows() -> None:
    """Sleeps of known order: a ratio above 1 means that ours is faster, and every variant of ours has its row."""
    seconds = {"clusterq": 0.001, "clusterq slow": 0.05, "peer": 0.012}
    sleeps = {name: partial(time.sleep, duration) for name, duration in seconds.items()}
    case = harness.Case("sleep", "", sleeps, harness.Bar("peer", 2.0), ours=("clusterq", "clusterq slow"))
    fast, slow = case.measure(3)
    assert fast.ratio["peer"] > 2 and fast.met is True
    assert slow.ratio["peer"] < 0.5 and slow.bar is None and slow.met is None
    assert list(slow.costs) == ["clusterq slow", "peer"] and slow.costs["clusterq slow"] >= 50
    assert fast.title != slow.title
    assert [row.bar for row in case.measure(1, quick=True)] == [None, None]
    # One bar each.
    bars = {"clusterq slow": harness.Bar("peer", 20.0, OF_THE_TIME), "clusterq": harness.Bar("peer", 0.5, OF_THE_TIME)}
    rows = replace(case, bar=bars).measure(3)
    assert [row.bar for row in rows] == [bars["clusterq"], bars["clusterq slow"]] and all(row.met for row in rows)


def test_rows_of_memory_are_exact() -> None:
    """Bytes at the peak, the result of the call included, whatever else is freed within it."""
    x = torch.zeros(1000)

    def ours() -> torch.Tensor:
        return x + x

    def peer() -> torch.Tensor:
        # Three blocks at a time: both sums and their product.
        return (x + x) * (x + x)

    case = harness.MemoryCase("sum", "[1000]", {"clusterq": ours, "peer": peer}, elements=x.numel())
    (row,) = case.measure(1)
    assert row.unit == "B" and row.costs == {"clusterq": 4.0, "peer": 12.0} and row.ratio == {"peer": 3.0}
    assert "4.00 B" in str(row) and "12.00 B (3.00x)" in str(row)


def test_page_faults_are_counted_and_an_allocator_can_avoid_them() -> None:
    """In processes of their own: 51 MB are mapped afresh in every call, unless freed memory stays."""
    source = """
import sys
from memory import minor_faults, set_allocator
set_allocator(sys.argv[1])
import torch
x = torch.zeros(64, 64, 56, 56)
x.clone()
print(min(minor_faults(x.clone) for _ in range(3)))
"""
    faults = {}
    for allocator in ("kept", "system"):
        done = subprocess.run([sys.executable, "-c", source, allocator], capture_output=True, text=True, cwd=BENCH,
                              check=True)  # fmt: skip
        faults[allocator] = int(done.stdout)
    assert faults["kept"] < 64
    # At least 25 huge pages; 12,544 pages of 4 KiB.
    assert faults["system"] >= 25
    row = replace(make_row(1.0), faults={"clusterq": 281, "torch": 12_544})
    assert str(row).endswith("page faults clusterq 281, torch 12544")
    assert replace(row, faults={"clusterq": 3, "torch": 0}).notes == ""


def test_results_from_before_there_were_other_costs_are_read(tmp_path: Path) -> None:
    path = store(tmp_path, make_row(2.0)) / "toy.json"
    values = json.loads(path.read_text())
    for row in values["rows"]:
        row["milliseconds"] = row.pop("costs")
        del row["unit"], row["faults"]
    del values["facts"]["allocator"]
    path.write_text(json.dumps(values))
    record = harness.Record.read(path)
    assert record.rows[0].costs["clusterq"] == 2.0 and record.facts.allocator == "system"


def test_report_of_stored_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    met = make_row(2.0, "forward", harness.Bar("torch", 4.0))
    missed = make_row(4.0, "backward", harness.Bar("torch", 4.0))
    slow = make_row(12.0, "step", harness.Bar("torch", 1.15, OF_THE_TIME))
    store(tmp_path, met, missed, slow, make_row(5.0, "free"))
    # A verdict in the file is for readers; the numbers decide.
    path = tmp_path / "toy.json"
    values = json.loads(path.read_text())
    assert [row["met"] for row in values["rows"]] == [True, False, False, None]
    values["rows"][1]["met"] = True
    path.write_text(json.dumps(values))

    assert report.main(["--from", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("| ")]
    command = f"`{FACTS.command}`"
    assert lines[1:] == [
        ["toy", "forward [4, 4]", "4x of torch", "5.00", "met", command],
        ["toy", "backward [4, 4]", "4x of torch", "2.50", "MISSED", command],
        ["toy", "step [4, 4]", "at most 1.15 of the time of torch", "1.20", "MISSED", command],
    ]
    written = (tmp_path / "report.md").read_text()
    assert all(line in written for line in printed.splitlines() if line.startswith("| "))
    assert "free [4, 4]" in written and "load 0.25 at the start" in written and "a processor" in written


def test_flags_of_a_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old_rows = [make_row(11.0, case) for case in ("same", "limit", "faster", "slower", "gone")]
    new_rows = [make_row(ms, case) for case, ms in
                (("same", 11.5), ("limit", 10.0), ("faster", 9.9), ("slower", 12.2), ("fresh", 1.0))]  # fmt: skip
    old, new = store(tmp_path / "old", *old_rows), store(tmp_path / "new", *new_rows, threads=2)
    store(old, make_row(1.0, "elsewhere"), suite="not_run_again")
    flags = {change.title: change.flag for change in report.compare(report.load(old), report.load(new))}
    assert flags == {
        "same [4, 4]": "",
        "limit [4, 4]": "",
        "faster [4, 4]": "faster",
        "slower [4, 4]": "SLOWER",
        "fresh [4, 4]": "only new",
        "gone [4, 4]": "only old",
    }
    assert report.main(["--from", str(new), "--compare", str(old)]) == 0
    printed = capsys.readouterr().out
    assert "toy: threads was 1, now 2" in printed
    (line,) = [line for line in printed.splitlines() if "slower [4, 4]" in line]
    assert [cell.strip() for cell in line.split("|")[3:-1]] == ["11.00", "12.20", "0.90", "SLOWER"]


def test_a_suite_that_fails_fails_the_report_and_leaves_no_old_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    store(out, make_row(1.0), suite="broken")
    store(out, make_row(2.0), suite="sound")
    store(tmp_path, make_row(1.0), suite="sound")
    (tmp_path / "bench_broken.py").write_text("raise SystemExit(3)\n")
    source = f"import shutil, sys\nshutil.copy({str(tmp_path / 'sound.json')!r}, sys.argv[-1])\nprint(sys.argv[1:-1])\n"
    (tmp_path / "bench_sound.py").write_text(source)
    monkeypatch.setattr(report, "SUITES", {name: tmp_path / f"bench_{name}.py" for name in ("broken", "sound")})
    # The older results are read before they are written over.
    assert report.main(["--output", str(out), "--compare", str(out), "--threads", "1", "--quick"]) == 1
    captured = capfd.readouterr()
    assert "suite broken failed" in captured.err
    assert "['--threads', '1', '--quick', '--json']" in captured.out
    (line,) = [line for line in captured.out.splitlines() if "faster" in line]
    assert "2.00" in line and "1.00" in line
    assert sorted(path.name for path in out.iterdir()) == ["report.md", "sound.json"]


def test_folders_without_results_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--from", str(tmp_path)]) == 2
    (tmp_path / "other.json").write_text("[1]")
    assert report.main(["--from", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("report: error: ") == 2


def test_command_line_goes_through_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def run(command: list[str], **settings: object) -> SimpleNamespace:
        commands.append(command[1:])
        return SimpleNamespace(returncode=len(commands))

    monkeypatch.setattr("clusterq.cli.subprocess.run", run)
    assert [cli.main(["bench", "steps", "centroids"]), cli.main(["bench"])] == [1, 2]
    assert commands == [[str(BENCH / "report.py"), "--suite", "steps", "centroids"], [str(BENCH / "report.py")]]


# (case, contestant of ours, peer, limit, direction): number of cases.
PROMISED = {
    "fake_quant": {
        **{(f"forward per {part}", "clusterq", "clone", 0.9, FASTER): 8 for part in ("tensor", "channel")},
        ("forward+backward per tensor, clipped", "clusterq", "torch", 3.0, FASTER): 8,
        ("forward+backward per channel, clipped", "clusterq", "torch", 3.0, FASTER): 8,
        ("forward+backward per tensor, learned", "clusterq", "torch", 8.0, FASTER): 8,
        ("forward+backward per channel, learned", "clusterq", "torch", 8.0, FASTER): 8,
        # torch's fused observer knows float32 alone.
        ("observe and forward per tensor", "clusterq", "torch", 8.0, FASTER): 4,
        ("forward of weights", "clusterq", "torch", 50.0, FASTER): 2,
        ("weights, min/max and forward", "clusterq", "eager", 5.0, FASTER): 4,
        ("a call without gradient", "clusterq", "empty op", 12.0, OVER): 2,
    },
    "bn_stats": {
        ("statistics", "clusterq", "var_mean", 40.0, FASTER): 1,
        # channels_last with 16 channels.
        ("statistics", "clusterq", "var_mean", 10.0, FASTER): 1,
        ("one read", "clusterq", "sum", 1.25, OF_THE_TIME): 2,
        ("against BatchNorm's own", "clusterq", "batch_norm_update_stats", 8.0, FASTER): 1,
        ("against BatchNorm's own", "clusterq", "batch_norm_update_stats", 1.8, FASTER): 1,
        **{
            (name, ours, peer, limit, OF_THE_TIME): 2
            for ours in ("clusterq", "clusterq per image")
            for name, peer, limit in (
                ("forward", "F.batch_norm", 1.1),
                ("backward", "native_batch_norm_backward", 1.15),
            )
        },
    },
    "centroids": {
        ("search, normal data", "clusterq", "cdist", 2.0, FASTER): 2,
        ("search against faiss", "clusterq", "faiss", 1.6, FASTER): 1,
        # 16 centroids or fewer.
        ("search against faiss", "clusterq", "faiss", 1.2, FASTER): 1,
        ("share of the peak", "clusterq", "multiply-adds", 1 / 0.65, OF_THE_TIME): 1,
        ("search and average against faiss", "clusterq", "faiss", 1.5, FASTER): 1,
        ("search and average against scikit-learn", "clusterq", "scikit-learn", 2.0, FASTER): 1,
        ("search and average against vector-quantize-pytorch", "clusterq", "vector-quantize-pytorch", 20.0, FASTER): 1,
    },
    "steps": {
        ("QAT step, ResNet-20 W4A4", "clusterq", "float", 1.10, OF_THE_TIME): 1,
        ("QAT step, ResNet-20 W4A4", "clusterq moving range", "float", 1.05, OF_THE_TIME): 1,
        ("QAT step, ResNet-18 W4A4", "clusterq", "float", 1.08, OF_THE_TIME): 1,
        ("QAT step, ResNet-18 W4A4", "clusterq moving range", "float", 1.05, OF_THE_TIME): 1,
        ("QAT step, MobileNet-V2 W4A4", "clusterq", "float", 1.12, OF_THE_TIME): 1,
        ("QAT step, MobileNet-V2 W4A4", "clusterq moving range", "float", 1.08, OF_THE_TIME): 1,
    },
    "alignment": {
        ("alignment loss and its gradients, all layers of ResNet-20", "clusterq", "eager", 10.0, FASTER): 2,
        ("teacher forward and backward, ResNet-20", "clusterq", "plain", 1.08, OF_THE_TIME): 1,
    },
}

OPTIONAL_PEERS = {"faiss": "faiss", "scikit-learn": "sklearn", "vector-quantize-pytorch": "vector_quantize_pytorch"}


@pytest.mark.parametrize("suite", PROMISED)
def test_promised_bars(suite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar that is lowered, or lost with its case, would make every report look better."""
    module = importlib.import_module(f"bench_{suite}")
    if suite == "steps":
        # The quick run of all suites builds the real ones.
        stand_in = torch.nn.Linear(1, 1)
        monkeypatch.setattr(module, "build_networks", lambda _, kind: dict.fromkeys([*kind.ours, "float"], stand_in))
        monkeypatch.setattr(module, "check", lambda *_: None)
    cases = module.cases(True)
    found = Counter((c.name, ours, b.peer, b.limit, b.direction) for c in cases for ours, b in c.bars.items())
    # The bench leaves out peers that are not installed.
    missing = {peer for peer, name in OPTIONAL_PEERS.items() if importlib.util.find_spec(name) is None}
    assert found == {bar: count for bar, count in PROMISED[suite].items() if bar[2] not in missing}


def test_shapes_of_the_promises_for_centroids() -> None:
    suite = importlib.import_module("bench_centroids")
    small = {(131072, 8, 256), (131072, 32, 512), (65536, 64, 512), (65536, 64, 16)}
    assert set(suite.SHAPES) == small | {(16384, 256, 1024), (4096, 512, 8192)} and suite.STEP == (65536, 64, 512)


def test_shapes_of_the_promises() -> None:
    """What the quick run shrinks."""
    suite, steps = importlib.import_module("bench_fake_quant"), importlib.import_module("bench_steps")
    assert suite.ACTIVATIONS == ((64, 64, 56, 56), (128, 16, 32, 32))
    assert suite.WEIGHTS == ((512, 512, 3, 3), (64, 16, 3, 3)) and set(suite.DTYPES) == {torch.float32, torch.bfloat16}
    sizes = {name: (network.batch, network.size) for name, network in steps.NETWORKS.items()}
    assert sizes == {"resnet20": (128, 32), "resnet18": (32, 32), "mobilenet_v2": (64, 64)}


def test_shapes_of_the_promises_for_statistics() -> None:
    suite = importlib.import_module("bench_bn_stats")
    planes = {(512, 16, 32, 32), (512, 64, 8, 8), (64, 64, 56, 56), (64, 512, 7, 7)}
    dtypes, formats = {torch.float32, torch.bfloat16}, {torch.contiguous_format, torch.channels_last}
    wanted = set(itertools.product(planes, dtypes, formats))
    assert set(suite.SHAPES) == wanted | set(itertools.product({(8192, 512)}, dtypes, {torch.contiguous_format}))


def test_a_peer_that_computes_something_else_is_not_timed() -> None:
    """Another code, another gradient, another dtype; one step at a tie passes."""
    from fake_quant_peers import assert_same

    y, grad = torch.arange(20_000.0), torch.ones(20_000)
    tie = y.clone()
    tie[5] += 1
    assert_same((y, grad), (tie, grad), 1.0, exact=False)
    for theirs in ((tie, grad), (y, 0.99 * grad), (y.double(), grad)):
        with pytest.raises(AssertionError):
            assert_same((y, grad), theirs, 1.0, exact=True)
    for theirs in ((y + (y < 50), grad), (torch.where(y == 5, 7.5, y), grad)):
        with pytest.raises(AssertionError):
            assert_same((y, grad), theirs, 1.0, exact=False)


def test_a_peer_that_cannot_do_a_case_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    from fake_quant_peers import able

    def refuse() -> None:
        raise RuntimeError("not for this dtype\nand more")

    kept, note = able({"clusterq": int, "peer": refuse}, "a case")
    assert list(kept) == ["clusterq"] and note == "without peer"
    assert capsys.readouterr().out == "  left out of a case: peer (RuntimeError: not for this dtype)\n"
    with pytest.raises(RuntimeError):
        able({"clusterq": refuse}, "a case")


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of all suites on small shapes, as `make bench` runs it."""
    folder = tmp_path_factory.mktemp("bench") / "out"
    command = [sys.executable, str(BENCH / "report.py"), "--quick", "--threads", "1", "--output", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_runs_to_the_end(quick_run: Path, suite: str) -> None:
    path = quick_run / f"{suite}.json"
    record = harness.Record.read(path)
    assert record.suite == suite and record.facts.quick and record.facts.threads == 1 and record.facts.repeats == 3
    assert record.facts.command == f"python bench/bench_{suite}.py --threads 1 --repeats 3 --quick"
    assert record.facts.kernels and record.facts.load_average >= 0
    assert record.rows and len({row.title for row in record.rows}) == len(record.rows)
    for row in record.rows:
        assert next(iter(row.costs)) == row.ours and len(row.costs) > 1
        assert all(value > 0 for value in row.costs.values())
        assert row.ratio.keys() == row.costs.keys() - {row.ours}
        assert all(0 < value < math.inf for value in row.ratio.values())
        assert row.met is None
        assert row.faults.keys() == (row.costs.keys() if row.unit == "ms" else set())
    # Results are published: nothing of the machine's folders in them.
    assert str(quick_run.parent) not in path.read_text()


def test_report_of_a_quick_run_judges_nothing(quick_run: Path) -> None:
    text = (quick_run / "report.md").read_text()
    assert "No bars" in text and "MISSED" not in text
    assert all(f"## {suite}" in text for suite in SUITES)


def test_main_contestant_of_the_steps_is_the_shipped_default() -> None:
    """Learned steps and asymmetric weights in the network that is timed, told from its quantizers."""
    networks = importlib.import_module("bench_steps").build_networks(torch.randn(2, 3, 32, 32))
    weights = {
        name: [m for m in network.modules() if isinstance(m, WeightQuantizer)] for name, network in networks.items()
    }
    default, symmetric = weights["clusterq"], weights["clusterq symmetric weights"]
    assert len(default) == len(symmetric) > 0 and not weights["float"] and not weights["eager"]
    assert {m.mode for m in (*default, *symmetric)} == {"learned"}
    assert all(m.zero_point.any() for m in default) and not any(m.zero_point.any() for m in symmetric)


@pytest.mark.parametrize(
    ("suite", "promised"),
    [
        ("fake_quant", ("forward per tensor", "forward per channel", "learned backward per tensor")),
        ("bn_stats", ("statistics", "BatchNorm and statistics", "backward of both")),
    ],
)
def test_a_gpu_suite_runs_where_there_is_none(suite: str, promised: tuple[str, ...], tmp_path: Path) -> None:
    """The script itself; what it says of a GPU it says on one."""
    target = tmp_path / "gpu.json"
    command = [sys.executable, f"gpu_{suite}.py", "--device", "cpu", "--quick", "--repeats", "1", "--json", target]
    child = subprocess.run(list(map(str, command)), cwd=BENCH, capture_output=True, text=True, timeout=600)
    assert child.returncode == 0, child.stdout + child.stderr
    assert "0 cases were wrong" in child.stdout
    rows = harness.Record.read(target).rows
    # Both dtypes and layouts.
    for name in promised:
        assert sum(row.case == name for row in rows) == 4


def test_bars_of_the_gpu() -> None:
    suite = importlib.import_module("gpu_fake_quant")
    found = Counter()
    for group in suite.GROUPS:
        for build in group(True):
            case = build()
            found.update((case.name, ours, b.peer, round(b.limit, 3), b.direction) for ours, b in case.bars.items())
    assert found == {
        ("forward per tensor", "clusterq", "clone", 0.92, FASTER): 4,
        ("forward per channel", "clusterq", "clone", 0.92, FASTER): 4,
        ("learned backward per tensor", "clusterq", "copy", 0.9, FASTER): 4,
        ("learned backward per channel", "clusterq", "copy", 0.9, FASTER): 4,
        ("learned backward per channel, FlagGems' shape", "clusterq", "torch", 3.527, FASTER): 2,
        ("forward+backward per tensor, learned", "clusterq", "torch", 2.3, FASTER): 4,
        ("forward+backward per channel, learned", "clusterq", "torch", 2.3, FASTER): 4,
        ("forward by size", "clusterq", "torch", 1.0, FASTER): 4,
        ("forward+backward by size, clipped", "clusterq", "torch", 1.0, FASTER): 4,
        ("forward+backward by size, learned", "clusterq", "torch", 1.0, FASTER): 4,
    }


def test_unseen_networks_are_trained_quantized_and_told_of(tmp_path: Path) -> None:
    """In small, one with dead channels and one of 100 classes; a second call trains neither and keeps the first's."""
    archive, folder, target = tmp_path / "cifar10_test.npz", tmp_path / "networks", tmp_path / "unseen.json"
    images = np.random.default_rng(0).integers(0, 256, (8_064, 32, 32, 3), dtype=np.uint8)
    np.savez(archive, images=images, labels=np.arange(len(images)) % 10)
    command = [sys.executable, "unseen_networks.py", folder, "--quick", "--data", archive, "--json", target]
    for name in ("resnet", "hundred"):
        child = subprocess.run([*map(str, command), "--networks", name], cwd=BENCH, capture_output=True, text=True)
        assert child.returncode == 0, child.stdout + child.stderr
    record = json.loads(target.read_text())
    assert list(record["networks"]) == ["resnet", "hundred"] and str(tmp_path) not in target.read_text()
    for found, classes in zip(record["networks"].values(), (10, 100), strict=True):
        assert found["classes"] == classes and found["images"] > 0
        assert [(row["scheme"], row["bits"]) for row in found["rows"]] == [("deploy", "W4A4"), ("deploy", "W3A3")]
    table = subprocess.run(
        [sys.executable, "unseen_networks.py", "--render", str(target)], cwd=BENCH, capture_output=True, text=True
    )
    assert table.stdout.count("\n") == 2 + 4 and "| plain, 100 classes | 0..16 | 100 |" in table.stdout
    state = load_file(folder / "resnet.safetensors")
    dead = {name: int((value <= 1e-12).sum()) for name, value in state.items() if name.endswith("running_var")}
    # A quarter of 12, 24 and 48 channels, half of them rounded down to even: the others' gain is 0.
    assert set(dead.values()) == {2, 3, 6}
    assert int((state["1.weight"] == 0).sum()) == 1
