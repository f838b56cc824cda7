"""Images in, a dataset out: only new and changed files are opened; the work is spread over chunks of files, then over shards to write."""

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, ValidationError

from components.counts import counted
from components.data.reader import RowReader
from components.data.shards import (
    DIGEST_LENGTH,
    FAULTLESS,
    QUARANTINE,
    QUARANTINE_SCHEMA,
    ROWS_SCHEMA,
    SHARDS,
    Manifest,
    Shard,
    check_whole,
    parquet_bytes,
    read_manifest,
    read_quarantine,
    read_table,
    write_manifest,
    write_quarantine,
    write_rows,
)
from components.errors import DataError
from components.ingest.chunks import RESULT_SCHEMA, TODO, Packing, Task, cut, decode_chunks, end_decoders, pack, packings, read_results, to_do
from components.ingest.folders import Found
from components.ingest.forgotten import forgotten_hashes
from components.ingest.ledger import LEDGER_SCHEMA, NOTHING_KNOWN, Recalled, placed, recall, rows_digest, settle, splits_of, to_pack
from components.ingest.listing import Listing, printable_column
from components.ingest.sources import POINTS, DataConfig, Source, address_of, source_to_json
from components.ingest.sources import list_source as look_at
from components.storage import Location
from pipeline.artifacts import ShardSet
from pipeline.context import StageContext
from pipeline.lease import alone
from pipeline.parallel_map import Row, Work, parallel_map

MIN_ROWS = 2
STATE, WORK = "state.json", "work"
MOST_CHUNKS = 16
ROWS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class ListedSource:
    """A source as it is now.

    Attributes:
        address: what `data.source` names, wherever the command is run.
        identity: the address, and what of it is read.
        plan: digest of the source, its files, and of what becomes of them.
        forgotten: SHA-256 of images that are left out whatever the source holds.
    """

    address: str
    identity: str
    source: Source
    listing: Listing
    plan: str
    forgotten: frozenset[bytes] = frozenset()


class State(BaseModel):
    """What the last run over a source left: the ledger, the shards it speaks of, and the dataset."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    plan: str = ""
    version: str = ""
    ledger: str = ""
    shards: tuple[Shard, ...] = ()


def list_source(config: DataConfig, storage: Location, found: Found | None = None) -> ListedSource:
    """Returns a source with its listing.

    Args:
        found: what a walk adds to, for whoever wants to see how far it is.

    Raises:
        DataError: if the source cannot be read or is empty.
    """
    if _holds(Path(config.source).expanduser(), storage):
        right = "set cluster.storage to a folder outside it"
        raise DataError(f"data.source={config.source} contains the storage root {storage}, whose pictures are not data; {right}")
    downloads = str(storage / "downloads") if storage.is_local else str(Path(tempfile.gettempdir()) / "ddpm-downloads")
    source, listing = look_at(config, downloads, found)
    address = address_of(config.source)
    # Where a built-in dataset was downloaded to is no part of it; how points are drawn is.
    identity = source_to_json(source) if "/" in address or address.startswith(POINTS) else address
    forgotten = forgotten_hashes(storage)
    settings = [config.holdout_fraction, config.duplicates, config.shard_bytes, *_splits_for_digest(listing)]
    left_out = [sorted(sha256.hex() for sha256 in forgotten)] if forgotten else []
    plan = _digest(identity, _definition(config), listing.digest(), listing.ignored, *settings, *left_out)
    return ListedSource(address, identity, source, listing, plan, forgotten)


def _splits_for_digest(listing: Listing) -> list[object]:
    """Returns what becomes of a source's splits, for digests; nothing where it has none, so that digests from before splits were seen stay the same."""
    return [] if listing.splits is None else [dict(listing.splits.files), listing.splits.used, listing.splits.held_out]


def _holds(folder: Path, storage: Location) -> bool:
    with contextlib.suppress(OSError):  # what cannot be looked at is told by the look at the source
        return storage.is_local and folder.is_dir() and storage.path.resolve().is_relative_to(folder.resolve())
    return False


def preprocess(config: DataConfig, listed: ListedSource, *, context: StageContext, anew: bool = False) -> ShardSet:
    """Turns a source into a dataset below `datasets/` and returns its receipt.

    Args:
        anew: open every file again. What others read stays as it is.

    Raises:
        DataError: if more than `data.max_bad_fraction` of the files are bad.
    """
    folder = dataset_folder(config, listed, context.storage)
    if listed.listing.splits is not None:
        context.reporter.line(f"  splits of the source: {listed.listing.splits.in_words}")
    with alone(folder / ".lock", context.reporter, "makes a dataset of this source"):
        version = "" if anew else _finished(folder, listed.plan)
        counts = _Counts(0, 0)
        if not version:
            version, counts = _Making(config, listed, folder, context, anew).run()
        else:
            _sweep(folder)
    manifest = read_manifest(folder / version)
    _check_bad(config, manifest, folder / version)
    return _receipt(folder / version, manifest, counts, context.inputs)


def files_to_open(config: DataConfig, listed: ListedSource, context: StageContext) -> int:
    """Returns how many files `preprocess` would open: those that are new or changed since the source was made a dataset of."""
    folder = dataset_folder(config, listed, context.storage)
    if _finished(folder, listed.plan):
        return 0
    making = _Making(config, listed, folder, context, anew=False)
    return int(recall(making.listing, making.ledger, making.shards, keep_duplicates=config.duplicates == "keep").todo.sum())


def dataset_folder(config: DataConfig, listed: ListedSource, storage: Location) -> Location:
    """Returns where the datasets of a source lie."""
    return storage / "datasets" / _digest(listed.identity, _definition(config), config.shard_bytes)


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=dict).encode("utf-8", "surrogateescape")).hexdigest()[:DIGEST_LENGTH]


def _definition(config: DataConfig) -> str:
    return json.dumps(config.space.definition())


def _state(folder: Location) -> State:
    try:
        return State.model_validate_json((folder / STATE).read_text())
    except (OSError, ValidationError):
        return State()


def newest_dataset(folder: Location) -> str:
    """Returns the name of the dataset that was made last in a source's folder; empty where there is none."""
    return _state(folder).version


def _finished(folder: Location, plan: str) -> str:
    """Returns the dataset of a source that has not changed, if it is whole."""
    state = _state(folder)
    return state.version if state.plan == plan and state.version and _is_whole(folder / state.version) else ""


def _sweep(folder: Location) -> None:
    """Removes what only a run in progress needs, even where one was killed before it could."""
    (folder / WORK).remove_tree()
    ledger = _state(folder).ledger
    for name in folder.files():
        if name.startswith("ledger-") and name != ledger:
            (folder / name).remove()


def _is_whole(folder: Location) -> bool:
    try:
        check_whole(folder, read_manifest(folder))
    except DataError:
        return False
    return True


@dataclass(frozen=True)
class _Counts:
    """Files that were opened, and those of them that were decoded."""

    opened: int
    decoded: int


class _Making:
    """The making of one dataset. Killed at any point and begun again it goes on with the chunks that are done, and ends with the same files."""

    def __init__(self, config: DataConfig, listed: ListedSource, folder: Location, context: StageContext, anew: bool) -> None:
        self.config, self.listed, self.folder, self.context, self.anew = config, listed, folder, context, anew
        self.listing = listed.listing.table
        self.state = State() if anew else _state(folder)
        there = (folder / SHARDS).files()
        self.shards = {shard.name: shard for shard in self.state.shards if there.get(shard.name) == shard.bytes}
        self.ledger = self._read_ledger()
        self.space = config.space
        self.work = folder / WORK / "nothing to open"

    def run(self) -> tuple[str, _Counts]:
        """Does the work; returns the dataset's name, and what it took."""
        keep, part, forgotten = self.config.duplicates == "keep", self.context.reporter.part, self.listed.forgotten
        with part("comparing the files with those before"):
            recalled = recall(self.listing, self.ledger, self.shards, keep_duplicates=keep, forgotten=forgotten)
        outcomes = self._decode(recalled)
        unchanged = outcomes["same"].to_numpy(zero_copy_only=False)
        with part("finding duplicates and held-out images"):
            settled = settle(self.listing, self.ledger, recalled, outcomes, unchanged, keep_duplicates=keep, forgotten=forgotten)
            held_out = splits_of(settled, self.config.holdout_fraction, self.listed.listing.held_out)
        settled = self._pack(settled, held_out)
        with part("writing the list of rows"):
            version = self._conclude(settled, held_out)
        decoded = len(outcomes) - int(unchanged.sum()) - outcomes["sha256"].null_count
        return version, _Counts(len(outcomes), decoded)

    def _read_ledger(self) -> pa.Table:
        if not self.state.ledger:
            return NOTHING_KNOWN
        try:
            return read_table(self.folder / self.state.ledger).cast(LEDGER_SCHEMA)
        except (FileNotFoundError, pa.ArrowInvalid, pa.ArrowKeyError):
            return NOTHING_KNOWN

    def _decode(self, recalled: Recalled) -> pa.Table:
        """Opens the files that must be; returns what became of each (RESULT_SCHEMA)."""
        todo = int(recalled.todo.sum())
        if not todo:
            return RESULT_SCHEMA.empty_table()
        if todo < len(self.listing):
            self.context.reporter.line(f"  {len(self.listing) - todo} of {counted(len(self.listing), 'file')} are as they were; {todo} to open")
        chunks = cut(self.listing["size"].to_numpy()[recalled.todo], self.space)
        content = to_do(self.listing, self.ledger, recalled, chunks)
        # Chunks that are there already are of use only for the very same work.
        self.work = self.folder / WORK / hashlib.sha256(content).hexdigest()[:DIGEST_LENGTH]
        (self.work / TODO).write_bytes(content)
        results: dict[int, pa.Table] = {}
        work = Work(partial(_decode_rows, task=self._task()), end_decoders, MOST_CHUNKS)
        with (
            self.context.reporter.progress("opening files", todo, "files") as advance,
            self._parallel_map([{"chunk": number} for number in range(len(chunks))], work) as done,
        ):
            for row in done:
                results[row["chunk"]] = read_results(row["result"])
                advance(len(results[row["chunk"]]))
        return pa.concat_tables([results[number] for number in range(len(chunks))])

    def _pack(self, settled: pa.Table, held_out: np.ndarray) -> pa.Table:
        """Writes the shards that are not there yet; returns the ledger with every row's place in a shard."""
        rows_per_shard = max(1, self.config.shard_bytes // self.space.row_bytes)
        groups = to_pack(settled, held_out, {shard.name: shard.rows for shard in self.shards.values()}, rows_per_shard)
        if not groups:
            return settled
        rows = [_packing_row(number, packing) for number, packing in enumerate(packings(settled, groups))]
        names = [""] * len(groups)
        work = Work(partial(_pack_rows, task=self._task()), end_decoders)
        with self.context.reporter.progress("writing shards", len(groups), "shards") as advance, self._parallel_map(rows, work) as done:
            for row in done:
                shard = Shard.model_validate_json(row["shard"])
                names[row["group"]] = shard.name
                self.shards[shard.name] = shard
                advance(1)
        return placed(settled, groups, names)

    def _task(self) -> Task:
        return Task(self.listed.source, self.space, str(self.folder), str(self.work))

    def _parallel_map(self, rows: Sequence[Row], work: Work) -> "contextlib.closing[Generator[Row]]":
        return contextlib.closing(parallel_map(rows, work, self.context.cluster))

    def _conclude(self, settled: pa.Table, held_out: np.ndarray) -> str:
        """Writes the dataset, then what the next run starts from; returns the dataset's name."""
        bad = _quarantine(settled)
        live = settled["reason"].is_null().to_numpy()
        rows = settled.filter(pa.array(live))
        digest = rows_digest(_definition(self.config), rows, held_out[live])[:DIGEST_LENGTH]
        version = f"{digest}-{_digest(bad.to_pylist(), self.listed.listing.ignored, self.listed.address, *_splits_for_digest(self.listed.listing))[:8]}"
        names, first = _first_rows(rows)
        parts = {name: "holdout" if held_out[live][row] else "train" for name, row in zip(names, first, strict=True)}
        self.shards = {name: self.shards[name].model_copy(update={"split": part}) for name, part in parts.items()}
        write_quarantine(self.folder / version, bad, self.work)
        problem = self._problem(len(rows), int((~held_out[live]).sum()), bad, self.folder / version)
        if not problem and (self.anew or not _is_whole(self.folder / version)):
            self._write_version(self.folder / version, digest, rows, held_out[live], bad)
        self._remember(settled, "" if problem else version)
        if problem:
            raise DataError(problem)
        return version

    def _problem(self, num_rows: int, num_train: int, bad: pa.Table, folder: Location) -> str:
        config = self.config
        if _num_bad(bad["reason"].to_pylist()) > config.max_bad_fraction * len(self.listing):
            return _too_many_bad(config, bad.to_pylist(), len(self.listing), folder)
        if num_rows < MIN_ROWS:
            left_out = f" ({len(bad)} are quarantined, with their reasons in {folder / QUARANTINE})" if len(bad) else ""
            return f"data.source={config.source} gives {counted(num_rows, 'usable image')}{left_out}; name a source of at least {MIN_ROWS}"
        if num_train < MIN_ROWS:
            how = f"holdout_split={config.holdout_split}" if config.holdout_split else f"holdout_fraction={config.holdout_fraction}"
            return f"data.{how} leaves {num_train} of {counted(num_rows, 'image')} to train on; hold fewer out"
        return ""

    def _write_version(self, folder: Location, digest: str, rows: pa.Table, held_out: np.ndarray, bad: pa.Table) -> None:
        shards, table = _rows_table(rows, held_out, self.shards)
        rows_file, rows_sha256 = write_rows(folder, table, self.work)
        ignored, labels, splits = dict(self.listed.listing.ignored), _count(table["label"]), self.listed.listing.splits
        sizes = table["bytes"].to_numpy()
        manifest = Manifest(
            digest=digest,
            source=self.listed.address,
            definition=str(self.space.definition()[0]),
            space=self.space,
            num_listed=len(self.listing),
            num_rows=len(rows),
            num_quarantined=len(bad),
            quarantined=_count(bad["reason"]),
            num_ignored=sum(ignored.values()),
            ignored=ignored,
            splits={"train": int((~held_out).sum()), "holdout": int(held_out.sum())},
            source_splits={} if splits is None else dict(splits.files),
            source_split=None if splits is None else splits.used,
            holdout_split=None if splits is None else splits.held_out,
            labels=labels,
            source_bytes=int(sizes[sizes > 0].sum()),
            rows_file=rows_file,
            rows_sha256=rows_sha256,
            shards=shards,
        )
        space = self.space.fitted(lambda: RowReader(folder, manifest).batches(ROWS_AT_ONCE))
        write_manifest(folder, manifest.model_copy(update={"space": space}), self.work)

    def _remember(self, settled: pa.Table, version: str) -> None:
        content = parquet_bytes(settled)
        ledger = f"ledger-{hashlib.sha256(content).hexdigest()[:DIGEST_LENGTH]}.parquet"
        (self.folder / ledger).write_bytes(content, staging=self.work)
        state = State(plan=self.listed.plan, version=version, ledger=ledger, shards=tuple(self.shards[name] for name in sorted(self.shards)))
        (self.folder / STATE).write_text(state.model_dump_json() + "\n", staging=self.work)
        _sweep(self.folder)


def _decode_rows(rows: Iterable[Row], task: Task) -> Iterator[Row]:
    for number, result in decode_chunks((int(row["chunk"]) for row in rows), task):
        yield {"chunk": number, "result": result}


def _packing_row(number: int, packing: Packing) -> Row:
    return {"group": number, **asdict(packing), "codes": packing.codes.tobytes(), "places": packing.places.tobytes()}


def _pack_rows(rows: Iterable[Row], task: Task) -> Iterator[Row]:
    for row in rows:
        packing = Packing(row["split"], list(row["files"]), np.frombuffer(row["codes"], np.int32), np.frombuffer(row["places"], np.int32))
        yield {"group": row["group"], "shard": pack(packing, task).model_dump_json()}


def _rows_table(rows: pa.Table, held_out: np.ndarray, shards: dict[str, Shard]) -> tuple[tuple[Shard, ...], pa.Table]:
    """Returns the shards in the order of their first rows, and the list of rows (ROWS_SCHEMA)."""
    files = rows["file"].combine_chunks().dictionary_encode()
    columns = [
        printable_column(rows["path"]),
        rows["label"],
        pa.DictionaryArray.from_arrays(pa.array(held_out.astype(np.int8)), pa.array(["train", "holdout"])).cast(pa.string()),
        _bytes(rows),
        rows["sha256"],
        files.indices,
        rows["row"],
    ]
    return tuple(shards[name] for name in files.dictionary.to_pylist()), pa.table(columns, schema=ROWS_SCHEMA)


def _quarantine(settled: pa.Table) -> pa.Table:
    bad = settled.filter(settled["reason"].is_valid())
    return pa.table([printable_column(bad["path"]), bad["reason"], bad["detail"], _bytes(bad)], schema=QUARANTINE_SCHEMA)


def _bytes(lines: pa.Table) -> pa.ChunkedArray:
    """Returns how many bytes each file had when it was read, else as it was listed."""
    return pc.call_function("coalesce", [lines["bytes"], lines["size"]])


def _first_rows(rows: pa.Table) -> tuple[list[str], np.ndarray]:
    """Returns the shards that hold rows, in the order of their first ones, and where these are."""
    files = rows["file"].combine_chunks().dictionary_encode()
    return files.dictionary.to_pylist(), np.unique(files.indices.to_numpy(), return_index=True)[1]


def _count(column: pa.ChunkedArray) -> dict[str, int]:
    return dict(sorted((str(entry["values"]), int(entry["counts"])) for entry in column.drop_null().value_counts().to_pylist()))


def _num_bad(reasons: Sequence[str]) -> int:
    """Counts what is wrong with a source: a file that is there twice is not, nor one that is to be forgotten."""
    return sum(reason not in FAULTLESS for reason in reasons)


def _check_bad(config: DataConfig, manifest: Manifest, folder: Location) -> None:
    bad = manifest.num_quarantined - sum(manifest.quarantined.get(reason, 0) for reason in FAULTLESS)
    if bad > config.max_bad_fraction * manifest.num_listed:
        raise DataError(_too_many_bad(config, [line.model_dump() for line in read_quarantine(folder)], manifest.num_listed, folder))


def _too_many_bad(config: DataConfig, lines: list[dict[str, Any]], listed: int, folder: Location) -> str:
    bad = [line for line in lines if line["reason"] not in FAULTLESS]
    reasons = ", ".join(f"{count} {reason}" for reason, count in _count(pa.chunked_array([[line["reason"] for line in bad]], pa.string())).items())
    return (
        f"data.max_bad_fraction={config.max_bad_fraction} is exceeded: {len(bad)} of {counted(listed, 'file')} are bad ({reasons}), the first {bad[0]['path']} "
        f"({bad[0]['reason']}: {bad[0]['detail']}); all are listed in {folder / QUARANTINE}; mend the images or allow more"
    )


def _receipt(folder: Location, manifest: Manifest, counts: _Counts, inputs: str) -> ShardSet:
    return ShardSet.of(folder, manifest, inputs=inputs, num_opened=counts.opened, num_decoded=counts.decoded)


def is_intact(receipt: ShardSet) -> bool:
    """Tells whether the dataset that a receipt describes is still there, whole and unchanged in digest."""
    folder = Location.of(receipt.path)
    return _is_whole(folder) and read_manifest(folder).digest == receipt.digest
