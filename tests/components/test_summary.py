"""Which images stand for a dataset, and that they are drawn under their own label."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
from support import ListedFile, write_listed

from components.data.summary import chosen_rows, dataset_sheet, quarantine_by_reason
from components.figures import Strip, contact_sheet
from components.spaces.pixels import PixelSpace
from components.storage import Location


def rows_of(contents: list[bytes], labels: list[str | None]) -> pa.Table:
    return pa.table({"label": pa.array(labels, pa.string()), "sha256": pa.array(contents, pa.binary(32))})


def many(count: int, num_labels: int) -> tuple[list[bytes], list[str | None]]:
    return [hashlib.sha256(bytes([number % 251, number // 251])).digest() for number in range(count)], [f"{n % num_labels:02d}" for n in range(count)]


def test_a_growing_dataset_keeps_the_chosen_rows_but_for_those_that_newer_ones_replace():
    contents, labels = many(4000, 25)
    few, more = (
        {label: {contents[row] for row in chosen} for label, chosen in chosen_rows(rows_of(contents[:count], labels[:count])).items()} for count in (1000, 4000)
    )
    assert few.keys() == more.keys()
    assert len(few) == 10
    known = set(contents[:1000])
    for label in few:
        assert len(few[label]) == len(more[label]) == 10
        assert more[label] & known <= few[label]


def test_rows_are_chosen_of_every_label_and_each_content_once():
    contents, labels = many(60, 3)
    chosen = chosen_rows(rows_of(contents * 2, [None, *labels[1:]] * 2), per_label=4)
    assert list(chosen) == ["00", "01", "02", None]
    assert [len({contents[row % 60] for row in rows}) for rows in chosen.values()] == [4, 4, 4, 1]


def test_what_is_held_out_does_not_decide_what_is_shown():
    contents, labels = many(500, 3)
    others = [hashlib.sha256(content).digest()[:24] + content[24:] for content in contents]
    one, other = chosen_rows(rows_of(contents, labels)), chosen_rows(rows_of(others, labels))
    assert all(np.array_equal(one[label], other[label]) for label in one)


def test_a_sheet_shows_rows_of_both_splits_under_their_label(tmp_path: Path):
    recipe = PixelSpace(image_size=8)
    files = [ListedFile(f"{n:03d}", label=("dog", "cat")[n % 2], split=("train", "holdout")[n % 3 == 0]) for n in range(100)]
    manifest = write_listed(Location.of(tmp_path / "set"), files, recipe, source="pets")
    strips = []
    for label in ("cat", "dog"):
        mine = sorted((file for file in files if file.label == label), key=lambda file: int.from_bytes(file.sha256[24:], "little"))[:10]
        assert {file.split for file in mine} == {"train", "holdout"}
        strips.append(Strip(label, "50", np.stack([file.pixels(recipe) for file in mine])))
    caption = f"100 images, 8x8 RGB, dataset {manifest.digest}"
    assert np.array_equal(np.asarray(dataset_sheet(Location.of(tmp_path / "set"), manifest)), np.asarray(contact_sheet(strips, "pets", caption)))


def test_without_labels_a_sheet_is_a_hundred_images(tmp_path: Path):
    manifest = write_listed(Location.of(tmp_path / "set"), [ListedFile(f"{n:03d}") for n in range(150)])
    sheet = dataset_sheet(Location.of(tmp_path / "set"), manifest)
    assert sheet.size == contact_sheet([Strip("", "", np.zeros((10, 1, 8, 8), np.uint8))] * 10, "", "").size


def test_quarantine_is_told_by_reason_the_most_frequent_first(tmp_path: Path):
    bad = [ListedFile(f"bad/{n}", reason="truncated" if n % 4 else "empty") for n in range(20)]
    manifest = write_listed(Location.of(tmp_path / "set"), [*map(ListedFile, "ab"), *bad])
    found = quarantine_by_reason(Location.of(tmp_path / "set"), manifest)
    assert [(reason, of.count, of.examples) for reason, of in found.items()] == [
        ("truncated", 15, ("bad/1", "bad/2", "bad/3")),
        ("empty", 5, ("bad/0", "bad/4", "bad/8")),
    ]
