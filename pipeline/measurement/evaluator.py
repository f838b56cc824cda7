"""Where samples are drawn and measured: the settings, a dataset, and a team of actors."""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np

from cluster.connect import connect
from cluster.node_watch import reporting_missing_nodes
from cluster.placement import place
from components.data.reader import RowReader
from components.data.shard_cache import ShardCache
from components.data.shards import Manifest, Split, read_manifest
from components.diffusion.recipe import Recipe
from components.errors import DataError
from components.model.spec import read_spec
from components.storage import Location
from pipeline.artifacts import Floor, Memorisation, Metric, MetricUnit, ShardSet
from pipeline.context import StageContext
from pipeline.measurement.actor_pool import ActorPool
from pipeline.measurement.config import EvaluateConfig
from pipeline.measurement.extractors import choose_extractors
from pipeline.measurement.measure import (
    FEWEST_COMPARED,
    Distance,
    SampleFeatures,
    find_copies,
    measure_distance,
    measure_floor,
    measure_inception_score,
    measure_scores,
)
from pipeline.measurement.reference_statistics import RealFeatures, is_energy, measure_real_rows, read_reference
from pipeline.measurement.remote_progress import collecting_progress
from pipeline.measurement.sample_store import SEEDS_PER_PART, Identity, RealSet, SampleSet, parts_of, pixels_file, read_array, sample_set

if TYPE_CHECKING:
    from components.metrics.memorisation import Pair
    from components.metrics.reference import Reference
    from pipeline.measurement.reference_statistics import AnyReference

RECONSTRUCTION = "reconstruction"
"""What the unit of an autoencoder's number says in the place of a sampler."""
PICTURE_BATCH = 16
"""Images that an actor draws together to be looked at: few, so that all actors have some."""


@dataclass(frozen=True)
class SamplingSummary:
    """What drawing a block of seeds left to say.

    Attributes:
        sha256: of all pixels in the order of their seeds.
        images_per_second: of those that were not there before; 0 where all were.
    """

    sha256: str
    images_per_second: float


@dataclass(frozen=True)
class Numbers:
    """All that is taken of a block of samples.

    Attributes:
        frechet: the distance that decides, then the guards'.
        scores: further numbers, some against the held-out split.
        copies: the verdict on memorisation, and the pairs it is made of.
    """

    frechet: tuple[Metric, ...]
    jackknifed: float
    scores: tuple[Metric, ...]
    floor: Floor | None
    copies: "tuple[Memorisation, tuple[Pair, ...]] | None"
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Evaluator:
    """Samples and real images side by side.

    Attributes:
        config: its precision is no longer `auto`.
        latents: what the images are encoded to, where the denoiser works on latents.
        reconstructs: it is an autoencoder that is measured, by what it makes of `originals`.
    """

    config: EvaluateConfig
    shards: ShardSet
    manifest: Manifest
    actor_pool: ActorPool
    context: StageContext
    policy: Literal["ema", "elected"] = "ema"
    latents: ShardSet | None = None
    reconstructs: bool = False
    _measured: dict[tuple[int, Split], RealFeatures] = field(default_factory=dict, compare=False)

    @property
    def originals(self) -> Split:
        """The images that an autoencoder is measured by: held-out ones, where there are enough."""
        return "holdout" if self.manifest.splits.get("holdout", 0) >= FEWEST_COMPARED else "train"

    @property
    def trained_on(self) -> ShardSet:
        """The dataset that the denoiser works on."""
        return self.latents or self.shards

    @cached_property
    def label_counts(self) -> dict[str, int]:
        """Training images of each label."""
        reader = RowReader(Location.of(self.shards.path), self.manifest, copies=ShardCache.of(self.context.cluster.cache, self.context.cluster.cache_bytes))
        numbers = reader.labels(np.arange(len(reader)))
        return {name: int((numbers == number).sum()) for number, name in enumerate(self.manifest.label_names)}

    def samples_of(self, checkpoint: Location, weights: str, recipe: Recipe | None = None) -> SampleSet:
        """Returns the samples of a checkpoint's average by a recipe, the configured one by default.

        Raises:
            DataError: if the folder is no checkpoint, lacks the average, or makes other images than the dataset's.
        """
        spec = read_spec(checkpoint)
        seen = spec.space.seen
        if (seen.kind, seen.shape) != (self.manifest.space.kind, self.manifest.space.shape):
            raise DataError(
                f"{checkpoint} draws {seen.description}, and dataset {self.manifest.digest} holds {self.manifest.space.description}; name one of the same shape"
            )
        if spec.diffusion.process == "reconstruction":
            originals = RealSet(self.context.storage, self.shards.path, self.originals)
            return sample_set(self.context.storage, checkpoint, weights, replace(self.config.recipe, steps=1), (), (originals, self.manifest.digest))
        counts = tuple(self.label_counts.get(name, 0) for name in spec.label_names)
        return sample_set(self.context.storage, checkpoint, weights, recipe or self.config.recipe, counts if any(counts) else (1,) * len(counts))

    def draw(self, samples: SampleSet, seeds: range, pixels: Location | None = None, *, need: bool = False) -> SamplingSummary:
        """Draws and measures a block of seeds, as far as that is not done.

        Args:
            pixels: folder where the pixels of those that are drawn stay; by default none do.
            need: the pixels of all must be there, and are drawn again if they are gone.
        """
        parts = parts_of(seeds, SEEDS_PER_PART)
        checksum, fresh, started = hashlib.sha256(), 0, time.perf_counter()
        with self.context.reporter.progress("drawing samples", len(seeds), f"{self.manifest.space.noun}s") as advance, collecting_progress(advance) as pieces:
            work = ((samples, part, self.config.batch_size, pieces.progress(part), pixels, need) for part in parts)
            for part, (sha256, drawn) in zip(parts, self.actor_pool.map("part", work), strict=True):
                checksum.update(bytes.fromhex(sha256))
                fresh += drawn
                pieces.finish(part, len(part))
        return SamplingSummary(checksum.hexdigest(), fresh / (time.perf_counter() - started))

    def pixels(self, samples: SampleSet, seeds: Sequence[int], block: range = range(0), folder: Location | None = None) -> np.ndarray:
        """Returns the pixels (len(seeds), C, H, W) of some seeds: those of a block that a folder holds, or drawn again."""
        found: dict[int, np.ndarray] = {}
        for part in parts_of(block, SEEDS_PER_PART) if folder is not None else []:
            mine = [seed for seed in seeds if seed in part]
            values = read_array(pixels_file(folder, part)) if folder is not None and mine else None
            if values is not None:
                found |= {seed: values[seed - part.start] for seed in mine}
        missing = sorted(set(seeds) - set(found))
        if missing:
            found |= dict(zip(missing, self._draw_again(samples, missing), strict=True))
        return np.stack([found[seed] for seed in seeds])

    def _draw_again(self, samples: SampleSet, seeds: Sequence[int]) -> np.ndarray:
        batches = [seeds[first : first + PICTURE_BATCH] for first in range(0, len(seeds), PICTURE_BATCH)]
        reported = self.context.reporter.progress("drawing samples to look at", len(seeds), f"{self.manifest.space.noun}s")
        with reported as advance, collecting_progress(advance) as pieces:
            drawn = []
            work = ((samples, batch, PICTURE_BATCH, pieces.progress(batch[0])) for batch in batches)
            for batch, images in zip(batches, self.actor_pool.map("draw", work), strict=True):
                drawn.append(images)
                pieces.finish(batch[0], len(batch))
        return np.concatenate(drawn)

    def real_features(self, which: int, split: Split) -> RealFeatures:
        """Returns a split of the dataset, measured by one extractor."""
        key = (which, split)
        if key not in self._measured:
            self._measured[key] = measure_real_rows(self.actor_pool, which, self.shards, self.manifest, split, self.context)
        return self._measured[key]

    def reference(self) -> "tuple[AnyReference, MetricUnit]":
        """Returns what the deciding number is measured against, and its unit for the configured samples.

        Raises:
            DataError: if the file of statistics is of other features.
        """
        identity = self.actor_pool.identities[0]
        train = self.real_features(0, self.originals if self.reconstructs else "train")
        if self.config.reference is None:
            return train.reference, self._unit(identity, train)
        file = Location.of(self.config.reference)
        reference = read_reference(file)
        _check_unit(file, reference, identity)
        if reference.dimensions != train.reference.dimensions:
            raise DataError(
                f"evaluate.reference={file} has {reference.dimensions} features, and {identity.name} has {train.reference.dimensions}; "
                f"name a file of {identity.name}"
            )
        unit = {"reference_digest": hashlib.sha256(file.read_bytes()).hexdigest(), "reference_split": "file", "reference_count": reference.count or 0}
        return reference, self._unit(identity, train).model_copy(update=unit)

    def measure(self, samples: SampleSet) -> Numbers:
        """Returns all that is taken of the configured seeds, which are drawn."""
        reference, unit = self.reference()
        sampled = SampleFeatures(samples.folder, self.actor_pool.identities[0], self.config.seeds)
        part = self.context.reporter.part
        train, holdout = self.real_features(0, "train"), self.holdout(0)
        with part("distances"):
            distance, guards = measure_distance(sampled, reference), self.guards(samples)
            floor = measure_floor(train, holdout, self.config.num_samples)
        with part("kernel distance, precision, recall"):
            scores = [*self._scores(sampled, train), *measure_inception_score(sampled, unit)]
            if holdout is not None:
                unit_of_holdout = self._unit(holdout.identity, holdout)
                scores = [as_metric(measure_distance(sampled, holdout.reference), unit_of_holdout), *self._scores(sampled, holdout), *scores]
        with part("looking for copies of training images"):
            copies = self.actor_pool.compute(find_copies, sampled, train, holdout)
        return Numbers(
            frechet=(as_metric(distance, unit), *guards),
            jackknifed=distance.jackknifed,
            scores=tuple(scores),
            floor=floor,
            copies=copies,
            warnings=tuple(_warnings(unit, reference.dimensions, copies)),
        )

    def _scores(self, sampled: SampleFeatures, real_features: RealFeatures) -> list[Metric]:
        return self.actor_pool.compute(measure_scores, sampled, real_features, self._unit(real_features.identity, real_features))

    def holdout(self, which: int) -> RealFeatures | None:
        """Returns the held-out split, measured by one extractor; None where it has too few rows."""
        return self.real_features(which, "holdout") if self.manifest.splits.get("holdout", 0) >= FEWEST_COMPARED else None

    def guards(self, samples: SampleSet) -> list[Metric]:
        """Returns the distances over the features that do not decide."""
        return [self._guard(which, samples) for which in range(1, len(self.actor_pool.identities))]

    def _guard(self, which: int, samples: SampleSet) -> Metric:
        train = self.real_features(which, "train")
        return as_metric(
            measure_distance(SampleFeatures(samples.folder, train.identity, self.config.seeds), train.reference), self._unit(train.identity, train)
        )

    def _unit(self, identity: Identity, real_features: RealFeatures) -> MetricUnit:
        return MetricUnit(
            extractor=identity.name,
            extractor_digest=identity.digest,
            preprocessing=identity.preprocessing,
            reference_digest=self.manifest.digest,
            reference_split=real_features.split,
            reference_count=real_features.num_rows,
            num_samples=self.config.num_samples,
            first_seed=self.config.first_seed,
            sampler=RECONSTRUCTION if self.reconstructs else self.config.recipe.describe(),
            steps=1 if self.reconstructs else self.config.steps,
            weights=self.policy,
            precision=self.config.recipe.precision,
        )


def _check_unit(file: Location, reference: "Reference", identity: Identity) -> None:
    """Checks that a file of statistics which says what it is of is of the features that decide."""
    said = json.loads(reference.unit or "{}")
    for part, found in (("extractor", identity.name), ("extractor_digest", identity.digest)):
        if said.get(part, found) != found:
            raise DataError(f"evaluate.reference={file} is of {part} {said[part]}, and {found} decides; name a file of {identity.name}")


@contextmanager
def open_evaluator(config: EvaluateConfig, shards: ShardSet, context: StageContext) -> Iterator[Evaluator]:
    """Gives a block the actors that draw and measure, on the cluster of the context.

    Raises:
        DataError: if the dataset, or a file of weights, is not whole.
    """
    with context.reporter.part("starting Ray"):
        connect(context.cluster)
    placement = place(context.cluster, context.reporter.line)
    manifest = read_manifest(Location.of(shards.path))
    kinds = choose_extractors(config, shards, context, placement)
    with reporting_missing_nodes(context.cluster, context.reporter.line):
        with context.reporter.part("starting the actors that draw and measure"):
            actor_pool = ActorPool(placement, kinds, context.cluster, config.num_samples * config.steps)
        with actor_pool:
            resolved = config.model_copy(update={"precision": actor_pool.first("precision", config.precision)})
            yield Evaluator(resolved, shards, manifest, actor_pool, context)


def as_metric(distance: Distance, unit: MetricUnit) -> Metric:
    """Returns a distance as a number with its unit."""
    return Metric(kind="energy" if is_energy(unit.extractor) else "frechet", value=distance.value, unit=unit, standard_error=distance.standard_error)


def _warnings(unit: MetricUnit, dimensions: int, copies: "tuple[Memorisation, tuple[Pair, ...]] | None") -> list[str]:
    """Returns what a reader must know before trusting the numbers, in sentences."""
    from components.metrics.frechet import MIN_FID_SAMPLES

    warnings = []
    fewest = max(dimensions, MIN_FID_SAMPLES if unit.extractor == "fid" else 0)
    if unit.num_samples < fewest:
        warnings.append(
            f"evaluate.num_samples={unit.num_samples} is below {fewest}, so that {unit.extractor} over {dimensions} features says little; use more samples"
        )
    if copies is not None and (copies[0].copies or copies[0].suspicious):
        warnings.append(f"{copies[0].verdict}; {copies[0].copy_rate:.1%} of them are as near to one as only {copies[0].expected:.0%} of honest images are")
    return warnings
