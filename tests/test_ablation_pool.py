"""Work shared by processes: order, failures, and processes that die. The functions are the standard library's own."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from typing import Any

import pytest

from clusterq.ablation import pool
from clusterq.ablation.pool import Task, run_tasks


@pytest.mark.parametrize("jobs", [1, 2])
def test_tasks_wait_for_what_they_need_and_failures_stop_no_others(jobs: int) -> None:
    tasks = [
        Task("child", "1", needs="parent"),
        Task("bad", "x"),
        Task("orphan", "2", needs="bad"),
        Task("grandchild", "3", needs="orphan"),
        Task("parent", "4"),
        Task("free", "5", needs="done long ago"),
    ]
    ended: list[tuple[str, str | None]] = []
    failed = run_tasks(tasks, int, jobs=jobs, on_end=lambda task, error: ended.append((task.name, error)))
    names = [name for name, _ in ended]
    assert sorted(names) == sorted(task.name for task in tasks)
    assert names.index("parent") < names.index("child")
    assert set(failed) == {"bad", "orphan", "grandchild"}
    assert all("ValueError: invalid literal for int()" in reason for reason in failed.values())
    assert dict(ended) == {task.name: failed.get(task.name) for task in tasks}


def test_process_that_dies_fails_its_task_alone() -> None:
    tasks = [Task("dies", 3), Task("dies too", 4), Task("after", 5, needs="dies")]
    failed = run_tasks(tasks, os._exit, jobs=2, on_end=lambda task, error: None)
    assert failed == {
        "dies": "its process ended with code 3",
        "dies too": "its process ended with code 4",
        "after": "its process ended with code 3",
    }


def test_process_that_dies_while_idle_is_replaced() -> None:
    def on_end(task: Task, error: str | None) -> None:
        for process in multiprocessing.active_children():
            process.kill()
            process.join()

    tasks = [Task("first", "1"), Task("second", "2", needs="first"), Task("third", "3", needs="second")]
    assert run_tasks(tasks, int, jobs=2, on_end=on_end) == {}


def test_process_that_dies_before_it_reads_its_task_fails_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(pool._Worker):
        def begin(self, task: Task) -> bool:
            begun = super().begin(task)
            if task.name == "lost":
                self.process.kill()
                self.process.join()
            return begun

    monkeypatch.setattr(pool, "_Worker", Killed)
    tasks = [Task("lost", "1"), Task("other", "2"), Task("after", "3", needs="lost")]
    ended = "its process ended with code -9"
    assert run_tasks(tasks, int, jobs=2, on_end=lambda task, error: None) == {"lost": ended, "after": ended}


def test_process_that_dies_before_it_gets_its_task_fails_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dead(pool._Worker):
        def __init__(self, function: Callable[[Any], None]) -> None:
            super().__init__(function)
            self.process.kill()
            self.process.join()

    monkeypatch.setattr(pool, "_Worker", Dead)
    ended = "its process ended with code -9"
    tasks = [Task("a", "1"), Task("b", "2")]
    assert run_tasks(tasks, int, jobs=2, on_end=lambda task, error: None) == {"a": ended, "b": ended}


def test_two_processes_work_at_the_same_time() -> None:
    # Starting both takes seconds, once: four naps one after the other would take four more than two at a time.
    ended: list[float] = []
    tasks = [Task(str(i), 1.5) for i in range(4)]
    assert not run_tasks(tasks, time.sleep, jobs=2, on_end=lambda task, error: ended.append(time.monotonic()))
    assert ended[-1] - ended[0] < 3 * 1.5


def test_no_tasks() -> None:
    assert run_tasks([], int, jobs=2, on_end=lambda task, error: None) == {}


def test_interrupt_ends_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = []

    class Watched(pool._Worker):
        def __init__(self, function: object) -> None:
            super().__init__(function)  # type: ignore[arg-type]
            workers.append(self)

    def interrupt(connections: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pool, "_Worker", Watched)
    monkeypatch.setattr(pool, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_tasks([Task("long", 600.0)], time.sleep, jobs=2, on_end=lambda task, error: None)
    assert len(workers) == 1 and workers[0].process.exitcode is not None
