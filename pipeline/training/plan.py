"""What training is told, what travels to its workers, and what comes back."""

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from components.diffusion.config import DiffusionConfig
from components.networks.kinds import AnyNetworkConfig
from pipeline.retraining.attempts import Start
from pipeline.training.config import TrainConfig

LAST_WRITE_S = 60.0
"""How long the last checkpoint is tried where it cannot be written."""


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
    perceptual: str | None = None
    """Checksums of the files of the perceptual loss."""


class TrainOutcome(BaseModel):
    """What the first worker says at the end."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    checkpoint: str
    weights_sha256: str
    parameters: int
    steps: int
    stopped_at: int | None = None
    precision: Literal["float32", "bfloat16"]
    layout: Literal["channels_last", "contiguous"]
    compiled: bool
    num_workers: int
    device: str
    host_bytes: int | None = None
    """Most memory that its process held."""
    gpu_bytes: int | None = None
    """Most memory of its GPU that was reserved; None on a CPU."""


class TrainFailure(BaseModel):
    """What the first worker says when going on makes no sense, and neither does starting again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    failure: str


def differences(there: Mapping[str, str], here: Mapping[str, str]) -> str:
    """Returns which settings differ, in words, such as `train.lr is 0.0002 there and 0.001 here`; nothing where those there are not known."""
    keys = sorted(key for key in there.keys() | here.keys() if there.get(key) != here.get(key)) if there else []
    return ", ".join(f"{key} is {there.get(key, 'missing')} there and {here.get(key, 'missing')} here" for key in keys)
