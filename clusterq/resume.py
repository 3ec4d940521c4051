"""Runs that survive: their state is kept beside the run folder while they work, and taken up again after any end.

While `clusterq quantize` makes `runs/X`, `runs/X.partial` holds `last` and `previous`, the two newest states,
`synthesis`, the image source once it is done, and one checkpoint per finished width. All of them are sealed folders
(see `clusterq.states`): written beside their place, flushed, renamed, and compared with their SHA-256 before they are
used. A process that is killed at any moment leaves `last` or `previous` whole. There is no `best`: without data nothing
ranks the states of a run, and loss on synthetic images does not rank them by accuracy; the last step is the result.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from clusterq.errors import CheckpointError, DivergenceError, OutputError, RunInterrupted
from clusterq.folders import new_folder
from clusterq.states import DamagedError, read_state, seal, verify, write_state

SAVE_EVERY = 60.0
# Share of the time that saving may take: a state that takes a second is written every 100 seconds at most.
_COST_SHARE = 0.01
_STATES = ("last", "previous")

Notify = Callable[[str], None]
StateOf = Callable[[], dict[str, Any]]


def partial_folder(output: Path) -> Path:
    """Where the state of the run that makes `output` is kept."""
    return output.with_name(f"{output.name}.partial")


def recorded_words(output: Path) -> list[str]:
    """The command that began the run of `output`, without the program's name.

    Raises:
        CheckpointError: there is no state of an interrupted run, or none that is whole.
    """
    words = _newest(partial_folder(output), _silent).get("words")
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise CheckpointError(f"{partial_folder(output)} does not say how its run was begun")
    return words


class Session:
    """Keeps the state of one run; use as a context manager around the whole run.

    Args:
        output: run folder to be made.
        every: seconds between two saves, more where a save takes long; None: no state is kept at all.
        words: the command that begins the run, for `recorded_words`.
        how: what a user types to continue.
        notify: called with one sentence where a user should know something.

    Attributes:
        done: results of the parts of the run that are finished, by name.
        carried: what `extra` of `begin` gave when the state that is continued was saved; empty for a new run.
        resumed: how often the run was continued.
    """

    def __init__(
        self, output: Path, *, every: float | None, words: list[str], how: str, notify: Notify | None = None
    ) -> None:
        self.output = output
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
        found = _has_state(self.folder)
        if found and not resume and not overwrite:
            raise OutputError(
                f"{self.folder} holds an interrupted run; continue it with --resume, or drop it with --overwrite"
            )
        if resume:
            _require_state(self.folder)
        self._acquire()
        if resume:
            self._load()
        elif found:
            self._discard()
            self._release()
            self._acquire()
        self._remove_remains()
        self._begun = True
        self._next = time.perf_counter() + self.every
        self._catch_signals()

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """The result of a part of the run: plain values, computed unless an earlier process has done so."""
        if name not in self.done:
            self.done[name] = compute()
            self._save_if_due()
        self.check()
        return self.done[name]

    def keep(self, name: str, result: Any, write: Callable[[Path], None]) -> None:
        """Finish a part: its result and its files, which `write` puts into a folder, are kept to the end of the run."""
        self.done[name] = result
        self._training = self._continued = None
        if self.every is not None:
            with new_folder(self.folder / name, overwrite=True) as folder:
                write(folder)
                self._folders[name] = seal(folder)
            self.save()
        self.check()

    def kept(self, name: str) -> Path:
        """The sealed folder of a finished part, verified when the run was continued."""
        return self.folder / name

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
        self._save_if_due()
        self.check()

    def check(self) -> None:
        """Raises RunInterrupted, with everything saved, when a signal asked for it."""
        if self._signal and self.every is not None:
            self.save()
            raise RunInterrupted(f"interrupted, everything is saved; {self.how_to_continue()}", self._signal)

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
        with new_folder(self.folder / "last", overwrite=True, keep="previous") as folder:
            write_state(folder, state)
            seal(folder)
        end = time.perf_counter()
        assert self.every is not None
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
        saved = _has_state(self.folder)
        if isinstance(error, DivergenceError) and not widths:
            # The same steps again would end in the same NaN.
            saved = False
        if not saved:
            self._discard()
        elif isinstance(error, DivergenceError):
            error.args = (f"{error}; finished before that, in {self.folder}: {', '.join(widths)}",)
        elif error is not None and not isinstance(error, RunInterrupted):
            error.how_to_continue = self.how_to_continue()  # type: ignore[attr-defined]

    def _save_if_due(self) -> None:
        # A signal has it saved by `check`: a second save of the same step would leave `previous` no older.
        if self.every is not None and not self._signal and time.perf_counter() >= self._next:
            self.save()

    def _load(self) -> None:
        state = _newest(self.folder, self._notify)
        differs = _difference(state["identity"], self._identity)
        if differs:
            raise CheckpointError(f"{self.folder} belongs to another run: {differs}")
        changed = _difference(state["environment"], self._environment)
        if changed:
            self._notify(f"{changed}: the result can differ in its last bits from that of a run in one go")
        self.done, self._folders, self._continued = state["done"], state["folders"], state["training"]
        self.carried, self.resumed = state["extra"], state["resumed"] + 1

    def _discard(self) -> None:
        # Renamed first: killed in the middle, this leaves nothing that looks like the state of a run.
        gone = self.folder.with_name(f".{self.folder.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            self.folder.rename(gone)
        except OSError as error:
            raise OutputError(f"{self.folder} cannot be removed: {error.strerror}") from error
        shutil.rmtree(gone, ignore_errors=True)

    def _remove_remains(self) -> None:
        """What a killed process left half-written; the lock says that no other process is writing it."""
        mark = re.compile(rf"\.({re.escape(self.output.name)}|{re.escape(self.folder.name)})\.[0-9a-f]{{8}}\.tmp")
        remains = [path for path in self.folder.iterdir() if path.name.startswith(".")]
        remains += [path for path in self.folder.parent.iterdir() if mark.fullmatch(path.name)]
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
            raise KeyboardInterrupt
        self._signal = number
        # Not by print: the signal may have come in the middle of one.
        os.write(2, b"\nclusterq: finishing this step and saving; once more stops at once\n")


def _silent(message: str) -> None:
    pass


def _has_state(folder: Path) -> bool:
    return any((folder / name).is_dir() for name in _STATES)


def _require_state(folder: Path) -> None:
    if not _has_state(folder):
        raise CheckpointError(f"{folder} holds no interrupted run to continue")


def _newest(folder: Path, notify: Notify) -> dict[str, Any]:
    """The content of `last`, of `previous` where `last` is damaged. Raises CheckpointError where both are."""
    _require_state(folder)
    problems = []
    for name in _STATES:
        try:
            state = read_state(folder / name)
            _require_form(state, folder / name)
            for part, digest in state["folders"].items():
                if verify(folder / part) != digest:
                    raise DamagedError(f"{folder / part} is not the one that {folder / name} was saved with")
        except DamagedError as error:
            problems.append(str(error))
            continue
        if problems:
            notify(f"{problems[0]}: continuing from the state before it")
        return dict(state)
    raise CheckpointError(f"{folder} holds no whole state to continue: {problems[0]}")


def _require_form(state: Any, folder: Path) -> None:
    wanted = {"words": list, "identity": dict, "environment": dict, "done": dict, "folders": dict, "extra": dict}
    whole = isinstance(state, dict) and all(isinstance(state.get(key), kind) for key, kind in wanted.items())
    training = state.get("training") if whole else None
    if not whole or not isinstance(state.get("resumed"), int) or not (
        training is None or (isinstance(training, dict) and {"name", "state"} <= set(training))
    ):  # fmt: skip
        raise DamagedError(f"{folder} is not the state of a run")
    for part, digest in state["folders"].items():
        if not isinstance(digest, str) or re.fullmatch(r"synthesis|W[2-8]A[2-8]", part) is None:
            raise DamagedError(f"{folder} is not the state of a run: it names {part!r}")


def _difference(old: Any, new: Any, path: str = "") -> str:
    """The first difference of two trees in words; empty when they are equal."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*old, *(key for key in new if key not in old)]:
            found = _difference(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
            if found:
                return found
        return ""
    return "" if old == new else f"{path} was {_short(old)} and is {_short(new)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def command_to_continue(output: Path, *, trust: bool, overwrite: bool) -> str:
    """What a user types to continue the run of `output`."""
    words = ["clusterq", "quantize", "--resume", str(output)]
    return shlex.join([*words, *(["--trust"] if trust else []), *(["--overwrite"] if overwrite else [])])
