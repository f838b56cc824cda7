"""The work of making a dataset, in parts that any process can do, in any order, twice over: files to chunks, and chunks to shards.

SOURCE/work/PLAN/
    todo.arrow               the files to open, one record batch for each chunk
    chunk-NUMBER.parquet     a chunk's rows, as a shard holds them
    chunk-NUMBER.arrow       what became of each of its files, written last
"""

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa

from ..data.images import PixelRecipe
from ..data.shards import SHARDS, Shard, Split, pixels_bytes, read_checked_shard, read_shard, shard_table, write_shard
from ..storage import Location
from .decoder import Decoder, Outcome
from .ledger import OUTCOME_SCHEMA, Group, Recalled
from .listing import LISTING_SCHEMA, items_of, printable
from .sources import Source

CHUNK_FILES, CHUNK_BYTES, CHUNK_PIXEL_BYTES = 4096, 16 << 20, 32 << 20
UNKNOWN_BYTES = 16 << 10
TODO = "todo.arrow"
TODO_SCHEMA = pa.schema([*LISTING_SCHEMA, ("known", pa.binary(32))])
RESULT_SCHEMA = pa.schema([*OUTCOME_SCHEMA, ("same", pa.bool_())])


@dataclass(frozen=True)
class Task:
    """All that a worker needs besides the number of its part; it travels.

    Attributes:
        folder: of the source's datasets: shards below `shards/`.
        work: of this piece of work.
    """

    source: Source
    recipe: PixelRecipe
    folder: str
    work: str


def cut(sizes: np.ndarray, recipe: PixelRecipe) -> list[tuple[int, int]]:
    """Returns the chunks [first, last) of files to open: bounded in files, in encoded bytes and in pixels.

    Args:
        sizes: bytes of each file, -1 where that is not known.
    """
    most = max(1, min(CHUNK_FILES, CHUNK_PIXEL_BYTES // recipe.row_bytes))
    ends = np.cumsum(np.where(sizes < 0, UNKNOWN_BYTES, sizes))
    chunks, first = [], 0
    while first < len(sizes):
        before = int(ends[first - 1]) if first else 0
        last = int(np.searchsorted(ends, before + CHUNK_BYTES, side="right"))
        chunks.append((first, min(max(last, first + 1), first + most, len(sizes))))
        first = chunks[-1][1]
    return chunks


def to_do(listing: pa.Table, ledger: pa.Table, recalled: Recalled, chunks: Sequence[tuple[int, int]]) -> memoryview:
    """Returns the files to open, as `todo.arrow` holds them: equal for equal work."""
    done = np.flatnonzero(recalled.todo)
    lines = np.where(recalled.decode, -1, recalled.at)[done]
    known = ledger["sha256"].combine_chunks().take(pa.array(lines, mask=lines < 0))
    todo = pa.table([*listing.take(pa.array(done)).columns, known], schema=TODO_SCHEMA)
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, TODO_SCHEMA) as writer:
        for first, last in chunks:
            writer.write_batch(todo.slice(first, last - first).combine_chunks().to_batches()[0])
    return sink.getbuffer()


@lru_cache(maxsize=1)
def _todo(work: Location) -> pa.RecordBatchFileReader:
    file = work / TODO
    return pa.ipc.open_file(pa.memory_map(str(file.path)) if file.is_local else pa.BufferReader(file.read_bytes()))


@lru_cache(maxsize=1)
def _decoder(source: Source, recipe: PixelRecipe) -> Decoder:
    return Decoder(source, recipe, max(1, min(CHUNK_FILES, CHUNK_PIXEL_BYTES // recipe.row_bytes)))


def decode_chunk(number: int, task: Task) -> bytes:
    """Makes a chunk, or finds it made; returns what became of its files: RESULT_SCHEMA as an Arrow stream.

    Raises:
        DataError: if the source is not there.
    """
    work = Location.of(task.work)
    results = work / f"chunk-{number:06d}.arrow"
    if results.is_file():
        return results.read_bytes()
    batch = pa.Table.from_batches([_todo(work).get_batch(number)])
    outcomes, pixels = _decoder(task.source, task.recipe).decode(list(items_of(batch)), batch["known"].to_pylist())
    rows = np.flatnonzero([outcome.pixels_hash is not None for outcome in outcomes])
    chunk = work / f"chunk-{number:06d}.parquet"
    if len(rows):
        sources = pa.array([printable(os.fsdecode(path)) for path in batch["path"].take(pa.array(rows)).to_pylist()], pa.string())
        labels = batch["label"].combine_chunks().take(pa.array(rows))
        kept = pixels if len(rows) == len(pixels) else pixels[rows]
        chunk.write_bytes(pixels_bytes(shard_table(task.recipe, kept, labels, sources), len(rows)))
    content = _results(outcomes, rows, chunk.name)
    results.write_bytes(content)
    return content


def _results(outcomes: list[Outcome], rows: np.ndarray, name: str) -> bytes:
    places = np.full(len(outcomes), -1)
    places[rows] = np.arange(len(rows))
    columns = [
        pa.array([outcome.size for outcome in outcomes], pa.int64()),
        pa.array([outcome.sha256 for outcome in outcomes], pa.binary(32)),
        pa.array([outcome.pixels_hash for outcome in outcomes], pa.binary(16)),
        pa.array([outcome.reason for outcome in outcomes], pa.string()),
        pa.array([outcome.detail for outcome in outcomes], pa.string()),
        pa.array([None if place < 0 else name for place in places], pa.string()),
        pa.array(places, pa.int32(), mask=places < 0),
        pa.array([outcome.is_same for outcome in outcomes], pa.bool_()),
    ]
    sink = io.BytesIO()
    table = pa.table(columns, schema=RESULT_SCHEMA)
    with pa.ipc.new_stream(sink, RESULT_SCHEMA) as writer:
        writer.write_table(table)
    return sink.getvalue()


def read_results(content: bytes) -> pa.Table:
    """Returns what `decode_chunk` returned, as a table (RESULT_SCHEMA)."""
    return pa.ipc.open_stream(content).read_all()


@dataclass(frozen=True)
class Packing:
    """The rows of one shard to write.

    Attributes:
        files: names of shards and chunks that hold them.
        codes: (rows,) int32: which of the files.
        places: (rows,) int32: where in it.
    """

    split: Split
    files: list[str]
    codes: np.ndarray
    places: np.ndarray


def packings(settled: pa.Table, groups: Sequence[Group]) -> Iterator[Packing]:
    """Yields where the rows of each group are to be had."""
    for group in groups:
        lines = settled.select(["file", "row"]).take(pa.array(group.lines))
        files = lines["file"].combine_chunks().dictionary_encode()
        codes, places = files.indices.to_numpy().astype(np.int32), lines["row"].to_numpy().astype(np.int32)
        yield Packing(group.split, files.dictionary.to_pylist(), codes, places)


def pack(packing: Packing, task: Task) -> Shard:
    """Writes a shard from rows of chunks and of other shards. Raises DataError if one of these is damaged."""
    folder, work = Location.of(task.folder), Location.of(task.work)
    parts = []
    for code, name in enumerate(packing.files):
        rows = read_shard(work / name) if name.startswith("chunk-") else read_checked_shard(folder / SHARDS / name)
        parts.append(rows.take(pa.array(packing.places[packing.codes == code])))
    order = np.argsort(np.argsort(packing.codes, kind="stable"), kind="stable")
    table = pa.concat_tables(parts).take(pa.array(order)).combine_chunks()
    return write_shard(folder / SHARDS, table, task.recipe, packing.split, staging=work)
