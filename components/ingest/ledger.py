"""What is known of each file of a source, so that only new and changed files are opened.

A ledger has one line for each listed file, in the order of the listing: size and stamp when it was read, the hash of its content, and what became
of it: the place of its row, or the reason for its quarantine. All functions here are pure; tables are Arrow's, masks and positions numpy's.
"""

import hashlib
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..data.shards import DUPLICATE, FORGOTTEN, Split
from .listing import LISTING_SCHEMA, UNSEEN, printable

UNREADABLE = "unreadable"
OUTCOME_SCHEMA = pa.schema(
    [
        ("bytes", pa.int64()),  # of the content; null where it could not be read
        ("sha256", pa.binary(32)),  # of the encoded file; null where it could not be read
        ("pixels", pa.binary(16)),  # hash of the row's pixels; null where there is none
        ("reason", pa.string()),  # null: the file is a row
        ("detail", pa.string()),
        ("file", pa.string()),  # the shard, or while a dataset is made the chunk, that holds the row
        ("row", pa.int32()),  # its place in that file
    ]
)
LEDGER_SCHEMA = pa.schema([*LISTING_SCHEMA, *OUTCOME_SCHEMA])
NOTHING_KNOWN = LEDGER_SCHEMA.empty_table()


@dataclass(frozen=True)
class Recalled:
    """What a ledger knows of a listing.

    Attributes:
        at: (N,) each listed file's line in the ledger, -1 where there is none of use.
        todo: (N,) whether the file must be opened; with a line, its content may turn out to be the same.
        decode: (N,) whether it must be decoded even so, because its row is not there.
    """

    at: np.ndarray
    todo: np.ndarray
    decode: np.ndarray


def recall(listing: pa.Table, ledger: pa.Table, shards: Collection[str], *, keep_duplicates: bool, forgotten: Collection[bytes] = ()) -> Recalled:
    """Finds what need not be done again.

    Args:
        listing: LISTING_SCHEMA.
        ledger: LEDGER_SCHEMA.
        shards: names of the shards that are there whole.
        forgotten: SHA-256 of images to leave out; one that no longer is needs a row again.
    """
    found = pc.call_function("index_in", [listing["path"]], pc.SetLookupOptions(ledger["path"].combine_chunks()))
    at = found.fill_null(-1).to_numpy().astype(np.int64)
    compared = ["label", "size", "stamp", "sha256", "reason", "file"]
    old = ledger.select(compared).take(pa.array(np.maximum(at, 0))) if len(ledger) else _nulls(len(listing))
    is_known = (at >= 0) & _equal(listing["label"], old["label"]) & ~_equal_to(old["reason"], UNREADABLE)
    is_same = is_known & (_equal(listing["size"], old["size"]) & _equal(listing["stamp"], old["stamp"]) & ~_equal_to(listing["stamp"], UNSEEN))
    is_duplicate = _equal_to(old["reason"], DUPLICATE)
    has_row = _is_null(old["reason"]) & pc.call_function("is_in", [old["file"]], pc.SetLookupOptions(pa.array(list(shards), pa.string()))).to_numpy()
    lost = is_known & ((_is_null(old["reason"]) & ~has_row) | (is_duplicate & keep_duplicates))
    lost |= is_known & _equal_to(old["reason"], FORGOTTEN) & ~_is_in(old["sha256"], forgotten)
    # A duplicate needs a row of its own once the file that stood for it is gone.
    stands = is_same & ~lost & (has_row | is_duplicate)
    orphaned = np.zeros(len(listing), bool)
    orphaned[np.flatnonzero(stands)[_first_of_each(_hashes(old["sha256"])[stands])]] = True
    orphaned &= is_duplicate
    return Recalled(np.where(is_known, at, -1), ~is_same | lost | orphaned, lost | orphaned | ~is_known | (is_duplicate & ~is_same))


def settle(
    listing: pa.Table,
    ledger: pa.Table,
    recalled: Recalled,
    outcomes: pa.Table,
    unchanged: np.ndarray,
    *,
    keep_duplicates: bool,
    forgotten: Collection[bytes] = (),
) -> pa.Table:
    """Joins what was known with what was found; of equal contents only the first keeps its row. Returns LEDGER_SCHEMA.

    Args:
        outcomes: OUTCOME_SCHEMA, one line for each file to do, in the order of the listing.
        unchanged: (len(outcomes),) whether the content was found to be the one that the ledger knows.
        forgotten: SHA-256 of images to leave out.
    """
    position = recalled.at.copy()
    done = np.flatnonzero(recalled.todo)
    fresh = ~unchanged
    position[done[fresh]] = len(ledger) + np.flatnonzero(fresh)
    joined = pa.concat_tables([ledger.select(OUTCOME_SCHEMA.names), outcomes.select(OUTCOME_SCHEMA.names)]).take(pa.array(position))
    settled = pa.table([*listing.columns, *joined.columns], schema=LEDGER_SCHEMA)
    settled = _without_forgotten(settled, forgotten)
    return settled if keep_duplicates else _without_duplicates(settled)


def _without_forgotten(settled: pa.Table, forgotten: Collection[bytes]) -> pa.Table:
    mask = _is_in(settled["sha256"], forgotten)
    return _set_aside(settled, mask, FORGOTTEN, ["it is to be forgotten"] * int(mask.sum()))


def _without_duplicates(settled: pa.Table) -> pa.Table:
    candidates = np.flatnonzero(_is_null(settled["reason"]) | _equal_to(settled["reason"], DUPLICATE))
    hashes = _hashes(settled["sha256"])[candidates]
    first = _first_of_each(hashes, everyone=True)
    repeats = first != np.arange(len(candidates))
    if not repeats.any():
        return settled
    paths = settled["path"].take(pa.array(candidates[first[repeats]]))
    mask = np.zeros(len(settled), bool)
    mask[candidates[repeats]] = True
    return _set_aside(settled, mask, DUPLICATE, [f"the same content as {printable(os.fsdecode(path))}"[:400] for path in paths.to_pylist()])


def _set_aside(settled: pa.Table, mask: np.ndarray, reason: str, details: Sequence[str]) -> pa.Table:
    """Returns the ledger with some lines that are no rows, for a reason, with a detail for each."""
    if not mask.any():
        return settled
    values = {
        "pixels": pa.nulls(len(details), pa.binary(16)),
        "reason": pa.array([reason] * len(details)),
        "detail": pa.array(details, pa.string()),
        "file": pa.nulls(len(details), pa.string()),
        "row": pa.nulls(len(details), pa.int32()),
    }
    for name, replacement in values.items():
        column = pc.call_function("replace_with_mask", [settled[name].combine_chunks(), pa.array(mask), replacement])
        settled = settled.set_column(settled.schema.get_field_index(name), LEDGER_SCHEMA.field(name), column)
    return settled


@dataclass(frozen=True)
class Group:
    """Rows that become one shard.

    Attributes:
        lines: (rows,) their lines in the ledger, ascending.
    """

    split: Split
    lines: np.ndarray


def splits_of(settled: pa.Table, holdout_fraction: float, held_out: np.ndarray | None = None) -> np.ndarray:
    """Returns for each line whether it is held out: a share of all contents, chosen by their hash, so that more data moves none.

    Args:
        held_out: (N,) lines of a split that is held out; then every line of the same content is, and no others are.
    """
    hashes = _hashes(settled["sha256"])
    if held_out is None:
        return hashes[:, 0].byteswap() < np.uint64(int(holdout_fraction * 2.0**64))
    first = _first_of_each(hashes, everyone=True)
    has_content = ~_is_null(settled["sha256"])
    return held_out | (np.isin(first, first[held_out & has_content]) & has_content)


def to_pack(settled: pa.Table, held_out: np.ndarray, shard_rows: Mapping[str, int], rows_per_shard: int, most_small: int = 8) -> list[Group]:
    """Returns the shards to write: of all rows that lie in no shard yet, or in one that cannot stay.

    A shard stays while each of its rows is live and of one split. Once there are more than a few shards that are less than half full, they are
    written anew, together.

    Args:
        shard_rows: rows of each shard that is there.
    """
    live = _is_null(settled["reason"])
    files = settled["file"].combine_chunks().dictionary_encode()
    codes = files.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    names = files.dictionary.to_pylist()
    counts = np.bincount(codes[live], minlength=len(names))
    outside = np.bincount(codes[live & held_out], minlength=len(names))
    stays = np.asarray([shard_rows.get(name) == count for name, count in zip(names, counts, strict=True)], bool)
    stays &= (outside == 0) | (outside == counts)
    small = stays & (counts * 2 < rows_per_shard)
    for part in (outside == 0, outside != 0):
        if (small & part).sum() > most_small:
            stays &= ~(small & part)
    moving = live & ~(stays[codes] if len(names) else False)
    groups = []
    for split, mask in (("train", moving & ~held_out), ("holdout", moving & held_out)):
        lines = np.flatnonzero(mask)
        groups += [Group(split, lines[first : first + rows_per_shard]) for first in range(0, len(lines), rows_per_shard)]
    return groups


def placed(settled: pa.Table, groups: Sequence[Group], names: Sequence[str]) -> pa.Table:
    """Returns the ledger once each group of rows lies in the shard of its name."""
    files = settled["file"].combine_chunks().dictionary_encode()
    places = settled["row"].fill_null(0).to_numpy().copy()
    codes = files.indices.fill_null(-1).to_numpy(zero_copy_only=False).copy()
    for number, group in enumerate(groups):
        codes[group.lines] = len(files.dictionary) + number
        places[group.lines] = np.arange(len(group.lines))
    dictionary = pa.array([*files.dictionary.to_pylist(), *names], pa.string())
    columns = {name: settled[name] for name in settled.column_names}
    columns["file"] = pa.chunked_array([dictionary.take(pa.array(codes, mask=codes < 0))])
    columns["row"] = pa.chunked_array([pa.array(places, pa.int32(), mask=codes < 0)])
    return pa.table(columns, schema=LEDGER_SCHEMA)


def rows_digest(definition: str, settled: pa.Table, held_out: np.ndarray) -> str:
    """Returns the digest of a dataset's rows, 64 hexadecimal digits, wherever they lie.

    Args:
        definition: what became of the pixels, as text.
        settled: live rows in their order.
    """
    state = hashlib.sha256(definition.encode())
    for name in ("pixels", "path", "label"):
        column = settled[name].combine_chunks()
        lengths = pc.call_function("binary_length", [column]).cast(pa.int64()).fill_null(-1)
        state.update(np.ascontiguousarray(lengths.to_numpy(zero_copy_only=False)).data)
        for first in range(0, len(column), 1 << 16):
            part = column.slice(first, 1 << 16).cast(pa.large_binary()).fill_null(b"")
            state.update(b"".join(part.to_pylist()))
    state.update(np.ascontiguousarray(held_out, np.uint8).data)
    return state.hexdigest()


def _nulls(count: int) -> pa.Table:
    return pa.table([pa.nulls(count, field.type) for field in LEDGER_SCHEMA], schema=LEDGER_SCHEMA)


def _is_in(column: pa.ChunkedArray, hashes: Collection[bytes]) -> np.ndarray:
    return pc.call_function("is_in", [column], pc.SetLookupOptions(pa.array(sorted(hashes), pa.binary(32)))).to_numpy()


def _is_null(column: pa.ChunkedArray) -> np.ndarray:
    return column.is_null().to_numpy()


def _equal_to(column: pa.ChunkedArray, value: str) -> np.ndarray:
    return pc.call_function("equal", [column, pa.scalar(value)]).fill_null(False).to_numpy()


def _equal(left: pa.ChunkedArray, right: pa.ChunkedArray) -> np.ndarray:
    return pc.call_function("equal", [left, right]).fill_null(False).to_numpy() | (_is_null(left) & _is_null(right))


def _hashes(column: pa.ChunkedArray) -> np.ndarray:
    """Returns a column of 32-byte hashes as (N, 4) uint64; zeros where it is null."""
    array = column.combine_chunks().fill_null(bytes(32))
    return np.frombuffer(array.buffers()[1], np.uint64, len(array) * 4, array.offset * 32).reshape(-1, 4)


def _first_of_each(hashes: np.ndarray, everyone: bool = False) -> np.ndarray:
    """Returns the positions of each hash's first occurrence; with `everyone`, for each position that of the first like it."""
    order = np.lexsort((np.arange(len(hashes)), hashes[:, 1], hashes[:, 0]))
    ordered = hashes[order]
    starts = np.ones(len(hashes), bool)
    starts[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    if not everyone:
        return order[starts]
    first = np.empty(len(hashes), np.int64)
    first[order] = order[starts][np.cumsum(starts) - 1]
    return first
