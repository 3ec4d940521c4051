"""Progress of long phases on standard error: a bar with the time left on a terminal, sparse lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, TextIO

_SECONDS_BETWEEN_LINES = 15.0


class ConsoleProgress:
    """Callable as `progress(phase, done, total)`; `total` may be None. Use as a context manager.

    A phase begins anew, with its own bar and clock, when its name changes or `done` falls back.

    Args:
        stream: where to write; a terminal gets bars.
        quiet: write nothing.
    """

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False) -> None:
        self.stream = stream if stream is not None else sys.stderr
        self.quiet = quiet
        self._phase = ""
        self._bar: Any = None
        self._done = 0
        self._start = self._last = 0.0

    def __enter__(self) -> ConsoleProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish()

    def __call__(self, phase: str, done: int, total: int | None) -> None:
        if self.quiet:
            return
        now = time.perf_counter()
        if phase != self._phase or done < self._done:
            self._finish()
            self._phase, self._start, self._last = phase, now, now
            if self.stream.isatty():
                from tqdm import tqdm

                self._bar = tqdm(desc=f"{phase:<22}", total=total, file=self.stream, dynamic_ncols=True, unit="")
        self._done = done
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
        elif now - self._last >= _SECONDS_BETWEEN_LINES or done == total:
            self._last = now
            self.stream.write(_line(phase, done, total, now - self._start))
            self.stream.flush()

    def _finish(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar, self._phase = None, ""


def _line(phase: str, done: int, total: int | None, seconds: float) -> str:
    if total is None:
        return f"{phase}: {done}, {seconds:.0f} s\n"
    if done >= total:
        return f"{phase}: {done}/{total}, {seconds:.0f} s\n"
    return f"{phase}: {done}/{total}, {seconds:.0f} s, about {seconds * (total - done) / max(done, 1):.0f} s left\n"
