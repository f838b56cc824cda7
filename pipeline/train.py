"""Shards in, a trained denoiser out: starts the workers, follows them, and hands on their last checkpoint."""

import itertools
import signal
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter, model_validator

from cluster.connect import connect
from cluster.lookout import waiting_aloud
from cluster.placement import Placement, place, run_config, scaling_config
from components.data.shards import read_manifest
from components.diffusion.schedule import DiffusionConfig
from components.errors import DataError
from components.model.unet import UNetConfig
from components.storage import Location
from pipeline.artifacts import ShardSet, TrainedModel
from pipeline.context import StageContext
from pipeline.errors import ConfigError
from pipeline.retraining.attempts import Start
from pipeline.tracking import Tracking, public_uri
from pipeline.training.follow import Follower
from pipeline.training.notebook import read_metrics

_NO_RESULT: dict[str, JsonValue] = {"result": False}
MIN_LABELS = 2


class TrainConfig(BaseModel):
    """The optimisation; the defaults are the CIFAR-10 run of the DDPM paper."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    steps: int = Field(800_000, ge=1)
    """Optimiser steps."""
    global_batch_size: int = Field(128, ge=1)
    """Images per step over all workers; a multiple of `lanes`."""
    lanes: int = Field(8, ge=1)
    """Parts that every batch is cut into, each with its own rows and noise; any number of workers that divides it gives the same run."""
    lr: float = Field(2e-4, gt=0.0)
    """Learning rate after the warm-up."""
    warmup_steps: int = Field(5000, ge=0)
    """Steps over which the learning rate rises linearly from 0."""
    weight_decay: float = Field(0.0, ge=0.0)
    """Decoupled weight decay (AdamW); 0 is Adam."""
    grad_clip: float = Field(1.0, gt=0.0)
    """Largest norm of the gradient; a longer one is scaled down."""
    ema_decay: float = Field(0.9999, ge=0.0, lt=1.0)
    """Decay of the weights' running average, per step, after its warm-up."""
    more_ema_decays: tuple[Annotated[float, Field(ge=0.0, lt=1.0)], ...] = ()
    """Decays of further averages, kept beside that of `ema_decay` in every checkpoint; each takes the memory of the weights once more."""
    flip: bool = True
    """Mirror images left to right with probability one half."""
    label_dropout: float = Field(0.1, ge=0.0, le=1.0)
    """Probability that an image's label is not told, so that a conditional model learns to draw without one too (Classifier-Free Guidance)."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the network; `auto` is bfloat16 on GPUs and on CPUs with AMX, float32 elsewhere. Noise, target and loss are float32."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Decides weights, rows, flips, time steps, noise and dropout."""
    log_every: int = Field(50, ge=1, json_schema_extra=_NO_RESULT)
    """Steps between two points of the loss curve."""
    checkpoint_every: int = Field(5000, ge=1, json_schema_extra=_NO_RESULT)
    """Steps between two checkpoints."""
    keep_last: int = Field(2, ge=1, json_schema_extra=_NO_RESULT)
    """Last checkpoints that are kept."""
    keep_every: int | None = Field(None, ge=1, json_schema_extra=_NO_RESULT)
    """Checkpoints at multiples of this step are kept for good; a multiple of `checkpoint_every`."""
    sample_every: int = Field(10_000, ge=1, json_schema_extra=_NO_RESULT)
    """Steps between two sample grids."""
    max_nonfinite_steps: int = Field(10, ge=0, json_schema_extra=_NO_RESULT)
    """Steps with a gradient that is not finite, left out and counted, before training stops."""

    @model_validator(mode="after")
    def _check_decays(self) -> Self:
        decays = (self.ema_decay, *self.more_ema_decays)
        if (repeated := next((decay for decay in self.more_ema_decays if decays.count(decay) > 1), None)) is not None:
            raise ValueError(f"more_ema_decays={list(self.more_ema_decays)} holds {repeated} twice, ema_decay={self.ema_decay} counted; state each decay once")
        return self

    @model_validator(mode="after")
    def _check_keeping(self) -> Self:
        if self.keep_every is not None and self.keep_every % self.checkpoint_every:
            raise ValueError(f"keep_every={self.keep_every} is no multiple of checkpoint_every={self.checkpoint_every}; use a multiple")
        return self


class TrainPlan(BaseModel):
    """All that a worker needs to know; it travels as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: TrainConfig
    model: UNetConfig
    diffusion: DiffusionConfig
    dataset: str
    folder: str
    inputs: str
    threads: int
    group_timeout_s: int
    cache: str | None = None
    cache_bytes: int = 20 << 30
    start: Start | None = None


def check_labels(model: UNetConfig, shards: ShardSet) -> None:
    """Checks that a dataset has the classes that a conditional model is told, before anything is trained.

    Raises:
        DataError: if it has not.
    """
    if model.conditional and shards.num_labels < MIN_LABELS:
        raise DataError(
            f"model.conditional=true needs at least {MIN_LABELS} labels, and {shards.source} has {shards.num_labels}; "
            "use images in a folder for each label, or model.conditional=false"
        )


def train(
    config: TrainConfig,
    model: UNetConfig,
    diffusion: DiffusionConfig,
    shards: ShardSet,
    *,
    context: StageContext,
    tracking: Tracking,
    run_id: str,
    config_digest: str,
    start: Start | None = None,
) -> TrainedModel:
    """Trains the denoiser, or goes on from the newest whole checkpoint of these inputs, and returns its receipt.

    Args:
        start: weights that network and averages start from, instead of fresh ones; optimiser and learning rate start anew.

    Raises:
        DataError: if the dataset is not whole.
        ConfigError: if more than `train.max_nonfinite_steps` gradients were not finite.
        RuntimeError: if the workers failed more than `cluster.max_failures` times.
    """
    read_manifest(Location.of(shards.path))
    connect(context.cluster)
    placement = place(context.cluster, context.reporter.line)
    plan = TrainPlan(
        train=config,
        model=model,
        diffusion=diffusion,
        dataset=shards.path,
        folder=str(context.folder),
        inputs=context.inputs,
        threads=placement.threads,
        group_timeout_s=context.cluster.group_timeout_s,
        cache=context.cluster.cache,
        cache_bytes=context.cluster.cache_bytes,
        start=start,
    )
    context.reporter.line(_derived(config, placement, context, start))
    with Follower(context, tracking, run_id, config.steps):
        outcome = _fit(plan, placement, context)
    receipt = _receipt(outcome, config, shards, context, tracking.uri, run_id, config_digest)
    return receipt if start is None else receipt.model_copy(update={"start": f"{start.weights} of {start.model}"})


def _derived(config: TrainConfig, placement: Placement, context: StageContext, start: Start | None) -> str:
    """Returns the values that follow from the settings and the machines, for a person to see at the start."""
    from components.model.checkpoint import checkpoints, is_complete

    newest = next(filter(is_complete, checkpoints(context.folder)), None)
    where = "one GPU each" if placement.use_gpu else f"{placement.threads} CPU thread{'s' if placement.threads > 1 else ''} each"
    begin = f", starting from {start.weights} of {start.model}" if start else ""
    begin = f", going on from {newest.name}" if newest else begin
    return f"  {placement.num_workers} workers with {where}, {config.global_batch_size // placement.num_workers} images per worker and step{begin}"


class TrainOutcome(BaseModel):
    """What the first worker says at the end."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    checkpoint: str
    weights_sha256: str
    parameters: int
    steps: int
    precision: Literal["float32", "bfloat16"]
    num_workers: int
    device: str


class TrainFailure(BaseModel):
    """What the first worker says when going on makes no sense, and neither does starting again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    failure: str


def _fit(plan: TrainPlan, placement: Placement, context: StageContext) -> TrainOutcome:
    from ray.train.torch import TorchTrainer

    from pipeline.training.loop import train_loop
    from pipeline.training.process_group import TorchConfigOnRaysNetwork

    with tempfile.TemporaryDirectory(prefix="ddpm-ray-train-") as bookkeeping:
        trainer = TorchTrainer(
            train_loop,  # pyrefly: ignore[bad-argument-type]  (its return value is the result's, as Ray documents)
            train_loop_config={"plan": plan.model_dump_json()},
            scaling_config=scaling_config(context.cluster, placement),
            run_config=run_config(context.cluster, bookkeeping=bookkeeping, name=context.folder.name),
            torch_config=TorchConfigOnRaysNetwork(backend="nccl" if placement.use_gpu else "gloo", timeout_s=plan.group_timeout_s),
        )
        with waiting_aloud(context.cluster, context.reporter.line), _interruptible():
            result: Any = trainer.fit()
    outcome = TypeAdapter(TrainOutcome | TrainFailure).validate_json(result.return_value)
    if isinstance(outcome, TrainFailure):
        raise ConfigError(outcome.failure)
    return outcome


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
    outcome: TrainOutcome, config: TrainConfig, shards: ShardSet, context: StageContext, tracking_uri: str, run_id: str, config_digest: str
) -> TrainedModel:
    lines = read_metrics(context.folder)
    speeds = [line.metrics["perf/images_per_second"] for line in lines if "perf/images_per_second" in line.metrics]
    losses = [line.metrics["train/loss"] for line in lines if "train/loss" in line.metrics]
    if not losses:
        raise ConfigError("train.lr: no step had a finite loss; lower it, or use train.precision=float32")
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
        num_workers=outcome.num_workers,
        device=outcome.device,
        config_digest=config_digest,
        dataset_digest=shards.digest,
        tracking_uri=public_uri(tracking_uri),
        mlflow_run_id=run_id,
    )


def is_intact(receipt: TrainedModel) -> bool:
    """Tells whether the checkpoint that a receipt describes is still there, every checksum matching."""
    from components.model.checkpoint import is_complete, manifest_of, verify

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
