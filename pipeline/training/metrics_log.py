"""What a training run writes down while it goes: one line per window of steps, by whichever attempt is the current one.

TRAINING/attempt.json              who may write: the attempt that started last
TRAINING/metrics/0001-00000.jsonl  attempt 1, lines 1 to 500; every file is replaced whole, so that no line is ever torn
TRAINING/system/0/...              the same of what the workers' first machine did, then of the second, and so on

An attempt is one start of the group of workers. A worker that was cut off and written off may still run; it finds that another attempt
took its place and stops before it writes.

Lines wait in memory until a thread writes them, some at a time, so that training waits for no disk and no request. What a checkpoint
follows on is written before it (`flush`): a worker that starts again from there repeats only steps whose lines it has to write.
"""

import threading
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from types import TracebackType

from pydantic import BaseModel, ConfigDict, ValidationError

from components.storage import Location

ATTEMPT_FILE, METRICS_FOLDER, SYSTEM_FOLDER, _SUFFIX = "attempt.json", "metrics", "system", ".jsonl"
LINES_PER_FILE = 500
WRITE_LOCAL_S, WRITE_REMOTE_S = 0.5, 5.0


def system_folder(folder: Location, node: int) -> Location:
    """Returns the metrics log of what a node did while it trained."""
    return folder / SYSTEM_FOLDER / str(node)


class MetricsLine(BaseModel):
    """One line of the metrics log."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    timestamp_ms: int
    metrics: dict[str, float]


class SupersededError(Exception):
    """Raised in a worker whose attempt is no longer the current one."""


class Ticket(BaseModel):
    """Names an attempt: what attempt.json holds, and what the first worker tells the others."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int
    holder: str


class Attempt:
    """The right to write into a training folder, until a later attempt takes it.

    Attributes:
        ticket: how other workers name this attempt.
    """

    def __init__(self, folder: Location, ticket: Ticket | None = None) -> None:
        """Takes the right to write, or shares it with the worker that did.

        Args:
            ticket: of the attempt that this worker is part of.
        """
        self.folder = folder
        before = None if ticket else _read_ticket(folder)
        self.ticket = ticket or Ticket(number=(before.number if before else 0) + 1, holder=uuid.uuid4().hex)
        if ticket is None:
            (folder / ATTEMPT_FILE).write_text(self.ticket.model_dump_json() + "\n")

    @property
    def number(self) -> int:
        """1 for the first start, 2 for the second; part of the names of all that it writes."""
        return self.ticket.number

    def check(self) -> None:
        """Checks that this is still the current attempt.

        Raises:
            SupersededError: if another one took its place.
        """
        current = _read_ticket(self.folder)
        if current is None or current.holder != self.ticket.holder:
            raise SupersededError(f"attempt {self.number} of {self.folder} was superseded by attempt {current.number if current else 'unknown'}")


def _read_ticket(folder: Location) -> Ticket | None:
    try:
        return Ticket.model_validate_json((folder / ATTEMPT_FILE).read_text())
    except (FileNotFoundError, ValidationError):
        return None


def attempts_so_far(folder: Location) -> int:
    """Returns the number of the last start of a training's workers, 0 before the first."""
    ticket = _read_ticket(folder)
    return ticket.number if ticket else 0


class MetricsLogWriter:
    """Writes lines on behalf of one attempt. Steps that an earlier attempt wrote down are not written again: they are the same numbers.

    A block of it writes what was appended every so often, and the rest when it ends.
    """

    def __init__(self, attempt: Attempt, metrics_log: Location | None = None) -> None:
        """Goes on where earlier attempts ended.

        Args:
            metrics log: folder of the lines; by default that of the training's metrics.
        """
        self._attempt, self._metrics_log = attempt, metrics_log or attempt.folder / METRICS_FOLDER
        before = MetricsLogReader(metrics_log) if metrics_log else open_metrics(attempt.folder)
        self._last_step = max((line.step for line in before.lines()), default=-1)
        self._waiting: list[MetricsLine] = []
        self._written: list[str] = []
        self._file = 0
        self._superseded: SupersededError | None = None
        self._one_at_a_time, self._stop = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._write_now_and_then, name="metrics-log", daemon=True)

    def append(self, line: MetricsLine) -> None:
        """Takes one line; it is written within seconds in a block, else by the next `flush`.

        Raises:
            SupersededError: if another attempt was seen to have taken this one's place.
        """
        if self._superseded is not None:
            raise self._superseded
        if line.step > self._last_step:
            self._waiting.append(line)

    def flush(self) -> None:
        """Writes all lines that wait.

        Raises:
            SupersededError: if another attempt took this one's place; nothing is written.
            OSError: if the storage cannot be reached; the lines wait for the next call.
        """
        with self._one_at_a_time:
            while self._waiting:
                self._attempt.check()
                if len(self._written) == LINES_PER_FILE:
                    self._file, self._written = self._file + 1, []
                fresh = self._waiting[: LINES_PER_FILE - len(self._written)]
                lines = self._written + [line.model_dump_json() + "\n" for line in fresh]
                (self._metrics_log / f"{self._attempt.number:04d}-{self._file:05d}{_SUFFIX}").write_text("".join(lines))
                self._written = lines
                del self._waiting[: len(fresh)]

    def _write_now_and_then(self) -> None:
        while not self._stop.wait(WRITE_LOCAL_S if self._metrics_log.is_local else WRITE_REMOTE_S):
            try:
                self.flush()
            except SupersededError as error:
                self._superseded = error
                return
            except OSError:
                continue  # The flush before the next checkpoint says so, if the storage is still away by then.

    def __enter__(self) -> "MetricsLogWriter":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        with suppress(*() if error is None else (SupersededError, OSError)):
            self.flush()


class MetricsLogReader:
    """Reads a metrics log while it grows; each call reads only files that changed, and parses only lines that are new."""

    def __init__(self, *folders: Location) -> None:
        """Reads folders of lines as one metrics log."""
        self._folders = folders
        self._sizes: dict[Location, int] = {}
        self._parsed: dict[Location, int] = {}
        self._lines: dict[int, MetricsLine] = {}
        self._sorted: list[MetricsLine] = []

    def lines(self) -> list[MetricsLine]:
        """Returns all lines by step; where two attempts wrote down the same step, the earlier one's.

        Raises:
            OSError: if the storage cannot be reached.
        """
        before = len(self._lines)
        for folder in self._folders:
            for name, size in folder.files().items():
                if name.endswith(_SUFFIX) and self._sizes.get(folder / name) != size:
                    self._read(folder / name)
                    self._sizes[folder / name] = size
        if len(self._lines) > before:
            self._sorted = [self._lines[step] for step in sorted(self._lines)]
        return self._sorted

    def _read(self, file: Location) -> None:
        texts = file.read_text().splitlines()
        for line in _parse(texts[self._parsed.get(file, 0) :]):
            self._lines.setdefault(line.step, line)
        self._parsed[file] = len(texts)


def _parse(texts: Iterable[str]) -> Iterator[MetricsLine]:
    """Yields the lines; version 0.1.0 appended to one file beside the folder, whose last line may be torn."""
    for text in texts:
        with suppress(ValidationError):
            yield MetricsLine.model_validate_json(text)


def open_metrics(folder: Location) -> MetricsLogReader:
    """Returns the reader of a training folder's metrics; version 0.1.0 wrote them into the folder itself."""
    return MetricsLogReader(folder / METRICS_FOLDER, folder)


def read_metrics(folder: Location) -> list[MetricsLine]:
    """Returns the lines of a training folder, by step; raises like `NotebookReader.lines`."""
    return open_metrics(folder).lines()
