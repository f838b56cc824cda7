import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from support import ROOT

from components.errors import DataError
from components.ingest.builtin import DigitsSource, TorchvisionSource
from components.ingest.folders import FolderSource
from components.ingest.listing import items_of
from components.ingest.sources import DataConfig, Source, list_source, source_from_json, source_to_json
from components.ingest.tables import ParquetSource

SOURCES: list[Source] = [
    FolderSource("/caf\udce9/photos"),
    FolderSource("s3://bucket/図"),
    ParquetSource("s3://bucket/x", None, "label"),
    ParquetSource("/x", "jpg", "fine"),
    TorchvisionSource("mnist", "/x"),
    DigitsSource(),
]


def test_sources_travel_as_text_to_another_process():
    texts = [source_to_json(source) for source in SOURCES]
    assert [source_from_json(text) for text in texts] == SOURCES
    script = "import sys; from components.ingest.sources import *; print(*(source_to_json(source_from_json(text)) for text in sys.argv[1:]), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", script, *texts], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines() == texts


@pytest.mark.parametrize("text", ['{"class": "Path"}', "{}"])
def test_text_that_is_no_source_is_refused(text: str):
    with pytest.raises(ValueError, match="is no source; use one of FolderSource, ParquetSource, TorchvisionSource, DigitsSource"):
        source_from_json(text)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("s3://key:secret@bucket/x", "holds keys or options"),
        ("s3://bucket/x?endpoint_override=y", "holds keys or options"),
        ("s3://key:sec/ret@bucket/x", "not a bucket"),
        ("s3://", "not a bucket"),
        ("s3://bucket/a//b", "not a bucket"),
        ("gs://bucket/x", "gs:// is no source; use a folder, s3://BUCKET/PREFIX"),
    ],
)
def test_an_address_that_holds_keys_or_is_none_is_refused(source: str, message: str):
    with pytest.raises(ValidationError, match=message):
        DataConfig(source=source)


@pytest.mark.parametrize("source", ["s3://bucket", "s3://my-bucket.x/photos of cats/図@2/", "/a@b?c", "cifar10"])
def test_addresses_and_paths_are_taken_as_they_are(source: str):
    assert DataConfig(source=source).source == source


def test_a_folder_that_does_not_exist_is_named():
    with pytest.raises(DataError, match=r"data\.source=/no/such/folder does not exist; name a folder of images or parquet files, or one of digits"):
        list_source(DataConfig(source="/no/such/folder"))


def test_a_file_in_place_of_a_folder_is_named(tmp_path: Path):
    (tmp_path / "x.jpg").write_text("x")
    with pytest.raises(DataError, match=r"x\.jpg is not a folder"):
        list_source(DataConfig(source=str(tmp_path / "x.jpg")))


def test_the_digits_are_the_1797_of_scikit_learn():
    source, listing = list_source(DataConfig())
    items = list(items_of(listing.table))
    assert not source.is_remote
    assert len(items) == 1797
    assert {item.label for item in items} == set("0123456789")
    values = source.fetch(items[0].path)
    assert isinstance(values, np.ndarray)
    assert values.nbytes == items[0].size
    assert values.max() == 239 or values.max() == 255


def test_a_torchvision_dataset_is_read_from_a_local_root(tmp_path: Path):
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    images, labels = np.arange(3 * 28 * 28, dtype=np.uint32).reshape(3, 28, 28).astype(np.uint8), np.asarray([4, 0, 9], np.uint8)
    for part, count in (("train", 3), ("t10k", 3)):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(np.asarray([0x803, count, 28, 28], ">i4").tobytes() + images.tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(np.asarray([0x801, count], ">i4").tobytes() + labels.tobytes())
    source, listing = list_source(DataConfig(source="mnist", root=str(tmp_path)))
    items = list(items_of(listing.table))
    assert [item.label for item in items] == ["4 - four", "0 - zero", "9 - nine"]
    assert np.array_equal(source.fetch(items[1].path), images[1])


@pytest.mark.skipif(os.environ.get("DDPM_TEST_NETWORK") == "1", reason="a network would serve the download")
def test_a_torchvision_dataset_that_is_nowhere_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import urllib.error
    import urllib.request

    def refuse(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(DataError, match=rf"data\.source=cifar10 is not under data\.root={tmp_path}, and could not be downloaded .*no network"):
        list_source(DataConfig(source="cifar10", root=str(tmp_path)))
