"""The work of making a dataset, in parts that any process can do, in any order, twice over: files to chunks, and chunks to shards.

SOURCE/work/PLAN/
    todo.arrow               the files to open, one record batch for each chunk
    chunk-NUMBER.rows        a chunk's rows, as a shard holds them, in an Arrow file
    chunk-NUMBER.arrow       what became of each of its files, written last
"""

import contextlib
import io
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..data.shards import SHARDS, Shard, Split, read_checked_shard, shard_table, write_shard
from ..spaces.space import Space
from ..storage import Location
from .decoder import Decoder
from .ledger import OUTCOME_SCHEMA, Group, Recalled
from .listing import LISTING_SCHEMA, items_of, printable_column
from .sources import Source

CHUNK_FILES, CHUNK_BYTES, CHUNK_ROW_BYTES = 4096, 16 << 20, 32 << 20
SHARES, TAPER = 32, 16
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
    space: Space
    folder: str
    work: str


def cut(sizes: np.ndarray, space: Space) -> list[tuple[int, int]]:
    """Returns the chunks [first, last) of files to open: bounded in files, bytes and pixels, ever smaller towards the end.

    Args:
        sizes: bytes of each file, -1 where that is not known.
    """
    most = max(1, min(CHUNK_FILES, CHUNK_ROW_BYTES // space.row_bytes))
    ends = np.cumsum(np.where(sizes < 0, UNKNOWN_BYTES, sizes))
    chunks, first = [], 0
    while first < len(sizes):
        before = int(ends[first - 1]) if first else 0
        files, size = _share(len(sizes) - first, most), _share(int(ends[-1]) - before, CHUNK_BYTES)
        last = int(np.searchsorted(ends, before + size, side="right"))
        chunks.append((first, min(max(last, first + 1), first + files, len(sizes))))
        first = chunks[-1][1]
    return chunks


def _share(left: int, most: int) -> int:
    return max(1, most // TAPER, min(most, left // SHARES))


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
def _todo(work: Location) -> pa.Buffer:
    file = work / TODO
    return pa.memory_map(str(file.path)).read_buffer() if file.is_local else pa.py_buffer(file.read_bytes())


_IDLE: defaultdict[tuple[Source, Space], list[Decoder]] = defaultdict(list)
_AT_WORK: list[Decoder] = []


@contextlib.contextmanager
def _borrowed(source: Source, space: Space) -> Iterator[Decoder]:
    """Gives a block a decoder of its own, which stays for the next one unless the block fails."""
    idle = _IDLE[source, space]
    decoder = idle.pop() if idle else Decoder(source, space, max(1, min(CHUNK_FILES, CHUNK_ROW_BYTES // space.row_bytes)))
    _AT_WORK.append(decoder)
    try:
        yield decoder
    except BaseException:
        decoder.close()
        raise
    finally:
        _AT_WORK.remove(decoder)
    _IDLE[source, space].append(decoder)


def end_decoders() -> None:
    """Ends the decoders of this process; what waits for one of them fails."""
    for decoder in list(_AT_WORK):
        decoder.abandon()
    while _IDLE:
        for decoder in _IDLE.popitem()[1]:
            decoder.close()


def decode_chunks(numbers: Iterable[int], task: Task) -> Iterator[tuple[int, bytes]]:
    """Makes chunks, or finds them made; yields the number of each, and what became of its files: RESULT_SCHEMA as an Arrow stream.

    While one is written the next is being decoded.

    Raises:
        DataError: if the source is not there.
    """
    work = Location.of(task.work)
    todo = pa.ipc.open_file(_todo(work))
    with _borrowed(task.source, task.space) as decoder, _one_at_a_time(decoder) as decoding:
        waiting = None
        for number in numbers:
            made = _made(work, number)
            if made is not None:
                yield number, made
                continue
            batch = pa.Table.from_batches([todo.get_batch(number)])
            decoded = decoding.submit(decoder.decode, list(items_of(batch)), batch["known"].to_pylist())
            if waiting:
                yield waiting[0], _write(*waiting[:2], *waiting[2].result(), task)
            waiting = number, batch, decoded
        if waiting:
            yield waiting[0], _write(*waiting[:2], *waiting[2].result(), task)


@contextlib.contextmanager
def _one_at_a_time(decoder: Decoder) -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1, thread_name_prefix="decode") as pool:
        try:
            yield pool
        except BaseException:
            decoder.abandon()
            raise


def _made(work: Location, number: int) -> bytes | None:
    results = work / f"chunk-{number:06d}.arrow"
    return results.read_bytes() if results.is_file() else None


def _write(number: int, batch: pa.Table, decoded: pa.Table, pixels: np.ndarray, task: Task) -> bytes:
    """Writes a chunk; returns what became of its files."""
    work = Location.of(task.work)
    is_row = decoded["pixels"].is_valid().to_numpy()
    chunk = work / f"chunk-{number:06d}.rows"
    if is_row.any():
        kept, rows = (pixels, batch) if is_row.all() else (pixels[is_row], batch.filter(pa.array(is_row)))
        table = shard_table(task.space, kept, rows["label"], printable_column(rows["path"]))
        chunk.write_bytes(memoryview(_ipc_file(table)))
    content = _results(decoded, is_row, chunk.name)
    (work / f"chunk-{number:06d}.arrow").write_bytes(content)
    return content


def _ipc_file(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _results(decoded: pa.Table, is_row: np.ndarray, name: str) -> bytes:
    file = pc.call_function("if_else", [pa.array(is_row), pa.scalar(name), pa.scalar(None, pa.string())])
    row = pa.array(np.cumsum(is_row, dtype=np.int32) - 1, mask=~is_row)
    columns = [*(decoded[field] for field in OUTCOME_SCHEMA.names[:5]), file, row, decoded["same"]]
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, RESULT_SCHEMA) as writer:
        writer.write_table(pa.table(columns, schema=RESULT_SCHEMA))
    return sink.getvalue()


def read_results(content: bytes) -> pa.Table:
    """Returns what `decode_chunks` yielded of a chunk, as a table (RESULT_SCHEMA)."""
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
        rows = _read_chunk(work / name) if name.startswith("chunk-") else read_checked_shard(folder / SHARDS / name)
        parts.append(_rows_at(rows, packing.places[packing.codes == code]))
    order = np.argsort(np.argsort(packing.codes, kind="stable"), kind="stable")
    return write_shard(folder / SHARDS, _rows_at(pa.concat_tables(parts), order), task.space, packing.split, staging=work)


def _read_chunk(file: Location) -> pa.Table:
    return pa.ipc.open_file(file.open()).read_all() if file.is_local else pa.ipc.open_file(file.read_bytes()).read_all()


def _rows_at(rows: pa.Table, places: np.ndarray) -> pa.Table:
    """Returns the rows at some places, without a copy where these follow each other."""
    first = int(places[0])
    return rows.slice(first, len(places)) if np.array_equal(places, np.arange(first, first + len(places))) else rows.take(pa.array(places))
