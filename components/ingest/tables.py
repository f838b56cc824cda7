"""Parquet files with encoded images in a column, on disk or on S3, as dataset hubs export them."""

import json
import os
import threading
from collections import Counter, deque
from collections.abc import Iterator, Mapping
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
GROUP_BYTES = 64 << 20  # of images; a row group above this is not read whole
USUAL_NAMES = frozenset(["image", "images", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "image_bytes", "img_bytes", "bytes", "content"])
URL_NAMES = frozenset(["url", "urls", "image_url", "img_url", "image_link", "link", "uri", "image_uri"])
BATCH_BYTES, BATCH_ROWS = 4 << 20, 64
ROWS_BEHIND = 32  # threads that fetch ahead ask for rows about in order, at most so far apart
REMOTE_BUFFER = 8 << 20
# Threads that fetch share what is open: a row group is read once, and a ParquetFile by one of them at a time.
_READING = threading.RLock()


@dataclass(frozen=True)
class ParquetSource:
    """Rows of parquet files: `image: struct<bytes, path>` or encoded bytes, `label`. The path of a row is `FILE#NUMBER`, the number of nine digits.

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
        """Returns the bytes of a row's image. Raises DataError if there are none, MemoryError if memory does not hold them."""
        name, _, row = path.rpartition("#")
        if not (name and row.isdecimal()):
            raise DataError("the folder could not be listed", "unreadable")
        try:
            value = _value(str(Location(self.root) / name), self.image_column, int(row))
        except MemoryError:  # which Arrow's own is, and an ArrowException too
            raise
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
    """Returns the name of the column that holds images, one in each row.

    It is the one that is wanted, else the only struct<bytes, path>, else the only one of encoded bytes, or of several such the only one that is
    called as hubs and img2dataset call it.

    Raises:
        DataError: if it is not there, is of another type, or is not the only candidate. The message says what the file has instead.
    """
    structs = [field.name for field in schema if _is_struct(field.type)]
    encoded = [field.name for field in schema if _is_bytes(field.type)]
    if wanted is not None:
        if wanted not in (*structs, *encoded):
            raise DataError(f"data.image_column={wanted} is not an image column of {name}; {_instead(schema, [*structs, *encoded])}")
        return wanted
    candidates = structs or encoded
    usual = [column for column in candidates if column.lower() in USUAL_NAMES]
    if len(candidates) != 1 and not (structs == [] and len(usual) == 1):
        raise DataError(f"{name} has {len(candidates)} columns that may hold images; {_instead(schema, candidates)}")
    return candidates[0] if len(candidates) == 1 else usual[0]


def _instead(schema: pa.Schema, candidates: list[str]) -> str:
    """Returns what would be right for a file of which no column is taken."""
    if candidates:
        return f"set data.image_column to the right one of {', '.join(candidates)}"
    lists = [field.name for field in schema if _is_list(field.type) and (_is_struct(field.type.value_type) or _is_bytes(field.type.value_type))]
    if lists:
        return f"column {lists[0]} holds lists of images, and a row is one image; write a row for each image"
    urls = [field.name for field in schema if _is_text(field.type) and field.name.lower() in URL_NAMES]
    if urls:
        return (
            f"column {urls[0]} holds addresses; fetch the images first, such as by "
            f"`img2dataset --input_format parquet --url_col {urls[0]} --output_format parquet`, and name the folder that it writes"
        )
    return f"it has {', '.join(schema.names) or 'no columns'}; an image column is of encoded bytes, or struct<bytes, path> as `datasets` writes it"


def holds_images(root: Location, parquets: list[Item]) -> bool:
    """Tells whether one of the first few files has a column of images by its type or name; one that cannot be read has none."""
    for file in sorted(parquets)[:LOOKED_AT]:
        try:
            with _open_listed(root, file) as parquet:
                if any(_is_struct(field.type) or (_is_bytes(field.type) and field.name.lower() in USUAL_NAMES) for field in parquet.schema_arrow):
                    return True
        except (OSError, ValueError, pa.ArrowException):
            continue
    return False


def _plain(kind: pa.DataType) -> pa.DataType:
    """Returns the type of the values, whether they are encoded by a dictionary, or of an extension type, or not."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind


def _is_bytes(kind: pa.DataType) -> bool:
    kind, types = _plain(kind), pa.types
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind) or types.is_fixed_size_binary(kind)


def _is_struct(kind: pa.DataType) -> bool:
    kind = _plain(kind)
    place = kind.get_field_index("bytes") if pa.types.is_struct(kind) else -1
    return place >= 0 and (_is_bytes(kind.field(place).type) or pa.types.is_null(kind.field(place).type))


def _is_text(kind: pa.DataType) -> bool:
    kind = _plain(kind)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind) or types.is_list_view(kind) or types.is_large_list_view(kind)


def _class_names(schema: pa.Schema, column: str) -> dict[int, str]:
    """Returns the names that `datasets` left in a file's metadata, none where those are not as it writes them."""
    try:
        entry = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    except (ValueError, RecursionError):
        return {}
    for key in ("info", "features", column, "names"):
        entry = entry.get(key) if isinstance(entry, dict) else None
    return {number: name for number, name in enumerate(entry) if isinstance(name, str)} if isinstance(entry, list) else {}


def _open(file: Location) -> pq.ParquetFile:
    return patiently(lambda: pq.ParquetFile(file.open(), pre_buffer=not file.is_local, page_checksum_verification=True))


def _open_listed(root: Location, file: Item) -> pq.ParquetFile:
    if file.stamp == UNSEEN:
        raise OSError("it is no regular file, or may not be read")  # a FIFO would block
    return _open(root / file.path)


class _Rows:
    """The images of one file, read forward: asking for an earlier row than those just read starts its row group anew."""

    def __init__(self, file: Location, wanted: str | None) -> None:
        self._parquet = _open(file)
        self._column = image_column(self._parquet.schema_arrow, wanted, str(file))
        groups = [self._parquet.metadata.row_group(group) for group in range(self._parquet.num_row_groups)]
        self._firsts = np.cumsum([0, *(group.num_rows for group in groups)])
        self._batch_rows = [_batch_rows(group, self._column) for group in groups]
        if not file.is_local and any(rows < group.num_rows for rows, group in zip(self._batch_rows, groups, strict=True)):
            # What is read ahead of its use is whole row groups.
            self._parquet = patiently(
                lambda: pq.ParquetFile(file.open(), metadata=self._parquet.metadata, buffer_size=REMOTE_BUFFER, page_checksum_verification=True)
            )
        self._rows_behind = 0 if file.is_local else ROWS_BEHIND
        self._group, self._end = -1, 0
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._read: deque[tuple[int, pa.Array]] = deque()

    def value(self, row: int) -> object:
        """Returns one row's image. Raises what Arrow raises, and IndexError if there is no such row."""
        if not 0 <= row < self._firsts[-1]:
            raise IndexError(f"row {row} of {self._firsts[-1]}")
        try:
            held = self._held(row)
            return (self._read_up_to(row) if held is None else held).as_py()
        except BaseException:
            self._group, self._batches, self._end = -1, iter(()), 0
            self._read.clear()
            raise

    def _held(self, row: int) -> "pa.Scalar | None":
        return next((values[row - first] for first, values in self._read if 0 <= row - first < len(values)), None)

    def _read_up_to(self, row: int) -> pa.Scalar:
        group = int(np.searchsorted(self._firsts, row, side="right")) - 1
        if group != self._group or row < self._end:
            self._start(group)
        while row >= self._end:
            self._advance(row)
        first, values = self._read[-1]
        return values[row - first]

    def _start(self, group: int) -> None:
        if group != self._group + 1:
            self._read.clear()
        elif self._firsts[group] - self._end <= self._rows_behind:
            while self._end < self._firsts[group]:
                self._advance(int(self._firsts[group]))
        self._group, self._end = group, int(self._firsts[group])
        self._batches = self._parquet.iter_batches(self._batch_rows[group], row_groups=[group], columns=[self._column], use_threads=False)

    def _advance(self, row: int) -> None:
        while self._read and self._read[0][0] + len(self._read[0][1]) + self._rows_behind <= row:
            self._read.popleft()
        batch = next(self._batches, None)
        if batch is None or not len(batch):
            raise OSError("the file has fewer rows than it says")
        self._read.append((self._end, batch.column(0)))
        self._end += len(batch)
        if self._end == self._firsts[self._group + 1]:
            self._batches = iter(())  # its pages are of no more use


def _batch_rows(group: pq.RowGroupMetaData, column: str) -> int:
    """Returns how many rows of a row group to read at once."""
    leaves = [group.column(index) for index in range(group.num_columns)]
    size = sum(leaf.total_uncompressed_size for leaf in leaves if leaf.path_in_schema.split(".")[0] == column or leaf.path_in_schema == column)
    return group.num_rows if size <= GROUP_BYTES else max(1, min(BATCH_ROWS, BATCH_BYTES * group.num_rows // size))


@lru_cache(maxsize=2)
def _rows(file: str, wanted: str | None) -> _Rows:
    return _Rows(Location(file), wanted)


def _value(file: str, wanted: str | None, row: int) -> object:
    with _READING:
        return patiently(lambda: _rows(file, wanted).value(row))
