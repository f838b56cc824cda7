"""What a training run writes down while it goes: one line per stretch of steps, by whichever attempt is the current one.

TRAINING/attempt.json           who may write: the attempt that started last
TRAINING/metrics/0001-00000.jsonl  attempt 1, lines 1 to 500; every file is replaced whole, so that no line is ever torn

An attempt is one start of the group of workers. A worker that was cut off and written off may still run; it finds that another attempt
took its place and stops before it writes.
"""

import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress

from pydantic import BaseModel, ConfigDict, ValidationError

from components.storage import Location

ATTEMPT_FILE, METRICS_FOLDER, _SUFFIX = "attempt.json", "metrics", ".jsonl"
LINES_PER_FILE = 500


class MetricsLine(BaseModel):
    """One line of the notebook."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    timestamp_ms: int
    metrics: dict[str, float]


class SupersededError(Exception):
    """Raised in a worker whose attempt is no longer the current one."""


class _Attempt(BaseModel):
    number: int
    holder: str


class Attempt:
    """The right to write into a training folder, until a later attempt takes it.

    Attributes:
        number: 1 for the first start, 2 for the second; part of the names of all that it writes.
    """

    def __init__(self, folder: Location) -> None:
        """Takes the right to write."""
        self.folder = folder
        before = _read_attempt(folder)
        self.number = (before.number if before else 0) + 1
        self._holder = uuid.uuid4().hex
        (folder / ATTEMPT_FILE).write_text(_Attempt(number=self.number, holder=self._holder).model_dump_json() + "\n")

    def check(self) -> None:
        """Checks that this is still the current attempt.

        Raises:
            SupersededError: if another one took its place.
        """
        current = _read_attempt(self.folder)
        if current is None or current.holder != self._holder:
            raise SupersededError(f"attempt {self.number} of {self.folder} was superseded by attempt {current.number if current else 'unknown'}")


def _read_attempt(folder: Location) -> _Attempt | None:
    try:
        return _Attempt.model_validate_json((folder / ATTEMPT_FILE).read_text())
    except (FileNotFoundError, ValidationError):
        return None


class NotebookWriter:
    """Appends lines on behalf of one attempt. Steps that an earlier attempt wrote down are not written again: they are the same numbers."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self._last_step = last_logged_step(attempt.folder)
        self._lines: list[str] = []
        self._file = 0

    def append(self, line: MetricsLine) -> None:
        """Writes one line down.

        Raises:
            SupersededError: if another attempt took this one's place.
        """
        if line.step <= self._last_step:
            return
        self._attempt.check()
        if len(self._lines) == LINES_PER_FILE:
            self._file, self._lines = self._file + 1, []
        self._lines.append(line.model_dump_json() + "\n")
        name = f"{self._attempt.number:04d}-{self._file:05d}.jsonl"
        (self._attempt.folder / METRICS_FOLDER / name).write_text("".join(self._lines))


class NotebookReader:
    """Reads a notebook while it grows; each call reads only files that changed."""

    def __init__(self, folder: Location) -> None:
        self._folders = (folder / METRICS_FOLDER, folder)
        self._read: dict[str, int] = {}
        self._lines: dict[int, MetricsLine] = {}

    def lines(self) -> list[MetricsLine]:
        """Returns all lines by step; where two attempts wrote down the same step, the earlier one's.

        Raises:
            OSError: if the storage cannot be reached.
        """
        for folder in self._folders:
            for name, size in folder.files().items():
                if name.endswith(_SUFFIX) and self._read.get(name) != size:
                    for line in _parse((folder / name).read_text().splitlines()):
                        self._lines.setdefault(line.step, line)
                    self._read[name] = size
        return [self._lines[step] for step in sorted(self._lines)]


def _parse(texts: Iterable[str]) -> Iterator[MetricsLine]:
    """Yields the lines; version 0.1.0 appended to one file beside the folder, whose last line may be torn."""
    for text in texts:
        with suppress(ValidationError):
            yield MetricsLine.model_validate_json(text)


def read_metrics(folder: Location) -> list[MetricsLine]:
    """Returns the lines of a training folder, by step; raises like `NotebookReader.lines`."""
    return NotebookReader(folder).lines()


def last_logged_step(folder: Location) -> int:
    """Returns the last step that the notebook holds, -1 where it is empty."""
    return max((line.step for line in read_metrics(folder)), default=-1)
