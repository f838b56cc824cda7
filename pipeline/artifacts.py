"""What one stage hands to the next: typed, frozen, stored as JSON beside what it describes."""

from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict

StageName = Literal["preprocess", "train", "evaluate", "register"]
STAGES: tuple[StageName, ...] = ("preprocess", "train", "evaluate", "register")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Receipt(_Record):
    """What every stage's receipt says."""

    inputs: str
    """Digest of all that decides the stage's result."""


class ShardSet(Receipt):
    """A dataset, ready to train on."""

    path: str
    """Folder of shards, manifest and quarantine list."""
    digest: str
    """Digest of the rows."""
    source: str
    num_rows: int
    num_train: int
    """Rows to train on; the others are held out."""
    num_listed: int
    num_quarantined: int
    num_ignored: int
    num_opened: int
    """Files that were opened, because they were new or changed."""
    num_decoded: int
    """Files that were decoded."""
    quarantined: dict[str, int]
    """Quarantined images by reason."""
    num_labels: int
    num_shards: int
    image_size: int
    channels: int


class TrainedModel(Receipt):
    """A checkpoint that rebuilds its denoiser by itself."""

    path: str
    """The last checkpoint folder."""
    folder: str
    """Folder of the training run: checkpoints, metrics, samples."""
    weights_sha256: str
    """Checksum of the averaged weights."""
    steps: int
    parameters: int
    loss: float
    """Mean training loss over the last logged steps."""
    images_per_second: float
    """Median over the run, all workers together."""
    precision: Literal["float32", "bfloat16"]
    num_workers: int
    device: str
    config_digest: str
    dataset_digest: str
    tracking_uri: str
    mlflow_run_id: str


class MetricUnit(_Record):
    """All that must be equal before two numbers may be compared."""

    extractor: str
    """Name of the metric, which names its features."""
    extractor_digest: str
    preprocessing: str
    reference_digest: str
    """Dataset that the samples are compared with."""
    reference_count: int
    num_samples: int
    first_seed: int
    sampler: str
    steps: int
    weights: Literal["ema"] = "ema"


class Metric(_Record):
    """A number with its unit; lower is better."""

    value: float
    unit: MetricUnit

    @property
    def name(self) -> str:
        """How logs and tags call it: features and sample count."""
        return f"{self.unit.extractor}_{self.unit.num_samples}"


class Evaluation(Receipt):
    """What the samples of a checkpoint are like."""

    folder: str
    """Folder of the pictures below."""
    metric: Metric
    """The number that decides."""
    guards: tuple[Metric, ...]
    """Further numbers, for people."""
    samples_sha256: str
    """Checksum of all samples' pixels in the order of their seeds."""
    images_per_second: float
    grid: str
    animation: str
    loss_curve: str


class Registration(Receipt):
    """A version in the model registry, and what became of the champion."""

    model_name: str
    version: int
    uri: str
    tracking_uri: str
    mlflow_run_id: str
    promoted: bool
    decision: str
    """Why the champion fell or stayed, in a sentence."""
    previous_champion: int | None
    metric: Metric


AnyReceipt = TypeVar("AnyReceipt", ShardSet, TrainedModel, Evaluation, Registration)
