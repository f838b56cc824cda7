"""Numbers from kept features: distances with their standard errors, what real images score, copies of training images."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from components.storage import Location
from pipeline.artifacts import Floor, Memorisation, Metric, MetricUnit, PairedTest
from pipeline.measurement.reference_statistics import RealFeatures, is_energy
from pipeline.measurement.sample_store import SEEDS_PER_PART, Identity, features_file, logits_file, parts_of, read_parts

if TYPE_CHECKING:
    from components.metrics.memorisation import Pair
    from components.metrics.moments import FeatureStats
    from components.metrics.reference import Reference
    from pipeline.measurement.reference_statistics import AnyReference

MOST_COMPARED = 10_000
"""Samples and real images of which pairs are compared: kernel distance, neighbours, copies."""
FEWEST_COMPARED = 10


@dataclass(frozen=True)
class SampleFeatures:
    """Features of a block of seeds by one extractor, kept in a folder of samples."""

    folder: Location
    identity: Identity
    seeds: range

    def chunks(self) -> Iterator[np.ndarray]:
        """Yields features (N, D) in the order of the seeds."""
        return read_parts(features_file(self.folder, self.identity, part) for part in parts_of(self.seeds, SEEDS_PER_PART))

    def is_there(self) -> bool:
        """Tells whether every part is."""
        return all(features_file(self.folder, self.identity, part).is_file() for part in parts_of(self.seeds, SEEDS_PER_PART))

    def first(self, most: int) -> np.ndarray:
        """Returns the features of the first seeds."""
        found, held = [], 0
        for values in self.chunks():
            found.append(values[: most - held])
            held += len(found[-1])
            if held >= most:
                break
        return np.concatenate(found)

    def logits(self) -> np.ndarray | None:
        """Returns the logits of all seeds, None for an extractor without any."""
        parts = parts_of(self.seeds, SEEDS_PER_PART)
        if not logits_file(self.folder, self.identity, parts[0]).is_file():
            return None
        return np.concatenate(list(read_parts(logits_file(self.folder, self.identity, part) for part in parts)))


@dataclass(frozen=True)
class Distance:
    """A Frechet or energy distance and what is known of its error.

    Attributes:
        influence: (N,) of every sample on the distance.
        jackknifed: without the bias of a finite number of samples.
    """

    value: float
    influence: np.ndarray
    jackknifed: float

    @property
    def standard_error(self) -> float:
        """Over the draw of samples."""
        from components.metrics.frechet import standard_error

        return standard_error(self.influence)


def measure_distance(sampled: SampleFeatures, reference: "AnyReference") -> Distance:
    """Returns the distance of samples from a reference: the Frechet distance from statistics, the energy distance from points."""
    from components.metrics import energy
    from components.metrics.frechet import compare, frechet_distance

    if isinstance(reference, energy.EnergyReference):
        found = energy.compare(np.concatenate(list(sampled.chunks())), reference)
        return Distance(found.distance, found.influence, found.unbiased)

    even, odd = _halves(sampled, reference)
    comparison = compare(even.merge(odd), reference)
    influence = [comparison.influence(values) for values in _batched(sampled.chunks())]
    halves = 0.5 * (frechet_distance(even, reference) + frechet_distance(odd, reference)) if min(even.count, odd.count) > 1 else comparison.distance
    return Distance(comparison.distance, np.concatenate(influence), 2 * comparison.distance - halves)


def _batched(chunks: Iterator[np.ndarray], rows: int = 4096) -> Iterator[np.ndarray]:
    """Joins chunks, so that what each call costs is paid for many rows at once."""
    held: list[np.ndarray] = []
    for values in chunks:
        held.append(values)
        if sum(map(len, held)) >= rows:
            yield np.concatenate(held)
            held = []
    if held:
        yield np.concatenate(held)


def _halves(sampled: SampleFeatures, reference: "Reference") -> "tuple[FeatureStats, FeatureStats]":
    """Returns the statistics of even and of odd places in the row of seeds."""
    from components.metrics.moments import FeatureStats

    halves: list[FeatureStats | None] = [None, None]
    passed = 0
    for values in sampled.chunks():
        for half in (0, 1):
            part = FeatureStats.of(values[(half - passed) % 2 :: 2], reference.mean)
            before = halves[half]
            halves[half] = part if before is None else before.merge(part)
        passed += len(values)
    even, odd = halves
    assert even is not None
    assert odd is not None
    return even, odd


def measure_scores(sampled: SampleFeatures, real_features: RealFeatures, unit: MetricUnit, device: str = "cpu") -> list[Metric]:
    """Returns what is taken of pairs of features: kernel distance, precision and recall, density and coverage."""
    from components.metrics.kernel import kernel_distance
    from components.metrics.neighbours import neighbourhoods

    fake, real = sampled.first(MOST_COMPARED), real_features.subsample(MOST_COMPARED)
    if min(len(fake), len(real)) < FEWEST_COMPARED:
        return []
    found = neighbourhoods(fake, real, device=device)
    unit = unit.model_copy(update={"num_samples": len(fake), "reference_count": len(real)})
    kernels = []
    if not is_energy(sampled.identity.name):  # which is a kernel distance itself
        kernel = kernel_distance(fake, real, device=device)
        kernels = [Metric(kind="kernel", value=kernel.mean, spread=kernel.standard_deviation, unit=unit)]
    return [
        *kernels,
        Metric(kind="precision", value=found.precision, unit=unit),
        Metric(kind="recall", value=found.recall, unit=unit),
        Metric(kind="density", value=found.density, unit=unit),
        Metric(kind="coverage", value=found.coverage, unit=unit),
    ]


def measure_inception_score(sampled: SampleFeatures, unit: MetricUnit) -> list[Metric]:
    """Returns the Inception score, for the one extractor that may give it."""
    from components.metrics.inception_score import inception_score

    logits = sampled.logits() if unit.extractor == "fid" else None
    if logits is None or len(logits) < FEWEST_COMPARED:
        return []
    score = inception_score(logits)
    return [Metric(kind="inception_score", value=score.mean, spread=score.standard_deviation, unit=unit)]


def measure_floor(train: RealFeatures, holdout: RealFeatures | None, num_samples: int) -> Floor | None:
    """Returns what real images score: held-out ones against the training split where there are any, else one half of it against the other."""
    if holdout is not None:
        measured, reference = holdout.subsample(num_samples), train.reference
        what = f"held-out {'points' if is_energy(train.identity.name) else 'images'} against the training split"
    else:
        values = train.subsample(2 * num_samples)
        measured, other = values[::2], values[1::2]
        if min(len(measured), len(other)) < FEWEST_COMPARED:
            return None
        reference = _reference_like(train.reference, other)
        what = "one half of the training split against the other"
    if len(measured) < FEWEST_COMPARED:
        return None
    if is_energy(train.identity.name):
        from components.metrics.energy import MOST_POINTS, between_real

        value, spread = between_real(measured, train.subsample(MOST_POINTS), len(measured))
        return Floor(value=value, spread=spread, count=len(measured), reference_count=reference.count or 0, measured=what, extractor=train.identity.name)
    from components.metrics.frechet import frechet_distance
    from components.metrics.moments import FeatureStats
    from components.metrics.reference import Reference

    assert isinstance(reference, Reference)
    value = frechet_distance(FeatureStats.of(measured, reference.mean), reference)
    return Floor(value=value, count=len(measured), reference_count=reference.count or 0, measured=what, extractor=train.identity.name)


def _reference_like(reference: "AnyReference", features: np.ndarray) -> "AnyReference":
    from components.metrics.energy import EnergyReference
    from components.metrics.moments import FeatureStats
    from components.metrics.reference import Reference

    return EnergyReference.of(features) if isinstance(reference, EnergyReference) else Reference.of(FeatureStats.of(features, reference.mean))


def find_copies(
    sampled: SampleFeatures, train: RealFeatures, holdout: RealFeatures | None, device: str = "cpu"
) -> "tuple[Memorisation, tuple[Pair, ...]] | None":
    """Returns how many samples are copies of training images, and the closest pairs; None where there are too few images to tell."""
    from components.metrics.memorisation import QUANTILE, Calibration, memorisation

    fake = sampled.first(MOST_COMPARED)
    known = train.subsample(MOST_COMPARED) if holdout is None else holdout.subsample(MOST_COMPARED)
    if min(len(fake), len(known)) < FEWEST_COMPARED:
        return None
    calibration = Calibration(known, train.subsampled_rows(MOST_COMPARED) if holdout is None else None)
    found = memorisation(fake, train.features(), calibration, device=device)
    which = "training images, each beside the others" if holdout is None else "held-out images"
    verdict = Memorisation(
        copy_rate=found.copy_rate,
        lower=found.lower,
        upper=found.upper,
        expected=QUANTILE,
        limit=found.limit,
        threshold=found.threshold,
        calibration=f"{found.calibration_count:,} {which}",
        num_samples=found.num_samples,
        num_searched=sum(map(len, train.kept_parts())),
        extractor=train.identity.name,
        nearer_than_all=found.nearer_than_all,
        suspicious=found.is_suspicious,
        copies=found.is_copying,
    )
    return verdict, found.pairs


def paired_test(candidate: SampleFeatures, champion: SampleFeatures, reference: "AnyReference") -> PairedTest:
    """Compares two models on the same seeds: what both have in common by starting from the same noise takes no part in the error."""
    from components.metrics.frechet import paired_difference

    ours, theirs = measure_distance(candidate, reference), measure_distance(champion, reference)
    difference, standard_error = paired_difference(ours.influence, theirs.influence, ours.value - theirs.value)
    return PairedTest(
        first_seed=candidate.seeds.start,
        num_samples=len(candidate.seeds),
        candidate=ours.value,
        champion=theirs.value,
        difference=difference,
        standard_error=standard_error,
    )
