"""What every training worker runs: rows and noise by step, forward, backward, EMA, checkpoint."""

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import torch

from cluster.machine import cpu_model
from components.data.batches import Batch, BatchPlan
from components.data.copies import Copies
from components.data.reader import RowReader
from components.data.shards import read_manifest
from components.figures import grid
from components.model.checkpoint import checkpoint_name, manifest_of, newest_whole_checkpoint, prune
from components.storage import Location
from pipeline.train import TrainFailure, TrainOutcome, TrainPlan
from pipeline.training.follow import samples_folder
from pipeline.training.notebook import Attempt, MetricsLine, NotebookWriter, SupersededError, Ticket
from pipeline.training.system_watch import SystemWatch
from pipeline.training.trainer import Trainer, grid_pixels, make_batch_plan, make_trainer

GRID_COLUMNS = 8


class Stretch:
    """Averages over a stretch of steps, on each worker."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Starts a new stretch of steps."""
        self._losses: list[torch.Tensor] = []
        self._norms: list[torch.Tensor] = []
        self._waited, self._started = 0.0, time.perf_counter()

    def add(self, loss: torch.Tensor, norm: torch.Tensor, waited: float) -> None:
        """Notes one step: its loss, its gradient norm, and the seconds spent waiting for data."""
        self._losses.append(loss)
        self._norms.append(norm)
        self._waited += waited

    def mean_loss(self) -> torch.Tensor:
        """Returns this worker's mean loss over the stretch."""
        return torch.stack(self._losses).mean()

    def line(self, trainer: Trainer, loss: float) -> MetricsLine:
        """Returns what the notebook says of the stretch; values that are not finite are left out."""
        seconds = time.perf_counter() - self._started
        metrics = {
            "train/loss": loss,
            "train/gradient_norm": float(torch.stack(self._norms).mean()),
            "train/learning_rate": trainer.learning_rate(),
            "train/nonfinite_steps": float(trainer.nonfinite_steps),
            "perf/images_per_second": len(self._losses) * trainer.config.global_batch_size / seconds,
            "perf/data_wait_fraction": self._waited / seconds,
        }
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
    device, folder, dataset = get_device(), Location.of(plan.folder), Location.of(plan.dataset)
    manifest = read_manifest(dataset)
    attempt, resumed = _agree_on_start(folder, rank)
    trainer = make_trainer(plan, manifest, device, resumed)
    if world > 1:
        trainer.network = prepare_model(trainer.unet, parallel_strategy_kwargs={"broadcast_buffers": False, "gradient_as_bucket_view": True})
    batch_plan = make_batch_plan(plan, manifest)
    reader = RowReader(dataset, manifest, copies=Copies.of(plan.cache, plan.cache_bytes))
    try:
        with _watch(attempt, context) as watch:
            newest = _run_steps(trainer, batch_plan, reader, attempt if rank == 0 else None, watch, rank, world) or resumed
    except (FloatingPointError, SupersededError) as error:
        return TrainFailure(failure=str(error)).model_dump_json()
    return "" if newest is None or rank else _outcome(trainer, newest, world, device).model_dump_json()


def _outcome(trainer: Trainer, checkpoint: Location, world: int, device: torch.device) -> TrainOutcome:
    return TrainOutcome(
        checkpoint=str(checkpoint),
        weights_sha256=manifest_of(checkpoint)["ema.safetensors"][1],
        parameters=sum(parameter.numel() for parameter in trainer.unet.parameters()),
        steps=trainer.step,
        precision=trainer.precision,
        num_workers=world,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model(),
    )


def _agree_on_start(folder: Location, rank: int) -> tuple[Attempt, Location | None]:
    """The first worker takes the right to write and finds the newest whole checkpoint; all use these."""
    from ray.train.collective import broadcast_from_rank_zero

    if rank == 0:
        attempt, found = Attempt(folder), newest_whole_checkpoint(folder)
        broadcast_from_rank_zero([attempt.ticket.model_dump_json(), found.name if found else ""])
        return attempt, found
    ticket, name = broadcast_from_rank_zero(["", ""])
    return Attempt(folder, Ticket.model_validate_json(ticket)), folder / name if name else None


def _watch(attempt: Attempt, context: Any) -> contextlib.AbstractContextManager[SystemWatch | None]:
    """Returns the watch of this worker's node, if it is the node's first worker."""
    if context.get_local_rank() != 0:
        return contextlib.nullcontext()
    return SystemWatch(attempt, context.get_node_rank(), alone=context.get_local_world_size() == context.get_world_size())


def _run_steps(
    trainer: Trainer, plan: BatchPlan, reader: RowReader, attempt: Attempt | None, watch: SystemWatch | None, rank: int, world: int
) -> Location | None:
    """Trains to the end. The first worker, which holds the attempt, returns the last checkpoint that it wrote, the others None."""
    config, lanes, stretch = trainer.config, plan.lanes_of(rank, world), Stretch()
    trainer.share = len(lanes) * world / plan.order.lanes
    newest = None
    if attempt and trainer.step == 0:
        _save_grid(trainer, attempt)
        stretch.reset()
    batches = plan.batches(reader, range(trainer.step, config.steps), lanes)
    with NotebookWriter(attempt) if attempt else contextlib.nullcontext() as notebook:
        for batch, waited in _timed(batches):
            loss, norm = trainer.update(batch, lanes[0])
            stretch.add(loss, norm, waited)
            at_checkpoint = trainer.step % config.checkpoint_every == 0 or trainer.step == config.steps
            if trainer.step % config.log_every == 0 or at_checkpoint:
                loss_now = _mean_over_workers(stretch.mean_loss(), world)
                if notebook:
                    notebook.append(stretch.line(trainer, loss_now))
                if watch:
                    watch.look(trainer.step)
                stretch.reset()
            if attempt and trainer.step % config.sample_every == 0:
                _save_grid(trainer, attempt)
                stretch.reset()
            if attempt and notebook and at_checkpoint:
                notebook.flush()
                newest = _save_checkpoint(trainer, attempt)
                stretch.reset()
    return newest


def _timed(batches: Iterator[Batch]) -> Iterator[tuple[Batch, float]]:
    """Yields each batch with the seconds it was waited for."""
    with contextlib.closing(batches):  # type: ignore[type-var]
        started = time.perf_counter()
        for batch in batches:
            yield batch, time.perf_counter() - started
            started = time.perf_counter()


def _mean_over_workers(value: torch.Tensor, world: int) -> float:
    if world > 1:
        torch.distributed.all_reduce(value)
    return float(value) / world


def _save_checkpoint(trainer: Trainer, attempt: Attempt) -> Location:
    attempt.check()
    path = attempt.folder / checkpoint_name(trainer.step, attempt.number)
    trainer.save(path)
    prune(attempt.folder, trainer.config.keep_last, path, trainer.config.keep_every)
    return path


def _save_grid(trainer: Trainer, attempt: Attempt) -> None:
    """Writes a small grid of samples, wide rather than tall."""
    pixels = grid_pixels(trainer)
    with (samples_folder(attempt.folder) / f"step_{trainer.step:09d}.png").staged() as staging:
        grid(pixels, GRID_COLUMNS).save(staging, format="PNG")
