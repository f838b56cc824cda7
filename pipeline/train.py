"""Shards in, a trained denoiser out: starts the workers, follows them, and hands on their last checkpoint."""

import itertools
import shutil
import signal
import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from pydantic import TypeAdapter, ValidationError
from rich.markup import escape

from cluster.connect import connect
from cluster.interrupt import interruptible
from cluster.key_value_store import KeyValueStore
from cluster.metrics import RunMetrics
from cluster.node_watch import reporting_missing_nodes
from cluster.nodes import count
from cluster.placement import Placement, fewer_for_gpus, place, run_config, scaling_config
from components.counts import counted
from components.data.shards import read_manifest
from components.diffusion.config import DiffusionConfig
from components.errors import DataError
from components.model.manifest import is_complete, manifest_of, verify
from components.model.retention import checkpoints, prune
from components.networks.config import NetworkConfig
from components.scratch import scratch
from components.storage import TEMPORARY, Location
from pipeline.artifacts import ShardSet, TrainedModel
from pipeline.context import StageContext
from pipeline.errors import ConfigError, TrainingError
from pipeline.retraining.attempts import Start
from pipeline.tracking import Tracking, public_uri
from pipeline.training.config import TrainConfig
from pipeline.training.heartbeat import REASON
from pipeline.training.metrics_log import attempts_so_far, read_metrics
from pipeline.training.metrics_relay import MetricsRelay
from pipeline.training.plan import TrainFailure, TrainOutcome, TrainPlan, differences
from pipeline.training.progress import already_at, is_as_long, receipt_in, record_of, steps_to_keep
from pipeline.training.restarts import pop_end, record_end
from pipeline.training.start import check_start
from pipeline.training.watchdog import Watchdog

MIN_LABELS = 2
IMPORTED = ("ray.train.torch", "torch._dynamo")
"""What takes training workers longest to import; the latter comes with the first optimiser."""


def check_labels(model: NetworkConfig, shards: ShardSet) -> None:
    """Checks that a dataset has the classes that a conditional model is told, before anything is trained.

    Raises:
        DataError: if it has not.
    """
    if model.conditional and shards.num_labels < MIN_LABELS:
        raise DataError(
            f"model.conditional=true needs at least {counted(MIN_LABELS, 'label')}, and {shards.source} has {shards.num_labels}; "
            "use images in a folder for each label, or model.conditional=false"
        )


def train(
    config: TrainConfig,
    model: NetworkConfig,
    diffusion: DiffusionConfig,
    shards: ShardSet,
    *,
    context: StageContext,
    tracking: Tracking,
    run_id: str,
    config_digest: str,
    settings: Mapping[str, str],
    start: Start | None = None,
    perceptual: str | None = None,
) -> TrainedModel:
    """Trains the denoiser, or goes on from the newest whole checkpoint of these inputs, and returns its receipt.

    Args:
        settings: all that the digest of the inputs is made of, kept in checkpoints for messages.
        start: weights that network and averages start from, instead of fresh ones; optimiser and learning rate start anew.
        perceptual: checksums of the files of the perceptual loss.

    Raises:
        DataError: if the dataset is not whole.
        ConfigError: if more than `train.max_nonfinite_steps` gradients were not finite.
        RuntimeError: if the workers failed more than `cluster.max_failures` times.
    """
    manifest = read_manifest(Location.of(shards.path))
    if config.validate_every and not manifest.splits.get("holdout", 0):
        raise ConfigError(f"train.validate_every={config.validate_every} needs held-out images, and {shards.source} has none; set data.holdout_fraction=0.1")
    if (done := already_at(config.steps, context.folder)) is not None:
        return _receipt(done, config, shards, context, tracking.uri, run_id, config_digest, start)
    with context.reporter.part("starting Ray"):
        connect(context.cluster)
    metrics = RunMetrics(context.run_name)
    metrics.set("ddpm_dataset_rows", shards.num_rows)
    metrics.set("ddpm_quarantined_files", shards.num_quarantined)
    placement = place(context.cluster, context.reporter.line)
    if (fewer := fewer_for_gpus(context.cluster, placement)) is not None:
        context.reporter.line(fewer)
    plan = _plan(config, model, diffusion, shards, placement, context, settings=settings, start=start, perceptual=perceptual)
    before = attempts_so_far(context.folder)
    if start is not None and not before:
        check_start(start, model, diffusion, config, shards, context)
    context.reporter.line(_derived(config, placement, None if before else start, shards.space.noun))
    report_unfinished(context, settings)
    if (ended := receipt_in(context.folder)) is not None and not is_as_long(ended, config.steps):
        record_end(context.folder, f"the run was made longer, from {ended.steps} to {config.steps} steps")
    _sweep(context.folder)
    with MetricsRelay(context, tracking, run_id, config.steps):
        outcome = _fit(plan, placement, context, before)
    _sweep(context.folder)
    with suppress(OSError):  # the last worker to write may have been killed before it did this
        prune(context.folder, config.keep_last, Location.of(outcome.checkpoint), config.keep_every, steps_to_keep(Location.of(outcome.checkpoint)))
    return _receipt(outcome, config, shards, context, tracking.uri, run_id, config_digest, start)


def _plan(
    config: TrainConfig,
    model: NetworkConfig,
    diffusion: DiffusionConfig,
    shards: ShardSet,
    placement: Placement,
    context: StageContext,
    *,
    settings: Mapping[str, str],
    start: Start | None,
    perceptual: str | None,
) -> TrainPlan:
    return TrainPlan(
        train=config,
        model=model,
        diffusion=diffusion,
        dataset=shards.path,
        folder=str(context.folder),
        inputs=context.inputs,
        settings=dict(settings),
        threads=placement.threads,
        threads_asked_for=bool(context.cluster.cpus_per_worker),
        group_timeout_s=context.cluster.group_timeout_s,
        cache=context.cluster.cache,
        cache_bytes=context.cluster.cache_bytes,
        start=start,
        perceptual=perceptual,
    )


def rehearse(
    config: TrainConfig,
    model: NetworkConfig,
    diffusion: DiffusionConfig,
    shards: ShardSet,
    *,
    placement: Placement,
    context: StageContext,
    perceptual: str | None = None,
) -> TrainOutcome:
    """Trains as `train` does, workers, threads and checkpoint alike, without telling anybody: what it takes is in the metrics log of the folder.

    Args:
        config: with as many steps as are to be timed.

    Raises:
        ConfigError: where training would.
    """
    plan = _plan(config, model, diffusion, shards, placement, context, settings={}, start=None, perceptual=perceptual)
    return _fit(plan, placement, context, 0)


def _derived(config: TrainConfig, placement: Placement, start: Start | None, noun: str) -> str:
    """Returns the values that follow from the settings and the machines, for a person to see at the start."""
    each = "" if placement.num_workers == 1 else " each"
    where = f"one GPU{each}" if placement.use_gpu else f"{count(placement.threads, 'CPU thread')}{each}"
    rows = count(config.global_batch_size // placement.num_workers, noun)
    begin = f", starting from {start.weights} of {start.model}" if start else ""
    return f"  {count(placement.num_workers, 'worker')} with {where}, {rows} per worker and step{begin}"


def _sweep(folder: Location) -> None:
    """Removes what killed processes left half written; nobody else writes here while no worker trains, for this process holds the run."""
    for left in folder.path.rglob(f".*{TEMPORARY}") if folder.is_local else ():
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def report_unfinished(context: StageContext, settings: Mapping[str, str]) -> None:
    """Says at a first start which trainings of the run, of other settings, were left unfinished, and what differs."""
    if checkpoints(context.folder):
        return
    for name in context.folder.parent.folders():
        other = context.folder.parent / name
        newest = next(filter(is_complete, checkpoints(other)), None)
        if newest is None or ".old-" in name or (other / "receipt.json").is_file():
            continue
        with suppress(OSError, ValidationError):
            record = record_of(newest)
            detail = differences(record.settings, settings) or "other settings"
            context.reporter.line(
                f"  [yellow]note[/] starting over: a training of the run that stopped at step {record.step} stays in {other} ({escape(detail)})"
            )


def _fit(plan: TrainPlan, placement: Placement, context: StageContext, before: int) -> TrainOutcome:
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from pipeline.training.controller import FailureObserver
    from pipeline.training.fit import InProcessTrainer, train_loop
    from pipeline.training.process_group import ProcessGroupConfig

    store, ended = KeyValueStore(plan.folder), pop_end(context.folder)
    store.clear()
    if before:
        store.put(REASON, ended)
    with scratch("ray-train") as bookkeeping:
        alone = context.cluster.address == "local" and not context.cluster.is_elastic
        trainer = (InProcessTrainer if alone else DataParallelTrainer)(
            train_loop,  # pyrefly: ignore[bad-argument-type]  (its return value is the result's, as Ray documents)
            train_loop_config={"plan": plan.model_dump_json()},
            scaling_config=scaling_config(context.cluster, placement),
            run_config=run_config(context.cluster, bookkeeping=str(bookkeeping), name=context.folder.name, callbacks=[FailureObserver(store)]),
            backend_config=ProcessGroupConfig(backend="nccl" if placement.use_gpu else "gloo", timeout_s=plan.group_timeout_s),
        )
        with _watched(plan, context, store, before), reporting_missing_nodes(context.cluster, context.reporter.line), _interruptible():
            result: Any = trainer.fit()
    outcome = TypeAdapter(TrainOutcome | TrainFailure).validate_json(result.return_value)
    if isinstance(outcome, TrainFailure):
        raise TrainingError(outcome.failure)
    return outcome


@contextmanager
def _watched(plan: TrainPlan, context: StageContext, store: KeyValueStore, before: int) -> Iterator[None]:
    """Watches the workers during a block, raises what is wrong with them, and leaves a line for the next start where the block ends before its time."""
    report, timeout = context.reporter.line, plan.train.hang_timeout_s
    with interruptible() as interrupt, Watchdog(store, context.cluster, timeout, before=before, report=report, interrupt=interrupt) as watchdog:
        try:
            yield
        except BaseException as error:
            record_end(context.folder, watchdog.why(error))
            watchdog.explain()
            raise


@contextmanager
def _interruptible() -> Iterator[None]:
    """Makes Ctrl-C during Ray's `fit` a KeyboardInterrupt again, and takes Ray's handler out when it is over.

    Ray answers Ctrl-C by aborting the workers and a SystemExit, and leaves its handler behind.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        raise KeyboardInterrupt from error
    finally:
        signal.signal(signal.SIGINT, handler)


def _receipt(
    outcome: TrainOutcome,
    config: TrainConfig,
    shards: ShardSet,
    context: StageContext,
    tracking_uri: str,
    run_id: str,
    config_digest: str,
    start: Start | None,
) -> TrainedModel:
    lines = [line for line in read_metrics(context.folder) if line.step <= outcome.steps]
    speeds = [line.metrics["perf/images_per_second"] for line in lines if "perf/images_per_second" in line.metrics]
    losses = [line.metrics["train/loss"] for line in lines if "train/loss" in line.metrics]
    if not losses:
        raise TrainingError("train.lr: no step had a finite loss; lower it, or use train.precision=float32")
    return TrainedModel(
        inputs=context.inputs,
        path=outcome.checkpoint,
        folder=str(context.folder),
        weights_sha256=outcome.weights_sha256,
        steps=outcome.steps,
        parameters=outcome.parameters,
        loss=statistics.fmean(losses[-5:]),
        images_per_second=statistics.median(speeds),
        seconds=outcome.steps * config.global_batch_size / statistics.median(speeds),
        precision=outcome.precision,
        layout=outcome.layout,
        compiled=outcome.compiled,
        num_workers=outcome.num_workers,
        device=outcome.device,
        config_digest=config_digest,
        dataset_digest=shards.digest,
        tracking_uri=public_uri(tracking_uri),
        mlflow_run_id=run_id,
        start=None if start is None else f"{start.weights} of {start.model}",
        stopped_at=outcome.stopped_at,
        host_bytes=outcome.host_bytes,
        gpu_bytes=outcome.gpu_bytes,
    )


def is_intact(receipt: TrainedModel) -> bool:
    """Tells whether the checkpoint that a receipt describes is still there, every checksum matching."""
    path = Location.of(receipt.path)
    try:
        checksum = verify(path.path)["ema.safetensors"] if path.is_local else manifest_of(path)["ema.safetensors"][1]
    except (DataError, KeyError):
        return False
    return checksum == receipt.weights_sha256 and is_complete(path)


def set_aside(folder: Location) -> None:
    """Moves a training folder out of the way, so that training starts anew and nothing is lost."""
    taken = folder.parent.folders()
    number = next(number for number in itertools.count(1) if f"{folder.name}.old-{number}" not in taken)
    folder.rename(folder.parent / f"{folder.name}.old-{number}")
