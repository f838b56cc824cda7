"""What changed from one dataset to another: rows, quarantine, settings of the space. Columns are compared whole, so that millions of rows take seconds."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .catalog import Dataset
from .shards import Manifest, read_rows
from .summary import NO_LABEL, read_bad

Value = TypeVar("Value")
_ROW_COLUMNS = ("source", "label", "split", "sha256")


@dataclass(frozen=True)
class Change:
    """Rows or files to which one thing happened.

    Attributes:
        by: how many by what it is about: a label, a reason, `from -> to`.
        examples: the first of them.
    """

    count: int
    by: dict[str, int]
    examples: tuple[str, ...]


@dataclass(frozen=True)
class DatasetDiff:
    """What differs between two datasets.

    Attributes:
        settings: what differs of source, definition and space, by name: before, after.
        rows: `added`, `removed`, `renamed` (same content, other path), `changed` (same path, other content); of the rows that are in both, also
            `relabelled` and `moved` between splits.
        quarantine: `newly` and `no_longer` quarantined files, and those with `other_reason`.
        ignored: files that are no images, by suffix: before, after.
        same_rows: rows with path and content as before.
        same_digest: whether the digests are equal, and with them pixels, labels, splits and order of all rows.
    """

    settings: dict[str, tuple[str, str]]
    rows: dict[str, Change]
    quarantine: dict[str, Change]
    ignored: dict[str, tuple[int, int]]
    same_rows: int
    same_digest: bool

    @property
    def other_pixels(self) -> bool:
        """Whether all rows are made in another way. Limits only decide which images are rows."""
        return bool(self.settings.keys() - {"source", "space.min_side", "space.max_pixels"})

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        parts = [*self.rows.values(), *self.quarantine.values()]
        return self.same_digest and not self.settings and not self.ignored and not any(part.count for part in parts)


def diff_datasets(before: Dataset, after: Dataset, num_examples: int = 10) -> DatasetDiff:
    """Compares two datasets.

    Raises:
        DataError: if the list of rows or of the quarantine of one cannot be read.
    """
    rows, num_same = _rows(read_rows(before.folder, before.manifest, _ROW_COLUMNS), read_rows(after.folder, after.manifest, _ROW_COLUMNS), num_examples)
    bad = _quarantine(read_bad(before.folder, before.manifest), read_bad(after.folder, after.manifest), num_examples)
    settings = _differing(_settings(before.manifest), _settings(after.manifest), "")
    ignored = _differing(before.manifest.ignored, after.manifest.ignored, 0)
    return DatasetDiff(settings, rows, bad, ignored, num_same, before.manifest.digest == after.manifest.digest)


def matches(before: pa.ChunkedArray, after: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the positions of equal values in two columns, in the order of the first; the n-th of equal values is paired with the n-th."""
    keys = pa.chunked_array([*before.chunks, *after.chunks], before.type).dictionary_encode()
    codes = np.concatenate([np.empty(0, np.int64), *(chunk.indices.to_numpy(zero_copy_only=False) for chunk in keys.chunks)]).astype(np.int64)
    first, second = codes[: len(before)], codes[len(before) :]
    size = max(len(codes), 1)
    _, left, right = np.intersect1d(first * size + _occurrence(first), second * size + _occurrence(second), assume_unique=True, return_indices=True)
    order = np.argsort(left)
    return left[order], right[order]


def _occurrence(codes: np.ndarray) -> np.ndarray:
    """Returns for each value how many equal ones stand before it."""
    order = np.argsort(codes, kind="stable")
    ordered = codes[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=-1))
    counts = np.empty(len(codes), np.int64)
    counts[order] = np.arange(len(codes)) - np.repeat(starts, np.diff(starts, append=len(codes)))
    return counts


def _rows(before: pa.Table, after: pa.Table, num_examples: int) -> tuple[dict[str, Change], int]:
    left, right = matches(before["source"], after["source"])
    changed = _unlike(before["sha256"], after["sha256"], left, right)
    gone, come = _others(len(before), left), _others(len(after), right)
    renamed_left, renamed_right = matches(before["sha256"].take(pa.array(gone)), after["sha256"].take(pa.array(come)))
    renamed_left, renamed_right = gone[renamed_left], come[renamed_right]
    removed, added = np.setdiff1d(gone, renamed_left, assume_unique=True), np.setdiff1d(come, renamed_right, assume_unique=True)
    both = np.concatenate([left, renamed_left]), np.concatenate([right, renamed_right])
    old_labels, new_labels = (table["label"].fill_null(NO_LABEL) for table in (before, after))
    sources = before["source"], after["source"]
    found = {
        "added": _change(_named(after["source"], added, num_examples), _picked(new_labels, added)),
        "removed": _change(_named(before["source"], removed, num_examples), _picked(old_labels, removed)),
        "renamed": _paired(*sources, renamed_left, renamed_right, num_examples),
        "changed": _change(_named(after["source"], right[changed], num_examples), _picked(new_labels, right[changed])),
        "relabelled": _turned(sources[1], old_labels, new_labels, *both, num_examples),
        "moved": _turned(sources[1], before["split"], after["split"], *both, num_examples),
    }
    return found, len(left) - len(changed)


def _quarantine(before: pa.Table, after: pa.Table, num_examples: int) -> dict[str, Change]:
    left, right = matches(before["path"], after["path"])
    come, gone = _others(len(after), right), _others(len(before), left)
    return {
        "newly": _change(_named(after["path"], come, num_examples), _picked(after["reason"], come)),
        "no_longer": _change(_named(before["path"], gone, num_examples), _picked(before["reason"], gone)),
        "other_reason": _turned(after["path"], before["reason"], after["reason"], left, right, num_examples),
    }


def _turned(names: pa.ChunkedArray, before: pa.ChunkedArray, after: pa.ChunkedArray, left: np.ndarray, right: np.ndarray, num_examples: int) -> Change:
    """Returns the rows, by name and in their order, where a value became another."""
    unlike = _unlike(before, after, left, right)
    left, right = left[unlike], right[unlike]
    order = np.argsort(right)
    return _change(_named(names, right[order], num_examples), _picked(before, left), _picked(after, right))


def _paired(before: pa.ChunkedArray, after: pa.ChunkedArray, left: np.ndarray, right: np.ndarray, num_examples: int) -> Change:
    pairs = zip(_named(before, left, num_examples), _named(after, right, num_examples), strict=True)
    return Change(len(left), {}, tuple(f"{old} -> {new}" for old, new in pairs))


def _change(examples: Iterable[str], *values: pa.ChunkedArray) -> Change:
    """Returns a change of which each row has one value, or a value before and one after."""
    names = [str(number) for number in range(len(values))]
    groups = pa.table(list(values), names=names).group_by(names).aggregate([([], "count_all")]).to_pylist()
    counts = {" -> ".join(group[name] for name in names): int(group["count_all"]) for group in groups}
    return Change(len(values[0]), dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))), tuple(examples))


def _others(count: int, positions: np.ndarray) -> np.ndarray:
    mask = np.ones(count, bool)
    mask[positions] = False
    return np.flatnonzero(mask)


def _unlike(before: pa.ChunkedArray, after: pa.ChunkedArray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Returns the numbers of the pairs in which a value became another."""
    pairs = pa.table({"before": _picked(before, left), "after": _picked(after, right), "pair": np.arange(len(left))})
    return pairs.filter(pc.field("before") != pc.field("after"))["pair"].to_numpy()


def _picked(column: pa.ChunkedArray, positions: np.ndarray) -> pa.ChunkedArray:
    return column.take(pa.array(positions))


def _named(column: pa.ChunkedArray, positions: np.ndarray, count: int) -> list[str]:
    """Returns the first few of some values; taking them would first join a whole column of long paths."""
    return [column[int(position)].as_py() for position in positions[:count]]


def _settings(manifest: Manifest) -> dict[str, str]:
    space = {f"space.{name}": str(value) for name, value in manifest.space.settings().items()}
    return {"source": manifest.source, "definition": manifest.definition, **space}


def _differing(before: Mapping[str, Value], after: Mapping[str, Value], missing: Value) -> dict[str, tuple[Value, Value]]:
    pairs = {name: (before.get(name, missing), after.get(name, missing)) for name in dict.fromkeys([*before, *after])}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
