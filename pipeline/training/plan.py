"""What training is told, what travels to its workers, and what comes back."""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from components.diffusion.config import DiffusionConfig
from components.networks.kinds import AnyNetworkConfig
from pipeline.retraining.attempts import Start

_NO_RESULT: dict[str, JsonValue] = {"result": False}

LAST_WRITE_S = 60.0
"""How long the last checkpoint is tried where it cannot be written."""


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
    """Arithmetic of the network; `auto` is bfloat16 on GPUs and, for a million parameters and more, on CPUs with AMX or AVX512-BF16; float32 elsewhere.
    Noise, target and loss are float32."""
    compile: bool | Literal["auto"] = Field("auto", json_schema_extra=_NO_RESULT)
    """Compile the step with torch.compile; `auto` does on GPUs where the run is long enough to pay for it."""
    micro_batch_size: int | Literal["auto"] = Field(0, json_schema_extra=_NO_RESULT)
    """Images of one forward and backward pass of a worker, whole lanes; 0 for all of its images, `auto` for as many as the GPU has memory for."""
    deterministic: bool = Field(False, json_schema_extra=_NO_RESULT)
    """Use only operations that give the same bits each time, so that on one kind of GPU, too, an interrupted run ends bit for bit like an undisturbed one."""
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
    hang_timeout_s: float = Field(240.0, gt=0.0, json_schema_extra=_NO_RESULT)
    """Seconds without a step, or five times the longest step where that is more, after which the worker that is waited for is killed and all start again."""
    max_nonfinite_steps: int = Field(10, ge=0, json_schema_extra=_NO_RESULT)
    """Steps with a gradient that is not finite, left out and counted, before training stops."""

    @model_validator(mode="after")
    def _check_decays(self) -> Self:
        decays = (self.ema_decay, *self.more_ema_decays)
        if (repeated := next((decay for decay in self.more_ema_decays if decays.count(decay) > 1), None)) is not None:
            raise ValueError(f"more_ema_decays={list(self.more_ema_decays)} holds {repeated} twice, ema_decay={self.ema_decay} counted; state each decay once")
        return self

    @model_validator(mode="after")
    def _check_micro_batches(self) -> Self:
        rows = self.global_batch_size // self.lanes
        if self.micro_batch_size != "auto" and (self.micro_batch_size < 0 or self.micro_batch_size % max(1, rows)):
            raise ValueError(
                f"micro_batch_size={self.micro_batch_size} is no whole number of lanes, and a lane has {rows} images (global_batch_size / lanes); "
                f"use a multiple of {rows}, auto, or 0 for no micro-batches"
            )
        return self

    @model_validator(mode="after")
    def _check_keeping(self) -> Self:
        if self.keep_every is not None and self.keep_every % self.checkpoint_every:
            raise ValueError(f"keep_every={self.keep_every} is not a multiple of checkpoint_every={self.checkpoint_every}; use a multiple")
        return self


class TrainPlan(BaseModel):
    """All that a worker needs to know; it travels as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: TrainConfig
    model: AnyNetworkConfig
    diffusion: DiffusionConfig
    dataset: str
    folder: str
    inputs: str
    settings: dict[str, str] = Field(default_factory=dict)
    threads: int
    threads_asked_for: bool = False
    group_timeout_s: int
    cache: str | None = None
    cache_bytes: int = 20 << 30
    start: Start | None = None


class TrainOutcome(BaseModel):
    """What the first worker says at the end."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    checkpoint: str
    weights_sha256: str
    parameters: int
    steps: int
    precision: Literal["float32", "bfloat16"]
    layout: Literal["channels_last", "contiguous"]
    compiled: bool
    num_workers: int
    device: str


class TrainFailure(BaseModel):
    """What the first worker says when going on makes no sense, and neither does starting again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    failure: str


def differences(there: Mapping[str, str], here: Mapping[str, str]) -> str:
    """Returns which settings differ, in words, such as `train.lr is 0.0002 there and 0.001 here`; nothing where those there are not known."""
    keys = sorted(key for key in there.keys() | here.keys() if there.get(key) != here.get(key)) if there else []
    return ", ".join(f"{key} is {there.get(key, 'missing')} there and {here.get(key, 'missing')} here" for key in keys)
