"""Follows a training run from the outside: the workers' notebook becomes a progress bar and MLflow's curves.

Workers only append to files. One process, the driver's, speaks to MLflow, and a cursor on disk says how far it came; so an unreachable
server costs training nothing, and a line is delivered once.
"""

import contextlib
import threading
from pathlib import Path
from types import TracebackType

from pydantic import BaseModel, ConfigDict, ValidationError

from components.data.shards import write_text
from pipeline.context import StageContext
from pipeline.errors import RegistryError
from pipeline.tracking import Tracking

METRICS_FILE = "metrics.jsonl"
CURSOR_FILE = "delivered.txt"
POLL_SECONDS = 0.5


class MetricsLine(BaseModel):
    """One line of the notebook."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    timestamp_ms: int
    metrics: dict[str, float]


def samples_folder(folder: Path) -> Path:
    """Returns where a training run puts its sample grids."""
    return folder / "samples"


def read_metrics(folder: Path, offset: int = 0) -> list[MetricsLine]:
    """Returns the whole lines of the notebook from a byte offset on; a line cut off by a kill does not count."""
    return _read_from(folder, offset)[0]


def _read_from(folder: Path, offset: int) -> tuple[list[MetricsLine], int]:
    path = folder / METRICS_FILE
    if not path.is_file():
        return [], offset
    with path.open("rb") as file:
        file.seek(offset)
        text = file.read()
    whole = text[: text.rfind(b"\n") + 1]
    lines = []
    for line in whole.splitlines():
        with contextlib.suppress(ValidationError):
            lines.append(MetricsLine.model_validate_json(line))
    return lines, offset + len(whole)


def last_logged_step(folder: Path) -> int:
    """Returns the last step that the notebook holds, -1 where it is empty. A cut-off last line is ended first."""
    path = folder / METRICS_FILE
    if path.is_file() and not path.read_bytes().endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")
    lines = read_metrics(folder)
    return lines[-1].step if lines else -1


class Follower:
    """Reads a training folder in a thread while a block runs, and delivers all that is left when it ends."""

    def __init__(self, context: StageContext, tracking: Tracking, run_id: str, steps: int) -> None:
        self._context, self._tracking, self._run_id, self._steps = context, tracking, run_id, steps
        self._folder = context.folder
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="follow", daemon=True)

    def __enter__(self) -> "Follower":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        try:
            self._deliver()
        except RegistryError:
            if error is None:
                raise

    def _follow(self) -> None:
        lines, offset = _read_from(self._folder, 0)
        done = lines[-1].step if lines else 0
        with self._context.reporter.progress("train", self._steps, "steps", done) as advance:
            while not self._stop.wait(POLL_SECONDS):
                lines, offset = _read_from(self._folder, offset)
                if lines:
                    advance(lines[-1].step - done)
                    done = lines[-1].step
                with contextlib.suppress(RegistryError):
                    self._deliver()

    def _deliver(self) -> None:
        deliver(self._folder, self._tracking, self._run_id)


def deliver(folder: Path, tracking: Tracking, run_id: str) -> None:
    """Sends what a training folder holds and the run has not got yet: lines of the notebook, sample grids.

    Raises:
        RegistryError: if the store cannot be reached; the next call goes on from there.
    """
    delivered = folder / CURSOR_FILE
    offset = int(delivered.read_text()) if delivered.is_file() else 0
    lines, end = _read_from(folder, offset)
    if lines:
        tracking.log_metrics(run_id, [(line.timestamp_ms, line.step, line.metrics) for line in lines])
        write_text(delivered, str(end))
    for picture in sorted(samples_folder(folder).glob("step_*.png")):
        marker = picture.with_suffix(".delivered")
        if not marker.exists():
            tracking.log_picture(run_id, picture, key="samples", step=int(picture.stem.removeprefix("step_")))
            marker.touch()


def forget_deliveries(folder: Path) -> None:
    """Makes the next `deliver` send everything, because the run is a new one."""
    for mark in [folder / CURSOR_FILE, *samples_folder(folder).glob("*.delivered")]:
        mark.unlink(missing_ok=True)
