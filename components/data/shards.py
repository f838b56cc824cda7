"""The parquet contract: what a shard holds, the manifest that makes shards a dataset, and the digest that names it.

datasets/SOURCE/                one source under one definition of its rows
    shards/CONTENT.parquet      rows (fixed_size_binary, such as C*H*W bytes of pixels), label, source; never changed, shared by versions
    VERSION/                    a dataset: VERSION begins with its digest
        rows-SHA.parquet        every row in its order: source, label, split, content, and where its pixels are
        quarantine.parquet      path, reason, detail, bytes of every file left out
        manifest.json           counts and checksums, written last: without it there is no dataset
"""

import hashlib
import io
import json
from collections.abc import Sequence
from typing import Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from ..errors import DataError
from ..spaces.kinds import AnySpace
from ..spaces.space import Space
from ..storage import Location

MANIFEST = "manifest.json"
QUARANTINE = "quarantine.parquet"
SHARDS = "shards"
ROW_GROUP_BYTES = 4 << 20
DIGEST_LENGTH = 16
QUARANTINE_SCHEMA = pa.schema([("path", pa.string()), ("reason", pa.string()), ("detail", pa.string()), ("bytes", pa.int64())])
ROWS_SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("label", pa.string()),
        ("split", pa.string()),
        ("bytes", pa.int64()),
        ("sha256", pa.binary(32)),
        ("shard", pa.int32()),
        ("row", pa.int32()),
    ]
)
Split = Literal["train", "holdout"]
DUPLICATE, FORGOTTEN = "duplicate", "forgotten"
FAULTLESS = (DUPLICATE, FORGOTTEN)
"""Reasons for which a file is no row though nothing is wrong with it."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class BadFile(_Record):
    """One line of the quarantine list."""

    path: str
    reason: str
    """Short class for counting, such as `truncated`."""
    detail: str
    bytes: int
    """Size of the file, -1 where it is not known."""


class Shard(_Record):
    """One file of a dataset."""

    name: str
    split: Split
    rows: int
    bytes: int
    sha256: str
    """Checksum of the file."""


class Manifest(_Record):
    """What a dataset holds."""

    digest: str
    """Names the rows: equal digests mean equal values, labels, sources and splits in equal order."""
    source: str
    definition: str
    """Which definition of rows was followed."""
    space: AnySpace
    """What rows are, and what became of them."""
    num_listed: int
    """Files that the source listed: rows plus quarantined."""
    num_rows: int
    num_quarantined: int
    quarantined: dict[str, int]
    """Quarantined files by reason."""
    num_ignored: int
    """Files of the source that are no images by their name, and were not opened."""
    ignored: dict[str, int]
    """Ignored files by suffix."""
    splits: dict[Split, int]
    """Rows of each part."""
    source_splits: dict[str, int] = {}
    """Files of each split that the source names, empty where it is all one."""
    source_split: str | None = None
    """Which of these is trained on."""
    holdout_split: str | None = None
    """Which of these is held out."""
    labels: dict[str, int]
    """Rows of each label, empty where the source has none."""
    source_bytes: int
    """Encoded bytes of the rows' files, as far as they are known."""
    rows_file: str
    """The list of rows."""
    rows_sha256: str
    shards: tuple[Shard, ...]

    @model_validator(mode="before")
    @classmethod
    def _read_older(cls, values: object) -> object:
        """Takes a manifest from when all rows were pixels."""
        if isinstance(values, dict) and "recipe" in values and "space" not in values:
            return {("space" if name == "recipe" else name): value for name, value in values.items()}
        return values

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        sums = {"num_listed": self.num_rows + self.num_quarantined, "num_quarantined": sum(self.quarantined.values()), "num_rows": sum(self.splits.values())}
        for name, expected in {**sums, "num_ignored": sum(self.ignored.values())}.items():
            if getattr(self, name) != expected:
                raise ValueError(f"{name}={getattr(self, name)} does not add up: its parts are {expected}")
        if sum(shard.rows for shard in self.shards) != self.num_rows:
            raise ValueError(f"num_rows={self.num_rows} does not add up: the shards hold {sum(shard.rows for shard in self.shards)}")
        return self

    @property
    def num_train(self) -> int:
        """Rows to train on."""
        return self.splits.get("train", 0)

    @property
    def label_names(self) -> list[str]:
        """Labels in the order of their class numbers."""
        return sorted(self.labels)


def shard_location(folder: Location, name: str) -> Location:
    """Returns where a shard of the dataset in a folder lies."""
    return folder.parent / SHARDS / name


def shard_schema(space: Space) -> pa.Schema:
    """Returns the schema of a shard; the shape of a row stands in its metadata."""
    metadata = {"ddpm.shape": json.dumps(list(space.row_shape))}
    return pa.schema([(space.column, pa.binary(space.row_bytes)), ("label", pa.string()), ("source", pa.string())], metadata=metadata)


def shard_table(space: Space, rows: np.ndarray, labels: pa.Array, sources: pa.Array) -> pa.Table:
    """Returns rows as a shard holds them.

    Args:
        rows: (N, *row_shape) of the space's type.
        labels: strings, null without one.
        sources: strings.
    """
    column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(space.row_bytes), len(rows), [None, pa.py_buffer(np.ascontiguousarray(rows, space.dtype))])
    return pa.table([column, labels, sources], schema=shard_schema(space))


def write_shard(shards: Location, table: pa.Table, space: Space, split: Split, staging: Location | None = None) -> Shard:
    """Writes rows to the folder of shards, atomically, under a name made of their content.

    Args:
        table: of `shard_table`.
        staging: folder for the file while it is written.
    """
    content = shard_bytes(table, max(1, ROW_GROUP_BYTES // space.row_bytes))
    sha256 = hashlib.sha256(content).hexdigest()
    name = _content_name(sha256)
    (shards / name).write_bytes(content, staging=staging)
    return Shard(name=name, split=split, rows=table.num_rows, bytes=len(content), sha256=sha256)


def read_checked_shard(path: Location) -> pa.Table:
    """Reads a whole shard whose name says its content.

    Raises:
        DataError: if the file is damaged.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); run preprocess again") from error
    if _content_name(hashlib.sha256(content).hexdigest()) != path.name:
        raise DataError(f"{path} is damaged: its content is not the one of its name; delete it and run preprocess again, which makes its rows anew")
    return pq.ParquetFile(pa.BufferReader(content)).read(use_threads=False)


def _content_name(sha256: str) -> str:
    return f"{sha256[:32]}.parquet"


def column_rows(column: pa.ChunkedArray, space: Space) -> np.ndarray:
    """Returns a fixed_size_binary column as rows (N, *row_shape), without a copy per row."""
    parts = []
    for chunk in column.chunks:
        values = np.frombuffer(chunk.buffers()[1], np.uint8)[chunk.offset * space.row_bytes : (chunk.offset + len(chunk)) * space.row_bytes]
        parts.append(values.view(space.dtype).reshape(len(chunk), *space.row_shape))
    return parts[0] if len(parts) == 1 else np.concatenate([np.empty((0, *space.row_shape), space.dtype), *parts])


def parquet_bytes(table: pa.Table) -> bytes:
    """Returns a table that is no shard as the bytes of a parquet file, equal for equal tables."""
    sink = io.BytesIO()
    pq.write_table(table.combine_chunks(), sink, compression="zstd", row_group_size=1 << 18, write_statistics=False)
    return sink.getvalue()


def shard_bytes(table: pa.Table, row_group_size: int) -> memoryview:
    """Returns the rows of a shard as the bytes of a parquet file, equal for equal rows."""
    sink = io.BytesIO()
    pq.write_table(table.combine_chunks(), sink, compression="none", use_dictionary=["label"], row_group_size=row_group_size, write_statistics=False)
    return sink.getbuffer()


def read_table(file: Location, columns: Sequence[str] | None = None) -> pa.Table:
    """Reads a whole parquet file. Raises OSError or ArrowException if that fails."""
    return pq.ParquetFile(pa.BufferReader(file.read_bytes())).read(columns=None if columns is None else list(columns))


def write_rows(folder: Location, rows: pa.Table, staging: Location | None = None) -> tuple[str, str]:
    """Writes the list of a dataset's rows (ROWS_SCHEMA), atomically; returns the file's name and its SHA-256."""
    content = parquet_bytes(rows.cast(ROWS_SCHEMA))
    sha256 = hashlib.sha256(content).hexdigest()
    name = f"rows-{sha256[:DIGEST_LENGTH]}.parquet"
    (folder / name).write_bytes(content, staging=staging)
    return name, sha256


def read_rows(folder: Location, manifest: Manifest, columns: Sequence[str] | None = None) -> pa.Table:
    """Reads the list of a dataset's rows, in their order.

    Raises:
        DataError: if it is not there or not the one that the manifest names.
    """
    file = folder / manifest.rows_file
    try:
        content = file.read_bytes()
        if hashlib.sha256(content).hexdigest() != manifest.rows_sha256:
            raise DataError(f"{file} does not match the checksum in {MANIFEST}; delete the dataset and run preprocess again")
        return pq.ParquetFile(pa.BufferReader(content)).read(columns=None if columns is None else list(columns))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file} cannot be read ({error}); delete the dataset and run preprocess again") from error


def write_quarantine(folder: Location, bad: pa.Table, staging: Location | None = None) -> None:
    """Writes the list of files that were left out (QUARANTINE_SCHEMA), atomically."""
    (folder / QUARANTINE).write_bytes(parquet_bytes(bad.cast(QUARANTINE_SCHEMA)), staging=staging)


def read_quarantine(folder: Location) -> list[BadFile]:
    """Returns the files that were left out of a dataset."""
    return [BadFile.model_validate(line) for line in read_table(folder / QUARANTINE).to_pylist()]


def write_manifest(folder: Location, manifest: Manifest, staging: Location | None = None) -> None:
    """Writes the manifest, atomically: from this moment the folder is a dataset."""
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", staging=staging)


def read_manifest(folder: Location) -> Manifest:
    """Reads a dataset's manifest.

    Raises:
        DataError: if there is none, or it is no manifest.
    """
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        reason = f"{error.errors()[0]['msg']}" if isinstance(error, ValidationError) else str(error)
        raise DataError(f"{folder} is not a whole dataset: its {MANIFEST} cannot be read ({reason}); run preprocess") from error


def check_whole(folder: Location, manifest: Manifest) -> None:
    """Checks that every shard is there with the size that the manifest says.

    Raises:
        DataError: naming the first that is not.
    """
    if not (folder / manifest.rows_file).is_file():
        raise DataError(f"{folder / manifest.rows_file} is missing; run preprocess again")
    found = (folder.parent / SHARDS).files()
    for shard in manifest.shards:
        if found.get(shard.name) != shard.bytes:
            path = shard_location(folder, shard.name)
            raise DataError(f"{path} is missing or not {shard.bytes} bytes as {MANIFEST} says; run preprocess again")
