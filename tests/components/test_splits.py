"""Splits that a source names by files and folders: which is trained on, which is held out, and that the others are not."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from servers import S3Server

from components.errors import DataError
from components.ingest.listing import items_of
from components.ingest.sources import DataConfig, list_source
from components.ingest.splits import SourceSplits, choose, split_of_file
from components.storage import Location


@pytest.fixture(params=["disk", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Location:
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    return Location.of(tmp_path / "root") if request.param == "disk" else Location.of(f"s3://{s3.bucket}/splits-{tmp_path.name}")


def write(root: Location, **files: int) -> None:
    """Writes parquet files of some rows, by names in which __ stands for a slash and ___ for a dash."""
    for name, rows in files.items():
        path = name.replace("___", "-").replace("__", "/")
        with (root / f"{path}.parquet").staged() as staging:
            pq.write_table(pa.table({"image": [f"{path} {row}".encode() for row in range(rows)]}), staging)


def listed(root: Location, **settings: str) -> list[str]:
    return [item.path for item in items_of(list_source(DataConfig.model_validate({"source": str(root), **settings}))[1].table)]


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train-00000-of-00001.parquet", "train"),
        ("data/test-00000-of-00004-0123abcd.parquet", "test"),
        ("default/validation/0000.parquet", "validation"),
        ("my_dataset_train.parquet", "train"),
        ("TEST.parquet", "test"),
        ("val/part 1.parquet", "validation"),
        ("dev.parquet", "validation"),
        ("eval/train-00000.parquet", "train"),
        ("data/00000.parquet", "unnamed"),
        ("trainer/latest.parquet", "unnamed"),
        ("contest/a.parquet", "unnamed"),
        ("train2017/0.parquet", "train"),
    ],
)
def test_a_split_is_named_by_the_file_else_by_the_innermost_folder(path: str, split: str):
    assert split_of_file(path) == split


def test_of_several_splits_train_is_taken_and_the_others_are_not_even_opened(root: Location):
    write(root, train___00000___of___00002=2, train___00001___of___00002=1, validation___00000___of___00001=1)
    (root / "test-00000-of-00001.parquet").write_bytes(b"no parquet")
    listing = list_source(DataConfig(source=str(root)))[1]
    assert {item.path.partition("#")[0] for item in items_of(listing.table)} == {"train-00000-of-00002.parquet", "train-00001-of-00002.parquet"}
    assert listing.splits == SourceSplits({"train": 2, "validation": 1, "test": 1}, "train")
    assert listing.splits is not None
    assert listing.splits.in_words == "train (2 files): trained on; validation (1 file): left out; test (1 file): left out"
    assert listing.held_out is None


def test_another_split_is_taken_and_one_is_held_out_where_they_are_asked_for(root: Location):
    write(root, data__train=2, data__validation=1, data__test=1)
    assert listed(root, split="test") == ["data/test.parquet#000000000"]
    assert len(listed(root, split="all")) == 4
    listing = list_source(DataConfig(source=str(root), holdout_split="validation"))[1]
    assert listing.held_out is not None
    held = [item.path for item, is_held in zip(items_of(listing.table), listing.held_out, strict=True) if is_held]
    assert (len(listing), held) == (3, ["data/validation.parquet#000000000"])
    both = list_source(DataConfig(source=str(root), split="all", holdout_split="test"))[1]
    assert both.held_out is not None
    assert (len(both), int(both.held_out.sum())) == (4, 1)


def test_a_source_with_one_split_or_none_is_read_whole_as_before(root: Location):
    write(root, train___0=1, train___1=2)
    listing = list_source(DataConfig(source=str(root)))[1]
    assert (len(listing), listing.splits) == (3, None)
    write(root, more__part___2=1)
    assert len(listed(root)) == 4


def test_image_folders_called_by_splits_are_splits_and_the_label_is_the_next_folder(root: Location):
    for path in ("train/cat/1.jpg", "train/dog/2.jpg", "test/cat/3.jpg", "val/bird/deep/4.jpg", "train/5.jpg"):
        (root / path).write_bytes(b"image")
    listing = list_source(DataConfig(source=str(root)))[1]
    assert [(item.path, item.label) for item in items_of(listing.table)] == [("train/5.jpg", None), ("train/cat/1.jpg", "cat"), ("train/dog/2.jpg", "dog")]
    assert listing.splits == SourceSplits({"train": 3, "validation": 1, "test": 1}, "train")
    held = list_source(DataConfig(source=str(root), holdout_split="validation"))[1]
    assert held.held_out is not None
    assert [(item.path, item.label, bool(is_held)) for item, is_held in zip(items_of(held.table), held.held_out, strict=True)][-1] == (
        "val/bird/deep/4.jpg",
        "bird",
        True,
    )
    assert [item.label for item in items_of(list_source(DataConfig(source=str(root), split="all"))[1].table)] == ["cat", None, "cat", "dog", "bird"]


@pytest.mark.parametrize("others", [["cat/1.jpg"], ["0.jpg"], []], ids=["another folder", "a file beside", "one split alone"])
def test_first_folders_that_are_not_all_splits_are_labels_as_before(tmp_path: Path, others: list[str]):
    for path in ("train/a/1.jpg", *(["test/b/2.jpg"] if others else []), *others):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"image")
    listing = list_source(DataConfig(source=str(tmp_path)))[1]
    assert listing.splits is None
    assert "train" in {item.label for item in items_of(listing.table)}
    assert len(listing) == 1 + 2 * bool(others)


@pytest.mark.parametrize(
    ("files", "split", "held_out", "message"),
    [
        (["validation", "test"], None, None, "names the splits validation, test and none to train on; set data.split to one of them, or to all"),
        (["train", "test"], "validation", None, "data.split=validation is not in data.source=x, which names the splits train, test"),
        (["train", "test"], None, "validation", "data.holdout_split=validation is not in data.source=x"),
        (["unnamed"], "train", None, "which names no splits by its files or folders"),
        (["train", "test"], None, "train", "data.holdout_split=train is the split that is trained on"),
        (["test"], None, "test", "names the splits test and none to train on"),
    ],
)
def test_a_split_that_cannot_be_had_is_one_message(files: list[str], split: str | None, held_out: str | None, message: str):
    with pytest.raises(DataError, match=message):
        choose("x", files, split, held_out)


@pytest.mark.parametrize("settings", [{"split": "test"}, {"holdout_split": "test"}])
def test_a_builtin_source_has_its_training_part_alone(settings: dict[str, str]):
    with pytest.raises(DataError, match=f"data.{next(iter(settings))}=test is not in data.source=digits, of which the training part is read"):
        list_source(DataConfig.model_validate({"source": "digits", **settings}))
    assert len(list_source(DataConfig(source="digits", split="train"))[1]) == 1797
