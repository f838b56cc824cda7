"""Parquet files with images, on disk and on a real S3 server."""

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from servers import S3Server

from components.errors import DataError
from components.ingest import tables
from components.ingest.listing import items_of
from components.ingest.sources import DataConfig, list_source
from components.ingest.tables import ParquetSource
from components.storage import Location

FETCH_WITHIN = """
import hashlib, sys
from components.ingest.decoder import _limit_memory
from components.ingest.tables import ParquetSource
folder, file, first, last, limit = sys.argv[1:]
source = ParquetSource(folder, None, "label")
_limit_memory(int(limit) << 20)
for row in range(int(first), int(last)):
    try:
        print(hashlib.sha256(source.fetch(f"{file}#{row:09d}")).hexdigest())
    except MemoryError:
        print("MemoryError")
"""
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture(params=["disk", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Location:
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    return Location.of(tmp_path / "root") if request.param == "disk" else Location.of(f"s3://{s3.bucket}/{tmp_path.name}")


def encoded(row: int) -> bytes:
    return b"image %d" % row


def write(file: Location, columns: dict[str, Sequence[object] | pa.Array], metadata: Mapping[str, str | bytes] | None = None, row_group_size: int = 2) -> None:
    with file.staged() as staging:
        pq.write_table(pa.table(columns).replace_schema_metadata(metadata), staging, row_group_size=row_group_size)


def images(rows: range) -> pa.Array:
    return pa.array([{"bytes": encoded(row), "path": f"{row}.png"} for row in rows], IMAGE)


def labels_of(root: Location, column: str = "label") -> list[str | None]:
    return [item.label for item in items_of(list_source(DataConfig(source=str(root), label_column=column))[1].table)]


@pytest.mark.parametrize("column", ["image", "img"])
def test_a_hub_export_is_read_with_its_class_names(root: Location, column: str):
    names = {"huggingface": json.dumps({"info": {"features": {"label": {"names": ["ant", "bee"], "_type": "ClassLabel"}}}})}
    write(root / "deep" / "train-1.parquet", {column: images(range(5, 8)), "label": [0, 7, None]}, names)
    write(root / "deep" / "train-0.parquet", {column: images(range(5)), "label": [row % 2 for row in range(5)]}, names)
    (root / "README.md").write_text("x")
    source, listing = list_source(DataConfig(source=str(root)))
    source.open()
    found = list(items_of(listing.table))
    assert [item.path for item in found][:2] == ["deep/train-0.parquet#000000000", "deep/train-0.parquet#000000001"]
    assert [item.label for item in found] == ["ant", "bee", "ant", "bee", "ant", "ant", "7", None]
    assert [source.fetch(item.path) for item in found] == [encoded(row) for row in range(8)]
    assert listing.ignored == {".md": 1}


def test_rows_are_fetched_by_many_threads_in_any_order(root: Location):
    write(root / "a.parquet", {"image": images(range(40))})
    source, listing = list_source(DataConfig(source=str(root)))
    paths = [item.path for item in items_of(listing.table)] * 3
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.fetch, reversed(paths))) == [encoded(row) for row in range(39, -1, -1)] * 3


def test_rows_are_listed_in_the_order_of_their_file(root: Location):
    write(root / "a.parquet", {"image": images(range(1001)), "label": [str(row) for row in range(1001)]})
    assert labels_of(root) == [str(row) for row in range(1001)]


def fetched_within(folder: Path, file: str, rows: range, limit: int) -> list[str]:
    """Fetches rows in a process that may take so many MiB besides what it has."""
    command = [sys.executable, "-c", FETCH_WITHIN, str(folder), file, str(rows.start), str(rows.stop), str(limit)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=200).stdout.split()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a limit of memory for a process is Linux's")
def test_a_row_group_larger_than_memory_is_read_row_by_row(tmp_path: Path):
    contents = [np.random.default_rng(row).bytes(1_000_000) for row in range(400)]
    table = pa.table({"image": pa.array([{"bytes": content, "path": None} for content in contents], IMAGE)})
    pq.write_table(table, tmp_path / "pages.parquet", row_group_size=400, use_dictionary=False, write_batch_size=4)
    pq.write_table(table.slice(0, 200), tmp_path / "one page.parquet", row_group_size=400, use_dictionary=False, write_batch_size=400)
    assert fetched_within(tmp_path, "pages.parquet", range(400), 150) == [hashlib.sha256(content).hexdigest() for content in contents]
    assert fetched_within(tmp_path, "one page.parquet", range(197, 200), 150) == ["MemoryError"] * 3


def test_rows_of_large_groups_are_the_same_in_any_order(root: Location, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tables, "GROUP_BYTES", 10)
    monkeypatch.setattr(tables, "BATCH_BYTES", 100)
    write(root / "a.parquet", {"image": images(range(400))}, row_group_size=90)
    source = ParquetSource(str(root), None, "label")
    orders = [range(400), range(0, 400, 7), range(399, -1, -13), [300, 80, 95, 85, 180, 100], random.Random(0).sample(range(400), 60)]
    for order in orders:
        assert [source.fetch(f"a.parquet#{row:09d}") for row in order] == [encoded(row) for row in order]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.fetch, [f"a.parquet#{row:09d}" for row in range(400)])) == [encoded(row) for row in range(400)]
    with pytest.raises(DataError, match=r"^IndexError: row 400 of 400$"):
        source.fetch("a.parquet#000000400")


@pytest.mark.parametrize("is_local", [True, False])
def test_rows_that_are_asked_for_about_in_order_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_local: bool):
    monkeypatch.setattr(tables, "GROUP_BYTES", 10)
    write(Location.of(tmp_path / "a.parquet"), {"image": images(range(400))}, row_group_size=100)
    starts: list[int] = []
    start = tables._Rows._start
    monkeypatch.setattr(tables._Rows, "_start", lambda rows, group: (starts.append(group), start(rows, group)))
    rows = tables._Rows(Location.of(tmp_path / "a.parquet"), None)
    rows._rows_behind = 0 if is_local else tables.ROWS_BEHIND
    order = range(400) if is_local else [row for first in range(0, 400, 16) for row in random.Random(first).sample(range(first, first + 16), 16)]
    assert [cast(dict, rows.value(row))["bytes"] for row in order] == [encoded(row) for row in order]
    assert starts == [0, 1, 2, 3]


HUGGINGFACE = ["[]", "{", "7", "null", '{"info": null}', '{"info": {"features": null}}', '{"info": {"features": {"label": {"names": null}}}}', "[" * 99_999]


@pytest.mark.parametrize("metadata", [*HUGGINGFACE, '{"info": {"features": {"label": {"names": {"0": "ant"}}}}}', b"\xff"], ids=range(10))
def test_class_names_that_are_not_as_they_should_be_are_none(tmp_path: Path, metadata: str | bytes):
    write(Location.of(tmp_path / "a.parquet"), {"image": images(range(2)), "label": [0, 1]}, {"huggingface": metadata})
    assert labels_of(Location.of(tmp_path)) == ["0", "1"]


def test_a_rewritten_file_changes_the_listing(root: Location):
    digests = set()
    for first in (0, 1):
        write(root / "a.parquet", {"image": images(range(first, first + 3))})
        digests.add(list_source(DataConfig(source=str(root)))[1].digest())
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["", "x", None], [None, "x", None]),
        ([1.5, None, 2.0], ["1.5", None, "2.0"]),
        ([b"a", b"", b"\xff"], ["a", None, r"\xff"]),
        ([[1, 2], None, []], ["[1, 2]", None, "[]"]),
        (pa.array(["x", None, "x"]).dictionary_encode(), ["x", None, "x"]),
        (pa.nulls(3), [None] * 3),
    ],
)
def test_labels_of_any_type_become_text(root: Location, values: Sequence[object], expected: list[str | None]):
    write(root / "a.parquet", {"image": images(range(3)), "kind": values})
    assert labels_of(root, "kind") == expected
    assert labels_of(root) == [None] * 3


LARGE = pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())])
CONTENTS = [encoded(0), encoded(1), encoded(0)]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(CONTENTS, pa.binary()),
        pa.array(CONTENTS, pa.large_binary()),
        pa.array(CONTENTS, pa.binary_view()),
        pa.array(CONTENTS, pa.binary(7)),
        pa.array(CONTENTS, pa.binary()).dictionary_encode(),
        pa.array([{"bytes": content, "path": None} for content in CONTENTS], IMAGE),
        pa.array([{"bytes": content, "path": None} for content in CONTENTS], LARGE),
        pa.array([{"bytes": content} for content in CONTENTS], pa.struct([("bytes", pa.binary_view())])),
    ],
    ids=["binary", "large", "view", "fixed size", "dictionary", "struct", "large struct", "struct of view"],
)
@pytest.mark.parametrize("name", ["jpg", "anything"])
def test_the_only_column_of_encoded_images_is_taken_whatever_its_type(tmp_path: Path, column: pa.Array, name: str):
    write(Location.of(tmp_path / "a.parquet"), {"url": ["a", "b", "c"], "width": [1, 2, 3], name: column}, row_group_size=3)
    source, listing = list_source(DataConfig(source=str(tmp_path)))
    assert [source.fetch(item.path) for item in items_of(listing.table)] == CONTENTS


@pytest.mark.parametrize(
    ("columns", "taken"),
    [
        ({"jpg": [b"i"], "key": [b"k"], "sha": [b"s"]}, b"i"),
        ({"image": pa.array([{"bytes": b"i", "path": None}], IMAGE), "jpg": [b"other"]}, b"i"),
        ({"key": [b"k"], "PNG": [b"i"]}, b"i"),
    ],
    ids=["the usual name among bytes", "a struct before bytes", "in capitals"],
)
def test_among_several_columns_the_one_that_hubs_would_mean_is_taken(tmp_path: Path, columns: dict[str, Sequence[object]], taken: bytes):
    write(Location.of(tmp_path / "a.parquet"), columns)
    source, listing = list_source(DataConfig(source=str(tmp_path)))
    assert [source.fetch(item.path) for item in items_of(listing.table)] == [taken]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"left": images(range(1)), "right": images(range(1))},
            r"a\.parquet has 2 columns that may hold images; set data\.image_column to the .* left, right",
        ),
        ({"left": [b"x"], "right": [b"y"]}, r"set data\.image_column to the right one of left, right"),
        ({"jpg": [b"x"], "png": [b"y"]}, r"set data\.image_column to the right one of jpg, png"),
        ({"images": pa.array([[{"bytes": b"x", "path": None}]], pa.list_(IMAGE))}, r"column images holds lists of images, and a row is one image"),
        ({"images": pa.array([[b"x"]], pa.large_list(pa.large_binary()))}, r"column images holds lists of images"),
        ({"URL": ["http://a/b.jpg"], "TEXT": ["a cat"]}, r"column URL holds addresses; fetch the images first, such as by `img2dataset --input_format parquet"),
        ({"image_url": pa.array(["http://a"], pa.large_string())}, r"column image_url holds addresses"),
        ({"label": [1], "text": ["x"]}, r"it has label, text; an image column is of encoded bytes, or struct<bytes, path>"),
    ],
    ids=["two structs", "two of bytes", "two usual names", "list", "large list", "addresses", "large addresses", "nothing"],
)
def test_a_file_of_which_no_column_is_taken_says_what_would_be_right(tmp_path: Path, columns: dict[str, Sequence[object]], message: str):
    write(Location.of(tmp_path / "a.parquet"), columns)
    with pytest.raises(DataError, match=message):
        list_source(DataConfig(source=str(tmp_path)))


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_labels_of_every_kind_of_text_are_read(tmp_path: Path, kind: pa.DataType):
    write(Location.of(tmp_path / "a.parquet"), {"image": images(range(3)), "label": pa.array(["x", None, "x"], pa.string()).cast(kind)})
    assert labels_of(Location.of(tmp_path)) == ["x", None, "x"]


def test_rows_that_img2dataset_could_not_fetch_have_a_reason(tmp_path: Path):
    write(Location.of(tmp_path / "00000.parquet"), {"jpg": [encoded(0), None], "status": ["success", "failed_to_download"]})
    source, listing = list_source(DataConfig(source=str(tmp_path)))
    assert source.fetch("00000.parquet#000000000") == encoded(0)
    with pytest.raises(DataError, match="the row has no image bytes"):
        source.fetch("00000.parquet#000000001")
    assert len(listing) == 2


def test_of_a_file_with_a_damaged_part_the_other_rows_are_read(tmp_path: Path):
    contents = [np.random.default_rng(row).bytes(5000) for row in range(6)]
    table = pa.table({"jpg": contents})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2, compression="none", use_dictionary=False, write_page_checksum=True)
    raw = bytearray((tmp_path / "a.parquet").read_bytes())
    raw[raw.find(contents[2]) + 100] ^= 1
    (tmp_path / "a.parquet").write_bytes(raw)
    source, listing = list_source(DataConfig(source=str(tmp_path)))
    assert len(listing) == 6

    def outcome(row: int) -> bytes | np.ndarray | str:
        try:
            return source.fetch(f"a.parquet#{row:09d}")
        except DataError as error:
            return error.reason

    assert [outcome(row) for row in range(6)] == [*contents[:2], "unreadable", "unreadable", *contents[4:]]


def test_plain_bytes_are_read_where_the_column_is_named(root: Location):
    write(root / "a.parquet", {"jpg": [encoded(0), encoded(1)], "other": [b"x", b"y"]})
    with pytest.raises(DataError, match=r"data\.image_column=png is not an image column of a\.parquet"):
        list_source(DataConfig(source=str(root), image_column="png"))
    source, listing = list_source(DataConfig(source=str(root), image_column="jpg"))
    assert [source.fetch(item.path) for item in items_of(listing.table)] == [encoded(0), encoded(1)]


def test_a_parquet_file_that_is_none_is_named(root: Location):
    (root / "bad.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"bad\.parquet is not a readable parquet file"):
        list_source(DataConfig(source=str(root)))


def test_a_fifo_never_blocks_and_a_name_of_no_encoding_is_read(tmp_path: Path):
    name = b"caf\xe9.parquet"
    write(Location.of(tmp_path / "a.parquet"), {"image": images(range(2))})
    os.rename(tmp_path / "a.parquet", os.path.join(os.fsencode(tmp_path), name))
    source, listing = list_source(DataConfig(source=str(tmp_path)))
    assert [source.fetch(item.path) for item in items_of(listing.table)] == [encoded(0), encoded(1)]
    os.mkfifo(tmp_path / "fifo.parquet")
    with pytest.raises(DataError, match=r"fifo\.parquet is not a readable parquet file \(it is no regular file"):
        list_source(DataConfig(source=str(tmp_path)))


def test_files_without_rows_are_named(root: Location):
    write(root / "a.parquet", {"image": images(range(0)), "label": pa.array([], pa.string())})
    with pytest.raises(DataError, match="holds parquet files without rows"):
        list_source(DataConfig(source=str(root)))


def test_a_row_without_bytes_or_file_is_unreadable(root: Location):
    write(root / "a.parquet", {"image": pa.array([None, {"bytes": None, "path": "x"}], IMAGE)})
    source, listing = list_source(DataConfig(source=str(root)))
    expected = ["the row has no image bytes"] * 2 + ["FileNotFoundError: No such file or directory", "the folder could not be listed"]
    for path, detail in zip([*(item.path for item in items_of(listing.table)), "gone.parquet#000000000", "folder"], expected, strict=True):
        with pytest.raises(DataError, match=f"^{detail}$"):
            source.fetch(path)


def test_images_and_parquet_with_images_are_not_mixed_in_silence(root: Location):
    write(root / "rows" / "a.parquet", {"image": images(range(2))})
    for name in ("x.png", "y.png", "z.png"):
        (root / "files" / name).write_text("x")
    with pytest.raises(DataError, match=r"holds 3 image files and 1 parquet files with images; name the subfolder of one kind"):
        list_source(DataConfig(source=str(root)))
    assert len(list_source(DataConfig(source=str(root / "rows")))[1]) == 2
    _, listing = list_source(DataConfig(source=str(root), image_column="image"))
    assert (len(listing), listing.ignored) == (2, {"image file beside parquet": 3})


def test_parquet_without_images_beside_images_is_counted(root: Location):
    write(root / "labels.parquet", {"name": ["x.png"], "label": [1]})
    (root / "broken.parquet").write_text("x")
    (root / "x.png").write_text("x")
    _, listing = list_source(DataConfig(source=str(root)))
    assert [item.path for item in items_of(listing.table)] == ["x.png"]
    assert listing.ignored == {".parquet": 2}


def test_parquet_on_s3_is_listed_as_on_disk(tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch):
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    for number in range(20):
        write(Location.of(tmp_path / f"{number}.parquet"), {"image": images(range(number, number + 3)), "label": [number] * 3})
    remote = Location.of(f"s3://{s3.bucket}/{tmp_path.name}-rows")
    remote.upload(tmp_path)
    here, there = (list_source(DataConfig(source=str(place)))[1].table for place in (tmp_path, remote))
    assert here.drop(["stamp"]).equals(there.drop(["stamp"]))
    assert set(here["stamp"].to_pylist()) == {f"{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in tmp_path.iterdir()}
