"""What every stage is handed besides its own config and receipts: where to write, where to run, whom to tell."""

import contextlib
import io
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cluster.config import ClusterConfig
from components.storage import Location

Advance = Callable[[int], None]
LINE_EVERY_S = 10.0


class _Stderr(io.TextIOBase):
    """stderr, to which writing does not fail when nobody reads it any more: that is no reason for a run to break off where it happens to stand."""

    def __init__(self) -> None:
        self._stream = sys.stderr

    @property
    def encoding(self) -> str:  # pyrefly: ignore[bad-override]
        return self._stream.encoding

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()


class Reporter:
    """Tells a person on stderr what happens: lines always; progress as bars on a terminal, else as a line every ten seconds."""

    def __init__(self) -> None:
        stderr: Any = _Stderr()
        self.console = Console(file=stderr, highlight=False)

    def line(self, text: str) -> None:
        """Prints one line."""
        self.console.print(text, soft_wrap=True)

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Says what is being waited for during a block, with a spinner where stderr is a terminal."""
        self.line(f"  {what}")
        with self.console.status(what) if sys.stderr.isatty() else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def progress(self, what: str, total: int, unit: str, done: int = 0) -> Iterator[Advance]:
        """Shows progress during a block; the block advances it by calling the function it is given."""
        if not sys.stderr.isatty():
            yield _Lines(self, what, total, unit, done).advance
            return
        columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True) as bars:
            task = bars.add_task(what, total=total, completed=done)
            yield lambda amount: bars.advance(task, amount)


class _Lines:
    """Progress as lines, for logs."""

    def __init__(self, reporter: Reporter, what: str, total: int, unit: str, done: int) -> None:
        self._reporter, self._what, self._total, self._unit = reporter, what, total, unit
        self._first = self._done = self._shown = done
        self._started = self._told = time.monotonic()

    def advance(self, amount: int) -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._told >= LINE_EVERY_S and self._done > self._shown:
            self._told, self._shown = now, self._done
            rate = (self._done - self._first) / (now - self._started)
            left = (self._total - self._done) / rate
            self._reporter.line(f"  {self._what} {self._done}/{self._total} {self._unit}, {rate:.3g} per second, {_duration(left)} left")


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min" if minutes < 100 else f"{minutes / 60:.1f} h"


@dataclass(frozen=True)
class StageContext:
    """Where a stage writes and runs.

    Attributes:
        storage: root of everything that runs make.
        folder: the stage's own folder for these inputs.
        inputs: digest of all that decides the stage's result.
        run_name: what a person calls the run.
    """

    storage: Location
    folder: Location
    inputs: str
    run_name: str
    cluster: ClusterConfig
    reporter: Reporter
