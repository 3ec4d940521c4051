"""Several processes make what one makes: the same images, centroids and student but for the order of additions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, os.path.dirname(__file__))
from process_cases import CONFIGS, SHAPE, everything, teacher

from clusterq import ClusterQ
from clusterq.processes import Processes

HERE = Path(__file__).parent


def together(case: str, size: int, folder: Path) -> list[dict[str, Any]]:
    """What each of `size` processes has in the end."""
    command = [sys.executable, str(HERE / "process_cases.py"), case]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(size), str(folder / f"meet{size}"), str(folder / "out")],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    errors = [worker.communicate(timeout=300)[1] for worker in workers]
    assert all(worker.returncode == 0 for worker in workers), errors
    if case == "parts":
        return []
    return [torch.load(folder / f"out.{rank}", weights_only=False) for rank in range(size)]


def assert_same(a: Any, b: Any, *, tolerance: float = 0.0) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("case", "size"), [("bank", 3), ("classes", 2), ("stream", 2), ("conditional", 2)])
def test_result_does_not_depend_on_the_number_of_processes(case, size, tmp_path):
    alone = everything(case, after=5)
    every = together(case, size, tmp_path)
    for other in every[1:]:
        assert_same(other, every[0])
    got = every[0]
    for name in ("images", "labels", "centroids", "student", "metrics", "state"):
        assert_same(got[name], alone[name], tolerance=1e-4)
    # Not the same run by accident: rounding differs somewhere.
    assert not torch.equal(got["images"], alone["images"])
    # What three have begun, one can finish.
    if case == "bank":
        assert_same(everything(case, state=got["state"])["images"], alone["images"], tolerance=1e-4)


def test_several_continue_what_one_began(tmp_path):
    alone = everything("classes", after=5)
    torch.save(alone["state"], tmp_path / "start.pt")
    (got, _) = together("classes", 2, tmp_path)
    assert_same(got["images"], alone["images"], tolerance=1e-4)
    assert len(got["metrics"]["synthesis"]) == len(alone["metrics"]["synthesis"])


def test_collectives_and_shared_batch_norm(tmp_path):
    together("parts", 2, tmp_path)


@pytest.mark.parametrize(
    ("case", "size", "message"),
    [
        ("bank", 5, "finetune.batch_size is 12; wanted a multiple of the 5 processes"),
        ("stream", 5, "synthesis.batch_size is 12; wanted a multiple of the 5 processes"),
        ("bank", 12, "batches of 10 images; wanted one for each of the 12"),
    ],
)
def test_batches_that_cannot_be_shared_are_refused(case, size, message, monkeypatch):
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group: size)
    monkeypatch.setattr("torch.distributed.get_rank", lambda group: 0)
    with pytest.raises(ValueError, match=message):
        ClusterQ(teacher(), CONFIGS[case](), input_shape=SHAPE, process_group=object())


@pytest.mark.parametrize(("count", "size"), [(0, 3), (1, 3), (7, 3), (6, 3), (5, 1)])
def test_rows_are_a_partition_of_nearly_equal_parts(count, size):
    parts = []
    for rank in range(size):
        processes = Processes()
        processes.rank, processes.size = rank, size
        parts.append(list(range(count))[processes.rows(count)])
    assert [row for part in parts for row in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
