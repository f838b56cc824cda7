"""How far new images are from those before them: what was left out, labels, brightness, contrast, each distance beside chance.

Labels are compared by the total variation distance of their shares, brightness and contrast by the Wasserstein-1 distance of one number per image.
A few new images differ from many by chance alone, so that each distance comes with the p-value of a permutation test: how often as many images
drawn from both together are as far from the rest. Both tests see at most SAMPLE images of each side, those of the smallest hashes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict

from ..spaces.space import Space
from .catalog import Dataset
from .diff import matches
from .reader import RowReader
from .shard_cache import ShardCache
from .shards import FAULTLESS, read_rows
from .summary import NO_LABEL, hash_ranks, read_bad

SAMPLE, PERMUTATIONS, SEED = 4000, 1999, 0
CHANCE = 0.001
"""p-value from which on a distance counts as chance; the smallest that the tests can find is half of it."""
SHOWN, MOST_SHARES, MOST_NAMED, BINS = 10, 10, 10, 32
BATCH_BYTES, BATCH_VALUES = 32 << 20, 1 << 21


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Distance(_Record):
    """How far new images are from those before, and how often chance alone is as far."""

    value: float
    """0 where both sides are alike, and where one of them is empty."""
    p_value: float
    """From 1 / (PERMUTATIONS + 1) to 1."""

    def exceeds(self, limit: float) -> bool:
        """Tells whether the distance is over a limit, and not by chance."""
        return self.value > limit and self.p_value < CHANCE


NO_DISTANCE = Distance(value=0.0, p_value=1.0)


class LabelCount(_Record):
    """Images of one label."""

    name: str
    before: int
    new: int


class Histogram(_Record):
    """Sampled images by a number from 0 to 1, in equal bins."""

    before: tuple[int, ...]
    new: tuple[int, ...]
    mean_before: float
    """0 where no image was sampled, `mean_new` too."""
    mean_new: float


class Drift(_Record):
    """What is new in a dataset, and how far it is from the dataset before."""

    num_before: int
    """Images before; an image is a content here, however many rows have it."""
    new_images: int
    """Images that the dataset before does not have."""
    removed_images: int
    """Images that only the dataset before has."""
    quarantined: dict[str, int]
    """Files that are quarantined now and were not before, by reason, the most frequent first; duplicates too."""
    labels: Distance
    """Total variation, 0 to 1, between the shares of labels; 0 without any label on both sides."""
    brightness: Distance
    """Wasserstein-1 distance, 0 to 1, between mean grey values of images."""
    contrast: Distance
    """Wasserstein-1 distance, 0 to 0.5, between standard deviations of grey values within images."""
    num_labels: int
    """Labels on either side, those without a label counted as one."""
    label_counts: tuple[LabelCount, ...]
    """Those whose share changed most, by name."""
    num_unseen_labels: int
    """Labels of new images that no image had before."""
    unseen_labels: dict[str, int]
    """New images of the most frequent of them."""
    grey: Histogram
    """Mean grey values."""
    shown_before: tuple[int, ...]
    """Numbers of some rows to show, in the dataset's list of rows."""
    shown_new: tuple[int, ...]

    @property
    def bad_files(self) -> int:
        """Newly quarantined files. Nothing is wrong with duplicates and with what is to be forgotten: they do not count."""
        return sum(count for reason, count in self.quarantined.items() if reason not in FAULTLESS)

    @property
    def bad_fraction(self) -> float:
        """Share of bad files among new images and bad files, 0 where there are none."""
        return self.bad_files / max(1, self.new_images + self.bad_files)


@dataclass(frozen=True)
class _Side:
    """One of both datasets.

    Attributes:
        rows: `label` and `split` of all its rows.
        images: (N,) the first row of each content that counts, in the order of hashes.
    """

    dataset: Dataset
    rows: pa.Table
    images: np.ndarray

    @property
    def sample(self) -> np.ndarray:
        return self.images[:SAMPLE]

    def label_counts(self, images: np.ndarray) -> dict[str, int]:
        """Returns how many of some images have each label."""
        counts = self.rows["label"].take(pa.array(images)).fill_null(NO_LABEL).value_counts()
        return {entry["values"]: entry["counts"] for entry in counts.to_pylist()}


def measure_drift(before: Dataset, after: Dataset, *, copies: ShardCache | None = None) -> Drift:
    """Compares the images that are new in a dataset with those of the dataset before.

    Args:
        copies: where shards that are not on a file system are copied to.

    Raises:
        DataError: if a part of a dataset cannot be read.
    """
    old, new, num_removed = _sides(before, after)
    counts = old.label_counts(old.images), new.label_counts(new.images)
    sampled = old.label_counts(old.sample), new.label_counts(new.sample)
    old_grey, new_grey = _measures(old, before.manifest.space, copies), _measures(new, before.manifest.space, copies)
    unseen = {name: count for name, count in _most_frequent(counts[1]).items() if name not in counts[0]}
    return Drift(
        num_before=len(old.images),
        new_images=len(new.images),
        removed_images=num_removed,
        quarantined=_newly_quarantined(before, after),
        labels=label_distance(*counts, *sampled),
        brightness=value_distance(old_grey[0], new_grey[0]),
        contrast=value_distance(old_grey[1], new_grey[1]),
        num_labels=len(counts[0] | counts[1]),
        label_counts=_most_changed(*counts),
        num_unseen_labels=len(unseen),
        unseen_labels=dict(list(unseen.items())[:MOST_NAMED]),
        grey=_histogram(old_grey[0], new_grey[0]),
        shown_before=tuple(old.images[:SHOWN].tolist()),
        shown_new=tuple(new.images[:SHOWN].tolist()),
    )


def _sides(before: Dataset, after: Dataset) -> tuple[_Side, _Side, int]:
    """Returns all images before, those that are new, and how many are gone."""
    tables = [read_rows(dataset.folder, dataset.manifest, ["label", "split", "sha256"]) for dataset in (before, after)]
    (old_hashes, old_rows), (hashes, rows) = (np.unique(hash_ranks(table["sha256"]), return_index=True) for table in tables)
    is_new = ~np.isin(hashes, old_hashes, assume_unique=True)
    old_table, new_table = (table.drop_columns("sha256") for table in tables)
    return _Side(before, old_table, old_rows), _Side(after, new_table, rows[is_new]), len(old_rows) - int((~is_new).sum())


def _newly_quarantined(before: Dataset, after: Dataset) -> dict[str, int]:
    old, new = (read_bad(dataset.folder, dataset.manifest) for dataset in (before, after))
    is_new = np.ones(len(new), bool)
    is_new[matches(old["path"], new["path"])[1]] = False
    return _most_frequent({entry["values"]: entry["counts"] for entry in new["reason"].filter(pa.array(is_new)).value_counts().to_pylist()})


def _most_frequent(counts: dict[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def label_distance(before: dict[str, int], new: dict[str, int], sampled_before: dict[str, int], sampled_new: dict[str, int]) -> Distance:
    """Returns the total variation distance between shares of labels, half the sum of their absolute differences.

    Args:
        before: images by label.
        sampled_before: those of them, likewise, that the test against chance is made on.
    """
    if not before or not new:
        return NO_DISTANCE
    exact, sampled = _vectors(before, new), _vectors(sampled_before, sampled_new)
    return Distance(value=min(1.0, float(_variation(*exact))), p_value=_label_p_value(*sampled))


def _vectors(before: dict[str, int], new: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    names = sorted(before | new)
    return np.array([before.get(name, 0) for name in names]), np.array([new.get(name, 0) for name in names])


def _variation(before: np.ndarray, new: np.ndarray) -> np.ndarray:
    return np.abs(before / before.sum(-1, keepdims=True) - new / new.sum(-1, keepdims=True)).sum(-1) / 2


def _label_p_value(before: np.ndarray, new: np.ndarray) -> float:
    rng, pooled, found = np.random.default_rng(SEED), before + new, _variation(before, new)
    as_far = 0
    for repeats in _parts(len(pooled)):
        drawn = rng.multivariate_hypergeometric(pooled, int(new.sum()), repeats, method="marginals")
        as_far += _count_as_far(_variation(pooled - drawn, drawn), found)
    return (1 + as_far) / (1 + PERMUTATIONS)


def value_distance(before: np.ndarray, new: np.ndarray) -> Distance:
    """Returns the Wasserstein-1 distance between two groups of numbers, the area between their distribution functions."""
    if not len(before) or not len(new):
        return NO_DISTANCE
    rng, values = np.random.default_rng(SEED), np.concatenate([before, new])
    order = np.argsort(values, kind="stable")
    gaps, is_new = np.diff(values[order]), order >= len(before)
    found, as_far = _area(is_new, len(new), gaps), 0
    for repeats in _parts(len(values)):
        drawn = rng.permuted(np.broadcast_to(is_new, (repeats, len(values))), axis=1)
        as_far += _count_as_far(_area(drawn, len(new), gaps), found)
    return Distance(value=float(found), p_value=(1 + as_far) / (1 + PERMUTATIONS))


def _area(is_new: np.ndarray, num_new: int, gaps: np.ndarray) -> np.ndarray:
    """Returns the area between distribution functions, for each row of memberships of the values in ascending order."""
    steps = np.where(is_new, 1 / num_new, -1 / (is_new.shape[-1] - num_new))
    return np.abs(np.cumsum(steps, axis=-1)[..., :-1]) @ gaps


def _count_as_far(drawn: np.ndarray, found: np.ndarray) -> int:
    """Returns how many distances are at least as large as the one that was found, but for rounding."""
    return int((drawn >= found - 1e-12).sum())


def _parts(width: int) -> Iterator[int]:
    """Yields how many permutations to make at a time, so that they need bounded memory."""
    most = max(1, BATCH_VALUES // width)
    for first in range(0, PERMUTATIONS, most):
        yield min(most, PERMUTATIONS - first)


def _most_changed(before: dict[str, int], new: dict[str, int]) -> tuple[LabelCount, ...]:
    names, (old_counts, new_counts) = sorted(before | new), _vectors(before, new)
    change = np.abs(old_counts / max(1, old_counts.sum()) - new_counts / max(1, new_counts.sum()))
    chosen = sorted(np.argsort(-change, kind="stable")[:MOST_SHARES].tolist())
    return tuple(LabelCount(name=names[place], before=int(old_counts[place]), new=int(new_counts[place])) for place in chosen)


def _histogram(before: np.ndarray, new: np.ndarray) -> Histogram:
    counts = [tuple(np.histogram(values, BINS, (0, 1))[0].tolist()) for values in (before, new)]
    means = [float(values.mean()) if len(values) else 0.0 for values in (before, new)]
    return Histogram(before=counts[0], new=counts[1], mean_before=means[0], mean_new=means[1])


def _measures(side: _Side, space: Space, copies: ShardCache | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns two numbers of each sampled row, from 0 to 1, such as mean and standard deviation of an image's grey values."""
    found = np.empty((len(side.sample), 2))
    for places, rows in _batches(side.dataset, side.rows["split"], side.sample, copies):
        found[places] = space.measure(rows)
    return found[:, 0], found[:, 1]


def rows_of(dataset: Dataset, numbers: np.ndarray, copies: ShardCache | None = None) -> np.ndarray:
    """Returns rows (len(numbers), *shape) by their number in the list of rows, of any split."""
    space = dataset.manifest.space
    out = np.empty((len(numbers), *space.shape), space.dtype)
    splits = read_rows(dataset.folder, dataset.manifest, ["split"])["split"]
    for places, rows in _batches(dataset, splits, numbers, copies):
        out[places] = rows
    return out


def _batches(dataset: Dataset, splits: pa.ChunkedArray, rows: np.ndarray, copies: ShardCache | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields all of some rows, a bounded number of bytes at a time: their places among `rows`, and what they hold."""
    per_batch = max(1, BATCH_BYTES // dataset.manifest.space.row_bytes)
    for split in dataset.manifest.splits:
        inside = pc.call_function("equal", [splits, pa.scalar(split)]).to_numpy()
        mine = np.flatnonzero(inside[rows])
        if not len(mine):
            continue
        # In the order of the shards, so that each of their parts is read about once.
        mine = mine[np.argsort(rows[mine])]
        numbers = np.cumsum(inside)[rows[mine]] - 1
        reader = RowReader(dataset.folder, dataset.manifest, split, BATCH_BYTES, copies)
        for first in range(0, len(mine), per_batch):
            yield mine[first : first + per_batch], reader.rows(numbers[first : first + per_batch])
