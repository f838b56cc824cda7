"""The parquet contract: what a shard holds, the manifest that makes shards a dataset, and the digest that names it.

datasets/DIGEST/
shard-00000.parquet ...   pixels (fixed_size_binary of C*H*W bytes), label, source
quarantine.parquet        path, reason, detail, bytes of every file left out
manifest.json             counts and checksums, written last: without it there is no dataset
"""

import hashlib
import json
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from ..errors import DataError
from ..storage import Location

MANIFEST = "manifest.json"
QUARANTINE = "quarantine.parquet"
ROW_GROUP_BYTES = 4 << 20
QUARANTINE_SCHEMA = pa.schema([("path", pa.string()), ("reason", pa.string()), ("detail", pa.string()), ("bytes", pa.int64())])


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
    rows: int
    bytes: int
    sha256: str
    """Checksum of the file."""
    content_sha256: str
    """Checksum of its rows: pixels, labels and sources, however the file encodes them."""
    labels: dict[str, int]
    """Rows of each label; rows without a label count under the empty name."""


class Manifest(_Record):
    """What a dataset holds."""

    digest: str
    """Names the rows: equal digests mean equal pixels, labels and sources in equal order."""
    plan: str
    """Digest of the listing and settings that the shards were made from."""
    source: str
    image_size: int
    channels: int
    num_rows: int
    num_listed: int
    """Images that the source listed: rows plus quarantined."""
    num_quarantined: int
    num_ignored: int
    """Files of the source that are no images by their name, and were not opened."""
    ignored: dict[str, int]
    """Ignored files by suffix."""
    quarantined: dict[str, int]
    """Quarantined files by reason."""
    labels: dict[str, int]
    """Rows of each label, empty where the source has none."""
    shards: tuple[Shard, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row's pixels."""
        return self.channels * self.image_size**2

    @property
    def label_names(self) -> list[str]:
        """Labels in the order of their class numbers."""
        return sorted(self.labels)


def shard_schema(channels: int, image_size: int, plan: str) -> pa.Schema:
    """Returns the schema of a shard; the shape of a row stands in its metadata."""
    metadata = {"ddpm.shape": json.dumps([channels, image_size, image_size]), "ddpm.plan": plan}
    fields = [("pixels", pa.binary(channels * image_size**2)), ("label", pa.string()), ("source", pa.string())]
    return pa.schema(fields, metadata=metadata)


def write_shard(path: Location, pixels: np.ndarray, labels: Sequence[str | None], sources: Sequence[str], plan: str) -> Shard:
    """Writes rows to a parquet file, atomically.

    Args:
        pixels: (N, C, H, W) uint8.
    """
    count, channels, image_size, _ = pixels.shape
    schema = shard_schema(channels, image_size, plan)
    width = channels * image_size**2
    column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), count, [None, pa.py_buffer(np.ascontiguousarray(pixels))])
    table = pa.table([column, pa.array(labels, pa.string()), pa.array(sources, pa.string())], schema=schema)
    write_table(path, table, row_group_size=max(1, ROW_GROUP_BYTES // width))
    return describe_shard(path, pixels, labels, sources)


def write_table(path: Location, table: pa.Table, row_group_size: int | None = None) -> None:
    """Writes a parquet file atomically."""
    with path.staged() as staging:
        pq.write_table(table, staging, compression="none", use_dictionary=["label"], row_group_size=row_group_size, write_statistics=False)


def describe_shard(path: Location, pixels: np.ndarray, labels: Sequence[str | None], sources: Sequence[str]) -> Shard:
    """Returns the manifest's entry for a shard that was just written or read back."""
    raw = path.read_bytes()
    content = hashlib.sha256(np.ascontiguousarray(pixels).data)
    content.update(json.dumps([list(labels), list(sources)], ensure_ascii=False).encode())
    names, counts = np.unique([label or "" for label in labels], return_counts=True)
    return Shard(
        name=path.name,
        rows=len(labels),
        bytes=len(raw),
        sha256=hashlib.sha256(raw).hexdigest(),
        content_sha256=content.hexdigest(),
        labels={str(name): int(count) for name, count in zip(names, counts, strict=True)},
    )


def read_shard(path: Location) -> tuple[np.ndarray, list[str | None], list[str], str]:
    """Reads a whole shard: pixels (N, C, H, W) uint8, labels, sources, plan.

    Raises:
        DataError: if the file is no shard.
    """
    try:
        table = pq.read_table(path.path, memory_map=True) if path.is_local else pq.read_table(pa.BufferReader(path.read_bytes()))
        metadata = table.schema.metadata
        channels, height, width = json.loads(metadata[b"ddpm.shape"])
        pixels = column_pixels(table.column("pixels"), (channels, height, width))
        return pixels, table.column("label").to_pylist(), table.column("source").to_pylist(), metadata[b"ddpm.plan"].decode()
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise DataError(f"{path} is not a readable shard ({error}); delete it and run preprocess again") from error


def column_pixels(column: pa.ChunkedArray, shape: tuple[int, int, int]) -> np.ndarray:
    """Returns a fixed_size_binary column as uint8 (N, C, H, W), without a copy per row."""
    width = int(np.prod(shape))
    parts = []
    for chunk in column.chunks:
        values = np.frombuffer(chunk.buffers()[1], np.uint8)[chunk.offset * width : (chunk.offset + len(chunk)) * width]
        parts.append(values.reshape(len(chunk), *shape))
    return parts[0] if len(parts) == 1 else np.concatenate([np.empty((0, *shape), np.uint8), *parts])


def dataset_digest(image_size: int, channels: int, shards: Sequence[Shard]) -> str:
    """Returns the digest of a dataset's rows: 16 hexadecimal digits."""
    parts = [f"{channels}x{image_size}x{image_size}", *(f"{shard.rows}:{shard.content_sha256}" for shard in shards)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def write_quarantine(folder: Location, bad: Sequence[BadFile]) -> None:
    """Writes the list of files that were left out, atomically; an empty list writes an empty table."""
    write_table(folder / QUARANTINE, pa.Table.from_pylist([line.model_dump() for line in bad], schema=QUARANTINE_SCHEMA))


def read_quarantine(folder: Location) -> list[BadFile]:
    """Returns the files that were left out of a dataset."""
    return [BadFile.model_validate(line) for line in pq.read_table(pa.BufferReader((folder / QUARANTINE).read_bytes())).to_pylist()]


def write_manifest(folder: Location, manifest: Manifest) -> None:
    """Writes the manifest, atomically: from this moment the folder is a dataset."""
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")


def read_manifest(folder: Location) -> Manifest:
    """Reads a dataset's manifest.

    Raises:
        DataError: if there is none, or it is no manifest.
    """
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} is not a whole dataset: its {MANIFEST} cannot be read ({error}); run preprocess") from error


def check_whole(folder: Location, manifest: Manifest) -> None:
    """Checks that every shard is there with the size that the manifest says.

    Raises:
        DataError: naming the first that is not.
    """
    found = folder.files()
    for shard in manifest.shards:
        if found.get(shard.name) != shard.bytes:
            raise DataError(f"{folder / shard.name} is missing or not {shard.bytes} bytes as {MANIFEST} says; delete the dataset and run preprocess again")


def iterate_pixels(folder: Location, manifest: Manifest, batch_size: int) -> Iterator[np.ndarray]:
    """Yields all pixels in row order, at most batch_size rows at a time, (B, C, H, W) uint8; no batch spans two shards."""
    for shard in manifest.shards:
        pixels = read_shard(folder / shard.name)[0]
        for first in range(0, len(pixels), batch_size):
            yield pixels[first : first + batch_size]
