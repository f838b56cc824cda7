"""What one stage hands to the next: typed, frozen, stored as JSON beside what it describes."""

from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from components.data.shards import Manifest
from components.spaces.kinds import AnySpace
from components.storage import Location

StageName = Literal["preprocess", "encode", "train", "evaluate", "register"]
STAGES: tuple[StageName, ...] = ("preprocess", "encode", "train", "evaluate", "register")


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
    """Files that were decoded; of a dataset of latents, images that were encoded."""
    quarantined: dict[str, int]
    """Quarantined images by reason."""
    source_splits: dict[str, int] = {}
    """Files of each split that the source names, empty where it is all one."""
    source_split: str | None = None
    """Which of these is trained on."""
    holdout_split: str | None = None
    """Which of these is held out; the others are left out."""
    num_labels: int
    num_shards: int
    space: AnySpace
    """What rows are."""

    @property
    def name(self) -> str:
        """What MLflow's pages call it."""
        return Location(self.source).name or "images"

    @classmethod
    def of(cls, folder: Location, manifest: Manifest, *, inputs: str, num_opened: int = 0, num_decoded: int = 0) -> "ShardSet":
        """Returns the receipt of the dataset in a folder."""
        return cls(
            inputs=inputs,
            path=str(folder),
            digest=manifest.digest,
            source=manifest.source,
            num_rows=manifest.num_rows,
            num_train=manifest.num_train,
            num_listed=manifest.num_listed,
            num_quarantined=manifest.num_quarantined,
            num_ignored=manifest.num_ignored,
            num_opened=num_opened,
            num_decoded=num_decoded,
            quarantined=manifest.quarantined,
            source_splits=manifest.source_splits,
            source_split=manifest.source_split,
            holdout_split=manifest.holdout_split,
            num_labels=len(manifest.labels),
            num_shards=len(manifest.shards),
            space=manifest.space,
        )


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
    loss: float | None
    """Mean training loss over the last logged steps; None where the weights were trained elsewhere."""
    images_per_second: float
    """Median over the run, all workers together."""
    seconds: float = 0.0
    """What all steps take at that speed."""
    precision: Literal["float32", "bfloat16"]
    layout: Literal["channels_last", "contiguous"] = "channels_last"
    compiled: bool = False
    num_workers: int
    device: str
    config_digest: str
    dataset_digest: str
    tracking_uri: str
    mlflow_run_id: str
    start: str | None = None
    """The weights that training started from, in words; None for fresh ones."""
    host_bytes: int | None = None
    """Most memory that the first worker's process held; None where nobody looked."""
    gpu_bytes: int | None = None
    """Most memory of its GPU that was reserved; None on a CPU."""
    stopped_at: int | None = None
    """Step at which held-out rows ended the training, whose best checkpoint this is; None where it went on to its end."""


class MetricUnit(_Record):
    """All that must be equal before two numbers may be compared."""

    extractor: str
    """Name of the distance over these features, which names the features."""
    extractor_digest: str
    preprocessing: str
    reference_digest: str
    """Dataset that the samples are compared with, or SHA-256 of a file of statistics."""
    reference_split: Literal["train", "holdout", "file"] = "train"
    """Part of the dataset; `file` where the reference is a file."""
    reference_count: int
    """Images of the reference, 0 where its file does not say."""
    num_samples: int
    first_seed: int
    sampler: str
    """Name and settings of the sampler, in words."""
    steps: int
    weights: Literal["ema", "elected"] = "ema"
    """`ema` is the last checkpoint's main average; `elected` the best of several averages and checkpoints."""
    precision: Literal["float32", "bfloat16"] = Field("float32", exclude_if=lambda precision: precision == "float32")
    """Arithmetic of the network while it sampled; a unit that is written without it, as all were before there was a choice, is of float32."""

    @property
    def features(self) -> str:
        """What the features are called."""
        return "inception" if self.extractor == "fid" else self.extractor.removeprefix("fd_").removeprefix("ed_")

    @property
    def drawn_by(self) -> str:
        """Sampler and arithmetic, in words: float32 goes without saying."""
        return self.sampler if self.precision == "float32" else f"{self.sampler}, {self.precision}"


MetricKind = Literal["frechet", "energy", "kernel", "inception_score", "precision", "recall", "density", "coverage"]


class Metric(_Record):
    """A number with its unit."""

    kind: MetricKind = "frechet"
    value: float
    unit: MetricUnit
    standard_error: float | None = None
    """Of a Frechet or energy distance over the draw of samples, by its influence function."""
    spread: float | None = None
    """Standard deviation over subsets of a kernel distance, over splits of an Inception score."""

    @property
    def name(self) -> str:
        """How logs and tags call it: features, sample count, and the reference where it is not the training split."""
        inception, other = {"frechet": ("fid", self.unit.extractor), "energy": ("", self.unit.extractor), "kernel": ("kid", f"kd_{self.unit.features}")}.get(
            self.kind, (self.kind, f"{self.kind}_{self.unit.features}")
        )
        name = f"{inception if self.unit.extractor == 'fid' else other}_{self.unit.num_samples}"
        return name if self.unit.reference_split == "train" else f"{name}_{self.unit.reference_split}"


class Floor(_Record):
    """What real images score against real images: no generator can be told from the data below it."""

    value: float
    spread: float | None = None
    """Standard deviation over draws of real points; None for images, which are compared once."""
    count: int
    """Rows on the measured side."""
    reference_count: int
    measured: str
    """Which images stand in for samples, and against which."""
    extractor: str


class Memorisation(_Record):
    """How many samples lie nearer to a training image than unseen images do."""

    copy_rate: float
    """Share of samples below the threshold; near `expected` for a model that does not copy."""
    lower: float
    upper: float
    """One-sided 99 % bounds of the copy rate (Clopper-Pearson)."""
    expected: float
    """Share of unseen images below the threshold, by its definition."""
    limit: float
    """What the interval's lower end must exceed before samples are called copies."""
    threshold: float
    """Distance in feature space."""
    calibration: str
    """Which images the threshold was taken of."""
    num_samples: int
    num_searched: int
    """Training images among which neighbours were sought."""
    extractor: str
    nearer_than_all: int
    """Samples nearer to a training image than every image that the threshold was taken of."""
    suspicious: bool
    """Whether more samples lie next to training images than chance explains, if only a few."""
    copies: bool
    """Whether the lower bound is above the limit: such a model takes no champion's place."""

    @property
    def verdict(self) -> str:
        """What is said of it, in a few words."""
        if self.copies:
            return "copies of training images among the samples"
        if self.suspicious:
            return f"more samples next to training images than chance explains ({self.nearer_than_all} nearer than any honest image): look at the closest pairs"
        return "no sign of copied training images"


class ElectionEntry(_Record):
    """One of the averages that stood for election."""

    checkpoint: str
    weights: str
    """Name of the average in its checkpoint."""
    step: int
    metric: Metric


class Evaluation(Receipt):
    """What the samples of a checkpoint are like."""

    folder: str
    """Folder of the pictures below."""
    settings: dict[str, JsonValue]
    """The evaluate section of the config, by which another model can be measured alike."""
    checkpoint: str
    """The checkpoint that was measured."""
    weights: str
    """Which of its averages: `ema`, or `ema-DECAY`."""
    weights_sha256: str
    """Checksum of that average."""
    step: int
    """Training steps of the checkpoint."""
    election: tuple[ElectionEntry, ...]
    """What it was chosen from, best first; empty where nothing else stood."""
    metric: Metric
    """The number that decides."""
    jackknifed: float
    """The same without the bias of a finite number of samples, estimated from two halves; never compared with the number itself."""
    guards: tuple[Metric, ...]
    """Frechet distances over other features, for people."""
    scores: tuple[Metric, ...]
    """Further numbers, for people; some against the held-out split."""
    bits_per_dimension: float | None = None
    """Bound of the negative log-likelihood of held-out images (`evaluate.nll_images`); of points that of their density. None where it was not asked for."""
    floor: Floor | None
    memorisation: Memorisation | None
    warnings: tuple[str, ...]
    """What a reader must know before trusting the numbers."""
    samples: str
    """Folder of the samples' features."""
    samples_sha256: str
    """Checksum of all samples' pixels in the order of their seeds."""
    images_per_second: float
    """Of those that were drawn by this call; 0 where all were there."""
    kept_samples: str | None
    """Dataset folder of the samples, where they are kept."""
    grid: str
    animation: str
    loss_curve: str
    report: str
    """The page that shows all of it."""


class PairedTest(_Record):
    """Candidate against champion on the same seeds."""

    first_seed: int
    num_samples: int
    candidate: float
    champion: float
    difference: float
    """Candidate minus champion; below 0 is better."""
    standard_error: float

    @property
    def upper(self) -> float:
        """End of the one-sided 95 % interval of the difference."""
        return self.difference + 1.645 * self.standard_error

    @property
    def interval(self) -> str:
        """The difference with its interval of 90 %, whose upper end the gate reads."""
        return f"{self.difference:+.4g} ± {1.645 * self.standard_error:.2g} (90 %)"


class ChampionTest(_Record):
    """What the gate knows of candidate and champion, besides their own numbers."""

    champion_version: int
    test: PairedTest
    confirmation: PairedTest | None
    """The same on fresh seeds; only where the first test says better."""

    @property
    def in_words(self) -> str:
        """What both tests found."""
        again = f"; on fresh seeds {self.confirmation.interval}" if self.confirmation else ""
        return f"v{self.champion_version} has {self.test.champion:.4g} on the same seeds: difference {self.test.interval}{again}"


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
    champion_test: ChampionTest | None = None
    """The paired test with the champion, where there was one of the same unit."""


AnyReceipt = TypeVar("AnyReceipt", ShardSet, TrainedModel, Evaluation, Registration)
