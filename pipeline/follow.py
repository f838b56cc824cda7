"""Follows a training run from the outside: the workers' notebook becomes a progress bar and MLflow's curves.

Workers only write files. One process, the driver's, speaks to MLflow, and a cursor in the folder says how far it came; so an unreachable
server costs training nothing, and a line is delivered once.
"""

import contextlib
import tempfile
import threading
from pathlib import Path
from types import TracebackType

from components.storage import Location
from pipeline.context import StageContext
from pipeline.errors import RegistryError
from pipeline.notebook import MetricsLine, NotebookReader
from pipeline.tracking import Tracking

CURSOR_FILE = "delivered_step.txt"
POLL_LOCAL_S, POLL_REMOTE_S = 0.5, 5.0
_DELIVERED = ".delivered"


def samples_folder(folder: Location) -> Location:
    """Returns where a training run puts its sample grids."""
    return folder / "samples"


class Follower:
    """Reads a training folder in a thread while a block runs, and delivers all that is left when it ends."""

    def __init__(self, context: StageContext, tracking: Tracking, run_id: str, steps: int) -> None:
        self._context, self._steps = context, steps
        self._reader = NotebookReader(context.folder)
        self._delivery = Delivery(context.folder, tracking, run_id)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="follow", daemon=True)

    def __enter__(self) -> "Follower":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        try:
            self._delivery.deliver(self._reader.lines())
        except (RegistryError, OSError):
            if error is None:
                raise

    def _follow(self) -> None:
        done = _last_step(self._look())
        with self._context.reporter.progress("train", self._steps, "steps", done) as advance:
            while not self._stop.wait(POLL_LOCAL_S if self._context.folder.is_local else POLL_REMOTE_S):
                lines = self._look()
                now = _last_step(lines)
                advance(max(0, now - done))
                done = max(done, now)
                with contextlib.suppress(RegistryError, OSError):
                    self._delivery.deliver(lines)

    def _look(self) -> list[MetricsLine]:
        try:
            return self._reader.lines()
        except OSError:
            return []


def _last_step(lines: list[MetricsLine]) -> int:
    return lines[-1].step if lines else 0


class Delivery:
    """Sends what a training folder holds to an MLflow run, each thing once."""

    def __init__(self, folder: Location, tracking: Tracking, run_id: str) -> None:
        self._folder, self._tracking, self._run_id = folder, tracking, run_id
        self._delivered: int | None = None

    def deliver(self, lines: list[MetricsLine]) -> None:
        """Sends the lines and sample grids that the run has not got yet.

        Raises:
            RegistryError: if the store cannot be reached; the next call goes on from there.
        """
        delivered = self._cursor()
        fresh = [line for line in lines if line.step > delivered]
        if fresh:
            self._tracking.log_metrics(self._run_id, [(line.timestamp_ms, line.step, line.metrics) for line in fresh])
            self._delivered = fresh[-1].step
            (self._folder / CURSOR_FILE).write_text(f"{self._delivered}\n")
        names = samples_folder(self._folder).files()
        for name in names:
            if name.endswith(".png") and name + _DELIVERED not in names:
                self._send_picture(samples_folder(self._folder) / name)

    def _cursor(self) -> int:
        if self._delivered is None:
            try:
                self._delivered = int((self._folder / CURSOR_FILE).read_text())
            except FileNotFoundError:
                self._delivered = -1
        return self._delivered

    def _send_picture(self, picture: Location) -> None:
        step = int(picture.name.removesuffix(".png").removeprefix("step_"))
        with tempfile.TemporaryDirectory(prefix="ddpm-picture-") as folder:
            copy = Path(folder) / picture.name
            picture.download(copy)
            self._tracking.log_picture(self._run_id, copy, key="samples", step=step)
        (picture.parent / (picture.name + _DELIVERED)).write_text("")


def forget_deliveries(folder: Location) -> None:
    """Makes the next delivery send everything, because the run is a new one."""
    (folder / CURSOR_FILE).remove()
    for name in samples_folder(folder).files():
        if name.endswith(_DELIVERED):
            (samples_folder(folder) / name).remove()
