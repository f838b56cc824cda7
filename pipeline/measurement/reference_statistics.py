"""Real images as references: their features, kept part by part, and the statistics that samples are compared with."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from components.data.shards import Manifest, Split
from components.storage import Location
from pipeline.artifacts import ShardSet
from pipeline.context import StageContext
from pipeline.lease import alone
from pipeline.measurement.actor_pool import ActorPool
from pipeline.measurement.remote_progress import collecting_progress
from pipeline.measurement.sample_store import ROWS_PER_PART, Identity, RealSet, parts_of, read_parts

if TYPE_CHECKING:
    from components.metrics.energy import EnergyReference
    from components.metrics.reference import Reference

    AnyReference = Reference | EnergyReference

MOST_KEPT = 100_000
"""Rows whose features stay after the statistics are made: neighbours are sought among them."""


@dataclass(frozen=True)
class RealFeatures:
    """One split of a dataset by one extractor, measured.

    Attributes:
        num_rows: of the split.
    """

    real: RealSet
    identity: Identity
    num_rows: int
    reference: "AnyReference"

    @property
    def split(self) -> Split:
        """The part of the dataset."""
        return self.real.split

    def kept_parts(self) -> list[range]:
        """Returns the rows whose features are kept: all, or as many parts as MOST_KEPT allows, evenly spread."""
        return kept(parts_of(range(self.num_rows), ROWS_PER_PART))

    def features(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (first row, features (N, D)) of the rows that are kept."""
        parts = self.kept_parts()
        files = (self.real.features_file(self.identity, rows) for rows in parts)
        yield from zip((rows.start for rows in parts), read_parts(files), strict=True)

    def subsample(self, most: int) -> np.ndarray:
        """Returns the features of at most so many rows, evenly spread over those that are kept."""
        wanted, chosen, passed = self._wanted(most), [], 0
        for _, values in self.features():
            chosen.append(values[wanted[(wanted >= passed) & (wanted < passed + len(values))] - passed])
            passed += len(values)
        return np.concatenate(chosen)

    def subsampled_rows(self, most: int) -> np.ndarray:
        """Returns which rows `subsample` takes."""
        rows = np.concatenate([np.arange(part.start, part.stop) for part in self.kept_parts()])
        return rows[self._wanted(most)]

    def _wanted(self, most: int) -> np.ndarray:
        count = sum(map(len, self.kept_parts()))
        return np.linspace(0, count - 1, min(most, count)).round().astype(int)


def kept(parts: list[range]) -> list[range]:
    """Returns the parts whose features stay."""
    most = max(1, MOST_KEPT // ROWS_PER_PART)
    if len(parts) <= most:
        return parts
    return [parts[number] for number in np.linspace(0, len(parts) - 1, most).round().astype(int)]


def measure_real_rows(actor_pool: ActorPool, which: int, shards: ShardSet, manifest: Manifest, split: Split, context: StageContext) -> RealFeatures:
    """Returns a split measured by an extractor; what was measured before is not measured again."""
    identity = actor_pool.identities[which]
    real = RealSet(context.storage / "cache" / "features" / manifest.digest, shards.path, split)
    num_rows = manifest.splits.get(split, 0)
    cached = reference_file(context.storage, manifest.digest, split, identity)
    parts = parts_of(range(num_rows), ROWS_PER_PART)
    reference = read_kept(cached, identity) if cached.is_file() else None
    needed = kept(parts) if reference is not None else parts
    reported = context.reporter.progress(f"measure {split} by {identity.name}", num_rows, f"{manifest.space.noun}s")
    with reported as advance, collecting_progress(advance) as pieces:
        for part, rows in zip(needed, actor_pool.map("real_part", ((which, real, part, pieces.progress(part)) for part in needed)), strict=True):
            pieces.finish(part, rows)
    if reference is not None:
        return RealFeatures(real, identity, num_rows, reference)
    with alone(context.storage / "locks" / f"features-{cached.name}", context.reporter, f"measures {split} {manifest.space.noun}s by {identity.name}"):
        if cached.is_file():
            return RealFeatures(real, identity, num_rows, read_kept(cached, identity))
        unit = {"dataset": manifest.digest, "split": split, "extractor": identity.name, "extractor_digest": identity.digest}
        reference = _make_reference(real, identity, parts, json.dumps(unit, sort_keys=True))
        reference.save(cached)
        for part in set(parts) - set(kept(parts)):
            real.features_file(identity, part).remove()
    return RealFeatures(real, identity, num_rows, reference)


def reference_file(storage: Location, dataset_digest: str, split: Split, identity: Identity) -> Location:
    """Returns where the statistics of a split by an extractor are kept."""
    return storage / "cache" / "references" / f"{dataset_digest}-{split}-{identity.file_name}.npz"


def _make_reference(real: RealSet, identity: Identity, parts: list[range], unit: str) -> "AnyReference":
    from components.metrics.energy import EnergyReference
    from components.metrics.moments import FeatureStats
    from components.metrics.reference import Reference

    if is_energy(identity.name):
        return EnergyReference.of(np.concatenate(list(read_parts(real.features_file(identity, rows) for rows in parts))), unit)

    stats: FeatureStats | None = None
    for values in read_parts(real.features_file(identity, rows) for rows in parts):
        shift = values.astype(np.float64).mean(axis=0) if stats is None else stats.shift
        part = FeatureStats.of(values, shift)
        stats = part if stats is None else stats.merge(part)
    assert stats is not None
    return Reference.of(stats, unit)


def is_energy(extractor: str) -> bool:
    """Tells whether an extractor's features are compared by the energy distance, as those of few dimensions are; else by the Frechet distance."""
    return extractor.startswith("ed_")


def read_kept(file: Location, identity: Identity) -> "AnyReference":
    """Returns what samples are compared with by an extractor, from a file of ours. Raises DataError if it is no such file."""
    from components.metrics.energy import EnergyReference

    return EnergyReference.load(file) if is_energy(identity.name) else read_reference(file)


def read_reference(file: Location) -> "Reference":
    """Returns statistics from a file: ours, or of mu and sigma as others write them.

    Raises:
        DataError: if it is no such file.
    """
    from components.metrics.reference import Reference

    return Reference.load(file)
