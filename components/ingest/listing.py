"""What a source holds: a sorted table of its images, small enough for tens of millions of them, and its digest."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from .splits import SourceSplits

LISTING_SCHEMA = pa.schema([("path", pa.binary()), ("label", pa.string()), ("size", pa.int64()), ("stamp", pa.string())])
UNSEEN = "?"
"""Stamp of a file that could not be looked at: it is never taken as unchanged."""
CHUNK_ROWS = 100_000
MOST_KINDS = 200
# One array of `binary` or `string` holds at most 2 GiB, one of these any number of bytes.
_WIDE = pa.schema([("path", pa.large_binary()), ("label", pa.large_string()), ("size", pa.int64()), ("stamp", pa.large_string())])


class Item(NamedTuple):
    """One image of a source.

    Attributes:
        path: its name within the source, unique; bytes that are no UTF-8 as `os.fsdecode` has them.
        label: class name, None without one.
        size: encoded bytes, -1 where that is not known.
        stamp: changes when the image may have changed; empty for what never changes, `UNSEEN` for what could not be looked at.
    """

    path: str
    label: str | None
    size: int
    stamp: str


@dataclass(frozen=True)
class Listing:
    """The images of a source, and what was passed over.

    Attributes:
        table: rows of `LISTING_SCHEMA`, sorted by the bytes of their unique paths.
        ignored: files and folders that were not looked into, by suffix or kind.
        splits: what becomes of the splits that the source names; None where all of it is one.
        held_out: (N,) whether an image is of the split that is held out; None without one.
    """

    table: pa.Table
    ignored: Mapping[str, int]
    splits: "SourceSplits | None" = None
    held_out: np.ndarray | None = None

    def __len__(self) -> int:
        return self.table.num_rows

    def digest(self) -> str:
        """Returns a digest (64 hexadecimal digits) that changes when an image is added, removed, renamed, relabelled or rewritten."""
        state = hashlib.sha256(f"listing v1 {self.table.num_rows}".encode())
        for name in LISTING_SCHEMA.names:
            chunks = [chunk for chunk in self.table.column(name).chunks if len(chunk)]
            for part in (_sizes, _lengths, _content):
                for chunk in chunks:
                    state.update(part(chunk))
        return state.hexdigest()


# Each gives a part of a column as bytes that are the same however its rows are cut into chunks, and nothing where the type has no such part.


def _sizes(chunk: pa.Array) -> memoryview | bytes:
    return np.ascontiguousarray(chunk.to_numpy(zero_copy_only=False), "<i8").data if pa.types.is_integer(chunk.type) else b""


def _lengths(chunk: pa.Array) -> memoryview | bytes:
    if pa.types.is_integer(chunk.type):
        return b""
    import pyarrow.compute as pc  # here, as decoders import this module and have no use for it

    return np.ascontiguousarray(pc.call_function("binary_length", [chunk]).fill_null(-1).to_numpy(zero_copy_only=False), "<i4").data


def _content(chunk: pa.Array) -> memoryview | bytes:
    if pa.types.is_integer(chunk.type):
        return b""
    # A null may hide bytes, which are no part of the content.
    full = chunk.fill_null("") if chunk.null_count else chunk
    _, offsets, values = full.buffers()
    ends = np.frombuffer(offsets, np.int32)[full.offset : full.offset + len(full) + 1]
    return memoryview(values)[int(ends[0]) : int(ends[-1])] if values is not None else b""


class ListingBuilder:
    """Collects the images of a source in any order; every `CHUNK_ROWS` of them are packed, so that millions cost no Python objects."""

    def __init__(self) -> None:
        self._rows: list[tuple[bytes, str | None, int, str]] = []
        self._packed: list[pa.Table] = []

    def __len__(self) -> int:
        return len(self._rows) + sum(table.num_rows for table in self._packed)

    def add(self, item: Item) -> None:
        """Adds one image."""
        self._rows.append((os.fsencode(item.path), item.label, item.size, item.stamp))
        if len(self._rows) >= CHUNK_ROWS:
            self._pack()

    def extend(self, table: pa.Table) -> None:
        """Adds the rows of a table of `LISTING_SCHEMA`."""
        self._packed.append(table)

    def build(self, ignored: Mapping[str, int]) -> Listing:
        """Returns the listing of all that was added, and forgets it; a path that was added twice is listed once."""
        self._pack()
        table = pa.concat_tables([LISTING_SCHEMA.empty_table(), *self._packed])
        self._packed = []
        if not _ascends(table):
            table = _unique(_sorted(table))
        return Listing(table.combine_chunks(), _summary(ignored))

    def _pack(self) -> None:
        if self._rows:
            columns = [pa.array(values, field.type) for values, field in zip(zip(*self._rows, strict=True), LISTING_SCHEMA, strict=True)]
            self._packed.append(pa.table(columns, schema=LISTING_SCHEMA))
            self._rows = []


def _ascends(table: pa.Table) -> bool:
    return all(chunk.false_count == 0 for chunk in _beside_the_next("less", table))


def _sorted(table: pa.Table) -> pa.Table:
    wide = table.cast(_WIDE).sort_by("path")
    return pa.concat_tables([wide.slice(first, CHUNK_ROWS).cast(LISTING_SCHEMA) for first in range(0, len(wide), CHUNK_ROWS)])


def _unique(table: pa.Table) -> pa.Table:
    if _ascends(table):
        return table
    return table.filter(pa.chunked_array([*_beside_the_next("not_equal", table), pa.array([True])]))


def _beside_the_next(comparison: str, table: pa.Table) -> list[pa.BooleanArray]:
    """Returns how each path but the last compares with the one that follows it."""
    import pyarrow.compute as pc

    path = table.column("path")
    return pc.call_function(comparison, [path[:-1], path[1:]]).chunks


def _summary(ignored: Mapping[str, int]) -> dict[str, int]:
    """Returns the counts sorted by name, the rarest in one where there are very many, as of files that are numbered behind a dot."""
    ranked = sorted((-count, kind) for kind, count in ignored.items() if count)
    kept = Counter({kind: -count for count, kind in ranked[:MOST_KINDS]})
    if ranked[MOST_KINDS:]:
        kept["other suffixes"] += -sum(count for count, _ in ranked[MOST_KINDS:])
    return dict(sorted(kept.items()))


def items_of(table: pa.Table) -> Iterator[Item]:
    """Yields the rows of a listing's table, in order, holding few of them as Python objects."""
    for batch in table.to_batches(max_chunksize=10_000):
        path, label, size, stamp = (batch.column(name).to_pylist() for name in LISTING_SCHEMA.names)
        yield from map(Item, map(os.fsdecode, path), label, size, stamp)


def label_of(path: str) -> str | None:
    """Returns the first folder level of a path as text, None without one."""
    folder, slash, _ = path.partition("/")
    return printable(folder) if slash and folder else None


def printable(path: str) -> str:
    """Returns a file name as text: bytes that are not UTF-8 are escaped in hexadecimal."""
    return path if path.isascii() else os.fsencode(path).decode("utf-8", "backslashreplace")


def printable_column(paths: pa.ChunkedArray) -> pa.Array:
    """Returns file names (binary) as text, as `printable` makes it."""
    column = paths.combine_chunks()
    try:
        return column.cast(pa.string())
    except pa.ArrowInvalid:
        return pa.array([printable(os.fsdecode(path)) for path in column.to_pylist()], pa.string())
