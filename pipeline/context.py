"""What every stage is handed besides its own config and receipts: where to write, where to run, whom to tell."""

import contextlib
import io
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, ClassVar, Literal

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from cluster.config import ClusterConfig
from components.storage import Location
from pipeline.progress import Pace, Times, duration, repeatedly

FIRST_LINE_S, LINE_EVERY_S, IDLE_S, LOOK_S = 5.0, 10.0, 30.0, 1.0


LogFormat = Literal["text", "json"]
_LEVELS = ("error", "warning", "note")


def json_line(message: str, facts: Mapping[str, object] | None = None) -> str:
    """Returns a line of a log for machines: when (UTC, ISO 8601), level, message, and what else is known.

    Args:
        message: what a person would read; a level at its beginning becomes the line's.
    """
    said = message.strip()
    level = next((level for level in _LEVELS if said.startswith((f"{level} ", f"{level}: "))), "info")
    told = said if level == "info" else said[len(level) :].lstrip(": ")
    return json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "level": level, "message": told, **(facts or {})}) + "\n"


class Advance:
    """Says how much more is done of a piece of work."""

    def __init__(self, pace: Pace, first: Callable[[], None], show: Callable[[], None]) -> None:
        """Prepares it.

        Args:
            first: called once, when something is done for the first time.
            show: called whenever something is done.
        """
        self._pace, self._first, self._show = pace, first, show

    def __call__(self, amount: float) -> None:
        """Adds to what is done."""
        if amount and not self._pace.has_ever_begun:
            self._first()
        self._pace.advance(amount)
        self._show()

    @property
    def has_begun(self) -> bool:
        """Whether anything was done since the beginning, or since it began anew."""
        return self._pace.has_begun

    def call(self, beginning: str) -> None:
        """Names what goes on as long as nothing is done."""
        if beginning != self._pace.beginning:
            self._pace.beginning = beginning
            self._show()

    def restart(self) -> None:
        """Has the time left reckoned anew, because workers start again."""
        self._pace.restart()
        self._show()


class _Stderr(io.TextIOBase):
    """stderr, to which writing does not fail when nobody reads it any more: that is no reason for a run to break off where it happens to stand."""

    @property
    def _stream(self) -> Any:
        return getattr(sys.stderr, "rich_proxied_file", sys.stderr)  # what moves on a terminal puts itself before it

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
    """Tells a person on stderr what happens: lines always; parts of the work as spinners and bars on a terminal, else as lines.

    A part has its first line where nothing was said for five seconds, and another every ten seconds.

    Attributes:
        log_format: of all reporters of this process: `json` is one object a line, for machines, and nothing that moves.
        times: seconds of every part, so that the end of a run can say what took the time.
    """

    log_format: ClassVar[LogFormat] = "text"

    def __init__(self) -> None:
        stderr: Any = _Stderr()
        self.console = Console(file=stderr, highlight=False)
        self.times = Times()
        self._parts: list[object] = []
        self._said = time.monotonic()

    def line(self, text: str) -> None:
        """Prints one line."""
        if self.log_format == "json":
            self._write({}, Text.from_markup(text).plain)
            return
        self._said = time.monotonic()
        self.console.print(text, soft_wrap=True)

    def _write(self, facts: Mapping[str, object], message: str) -> None:
        self._said = time.monotonic()
        self.console.file.write(json_line(message, facts))
        self.console.file.flush()

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Says at once what is done during a block, and goes on as `part` does."""
        self.line(f"  {what}")
        with self.part(what):
            yield

    @contextlib.contextmanager
    def part(self, what: str, done: Callable[[], str] | None = None) -> Iterator[None]:
        """Times a block whose end nobody knows beforehand, and says what is done where it takes longer than some seconds.

        Args:
            done: says how much is done.
        """
        began = time.monotonic()

        def text() -> str:
            return f"{what}{'' if done is None else f', {done()}'}, {duration(time.monotonic() - began)} so far"

        with self.times.of(what), self._shown(self.console.status(what), text):
            yield

    @contextlib.contextmanager
    def progress(self, what: str, total: int, unit: str, done: int = 0, *, start: str | None = None) -> Iterator[Advance]:
        """Shows progress during a block; the block advances it by calling the function it is given.

        Args:
            start: what the time before the first advance goes to; to the whole by default.
        """
        began, pace = time.monotonic(), Pace(total, done)
        if start is not None:
            self.times.add(start, 0.0)  # told before what it comes before
        bars = Progress(*_COLUMNS, console=self.console, transient=True)
        task = bars.add_task(what, total=total, completed=done, unit=unit, pace=str(pace))

        def first() -> None:
            if start is not None:
                self.times.add(start, time.monotonic() - began)
                self.times.add(what, began - time.monotonic())

        def show() -> None:
            bars.update(task, completed=int(pace.done), pace=str(pace))

        def text() -> str:
            return f"{what} {int(pace.done)}/{total} {unit}, {pace}{_still(pace)}"

        def facts() -> dict[str, object]:
            return {"part": what, "done": int(pace.done), "total": total, "unit": unit}

        with self.times.of(what), self._shown(bars, text, facts):
            yield Advance(pace, first, show)

    @contextlib.contextmanager
    def _shown(
        self, moving: contextlib.AbstractContextManager[object], say: Callable[[], str], facts: Callable[[], Mapping[str, object]] | None = None
    ) -> Iterator[None]:
        """Shows what moves on a terminal, else prints a line now and then, during a block; of blocks within each other the inner one has the word."""
        part, text = object(), False

        def report() -> None:
            nonlocal text
            if self._parts[-1] is part and time.monotonic() - self._said >= (LINE_EVERY_S if text else FIRST_LINE_S):
                text = True
                if self.log_format == "json":
                    self._write(facts() if facts else {}, say())
                else:
                    self.line(f"  {escape(say())}")

        self._parts.append(part)
        try:
            with moving if sys.stderr.isatty() and self.log_format == "text" else repeatedly(LOOK_S, report):
                yield
        finally:
            self._parts.remove(part)


def _still(pace: Pace) -> str:
    """Returns for how long nothing was done, where that is long."""
    if not pace.has_begun:
        return f", {duration(pace.idle_s)} so far"
    return f", nothing new for {duration(pace.idle_s)}" if pace.idle_s >= IDLE_S else ""


_COLUMNS = (
    TextColumn("  {task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TextColumn("{task.fields[unit]}"),
    TimeElapsedColumn(),
    TextColumn("{task.fields[pace]}"),
)


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
