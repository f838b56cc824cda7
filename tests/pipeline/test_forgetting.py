"""Images that are to be forgotten, in the making of datasets; test_forget.py in end_to_end/ has the models."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import shard_pixels

from components.data.catalog import Dataset
from components.data.shards import read_rows
from components.errors import DataError
from components.storage import Location
from pipeline.artifacts import ShardSet
from pipeline.config import load_config
from pipeline.context import Reporter
from pipeline.run import run
from workflows.forget import forget


def write(file: Path, number: int) -> str:
    """Writes an image of noise; returns the SHA-256 of its file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8), dtype=np.uint8)).save(file)
    return hashlib.sha256(file.read_bytes()).hexdigest()


def preprocessed(place: Path, *, anew: bool = False) -> ShardSet:
    config = load_config(
        None, [f"data.source={place / 'source'}", "data.image_size=8", "data.mode=L", "data.shard_bytes=1024", f"cluster.storage={place / 'storage'}"]
    )
    receipt = run(config, "one", until="preprocess", start_from="preprocess" if anew else None, reporter=Reporter())["preprocess"].receipt
    assert isinstance(receipt, ShardSet)
    return receipt


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for number in range(60):
        write(tmp_path / "source" / "a" / f"{number:03d}.png", number)
    write(tmp_path / "source" / "b" / "copy.png", 7)
    return tmp_path


def test_a_forgotten_image_comes_into_no_dataset_again_whatever_it_is_called(place: Path):
    storage = Location.of(place / "storage")
    before = Dataset.of(Location.of(preprocessed(place).path))
    sha256 = hashlib.sha256((place / "source" / "a" / "007.png").read_bytes()).hexdigest()
    gone = np.asarray(Image.open(place / "source" / "a" / "007.png")).tobytes()
    assert gone in shard_pixels(before)
    found = forget(storage, None, ["a/007.png", sha256.upper(), str(place / "source" / "a" / "011.png")], "asked for")
    assert set(found.hashes) == found.fresh == {sha256, hashlib.sha256((place / "source" / "a" / "011.png").read_bytes()).hexdigest()}
    assert [(dataset.name, rows) for dataset, rows in found.datasets] == [(before.name, 2)]
    write(place / "source" / "c" / "again.png", 7)
    for anew, opened in ((False, 1), (True, 62)):
        receipt = preprocessed(place, anew=anew)
        assert (receipt.quarantined, receipt.num_opened, receipt.num_rows) == ({"forgotten": 4}, opened, 58)
        now = Dataset.of(Location.of(receipt.path))
        assert sha256 not in {value.hex() for value in read_rows(now.folder, now.manifest)["sha256"].to_pylist()}
        assert gone not in shard_pixels(now)
    assert forget(storage, None, [sha256], "again").fresh == set()


def test_without_its_tombstone_it_comes_back(place: Path):
    first = preprocessed(place)
    found = forget(Location.of(place / "storage"), None, ["a/011.png"], "asked for")
    assert preprocessed(place).quarantined == {"duplicate": 1, "forgotten": 1}
    (sha256,) = found.hashes
    tombstone = place / "storage" / "forgotten" / f"{sha256}.json"
    assert json.loads(tombstone.read_text())["paths"] == ["a/011.png"]
    tombstone.unlink()
    assert preprocessed(place).digest == first.digest
    write(place / "source" / "a" / "060.png", 60)
    more = preprocessed(place)
    assert (more.num_rows, more.quarantined, more.num_decoded) == (61, {"duplicate": 1}, 2)


def test_what_is_no_image_is_named_and_nothing_is_changed(place: Path):
    preprocessed(place)
    with pytest.raises(DataError, match=r"nowhere\.png is no SHA-256, no file here, and no row of a dataset"):
        forget(Location.of(place / "storage"), None, ["a/012.png", "nowhere.png"], "")
    assert not (place / "storage" / "forgotten").exists()
