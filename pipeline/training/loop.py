"""What every training worker runs: rows and noise by step, forward, backward, EMA, checkpoint."""

import contextlib
import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from cluster.key_value_store import KeyValueStore
from cluster.machine import cpu_model, peak_memory
from components.counts import counted
from components.data.batches import Batch, BatchPlan, on_device
from components.data.reader import RowReader
from components.data.shard_cache import ShardCache
from components.data.shards import Manifest, read_manifest
from components.errors import DataError
from components.figures import grid
from components.model.checkpoint import TrainingRecord
from components.model.manifest import is_complete, manifest_of
from components.model.retention import checkpoint_step, checkpoints, newest_whole_checkpoint
from components.storage import Location
from pipeline.training.arithmetic import compilations, prepare, threads_that_pay
from pipeline.training.checkpoint_writer import CheckpointWriter, UnwritableError
from pipeline.training.desync import DesyncError, compare_ranks
from pipeline.training.heartbeat import SAVED, TROUBLE, Heartbeat
from pipeline.training.metrics_log import Attempt, MetricsLine, MetricsLogWriter, SupersededError, Ticket
from pipeline.training.metrics_relay import samples_folder
from pipeline.training.plan import TrainFailure, TrainOutcome, TrainPlan
from pipeline.training.restarts import record_restart
from pipeline.training.system_watch import SystemMetricsMonitor
from pipeline.training.trainer import Trainer, make_batch_plan, make_trainer, sample_tiles
from pipeline.training.validation import Validation, deciding

GRID_COLUMNS = 8


class MetricsWindow:
    """Averages over the steps since the last point of the curve; every worker has the same.

    Each step's loss is added up over the workers while the next step goes on, so that a checkpoint between two points can hold them.
    """

    def __init__(self, num_workers: int) -> None:
        """Starts with no step."""
        self._num_workers = num_workers
        self._sums: list[torch.distributed.Work] = []
        self.reset()

    def reset(self) -> None:
        """Starts a new window of steps."""
        self._settle()
        self._losses: list[torch.Tensor] = []
        self._norms: list[torch.Tensor] = []
        self._steps, self._waited, self._stood_still, self._started = 0, 0.0, 0.0, time.perf_counter()

    def resume(self, record: TrainingRecord, device: torch.device) -> None:
        """Takes over the steps that a checkpoint held."""
        self._losses = [torch.tensor(loss, device=device) for loss in record.open_losses]
        self._norms = [torch.tensor(norm, device=device) for norm in record.open_norms]

    def add(self, loss: torch.Tensor, norm: torch.Tensor, waited: float) -> None:
        """Notes one step: this worker's loss, the gradient's norm, and the seconds spent waiting for data."""
        if self._num_workers > 1:
            loss = loss / self._num_workers
            self._sums.append(torch.distributed.all_reduce(loss, async_op=True))
        self._losses.append(loss)
        self._norms.append(norm)
        self._steps, self._waited = self._steps + 1, self._waited + waited

    def add_checkpoint_wait(self, seconds: float) -> None:
        """Notes time that training waited for a checkpoint."""
        self._stood_still += seconds

    def exclude(self, seconds: float) -> None:
        """Leaves time out that went into something else than training."""
        self._started += seconds

    def open(self) -> tuple[list[float], list[float]]:
        """Returns losses and norms so far, for a checkpoint."""
        self._settle()
        return ([float(loss) for loss in self._losses], [float(norm) for norm in self._norms])

    def _settle(self) -> None:
        for total in self._sums:
            total.wait()
        self._sums = []

    def line(self, trainer: Trainer) -> MetricsLine:
        """Returns what the metrics log says of the window; values that are not finite are left out."""
        self._settle()
        seconds = time.perf_counter() - self._started
        metrics = {
            "train/loss": float(torch.stack(self._losses).mean()),
            "train/gradient_norm": float(torch.stack(self._norms).mean()),
            "train/learning_rate": trainer.learning_rate(),
            "train/nonfinite_steps": float(trainer.nonfinite_steps),
            "perf/images_per_second": self._steps * trainer.config.global_batch_size / seconds,
            "perf/data_wait_fraction": self._waited / seconds,
            "perf/checkpoint_wait_fraction": self._stood_still / seconds,
        }
        if trainer.spike_steps is not None:
            metrics["train/spike_steps"] = float(trainer.spike_steps)
        finite = {key: value for key, value in metrics.items() if math.isfinite(value)}
        return MetricsLine(step=trainer.step, timestamp_ms=time.time_ns() // 1_000_000, metrics=finite)


def train_loop(config: dict[str, Any]) -> str:
    """Runs on every worker under Ray Train; the first one's return value is the stage's outcome, as JSON."""
    import ray.train
    from ray.train.torch import get_device, prepare_model

    plan = TrainPlan.model_validate_json(config["plan"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(plan.threads)
    prepare(deterministic=plan.train.deterministic)
    device, folder, dataset = get_device(), Location.of(plan.folder), Location.of(plan.dataset)
    manifest = read_manifest(dataset)
    attempt, resumed = _agree_on_start(folder, rank, device)
    try:
        trainer = make_trainer(plan, manifest, device, resumed)
    except DataError as error:
        return TrainFailure(failure=str(error)).model_dump_json()
    store = KeyValueStore(plan.folder)
    if rank == 0:
        record_restart(folder, store, attempt.number, trainer.step, world)
    if world > 1:
        trainer.stepper.network = prepare_model(trainer.network, parallel_strategy_kwargs={"broadcast_buffers": False, "gradient_as_bucket_view": True})
    batch_plan = make_batch_plan(plan, manifest)
    reader = RowReader(dataset, manifest, copies=ShardCache.of(plan.cache, plan.cache_bytes))
    node = {"node_id": ray.get_runtime_context().get_node_id(), "node": platform.node()}
    try:
        with Heartbeat(store, attempt.number, rank, world, **node, first=trainer.step) as heartbeat, _watch(attempt, context) as watch:
            worker = Worker(trainer, batch_plan, reader, heartbeat, watch, rank, world, plan.threads_asked_for)
            if plan.train.validate_every:
                held_out = RowReader(dataset, manifest, "holdout", copies=ShardCache.of(plan.cache, plan.cache_bytes))
                worker.validation = Validation(trainer, held_out, manifest, rank, world)
            newest = (worker.lead(attempt) if rank == 0 else worker.follow()) or resumed
    except torch.OutOfMemoryError as error:
        return TrainFailure(failure=_no_room(plan, manifest, device, error)).model_dump_json()
    except (DesyncError, FloatingPointError, SupersededError) as error:
        return TrainFailure(failure=str(error)).model_dump_json()
    return "" if newest is None or rank else _outcome(trainer, _to_hand_on(trainer, newest), world, device).model_dump_json()


def _to_hand_on(trainer: Trainer, newest: Location) -> Location:
    """Returns the last checkpoint, or where held-out rows ended the training, the best of those that are there by what they said."""
    if not trainer.has_stopped:
        return newest
    values = dict(trainer.validations)
    kept = [path for path in checkpoints(newest.parent) if checkpoint_step(path) in values and is_complete(path)]
    return min(kept, key=lambda path: values[checkpoint_step(path)], default=newest)


def _no_room(plan: TrainPlan, manifest: Manifest, device: torch.device, error: Exception) -> str:
    right = ["train.micro_batch_size=auto"] if plan.train.micro_batch_size != "auto" else ["more train.lanes, so that a lane has fewer images"]
    right += [] if getattr(plan.model, "checkpointing", True) else ["model.checkpointing=true"]
    detail = f"train.micro_batch_size={plan.train.micro_batch_size} needs more memory than {_name_of(device)} has for {manifest.space.description}"
    return f"{detail} ({' '.join(str(error).split())[:200]}); use {' or '.join(right)}"


def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()


def _outcome(trainer: Trainer, checkpoint: Location, world: int, device: torch.device) -> TrainOutcome:
    return TrainOutcome(
        checkpoint=str(checkpoint),
        weights_sha256=manifest_of(checkpoint)["ema.safetensors"][1],
        parameters=sum(parameter.numel() for parameter in trainer.network.parameters()),
        steps=checkpoint_step(checkpoint),
        stopped_at=trainer.step if trainer.has_stopped else None,
        precision=trainer.arithmetic.precision,
        layout=trainer.arithmetic.layout,
        compiled=trainer.arithmetic.compiled,
        num_workers=world,
        device=_name_of(device),
        host_bytes=peak_memory(),
        gpu_bytes=torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None,
    )


def _agree_on_start(folder: Location, rank: int, device: torch.device) -> tuple[Attempt, Location | None]:
    """The first worker takes the right to write and finds the newest whole checkpoint; all use these."""
    attempt = found = None
    if rank == 0:
        attempt, found = Attempt(folder), newest_whole_checkpoint(folder)
    detail = ["" if attempt is None else attempt.ticket.model_dump_json(), found.name if found else ""]
    torch.distributed.broadcast_object_list(detail, device=device)
    ticket, name = detail
    return attempt or Attempt(folder, Ticket.model_validate_json(ticket)), folder / name if name else None


def _watch(attempt: Attempt, context: Any) -> contextlib.AbstractContextManager[SystemMetricsMonitor | None]:
    """Returns the watch of this worker's node, if it is the node's first worker."""
    if context.get_local_rank() != 0:
        return contextlib.nullcontext()
    return SystemMetricsMonitor(attempt, context.get_node_rank(), alone=context.get_local_world_size() == context.get_world_size())


@dataclass
class Worker:
    """One worker at its steps.

    Attributes:
        threads_asked_for: whether somebody said how many threads a worker has.
        pictures: sample grids that are still to be written, by step.
        validation: measures held-out rows; None where nobody asked for it.
        validated: what the last step's measurement said; nothing where there was none.
    """

    trainer: Trainer
    plan: BatchPlan
    reader: RowReader
    heartbeat: Heartbeat
    watch: SystemMetricsMonitor | None
    rank: int
    world: int
    threads_asked_for: bool = False
    pictures: dict[int, np.ndarray] = field(default_factory=dict)
    validation: Validation | None = None
    validated: dict[str, float] = field(default_factory=dict)

    def follow(self) -> None:
        """Trains to the end; only the first worker writes."""
        for window in self._steps():
            if self._is_point():
                window.reset()

    def lead(self, attempt: Attempt) -> Location | None:
        """Trains to the end, writes the curve, the pictures and the checkpoints, and returns the last checkpoint; None where all was done before.

        Raises:
            SupersededError: if another attempt took this one's place.
        """
        if self.trainer.step == 0:
            self._draw(attempt)
        with MetricsLogWriter(attempt) as metrics_log, self._checkpoints(attempt, metrics_log) as checkpoints:
            self._lead(attempt, metrics_log, checkpoints)
            self.heartbeat.phase = "ending"
            try:
                newest = checkpoints.finish()
                self._write_pictures(attempt)
                return newest
            except UnwritableError as error:
                right = "make room or mend it, and run the same command again to resume from the last checkpoint"
                self.heartbeat.give_up(f"cluster.storage: {attempt.folder} cannot be written ({error}); {right}")
                raise

    def _lead(self, attempt: Attempt, metrics_log: MetricsLogWriter, checkpoints: CheckpointWriter) -> None:
        trainer, saved = self.trainer, ""
        for window in self._steps():
            if self._is_point():
                line = window.line(trainer)
                metrics_log.append(line.model_copy(update={"metrics": line.metrics | self.validated}))
                window.reset()
            if trainer.step % trainer.config.sample_every == 0:
                window.exclude(self._draw(attempt))
            wanted = self.heartbeat.wanted
            if self._is_checkpoint() or wanted != saved:
                self.heartbeat.phase = "saving"
                window.add_checkpoint_wait(checkpoints.save(trainer.everything(*window.open()), self._answer(wanted)))
                saved = wanted

    def _checkpoints(self, attempt: Attempt, metrics_log: MetricsLogWriter) -> CheckpointWriter:
        return CheckpointWriter(attempt, metrics_log, self.trainer.spec, self.trainer.config, lambda trouble: self.heartbeat.say(TROUBLE, trouble))

    def _answer(self, wanted: str) -> Callable[[int], None] | None:
        """Returns what tells the driver that the checkpoint it asked for is whole."""
        return (lambda step: self.heartbeat.say(SAVED, f"{wanted} {step}")) if wanted else None

    def _steps(self) -> Iterator[MetricsWindow]:
        """Takes one step after the other, and gives the steps since the last point of the curve after each."""
        trainer, lanes, window = self.trainer, self.plan.lanes_of(self.rank, self.world), MetricsWindow(self.world)
        trainer.stepper.share = len(lanes) * self.world / self.plan.order.lanes
        if trainer.resumed is not None:
            window.resume(trainer.resumed, trainer.device)
        self.heartbeat.phase = "waiting for data"
        if trainer.step >= trainer.config.steps or trainer.has_stopped:
            return
        self._begin(lanes)
        batches = self.plan.batches(self.reader, range(trainer.step, trainer.config.steps), lanes)
        for batch, waited in _timed(on_device(batches, trainer.device)):
            self.heartbeat.phase = "computing"
            loss, norm = trainer.update(batch)
            window.add(loss, norm, waited)
            self.heartbeat.step = trainer.step
            if self.world > 1 and trainer.config.compare_ranks_every and trainer.step % trainer.config.compare_ranks_every == 0:
                compare_ranks(trainer.network, trainer.step)
            window.exclude(self._validate())
            if self.watch and self._is_point():
                self.watch.look(trainer.step)
            yield window
            if trainer.has_stopped:
                break
            self.heartbeat.phase = "waiting for data"
        self.heartbeat.phase = "ending"

    def _validate(self) -> float:
        """Measures held-out rows where it is time to, and returns how long that took."""
        self.validated, every = {}, self.trainer.config.validate_every
        if self.validation is None or self.trainer.step % every:
            return 0.0
        started, self.heartbeat.phase = time.perf_counter(), "validating"
        metrics = self.validation.measure()
        self.trainer.validations.append((self.trainer.step, deciding(self.trainer.config, metrics)))
        self.validated = {key: value for key, value in metrics.items() if math.isfinite(value)}
        if self.trainer.has_stopped and self.rank == 0:
            best, value = min(self.trainer.validations, key=lambda validation: validation[1])
            on = f"held-out {self.trainer.config.early_stop_on}"
            counts = counted(self.trainer.config.early_stop, "measurement")
            self.heartbeat.report(f"stopped early at step {self.trainer.step}: {counts} without a gain; {on} was lowest, {value:.4g}, at step {best}")
        return time.perf_counter() - started

    def _begin(self, lanes: range) -> None:
        """Decides on micro-batches, warms up what has to be, and says how it is computed."""
        trainer, order = self.trainer, self.plan.order
        first = self.plan.batch(self.reader, trainer.step, lanes).map(lambda tensor: tensor.to(trainer.device))
        trainer.stepper.cut(trainer.config.micro_batch_size, first, order.rows_per_lane)
        if trainer.device.type == "cpu" and not self.threads_asked_for:
            torch.set_num_threads(threads_that_pay(torch.get_num_threads(), trainer.pass_flops(trainer.stepper.part or len(first.data))))
        if self.rank == 0:
            images, part = counted(len(first.data), trainer.spec.space.noun), trainer.stepper.part
            passes = f"{images} of a worker in passes of {part}" if part else f"{images} of a worker in one pass"
            threads = f", {counted(torch.get_num_threads(), 'thread')}" if trainer.device.type == "cpu" else ""
            self.heartbeat.report(f"{_name_of(trainer.device)}{threads}: {trainer.arithmetic}, {passes}")
            if trainer.config.freeze:
                counts = [sum(each.numel() for each in trainer.network.parameters() if each.requires_grad is trained) for trained in (True, False)]
                self.heartbeat.report(f"{counts[0]:,} parameters are trained, {counts[1]:,} are frozen (train.freeze)")
        with self._compiling() if trainer.arithmetic.compiled else contextlib.nullcontext():
            if self.world > 1 or trainer.arithmetic.compiled:
                trainer.warm_up(first)

    @contextlib.contextmanager
    def _compiling(self) -> Iterator[None]:
        """Says how long a pass takes that compiles."""
        started, self.heartbeat.phase = time.perf_counter(), "compiling"
        yield
        if self.trainer.device.type == "cuda":
            torch.cuda.synchronize()
        self.heartbeat.phase = "waiting for data"
        if self.rank == 0:
            self.heartbeat.report(f"compiled the step in {time.perf_counter() - started:.0f} s; kept in {compilations()} for the next start")

    def _is_checkpoint(self) -> bool:
        step, config = self.trainer.step, self.trainer.config
        ends = step == config.steps or (bool(self.validated) and (self._is_best() or self.trainer.has_stopped))
        return ends or step % config.checkpoint_every == 0 or (config.ema_snapshot_every is not None and step % config.ema_snapshot_every == 0)

    def _is_best(self) -> bool:
        """Tells whether the last measurement is lower than all before."""
        *before, (_, last) = self.trainer.validations
        return all(last < value for _, value in before)

    def _is_point(self) -> bool:
        """Tells whether the curve has a point at this step."""
        return self.trainer.step % self.trainer.config.log_every == 0 or bool(self.validated) or self._is_checkpoint()

    def _draw(self, attempt: Attempt) -> float:
        """Draws the sample grid and returns how long that took; one that cannot be written now is written with the next."""
        started = time.perf_counter()
        self.heartbeat.phase = "drawing samples"
        self.pictures[self.trainer.step] = sample_tiles(self.trainer)
        with contextlib.suppress(OSError):
            self._write_pictures(attempt)
        return time.perf_counter() - started

    def _write_pictures(self, attempt: Attempt) -> None:
        for step in sorted(self.pictures):
            with (samples_folder(attempt.folder) / f"step_{step:09d}.png").staged() as staging:
                grid(self.pictures[step], GRID_COLUMNS).save(staging, format="PNG")
            del self.pictures[step]


def _timed(batches: Iterator[Batch]) -> Iterator[tuple[Batch, float]]:
    """Yields each batch with the seconds it was waited for."""
    with contextlib.closing(batches):  # type: ignore[type-var]
        started = time.perf_counter()
        for batch in batches:
            yield batch, time.perf_counter() - started
            started = time.perf_counter()
