"""What a dataset looks like: a few of its images, chosen by their content, and a few of the files that were left out."""

import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from ..counts import counted
from ..errors import DataError
from ..figures import Strip, contact_sheet, titled
from ..storage import Location
from .images import to_image
from .reader import RowReader
from .shard_cache import ShardCache
from .shards import QUARANTINE, QUARANTINE_SCHEMA, Manifest, check_whole, read_rows, read_table

SHEET_LABELS, SHEET_COLUMNS = 10, 10
NO_LABEL = "(no label)"


@dataclass(frozen=True)
class Reason:
    """Files that were left out for one reason.

    Attributes:
        examples: the first of them.
    """

    count: int
    examples: tuple[str, ...]


def read_bad(folder: Location, manifest: Manifest) -> pa.Table:
    """Returns the files that were left out of a dataset (QUARANTINE_SCHEMA).

    Raises:
        DataError: if the list cannot be read.
    """
    if not manifest.num_quarantined:
        return QUARANTINE_SCHEMA.empty_table()
    try:
        return read_table(folder / QUARANTINE)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{folder / QUARANTINE} cannot be read ({error}); delete the dataset and run preprocess again") from error


def quarantine_by_reason(folder: Location, manifest: Manifest, num_examples: int = 3) -> dict[str, Reason]:
    """Returns what was left out by reason, the most frequent first. Raises DataError if the list cannot be read."""
    bad = read_bad(folder, manifest)
    reasons = sorted(manifest.quarantined.items(), key=lambda item: (-item[1], item[0]))
    paths = {reason: bad.filter(pc.field("reason") == reason)["path"].slice(0, num_examples).to_pylist() for reason, _ in reasons}
    return {reason: Reason(count, tuple(paths[reason])) for reason, count in reasons}


def chosen_rows(rows: pa.Table, num_labels: int = SHEET_LABELS, per_label: int = SHEET_COLUMNS) -> dict[str | None, np.ndarray]:
    """Returns some rows of each of some labels, both by a hash, so that a growing dataset keeps most of them.

    A file's content decides by the end of its hash: the beginning decides what is held out. Equal contents are chosen once.

    Args:
        rows: columns `label` and `sha256` of the list of rows.
    """
    labels = rows["label"].combine_chunks().dictionary_encode(null_encoding="encode")
    codes, names = labels.indices.to_numpy(zero_copy_only=False), labels.dictionary
    ranks = hash_ranks(rows["sha256"])
    chosen: dict[str | None, np.ndarray] = {}
    for code in _some(names, num_labels):
        mine = np.flatnonzero(codes == code)
        _, first = np.unique(ranks[mine], return_index=True)
        chosen[names[code].as_py()] = mine[first[:per_label]]
    return chosen


def _some(names: pa.Array, count: int) -> list[int]:
    """Returns the positions of some names, in the order of the names; null is the last."""
    texts = names.to_pylist()
    by_hash = sorted(range(len(texts)), key=lambda code: hashlib.sha256((texts[code] or "").encode()).digest())
    return sorted(by_hash[:count], key=lambda code: (texts[code] is None, texts[code]))


def hash_ranks(hashes: pa.ChunkedArray) -> np.ndarray:
    """Returns the last eight bytes of each 32-byte hash as a number; the first ones decide what is held out."""
    array = pc.fill_null(hashes.combine_chunks(), bytes(32))
    return np.frombuffer(array.buffers()[1], np.uint64, len(array) * 4, array.offset * 32)[3::4]


def dataset_sheet(folder: Location, manifest: Manifest, copies: ShardCache | None = None) -> Image.Image:
    """Returns a picture of a dataset: up to ten labels with ten images each, or a hundred images where there are no labels.

    Raises:
        DataError: if a part of the dataset is missing.
    """
    check_whole(folder, manifest)
    rows = read_rows(folder, manifest, ["label", "split", "sha256"])
    space = manifest.space
    if not space.one_tile_per_row:
        numbers = np.linspace(0, len(rows) - 1, min(len(rows), space.rows_in_a_picture)).round().astype(int)
        tile = space.tiles(_read(folder, manifest, rows["split"], numbers, copies))[0]
        return titled(to_image(tile), manifest.source, _caption(manifest, 0))
    chosen = chosen_rows(rows, per_label=SHEET_COLUMNS if manifest.labels else SHEET_LABELS * SHEET_COLUMNS)
    found = _read(folder, manifest, rows["split"], np.concatenate(list(chosen.values())), copies)
    parts = np.split(space.tiles(found), np.cumsum([len(numbers) for numbers in chosen.values()])[:-1])
    if not manifest.labels:
        strips = [Strip("", "", parts[0][first : first + SHEET_COLUMNS]) for first in range(0, len(parts[0]), SHEET_COLUMNS)]
    else:
        counts = {None: manifest.num_rows - sum(manifest.labels.values()), **manifest.labels}
        strips = [Strip(label or NO_LABEL, f"{counts[label]:,}", part) for label, part in zip(chosen, parts, strict=True)]
    return contact_sheet(strips, manifest.source, _caption(manifest, len(chosen)))


def _caption(manifest: Manifest, num_shown: int) -> str:
    space = manifest.space
    labels = f", {num_shown} of {counted(len(manifest.labels), 'label')}" if num_shown < len(manifest.labels) else ""
    return f"{counted(manifest.num_rows, space.noun, ',')}, {space.description}{labels}, dataset {manifest.digest}"


def _read(folder: Location, manifest: Manifest, splits: pa.ChunkedArray, numbers: np.ndarray, copies: ShardCache | None) -> np.ndarray:
    """Returns rows of any split, (len(numbers), *shape)."""
    out = np.empty((len(numbers), *manifest.space.row_shape), manifest.space.dtype)
    encoded = splits.combine_chunks().dictionary_encode()
    codes, names = encoded.indices.to_numpy(), encoded.dictionary.to_pylist()
    for split in (split for split in manifest.splits if split in names):
        inside = codes == names.index(split)
        mine = inside[numbers]
        if mine.any():
            out[mine] = RowReader(folder, manifest, split, copies=copies).rows(np.cumsum(inside)[numbers[mine]] - 1)
    return out
