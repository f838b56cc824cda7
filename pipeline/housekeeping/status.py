"""What goes on below a storage root: every run's stage, step, speed, last checkpoint and last restart, from what the run itself wrote down."""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from components.storage import Location
from pipeline.artifacts import STAGES
from pipeline.housekeeping.records import RECEIPT, Records, RunRecords, Training
from pipeline.training.metrics_log import MetricsLine, open_metrics
from pipeline.training.restarts import restarts_of

_RECENT = 4


@dataclass(frozen=True)
class RunStatus:
    """What a run is at.

    Attributes:
        busy: whether a process works on it.
        stage: the one that it is at, or that is not done; `done` where all are.
        steps: at which its training ends.
        steps_per_second: over the last points of its loss curve; None where there are too few of them.
        seconds_left: of the training at that speed.
        checkpoint_age: seconds since its last checkpoint.
        restart: the last start of its workers after the first, in words.
    """

    name: str
    busy: bool
    stage: str
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    steps_per_second: float | None = None
    images_per_second: float | None = None
    seconds_left: float | None = None
    checkpoint_age: float | None = None
    restart: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns what a script needs."""
        return asdict(self)


def statuses(storage: Location, now: float | None = None) -> list[RunStatus]:
    """Returns what every run below a storage root is at, those that a process works on first.

    Raises:
        OSError: if it cannot be looked through.
    """
    at = time.time() if now is None else now
    found = [status_of(run, at) for run in Records.of(storage).runs]
    return sorted(found, key=lambda status: (not status.busy, status.name))


def status_of(run: RunRecords, now: float) -> RunStatus:
    """Returns what a run is at.

    Args:
        now: seconds since 1970.
    """
    training, lines = max(((training, _lines(training)) for training in run.trainings), key=_last_touched, default=(None, []))
    stage = _stage(run, training)
    if training is None:
        return RunStatus(run.name, run.busy, stage)
    steps = run.settings.get("train", {}).get("steps")
    ended = training.receipt is not None
    speed = None if ended or not run.busy else _speed(lines)
    last = lines[-1] if lines else None
    restarts = restarts_of(training.folder)
    return RunStatus(
        name=run.name,
        busy=run.busy,
        stage=stage,
        step=training.receipt.steps if training.receipt else last.step if last else None,
        steps=steps,
        loss=_newest(lines, "train/loss"),
        steps_per_second=speed,
        images_per_second=_newest(lines, "perf/images_per_second"),
        seconds_left=(steps - last.step) / speed if speed and steps and last else None,
        checkpoint_age=now - training.written if training.written else None,
        restart=str(restarts[-1]) if restarts else None,
    )


def _lines(training: Training) -> Sequence[MetricsLine]:
    with suppress(OSError, ValueError):
        return open_metrics(training.folder).lines()
    return []


def _last_touched(of: tuple[Training, Sequence[MetricsLine]]) -> float:
    training, lines = of
    return max(training.written, lines[-1].timestamp_ms / 1000 if lines else 0.0)


def _stage(run: RunRecords, training: Training | None) -> str:
    """Returns the first stage without a receipt behind the newest one that has one."""
    done = [stage for stage in STAGES if any((run.folder / stage / name / RECEIPT).is_file() for name in (run.folder / stage).folders())]
    if training is not None and training.receipt is None:
        return "train"
    encodes = bool((run.settings.get("data") or {}).get("autoencoder"))
    # A run whose dataset was given to it, such as an attempt at retraining, has no receipt of the first stages.
    first = max((STAGES.index(stage) + 1 for stage in done), default=0)
    return next((stage for stage in STAGES[first:] if stage != "encode" or encodes), "done")


def _speed(lines: Sequence[MetricsLine]) -> float | None:
    recent = lines[-_RECENT:]
    if len(recent) < 2:
        return None
    seconds = (recent[-1].timestamp_ms - recent[0].timestamp_ms) / 1000
    return (recent[-1].step - recent[0].step) / seconds if seconds > 0 else None


def _newest(lines: Sequence[MetricsLine], metric: str) -> float | None:
    return next((line.metrics[metric] for line in reversed(lines) if metric in line.metrics), None)
