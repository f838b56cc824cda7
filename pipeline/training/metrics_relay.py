"""Follows a training run from the outside: the workers' metrics log become a progress bar and MLflow's curves.

Workers only write files. One process, the driver's, speaks to MLflow, and a cursor beside each metrics log says how far it came; so a server
that is slow or away costs training nothing, and a line is delivered once.
"""

import contextlib
import itertools
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

from rich.markup import escape

from cluster.config import HeadLostError
from cluster.key_value_store import KeyValueStore, StoreLostError
from cluster.metrics import RunMetrics
from components.model.manifest import MANIFEST
from components.model.retention import checkpoints, damage_of, damaged_checkpoints
from components.scratch import scratch
from components.storage import Location
from pipeline.context import StageContext
from pipeline.errors import RegistryError
from pipeline.tracking import BATCH_METRICS, Tracking
from pipeline.training.heartbeat import BEATS, LINES, Beat
from pipeline.training.metrics_log import SYSTEM_FOLDER, MetricsLine, MetricsLogReader, attempts_so_far, open_metrics
from pipeline.training.restarts import restarts_of

CURSOR_FILE = "delivered_step.txt"
LOOK_LOCAL_S, LOOK_REMOTE_S = 0.5, 5.0
DELIVER_EVERY_S = 5.0
LAST_DELIVERY_S, LEAVING_S = 60.0, 5.0
PICTURES_KEY = "samples"
_DELIVERED = ".delivered"
_LINES_LOOKED_AT = 200
"""Points of the curve among which the last measurement of each kind is looked for."""
EXPORT_EVERY_S = 5.0


def samples_folder(folder: Location) -> Location:
    """Returns where a training run puts its sample grids."""
    return folder / "samples"


def in_a_hurry(error: BaseException | None) -> bool:
    """Tells whether a block ends because somebody waits for the command to end; what is not delivered then waits for the next one."""
    return isinstance(error, KeyboardInterrupt | HeadLostError)


class MetricsRelay:
    """Reads a training folder while a block runs, and tries once to deliver what is left when it ends, for a minute at most."""

    def __init__(self, context: StageContext, tracking: Tracking, run_id: str, steps: int) -> None:
        self._context, self._steps = context, steps
        self._reader, self._store = open_metrics(context.folder), KeyValueStore(str(context.folder))
        self._before = attempts_so_far(context.folder)
        self._delivery = Delivery(context.folder, tracking, run_id)
        self._metrics = RunMetrics(context.run_name)
        self._damaged = set(damaged_checkpoints(context.folder))
        self._ended, self._late = threading.Event(), threading.Event()
        self._told: set[str] = set()
        self._complete = False
        self._showing = threading.Thread(target=self._show, name="progress", daemon=True)
        self._delivering = threading.Thread(target=self._deliver, name="delivery", daemon=True)

    def __enter__(self) -> "MetricsRelay":
        self._showing.start()
        self._delivering.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._showing.join()
        self._report_damaged()
        self._report_lines()
        with self._context.reporter.part("delivering metrics to MLflow"):
            self._delivering.join(LEAVING_S if in_a_hurry(error) else LAST_DELIVERY_S)
        self._late.set()
        if not self._complete:
            self._context.reporter.line(f"  [yellow]warning[/] MLflow does not have all metrics yet; the rest is kept in {self._context.folder}")

    def _show(self) -> None:
        done, attempt, exported = self._last_step(), self._before, 0.0
        with self._context.reporter.progress("train", self._steps, "steps", done, start="starting the workers") as advance:
            while not self._ended.wait(LOOK_LOCAL_S if self._context.folder.is_local else LOOK_REMOTE_S):
                self._report_damaged()
                self._report_lines()
                beat = self._beat()
                if beat is not None and beat.attempt > attempt:
                    attempt = beat.attempt
                    advance.restart()
                if beat is not None and not advance.has_begun:
                    advance.call("compiling" if beat.phase == "compiling" else "starting")
                now = max(self._last_step(), 0 if beat is None else beat.step)
                advance(max(0, now - done))
                done = max(done, now)
                if time.monotonic() - exported >= EXPORT_EVERY_S:
                    exported = time.monotonic()
                    self._export(done)

    def _export(self, step: int) -> None:
        """Tells Prometheus how far the training is."""
        with contextlib.suppress(OSError):
            lines, newest = self._reader.lines(), next(iter(checkpoints(self._context.folder)), None)
            found = {name: value for line in lines[-_LINES_LOOKED_AT:] for name, value in line.metrics.items()}
            self._metrics.set("ddpm_training_step", step)
            self._metrics.set("ddpm_training_steps", self._steps)
            self._metrics.set("ddpm_training_loss", found.get("train/loss"))
            self._metrics.set("ddpm_validation_loss", found.get("validation/loss"))
            self._metrics.set("ddpm_images_per_second", found.get("perf/images_per_second"))
            self._metrics.set("ddpm_restarts", len(restarts_of(self._context.folder)))
            if newest is not None and (written := (newest / MANIFEST).modified()):
                self._metrics.set("ddpm_checkpoint_timestamp_seconds", written)

    def _report_damaged(self) -> None:
        """Says which checkpoints workers have set aside since the last look."""
        with contextlib.suppress(OSError):
            for path in damaged_checkpoints(self._context.folder):
                if path not in self._damaged:
                    self._damaged.add(path)
                    reason = escape(damage_of(path))
                    self._context.reporter.line(f"  [yellow]warning[/] a damaged checkpoint was renamed to {path.name}, the one before it is used: {reason}")

    def _report_lines(self) -> None:
        """Says what the first worker has to say."""
        with contextlib.suppress(StoreLostError):
            for key, line in sorted(self._store.below(LINES).items()):
                if key not in self._told:
                    self._told.add(key)
                    self._context.reporter.line(f"  {escape(line)}")

    def _beat(self) -> Beat | None:
        """Returns the last beat of the first worker, of the newest start of this command's workers."""
        with contextlib.suppress(StoreLostError, ValueError):
            beats = [Beat.model_validate_json(note) for note in self._store.below(BEATS).values()]
            return max((beat for beat in beats if beat.rank == 0 and beat.attempt > self._before), key=lambda beat: beat.attempt, default=None)
        return None

    def _last_step(self) -> int:
        with contextlib.suppress(OSError):
            lines = self._reader.lines()
            return lines[-1].step if lines else 0
        return 0

    def _deliver(self) -> None:
        """Delivers now and then, and once more when the block has ended."""
        ended = False
        while not ended:
            ended = self._ended.wait(DELIVER_EVERY_S)
            with contextlib.suppress(RegistryError, OSError):
                self._complete = self._delivery.deliver(lambda: not self._late.is_set()) and ended


class Delivery:
    """Sends what a training folder holds to an MLflow run, each thing once."""

    def __init__(self, folder: Location, tracking: Tracking, run_id: str) -> None:
        self._folder, self._tracking, self._run_id = folder, tracking, run_id
        self._channels = {"": _Channel(open_metrics(folder), folder / CURSOR_FILE)}
        self._told_restarts = 0

    def deliver(self, keep_going: Callable[[], bool] = lambda: True) -> bool:
        """Sends the lines and sample grids that the run has not got yet, and returns whether it has all now.

        Args:
            keep_going: asked before every request whether there is time for it.

        Raises:
            RegistryError: if the store cannot be reached; the next call goes on from there.
            OSError: if the training folder cannot be reached; likewise.
        """
        system = self._folder / SYSTEM_FOLDER
        for node in system.folders():
            if node not in self._channels:
                self._channels[node] = _Channel(MetricsLogReader(system / node), system / node / CURSOR_FILE)
        for channel in self._channels.values():
            for batch in channel.fresh():
                if not keep_going():
                    return False
                self._tracking.log_metrics(self._run_id, [(line.timestamp_ms, line.step, line.metrics) for line in batch])
                channel.note(batch[-1].step)
        self._send_restarts()
        return self._send_pictures(keep_going)

    def _send_restarts(self) -> None:
        """Tags the run with the starts of its workers after the first: when, from which step, and why."""
        restarts = restarts_of(self._folder)
        if len(restarts) > self._told_restarts:
            self._tracking.tag_run(self._run_id, {f"restart.{restart.attempt:04d}": str(restart) for restart in restarts})
            self._told_restarts = len(restarts)

    def _send_pictures(self, keep_going: Callable[[], bool]) -> bool:
        folder = samples_folder(self._folder)
        names = folder.files()
        for name in names:
            if name.endswith(".png") and name + _DELIVERED not in names:
                if not keep_going():
                    return False
                self._send_picture(folder / name)
        return True

    def _send_picture(self, picture: Location) -> None:
        step = int(picture.name.removesuffix(".png").removeprefix("step_"))
        if not self._tracking.has_picture(self._run_id, key=PICTURES_KEY, step=step):
            with scratch("picture") as folder:
                copy = folder / picture.name
                picture.download(copy)
                self._tracking.log_picture(self._run_id, copy, key=PICTURES_KEY, step=step)
        (picture.parent / (picture.name + _DELIVERED)).write_text("")


class _Channel:
    """A metrics log, and how far a run has it."""

    def __init__(self, reader: MetricsLogReader, cursor: Location) -> None:
        self._reader, self._cursor = reader, cursor
        self._delivered: int | None = None

    def fresh(self) -> Iterator[Sequence[MetricsLine]]:
        """Yields the lines that the run has not got, as many at a time as one request takes."""
        lines = self._reader.lines()
        first = bisect_right(lines, self._last(), key=lambda line: line.step)
        while first < len(lines):
            sums = itertools.accumulate(len(line.metrics) for line in lines[first : first + BATCH_METRICS])
            count = max(1, sum(metrics <= BATCH_METRICS for metrics in sums))
            yield lines[first : first + count]
            first += count

    def _last(self) -> int:
        if self._delivered is None:
            try:
                self._delivered = int(self._cursor.read_text())
            except FileNotFoundError:
                self._delivered = -1
        return self._delivered

    def note(self, step: int) -> None:
        """Notes that the run has the lines up to a step."""
        self._delivered = step
        self._cursor.write_text(f"{step}\n")


def forget_deliveries(folder: Location) -> None:
    """Makes the next delivery send everything, because the run is a new one."""
    system = folder / SYSTEM_FOLDER
    for metrics_log in (folder, *(system / node for node in system.folders())):
        (metrics_log / CURSOR_FILE).remove()
    for name in samples_folder(folder).files():
        if name.endswith(_DELIVERED):
            (samples_folder(folder) / name).remove()
