"""Parquet files with encoded images in a column, on disk or on S3, as dataset hubs export them."""

import json
import os
import threading
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import DataError
from ..storage import Location
from .folders import Found, check_there, patiently, walk, why_unreadable
from .listing import LISTING_SCHEMA, UNSEEN, Item, Listing, ListingBuilder

LOOKED_AT = 3
LISTED_AT_ONCE = 16  # files on S3, for opening one is waiting
LABEL_ROWS = 100_000
# Threads that fetch share what is open: a row group is read once, and a ParquetFile by one of them at a time.
_READING = threading.RLock()


@dataclass(frozen=True)
class ParquetSource:
    """Rows of parquet files: `image: struct<bytes, path>`, `label`. The path of a row is `FILE#NUMBER`, the number of nine digits.

    Attributes:
        root: an absolute path, or s3://BUCKET/PREFIX.
    """

    root: str
    image_column: str | None
    label_column: str

    @property
    def is_remote(self) -> bool:
        return not Location(self.root).is_local

    def listing(self) -> Listing:
        return self.listing_of(walk(Location(self.root)))

    def listing_of(self, found: Found) -> Listing:
        """Returns the listing that follows from a walk, which it uses up.

        Raises:
            DataError: if a file cannot be read, has no image column, or there are no rows.
        """
        builder = ListingBuilder()
        with ThreadPoolExecutor(LISTED_AT_ONCE if self.is_remote else 1) as pool:
            for table in pool.map(self._rows_of, found.parquets):
                builder.extend(table)
        if not len(builder):
            raise DataError(f"data.source={self.root} holds parquet files without rows; name a folder whose files have images")
        for folder in found.unlisted:
            builder.add(folder)
        return builder.build(found.ignored + Counter({"image file beside parquet": len(found.images)}))

    def _rows_of(self, file: Item) -> pa.Table:
        root = Location(self.root)
        try:
            return _rows_of(root, file, self)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise DataError(f"data.source: {root / file.path} is not a readable parquet file ({error}); restore or remove it") from error

    def open(self) -> None:
        check_there(self.root)

    def fetch(self, path: str) -> bytes:
        name, _, row = path.rpartition("#")
        if not (name and row.isdecimal()):
            raise DataError("the folder could not be listed", "unreadable")
        try:
            value = _value(str(Location(self.root) / name), self.image_column, int(row))
        except (OSError, ValueError, IndexError, pa.ArrowException) as error:
            raise DataError(why_unreadable(error), "unreadable") from error
        value = value["bytes"] if isinstance(value, dict) else value
        if not isinstance(value, bytes):
            raise DataError("the row has no image bytes", "unreadable")
        return value


def _rows_of(root: Location, file: Item, source: ParquetSource) -> pa.Table:
    """Returns the listing's rows of one file."""
    with _open_listed(root, file) as parquet:
        schema, rows = parquet.schema_arrow, parquet.metadata.num_rows
        image_column(schema, source.image_column, file.path)
        known = source.label_column in schema.names
        batches = parquet.iter_batches(LABEL_ROWS, columns=[source.label_column]) if known and rows else ()
        names = _class_names(schema, source.label_column)
        labels = [_labels(batch.column(0), names) for batch in batches] if known else [pa.nulls(rows, pa.string())]
    first = os.fsencode(file.path)
    path = pa.array([b"%b#%09d" % (first, row) for row in range(rows)], pa.binary())
    stamp = file.stamp if source.is_remote else f"{file.size}:{file.stamp}"
    columns = [path, pa.chunked_array(labels, pa.string()), pa.array(np.full(rows, -1)), pa.repeat(pa.scalar(stamp), rows)]
    return pa.table(columns, schema=LISTING_SCHEMA)


def _labels(values: pa.Array, names: Mapping[int, str]) -> pa.Array:
    if pa.types.is_nested(values.type):
        return pa.array([_label(value, names) for value in values.to_pylist()], pa.string())
    encoded = values if pa.types.is_dictionary(values.type) else values.dictionary_encode()
    return pa.array([_label(value, names) for value in encoded.dictionary.to_pylist()], pa.string()).take(encoded.indices)


def _label(value: object, names: Mapping[int, str]) -> str | None:
    if value in (None, "", b""):
        return None
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return names.get(value, str(value)) if isinstance(value, int) else str(value)


def image_column(schema: pa.Schema, wanted: str | None, name: str) -> str:
    """Returns the name of the column that holds images.

    Raises:
        DataError: if it is not there, is of another type, or is not the only candidate.
    """
    candidates = [field.name for field in schema if _holds_images(field.type, named=field.name == wanted)]
    if wanted is not None:
        if wanted not in candidates:
            raise DataError(f"data.image_column={wanted} is no image column of {name}; use one of struct<bytes, path> or binary among {schema.names}")
        return wanted
    if len(candidates) != 1:
        raise DataError(f"{name} has {len(candidates)} columns of type struct<bytes, path> among {schema.names}; set data.image_column to the right one")
    return candidates[0]


def holds_images(root: Location, parquets: list[Item]) -> bool:
    """Tells whether one of the first few files has a column of type struct<bytes, path>; one that cannot be read has none."""
    for file in sorted(parquets)[:LOOKED_AT]:
        try:
            with _open_listed(root, file) as parquet:
                if any(_holds_images(column.type, named=False) for column in parquet.schema_arrow):
                    return True
        except (OSError, ValueError, pa.ArrowException):
            continue
    return False


def _holds_images(kind: pa.DataType, *, named: bool) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return named and (pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _class_names(schema: pa.Schema, column: str) -> dict[int, str]:
    metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = metadata.get("info", {}).get("features", {}).get(column, {})
    return dict(enumerate(feature.get("names", []))) if isinstance(feature, dict) else {}


def _open(file: Location) -> pq.ParquetFile:
    return patiently(lambda: pq.ParquetFile(file.open(), pre_buffer=not file.is_local))


def _open_listed(root: Location, file: Item) -> pq.ParquetFile:
    if file.stamp == UNSEEN:
        raise OSError("it is no regular file, or may not be read")  # a FIFO would block
    return _open(root / file.path)


@lru_cache(maxsize=4)
def _opened(file: str, wanted: str | None) -> tuple[pq.ParquetFile, str, np.ndarray]:
    parquet = _open(Location(file))
    ends = np.cumsum([parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)])
    return parquet, image_column(parquet.schema_arrow, wanted, file), ends


@lru_cache(maxsize=2)
def _group(file: str, wanted: str | None, group: int) -> pa.ChunkedArray:
    parquet, column, _ = _opened(file, wanted)
    return patiently(lambda: parquet.read_row_group(group, columns=[column])).column(0)


def _value(file: str, wanted: str | None, row: int) -> object:
    with _READING:
        ends = _opened(file, wanted)[2]
        group = int(np.searchsorted(ends, row, side="right"))
        return _group(file, wanted, group)[row - (int(ends[group - 1]) if group else 0)].as_py()
