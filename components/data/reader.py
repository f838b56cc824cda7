"""Rows of a dataset by number, in bounded memory."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..spaces.space import Space
from ..storage import Location
from .shard_cache import ShardCache
from .shards import Manifest, Split, column_rows, shard_location

CACHE_BYTES = 3 << 29
OPEN_FILES = 128
NO_LABEL = -1


class RowReader:
    """Reads rows by their number; keeps the row groups it used last, up to 1.5 GiB.

    The row order of `order.py` touches at most 1 GiB at a time, so that each row group is read about once per epoch.

    Args:
        split: the part of the dataset whose rows are numbered from 0 on, in the order of the list of rows.
        copies: where shards that are not on a file system are copied to; a temporary folder by default.
    """

    def __init__(self, folder: Location, manifest: Manifest, split: Split = "train", cache_bytes: int = CACHE_BYTES, copies: ShardCache | None = None) -> None:
        self._folder, self._manifest, self._split = folder, manifest, split
        self._copies = copies or ShardCache.of()
        self._shards, self._places = self._copies.use(folder / manifest.rows_file, manifest.rows_sha256, lambda path: _places(path, split))
        self._files: OrderedDict[int, tuple[pq.ParquetFile, np.ndarray]] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._cache_bytes, self._held_bytes = cache_bytes, 0

    @property
    def space(self) -> Space:
        """What the rows are."""
        return self._manifest.space

    def __len__(self) -> int:
        return len(self._places)

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """Returns rows (len(numbers), *row_shape) of the dataset's space, in the order asked for.

        Raises:
            IndexError: if a row number is outside the dataset.
        """
        if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < len(self):
            raise IndexError(f"rows {int(numbers.min())}..{int(numbers.max())} are outside a dataset of {len(self)} rows")
        space = self._manifest.space
        out = np.empty((len(numbers), *space.row_shape), space.dtype)
        shards = self._shards[numbers]
        for shard in np.unique(shards):
            mine = np.flatnonzero(shards == shard)
            self._gather(int(shard), self._places[numbers[mine]], mine, out)
        return out

    def labels(self, rows: np.ndarray) -> np.ndarray:
        """Returns class numbers (len(rows),) int32, places in the manifest's `label_names`; NO_LABEL for a row without a label."""
        return self._labels[rows]

    @cached_property
    def _labels(self) -> np.ndarray:
        manifest = self._manifest
        return self._copies.use(self._folder / manifest.rows_file, manifest.rows_sha256, lambda path: _labels(path, self._split, manifest.label_names))

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """Yields all rows in their order, at most batch_size at a time, (B, *shape)."""
        for first in range(0, len(self), batch_size):
            yield self.rows(np.arange(first, min(first + batch_size, len(self))))

    def _gather(self, shard: int, rows: np.ndarray, places: np.ndarray, out: np.ndarray) -> None:
        group_ends = self._open(shard)[1]
        groups = np.searchsorted(group_ends, rows, side="right")
        for group in np.unique(groups):
            mine = groups == group
            begin = int(group_ends[group - 1]) if group else 0
            out[places[mine]] = self._group(shard, int(group))[rows[mine] - begin]

    def _open(self, shard: int) -> tuple[pq.ParquetFile, np.ndarray]:
        if shard not in self._files:
            entry = self._manifest.shards[shard]
            location = shard_location(self._folder, entry.name)
            file = self._copies.use(location, entry.sha256, lambda path: pq.ParquetFile(path, memory_map=True))
            counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            self._files[shard] = (file, np.cumsum(counts))
            if len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)
        self._files.move_to_end(shard)
        return self._files[shard]

    def _group(self, shard: int, group: int) -> np.ndarray:
        key = (shard, group)
        if key not in self._groups:
            table = self._open(shard)[0].read_row_group(group, columns=[self._manifest.space.column], use_threads=False)
            self._groups[key] = column_rows(table.column(0), self._manifest.space)
            self._held_bytes += self._groups[key].nbytes
            self._evict()
        self._groups.move_to_end(key)
        return self._groups[key]

    def _evict(self) -> None:
        while self._held_bytes > self._cache_bytes and len(self._groups) > 1:
            self._held_bytes -= self._groups.popitem(last=False)[1].nbytes


def _places(rows_file: Path, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Returns shard and place in it of every row of a split."""
    table = pq.read_table(rows_file, columns=["shard", "row"], filters=[("split", "=", split)], use_threads=False)
    return table.column("shard").to_numpy(), table.column("row").to_numpy()


def _labels(rows_file: Path, split: Split, label_names: Sequence[str]) -> np.ndarray:
    """Returns the class number of every row of a split, a part of the file at a time: text is larger than numbers."""
    names, parts = pa.array(label_names, pa.string()), [np.empty(0, np.int32)]
    with pq.ParquetFile(rows_file) as file:
        for rows in file.iter_batches(columns=["label", "split"], use_threads=False):
            numbers = pc.call_function("index_in", [rows["label"]], pc.SetLookupOptions(names)).fill_null(NO_LABEL)
            parts.append(numbers.filter(pc.call_function("equal", [rows["split"], pa.scalar(split)])).to_numpy())
    return np.concatenate(parts)
