"""Runs that survive: their state is kept beside the run folder while they work, and taken up again after any end.

While `clusterq quantize` makes `runs/X`, `runs/X.partial` holds `last` and `previous`, the two newest states,
`synthesis`, the image source once it is done, and one checkpoint per finished width. All of them are sealed folders
(see `clusterq.states`): written beside their place, flushed, renamed, and compared with their SHA-256 before they are
used. A process that is killed at any moment leaves `last` or `previous` whole. There is no `best`: without data nothing
ranks the states of a run, and loss on synthetic images does not rank them by accuracy; the last step is the result.

Of several processes the first reads and writes for all. They stay in step: which of them saves, or has got a signal, is
agreed upon at every look.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from clusterq.errors import CheckpointError, DivergenceError, OutputError, RunInterrupted
from clusterq.folders import new_folder
from clusterq.partial import Notify, difference, has_state, newest, partial_folder, require_state
from clusterq.processes import Processes
from clusterq.states import read_state, seal, write_state

SAVE_EVERY = 60.0
# Share of the time that saving may take: a state that takes a second is written every 100 seconds at most.
_COST_SHARE = 0.01
StateOf = Callable[[], dict[str, Any]]


class Session:
    """Keeps the state of one run; use as a context manager around the whole run.

    Args:
        output: run folder to be made.
        every: seconds between two saves, more where a save takes long; None: no state is kept at all.
        words: the command that begins the run, for `recorded_words`.
        how: what a user types to continue.
        notify: called with one sentence where a user should know something.
        processes: that carry out the run; all make the same calls.

    Attributes:
        done: results of the parts of the run that are finished, by name.
        carried: what `extra` of `begin` gave when the state that is continued was saved; empty for a new run.
        resumed: how often the run was continued.
    """

    def __init__(
        self,
        output: Path,
        *,
        every: float | None,
        words: list[str],
        how: str,
        notify: Notify | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.output = output
        self.processes = processes or Processes()
        self.folder = partial_folder(output)
        self.every = every
        self.done: dict[str, Any] = {}
        self.carried: dict[str, Any] = {}
        self.resumed = 0
        self._words, self._how = words, how
        self._notify = notify or _silent
        self._identity: dict[str, Any] = {}
        self._environment: dict[str, Any] = {}
        self._extra: StateOf = dict
        self._folders: dict[str, str] = {}
        self._continued: dict[str, Any] | None = None
        self._training: tuple[str, StateOf] | None = None
        self._begun = False
        self._next = 0.0
        self._due = False
        self._lock: int | None = None
        self._signal = 0
        self._handlers: dict[int, Any] = {}

    def begin(
        self,
        identity: Mapping[str, Any],
        environment: Mapping[str, Any],
        extra: StateOf,
        *,
        resume: bool,
        overwrite: bool = False,
    ) -> None:
        """Start, or continue what is there.

        Args:
            identity: what must be the same for a state to be continued: network, settings, data.
            environment: what should be: versions, threads, processor. A difference is told.
            extra: gives more to keep with every state.
            resume: continue; it is an error when there is nothing to continue.
            overwrite: without `resume`: drop the state of an earlier run instead of refusing.

        Raises:
            CheckpointError: nothing to continue, no whole state, an unknown format, or another `identity`.
            OutputError: the state of an earlier run is there, another process works on it, or nothing can be written.
        """
        self._identity, self._environment, self._extra = dict(identity), dict(environment), extra
        if self.every is None:
            return
        found = self.processes.first(lambda: self._take_up(resume=resume, overwrite=overwrite))
        if found is not None:
            self.done, self._folders, self._continued = found["done"], found["folders"], found["training"]
            self.carried, self.resumed = found["extra"], found["resumed"] + 1
        self._begun = self.writes
        self._next = time.perf_counter() + self.every
        self._catch_signals()

    @property
    def writes(self) -> bool:
        """Whether this is the process whose files stay."""
        return self.processes.rank == 0

    def _take_up(self, *, resume: bool, overwrite: bool) -> dict[str, Any] | None:
        """Make the folder this run's; the state to continue from."""
        found = has_state(self.folder)
        if found and not resume and not overwrite:
            raise OutputError(
                f"{self.folder} holds an interrupted run; continue it with --resume, or drop it with --overwrite"
            )
        if resume:
            require_state(self.folder)
        self._acquire()
        state = self._load() if resume else None
        if found and not resume:
            self._discard()
            self._release()
            self._acquire()
        self._remove_remains()
        return state

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """The result of a part of the run: plain values, computed unless an earlier process has done so."""
        if name not in self.done:
            self.done[name] = compute()
        self.look()
        return self.done[name]

    def keep(self, name: str, result: Any, write: Callable[[Path], None]) -> None:
        """Finish a part: its result and its files, which `write` puts into a folder, are kept to the end of the run."""
        self.done[name] = result
        self._training = self._continued = None
        if self.every is not None:
            with self.new_folder(self.folder / name, overwrite=True) as folder:
                write(folder)
                if self.writes:
                    self._folders[name] = seal(folder)
            self._due = True
        self.look()

    @contextmanager
    def new_folder(self, path: Path, *, overwrite: bool, keep: str | None = None) -> Iterator[Path]:
        """`clusterq.folders.new_folder`; in a process whose files do not stay, one that vanishes."""
        if self.writes:
            with new_folder(path, overwrite=overwrite, keep=keep) as folder:
                yield folder
        else:
            with tempfile.TemporaryDirectory() as name:
                yield Path(name)

    def kept(self, name: str) -> Path:
        """The sealed folder of a finished part, verified when the run was continued; the first process's."""
        return self.folder / name

    def read_kept(self, name: str) -> Any:
        """The state in the folder of a finished part."""
        return self.processes.first(lambda: read_state(self.kept(name), verified=True))

    def state_of(self, name: str) -> dict[str, Any] | None:
        """State of a part that was interrupted in training, None when it was not."""
        if self._continued is None or self._continued["name"] != name:
            return None
        state: dict[str, Any] = self._continued["state"]
        return state

    def after_step(self, name: str, state: StateOf) -> None:
        """To be called after every step of a part in training; saves when it is time, and ends the run on a signal."""
        self._training = (name, state)
        self._continued = None
        self.look()

    def look(self) -> None:
        """Saves when it is time. Raises RunInterrupted, with everything saved, when a signal asked for it."""
        if self.every is None:
            return
        self._due = self._due or time.perf_counter() >= self._next
        # Signals have larger numbers than 1, and the first process's clock counts: part of a state is exchanged.
        agreed = self.processes.agree(self._signal or int(self._due and self.writes))
        if agreed > 1:
            self._signal = agreed
        if agreed:
            self.save()
        if self._signal:
            stop = RunInterrupted(f"interrupted, everything is saved; {self.how_to_continue()}", self._signal)
            stop.told = not self.writes
            raise stop

    def look_alone(self) -> None:
        """`look` where processes are not in step; of several processes none does anything."""
        if self.processes.size == 1:
            self.look()

    def how_to_continue(self) -> str:
        """One clause for a message."""
        return f"continue with: {self._how}"

    def save(self) -> None:
        """Write `last`; the one before becomes `previous`."""
        begin = time.perf_counter()
        training = self._continued
        if self._training is not None:
            training = {"name": self._training[0], "state": self._training[1]()}
        state = {
            "words": self._words, "identity": self._identity, "environment": self._environment,
            "done": self.done, "folders": self._folders, "training": training, "resumed": self.resumed,
            "extra": self._extra(),
        }  # fmt: skip
        if self.writes:
            with new_folder(self.folder / "last", overwrite=True, keep="previous") as folder:
                write_state(folder, state)
                seal(folder)
        end = time.perf_counter()
        assert self.every is not None
        self._due = False
        self._next = end + max(self.every, (end - begin) / _COST_SHARE)

    def finish(self) -> None:
        """The run folder is in its place: the state is not needed any more."""
        if self._begun:
            self._discard()
            self._begun = False

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._begun:
            self._leave(error)
        self._release()

    def _leave(self, error: BaseException | None) -> None:
        widths = sorted(name for name in self._folders if name != "synthesis")
        saved = has_state(self.folder)
        if isinstance(error, DivergenceError) and not widths:
            # The same steps again would end in the same NaN.
            saved = False
        if not saved:
            self._discard()
        elif isinstance(error, DivergenceError):
            error.args = (f"{error}; finished before that, in {self.folder}: {', '.join(widths)}",)
        # Of a state that does not fit the same would come again.
        elif error is not None and not isinstance(error, (RunInterrupted, CheckpointError)):
            error.how_to_continue = self.how_to_continue()  # type: ignore[attr-defined]

    def _load(self) -> dict[str, Any]:
        state, name = newest(self.folder, self._notify)
        differs = difference(state["identity"], self._identity)
        if differs:
            raise CheckpointError(f"{self.folder} belongs to another run: {differs}")
        changed = difference(state["environment"], self._environment)
        if changed:
            self._notify(f"{changed}: the result can differ in its last bits from that of a run in one go")
        if name != "last":
            self._remove_damaged()
        return state

    def _remove_damaged(self) -> None:
        # The next save would move it to the place of `previous`, which alone is whole.
        try:
            if (self.folder / "last").exists():
                shutil.rmtree(self.folder / "last")
        except OSError as error:
            raise OutputError(f"{self.folder / 'last'} cannot be removed: {error.strerror}") from error

    def _discard(self) -> None:
        # Renamed first: killed in the middle, this leaves nothing that looks like the state of a run.
        gone = self.folder.with_name(f".{self.folder.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            self.folder.rename(gone)
        except OSError as error:
            raise OutputError(f"{self.folder} cannot be removed: {error.strerror}") from error
        shutil.rmtree(gone, ignore_errors=True)

    def _remove_remains(self) -> None:
        """What a killed process left half-written; the lock says that no other process is writing it.

        Killed between the two renames that replace a run folder, it left the earlier one under another name.
        """
        mark = re.compile(
            rf"\.({re.escape(self.output.name)}|{re.escape(self.folder.name)})\.[0-9a-f]{{8}}\.(tmp|old|probe)"
        )
        remains = [path for path in self.folder.iterdir() if path.name.startswith(".")]
        for path in sorted(self.folder.parent.iterdir()):
            found = mark.fullmatch(path.name)
            if found is None:
                continue
            if found.groups() == (self.output.name, "old") and not self.output.exists():
                try:
                    path.rename(self.output)
                except OSError as error:
                    raise OutputError(f"{path} cannot be renamed to {self.output}: {error.strerror}") from error
            else:
                remains.append(path)
        for path in remains:
            shutil.rmtree(path, ignore_errors=True)

    def _acquire(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise OutputError(f"{self.folder} cannot be written: {error.strerror}") from error
        if os.name != "posix":
            return
        import fcntl

        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._release()
            raise OutputError(f"{self.folder} is in use by another process") from error
        except OSError as error:
            # File systems without locks.
            self._notify(f"{self.folder} cannot be locked ({error.strerror}): run no second process on it")

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _catch_signals(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            # Ignored from outside, as of a command started with nohup or in a shell's background: stays ignored.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, self._stop)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self._signal:
            stop = KeyboardInterrupt()
            stop.signal = number  # type: ignore[attr-defined]
            raise stop
        self._signal = number
        # Not by print: the signal may have come in the middle of one.
        os.write(2, b"\nclusterq: finishing this step and saving; once more stops at once\n")


def _silent(message: str) -> None:
    pass
