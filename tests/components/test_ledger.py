"""What a ledger saves, and that it saves nothing wrong: any history of a source ends where a fresh start would."""

import hashlib
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.ingest.ledger import (
    DUPLICATE,
    LEDGER_SCHEMA,
    NOTHING_KNOWN,
    OUTCOME_SCHEMA,
    placed,
    recall,
    rows_digest,
    settle,
    splits_of,
    to_pack,
)
from components.ingest.listing import UNSEEN, Item, Listing, ListingBuilder

BAD = "bad"  # a content that does not decode
GONE = "gone"  # a file that is there but cannot be read


def sha(content: str) -> bytes:
    return hashlib.sha256(content.encode()).digest()


@dataclass
class Run:
    """What one run over a source did.

    Attributes:
        opened: paths of the files that were read, decoded: those that were decoded.
    """

    settled: pa.Table
    opened: set[str]
    decoded: set[str]
    held_out: np.ndarray
    rewritten: int


@dataclass
class World:
    """Datasets of a source without its pixels: a shard is the list of its rows' (path, content)."""

    keep_duplicates: bool = False
    holdout: float = 0.0
    rows_per_shard: int = 3
    ledger: pa.Table = field(default_factory=lambda: NOTHING_KNOWN)
    shards: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def run(self, files: dict[str, tuple[str, str]]) -> Run:
        """Takes path -> (content, stamp) as the source is now."""
        listing = a_listing(files).table
        recalled = recall(listing, self.ledger, self.shards, keep_duplicates=self.keep_duplicates)
        paths = [path.decode() for path in listing["path"].to_pylist()]
        opened, decoded, outcomes, unchanged, chunk = set(), set(), [], [], []
        for line in np.flatnonzero(recalled.todo):
            content = files[paths[line]][0]
            opened.add(paths[line])
            known = self.ledger["sha256"][int(recalled.at[line])].as_py() if not recalled.decode[line] else None
            unchanged.append(content != GONE and known == sha(content))
            outcomes.append(self._outcome(paths[line], content, unchanged[-1], chunk))
            if not unchanged[-1] and content != GONE:
                decoded.add(paths[line])
        table = pa.Table.from_pylist(outcomes, schema=OUTCOME_SCHEMA)
        settled = settle(listing, self.ledger, recalled, table, np.asarray(unchanged, bool), keep_duplicates=self.keep_duplicates)
        held_out = splits_of(settled, self.holdout)
        groups = to_pack(settled, held_out, {name: len(rows) for name, rows in self.shards.items()}, self.rows_per_shard)
        names = [self._write(settled, group.lines, chunk) for group in groups]
        self.ledger = placed(settled, groups, names)
        used = set(self.ledger["file"].drop_null().to_pylist())
        self.shards = {name: rows for name, rows in self.shards.items() if name in used}
        return Run(self.ledger, opened, decoded, held_out, sum(len(group.lines) for group in groups))

    @staticmethod
    def _outcome(path: str, content: str, same: bool, chunk: list[tuple[str, str]]) -> dict[str, object]:
        hashed = None if content == GONE else sha(content)
        if same or content in (BAD, GONE):
            reason = None if same else {BAD: "corrupt", GONE: "unreadable"}[content]
            return {"sha256": hashed, "pixels": None, "reason": reason, "detail": reason, "file": None, "row": None}
        chunk.append((path, content))
        return {"sha256": hashed, "pixels": sha(content)[:16], "reason": None, "detail": None, "file": "chunk-0", "row": len(chunk) - 1}

    def _write(self, settled: pa.Table, lines: np.ndarray, chunk: list[tuple[str, str]]) -> str:
        rows = []
        for line in lines:
            file, row = settled["file"][int(line)].as_py(), settled["row"][int(line)].as_py()
            rows.append((chunk if file == "chunk-0" else self.shards[file])[row])
        name = hashlib.sha256(repr(rows).encode()).hexdigest()
        self.shards[name] = rows
        return name

    def check(self, files: dict[str, tuple[str, str]], run: Run) -> None:
        """Checks that each row is where the ledger says, of the right content, and that shards hold nothing else."""
        placed_rows = 0
        for line in run.settled.to_pylist():
            if line["reason"] is None:
                assert self.shards[line["file"]][line["row"]] == (line["path"].decode(), files[line["path"].decode()][0])
                placed_rows += 1
        assert sum(map(len, self.shards.values())) == placed_rows
        splits = {(line["file"], bool(out)) for line, out in zip(run.settled.to_pylist(), run.held_out, strict=True) if line["reason"] is None}
        assert len({file for file, _ in splits}) == len(splits)


def a_listing(files: dict[str, tuple[str, str]]) -> Listing:
    builder = ListingBuilder()
    for path, (content, stamp) in files.items():
        builder.add(Item(path, path.split("/")[0], len(content), stamp))
    return builder.build({})


def essence(run: Run) -> list[tuple[object, ...]]:
    lines = run.settled.to_pylist()
    return [(line["path"], line["reason"], line["detail"], line["sha256"], line["pixels"], bool(out)) for line, out in zip(lines, run.held_out, strict=True)]


def digest(run: Run) -> str:
    live = np.asarray([line["reason"] is None for line in run.settled.to_pylist()], bool)
    return rows_digest("", run.settled.filter(pa.array(live)), run.held_out[live])


CONTENTS = st.sampled_from(["a", "a", "b", BAD, GONE])
FILES = st.dictionaries(st.sampled_from([f"{label}/{name}" for label in "xy" for name in "12"]), st.tuples(CONTENTS, st.sampled_from("12")), min_size=1)


@settings(max_examples=400, deadline=None)
@given(
    histories=st.lists(FILES, min_size=1, max_size=4),
    keeps=st.lists(st.booleans(), min_size=4, max_size=4),
    holdouts=st.lists(st.sampled_from([0.0, 0.4]), min_size=4, max_size=4),
)
def test_any_history_ends_where_a_fresh_start_does(histories: list[dict[str, tuple[str, str]]], keeps: list[bool], holdouts: list[float]):
    world = World()
    for step, files in enumerate(histories):
        # A stamp stands for a content: another one at the same path has another stamp, as any file system sees to.
        stamped = {path: (content, UNSEEN if content == GONE else content + stamp) for path, (content, stamp) in files.items()}
        world.keep_duplicates, world.holdout = keeps[step], holdouts[step]
        run = world.run(stamped)
        world.check(stamped, run)
        fresh = World(keep_duplicates=keeps[step], holdout=holdouts[step]).run(stamped)
        assert essence(run) == essence(fresh)
        assert digest(run) == digest(fresh)


def a_source(count: int, **more: str) -> dict[str, tuple[str, str]]:
    return {f"x/{number:05d}": (f"content {number}", "1") for number in range(count)} | {path: (content, "1") for path, content in more.items()}


def test_an_unchanged_source_is_not_opened():
    world, files = World(), a_source(10, **{"x/bad": BAD, "x/twice": "content 3"})
    assert len(world.run(files).opened) == 12
    again = world.run(files)
    assert (again.opened, again.rewritten) == (set(), 0)


def test_only_new_files_are_opened_and_old_shards_stay():
    world = World(rows_per_shard=4)
    world.run(a_source(10))
    before = set(world.shards)
    run = world.run(a_source(10, **{"w/new": "new", "x/00004b": "newer"}))
    assert run.opened == run.decoded == {"w/new", "x/00004b"}
    assert before < set(world.shards)
    assert run.rewritten == 2


def test_a_touched_file_is_opened_but_not_decoded():
    world, files = World(), a_source(5)
    world.run(files)
    files["x/00002"] = ("content 2", "2")
    run = world.run(files)
    assert (run.opened, run.decoded, run.rewritten) == ({"x/00002"}, set(), 0)


def test_a_changed_file_takes_only_its_shard_with_it():
    world, files = World(rows_per_shard=2), a_source(6)
    world.run(files)
    before = set(world.shards)
    files["x/00002"] = ("other", "2")
    run = world.run(files)
    assert (run.decoded, run.rewritten) == ({"x/00002"}, 2)
    assert len(before - set(world.shards)) == 1


def test_the_second_of_two_equal_files_becomes_a_row_when_the_first_is_gone():
    world, files = World(), a_source(3, **{"x/00001b": "content 1"})
    first = {line["path"].decode(): line for line in world.run(files).settled.to_pylist()}
    assert first["x/00001b"]["reason"] == DUPLICATE
    assert first["x/00001b"]["detail"] == "the same content as x/00001"
    del files["x/00001"]
    run = world.run(files)
    assert run.decoded == {"x/00001b"}
    assert all(line["reason"] is None for line in run.settled.to_pylist())


def test_a_duplicate_that_was_touched_while_the_first_went_becomes_a_row():
    world, files = World(), a_source(1, **{"x/00000b": "content 0"})
    world.run(files)
    run = world.run({"x/00000b": ("content 0", "touched")})
    world.check({"x/00000b": ("content 0", "touched")}, run)
    assert run.settled["reason"].to_pylist() == [None]


def test_a_file_that_could_not_be_read_is_tried_again():
    world, files = World(), a_source(3)
    world.run(files | {"x/late": (GONE, "1")})
    run = world.run(files | {"x/late": ("late", "1")})
    assert run.decoded == {"x/late"}


def test_rows_of_a_shard_that_vanished_are_decoded_again():
    world, files = World(rows_per_shard=4), a_source(10)
    digest_before = digest(world.run(files))
    lost = sorted(world.shards)[0]
    missing = {path for path, _ in world.shards.pop(lost)}
    run = world.run(files)
    assert run.decoded == missing
    assert digest(run) == digest_before


def test_many_small_shards_are_put_together():
    world = World(rows_per_shard=100)
    for count in range(1, 30):
        world.run(a_source(count))
        assert len(world.shards) <= 9
    assert sum(map(len, world.shards.values())) == 29


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5])
def test_the_held_out_part_is_a_share_by_content_that_growth_does_not_move(fraction: float):
    small, large = World(holdout=fraction).run(a_source(1000)), World(holdout=fraction).run(a_source(2000))
    chosen = {line["path"] for line, out in zip(small.settled.to_pylist(), small.held_out, strict=True) if out}
    later = {line["path"] for line, out in zip(large.settled.to_pylist(), large.held_out, strict=True) if out}
    assert chosen == {path for path in later if path < b"x/01000"}
    assert abs(len(later) / 2000 - fraction) < 0.04


def test_the_digest_names_pixels_paths_labels_and_splits():
    lines = World().run(a_source(4)).settled
    digests = {rows_digest("", lines, np.zeros(4, bool)), rows_digest("other", lines, np.zeros(4, bool)), rows_digest("", lines, np.ones(4, bool))}
    digests.add(rows_digest("", lines.slice(1), np.zeros(3, bool)))
    for name, value in (("pixels", bytes(16)), ("path", b"q"), ("label", "q")):
        column = pa.array([value, *lines[name].to_pylist()[1:]], LEDGER_SCHEMA.field(name).type)
        digests.add(rows_digest("", lines.set_column(lines.schema.get_field_index(name), name, column), np.zeros(4, bool)))
    assert len(digests) == 7
