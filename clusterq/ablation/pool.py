"""Pieces of work, some of which need others first, on a few processes that live as long as there is work."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from clusterq.errors import ClusterQError

# What a run may raise, as the command line knows it. Anything else is a fault of this package: it ends its process.
_EXPECTED = (ClusterQError, ValueError, OSError, RuntimeError, MemoryError, ImportError)


@dataclass(frozen=True)
class Task:
    """A piece of work.

    Attributes:
        name: told apart by.
        work: argument of the function; plain enough to be sent to a process.
        needs: name of the task that has to be done first; None: nothing.
    """

    name: str
    work: Any
    needs: str | None = None


OnEnd = Callable[[Task, str | None], None]


def run_tasks(tasks: Sequence[Task], function: Callable[[Any], None], *, jobs: int, on_end: OnEnd) -> dict[str, str]:
    """Call `function(task.work)` for every task.

    A task that fails is told and does not stop the others; those that need it fail with it. With one job all of it
    happens in this process. With several, a process that dies is replaced, and its task has failed.

    Args:
        tasks: in the order to begin with.
        function: of a module, so that another process finds it.
        jobs: processes at a time.
        on_end: called with a task and None, or the sentence that says why it failed.

    Returns:
        Sentences of the failed tasks by name.

    Raises:
        KeyboardInterrupt: passed on; the processes are ended first.
    """
    queue = _Queue(tasks, on_end)
    if jobs == 1:
        while (task := queue.take()) is not None:
            queue.end(task, _attempt(function, task.work))
        return queue.failed
    workers: list[_Worker] = []
    try:
        while queue.waiting or any(worker.task is not None for worker in workers):
            while sum(w.task is not None for w in workers) < jobs and (task := queue.take()) is not None:
                _begin(task, workers, function, queue)
            busy: Mapping[Any, _Worker] = {worker.connection: worker for worker in workers if worker.task is not None}
            # None where every process ended before it got its task: to wait for nothing would be to wait for ever.
            for connection in wait(list(busy)) if busy else []:
                worker = busy[connection]
                task, error, alive = worker.finish()
                if not alive:
                    workers.remove(worker)
                queue.end(task, error)
    finally:
        for worker in workers:
            worker.stop()
    return queue.failed


def _begin(task: Task, workers: list[_Worker], function: Callable[[Any], None], queue: _Queue) -> None:
    """Give a task to an idle process, or to a new one where there is none that lives."""
    while (idle := next((worker for worker in workers if worker.task is None), None)) is not None:
        if idle.begin(task):
            return
        workers.remove(idle)
        idle.stop()
    worker = _Worker(function)
    if worker.begin(task):
        workers.append(worker)
    else:
        queue.end(task, worker.how_it_ended())
        worker.stop()


class _Queue:
    """Tasks that wait, in order, and how the others ended."""

    def __init__(self, tasks: Sequence[Task], on_end: OnEnd) -> None:
        self.waiting = list(tasks)
        self.failed: dict[str, str] = {}
        self._on_end = on_end
        self._open = {task.name for task in tasks}

    def take(self) -> Task | None:
        """The first task that can begin. None: all that wait need one that is still running, or none waits."""
        for task in self.waiting:
            if task.needs is None or task.needs not in self._open:
                self.waiting.remove(task)
                return task
        return None

    def end(self, task: Task, error: str | None) -> None:
        """Keep how a task ended, and end with it those that needed it."""
        self._open.discard(task.name)
        if error is not None:
            self.failed[task.name] = error
            for other in [other for other in self.waiting if other.needs == task.name]:
                self.waiting.remove(other)
                self.end(other, error)
        self._on_end(task, error)


class _Worker:
    """A process that takes one task after the other."""

    def __init__(self, function: Callable[[Any], None]) -> None:
        # A forked process would inherit torch's threads in an unusable state.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_serve, args=(theirs, function), daemon=True)
        self.process.start()
        theirs.close()
        self.task: Task | None = None

    def begin(self, task: Task) -> bool:
        """Send a task; False: the process has ended, and the task has not begun."""
        try:
            self.connection.send(task.work)
        except OSError:
            return False
        self.task = task
        return True

    def finish(self) -> tuple[Task, str | None, bool]:
        """The task whose end was reported, why it failed, and whether the process lives on."""
        task, self.task = self.task, None
        assert task is not None
        try:
            return task, self.connection.recv(), True
        # The latter where the process ended with work that it had not read.
        except (EOFError, OSError):
            return task, self.how_it_ended(), False

    def how_it_ended(self) -> str:
        """A sentence; waits for the end."""
        self.process.join()
        return f"its process ended with code {self.process.exitcode}"

    def stop(self) -> None:
        if self.task is not None:
            self.process.terminate()
        self.connection.close()
        self.process.join()


def _serve(connection: Connection, function: Callable[[Any], None]) -> None:
    # Ctrl-C reaches every process of the terminal; the first one decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            work = connection.recv()
        except (EOFError, OSError):
            return
        connection.send(_attempt(function, work))


def _end_with_parent() -> None:
    """Ends this process when the first one is gone, killed perhaps: nobody would hear of the result."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _attempt(function: Callable[[Any], None], work: Any) -> str | None:
    try:
        function(work)
    except _EXPECTED as error:
        text = str(error).strip().splitlines() or ["no message"]
        return text[0] if isinstance(error, ClusterQError) else f"{type(error).__name__}: {text[0]}"
    return None
