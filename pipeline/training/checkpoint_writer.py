"""Writes checkpoints while training goes on: the tensors are copied between two steps, and a thread does the rest."""

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType

import torch

from components.model.checkpoint import Resumable, TrainingState, write_checkpoint
from components.model.manifest import power_average_name
from components.model.retention import checkpoint_name, prune, snapshots_folder
from components.model.spec import DenoiserSpec
from components.storage import Location
from pipeline.training.config import TrainConfig
from pipeline.training.metrics_log import Attempt, MetricsLogWriter
from pipeline.training.plan import LAST_WRITE_S

RETRY_S = 2.0


class UnwritableError(Exception):
    """Raised when the last checkpoint could not be written for a minute."""


class CheckpointWriter:
    """The checkpoints of one attempt, one at a time.

    What cannot be written, because the disk is full or the storage away, is tried again every two seconds while training goes on, until
    the next checkpoint takes its place.

    Attributes:
        newest: the last checkpoint that is whole.
    """

    def __init__(self, attempt: Attempt, metrics_log: MetricsLogWriter, spec: DenoiserSpec, config: TrainConfig, report: Callable[[str], None]) -> None:
        """Prepares the writing; the copies are made when the first checkpoint is due.

        Args:
            tell: is given what keeps a checkpoint from being written, and an empty text when that is over.
        """
        self._attempt, self._metrics_log, self._spec, self._config, self._report = attempt, metrics_log, spec, config, report
        self.newest: Location | None = None
        self._copies: dict[str, dict[str, torch.Tensor]] = {}
        self._changed = threading.Condition()
        self._waiting: tuple[Resumable, Callable[[int], None] | None] | None = None
        self._copied: torch.cuda.Event | None = None
        self._writing = self._stop = False
        self._trouble = ""
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoints", daemon=True)

    def save(self, everything: Resumable, then: Callable[[int], None] | None = None) -> float:
        """Takes a copy to be written and returns the seconds that took; waits for the checkpoint before, unless that cannot be written.

        Args:
            then: called with the step when the checkpoint is whole.

        Raises:
            SupersededError: if another attempt was seen to have taken this one's place.
        """
        started = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: not self._writing and (self._waiting is None or bool(self._trouble) or self._failure is not None))
            self._raise_failure()
            self._waiting = (self._copy(everything), then)
            self._changed.notify_all()
        return time.perf_counter() - started

    def finish(self) -> Location | None:
        """Waits until the last checkpoint is whole and returns it.

        Raises:
            UnwritableError: if it cannot be written for a minute.
            SupersededError: if another attempt was seen to have taken this one's place.
        """
        deadline = None
        with self._changed:
            while self._waiting is not None and self._failure is None:
                self._changed.wait(1.0)
                deadline = (deadline or time.monotonic() + LAST_WRITE_S) if self._trouble else None
                if deadline is not None and time.monotonic() >= deadline and not self._writing:
                    raise UnwritableError(self._trouble)
            self._raise_failure()
        return self.newest

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _copy(self, live: Resumable) -> Resumable:
        state = live.state
        copied = Resumable(
            ema=self._copy_tensors("ema", live.ema),
            state=TrainingState(self._copy_tensors("weights", state.weights), self._copy_tensors("optimizer", state.optimizer), state.record),
            more_averages={name: self._copy_tensors(name, average) for name, average in live.more_averages.items()},
        )
        if any(value.is_cuda for value in state.weights.values()):
            self._copied = torch.cuda.Event()
            self._copied.record()
        return copied

    def _copy_tensors(self, group: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies tensors into memory that is kept from checkpoint to checkpoint; from a GPU the copy is under way when this returns."""
        kept = self._copies.setdefault(group, {})
        for name, value in tensors.items():
            if name not in kept:
                kept[name] = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            kept[name].copy_(value.detach(), non_blocking=True)
        return {name: kept[name] for name in tensors}

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._stop)
                if self._stop or self._waiting is None:
                    return
                (everything, then), self._writing = self._waiting, True
            trouble, failure = "", None
            try:
                self._write(everything)
            except OSError as error:
                trouble = error.strerror or " ".join(str(error).split())[:300]
            except Exception as error:  # raised where training sees it
                failure = error
            self._note(trouble, failure)
            if trouble or failure:
                continue
            if then is not None:
                then(everything.state.record.step)

    def _note(self, trouble: str, failure: Exception | None) -> None:
        """Notes what came of a write, and after one that failed waits a while, or until another checkpoint takes its place."""
        with self._changed:
            if trouble != self._trouble:
                self._report(trouble)
            self._trouble, self._failure, self._writing = trouble, failure, False
            tried = self._waiting
            self._waiting = self._waiting if trouble else None
            self._changed.notify_all()
            if trouble:
                self._changed.wait_for(lambda: self._waiting is not tried or self._stop, RETRY_S)
            self._stop = self._stop or failure is not None

    def _write(self, everything: Resumable) -> None:
        if self._copied is not None:
            self._copied.synchronize()
        # What a restart from this checkpoint would not log again has to be written down before it.
        self._metrics_log.flush()
        self._attempt.check()
        folder, record = self._attempt.folder, everything.state.record
        path = folder / checkpoint_name(record.step, self._attempt.number)
        write_checkpoint(path, self._spec, everything.ema, everything.state, more_averages=everything.more_averages)
        self.newest = path
        self._keep_averages(everything)
        with suppress(OSError):  # the next one makes up for it
            prune(folder, self._config.keep_last, path, self._config.keep_every, () if record.best_step is None else (record.best_step,))

    def _keep_averages(self, everything: Resumable) -> None:
        """Writes the averages of `train.ema_widths` once more where they are kept for good."""
        step, every = everything.state.record.step, self._config.ema_snapshot_every
        if every is not None and step % every == 0:
            powers = {name: everything.more_averages[name] for name in map(power_average_name, self._config.ema_widths)}
            write_checkpoint(snapshots_folder(self._attempt.folder) / f"step_{step:09d}", self._spec, everything.ema, more_averages=powers)

    def __enter__(self) -> "CheckpointWriter":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._changed:
            self._stop = True
            self._changed.notify_all()
        self._thread.join()
