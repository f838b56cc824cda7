"""Forgetting images: what learned from them is named and tagged, and no dataset made afterwards holds them."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from PIL import Image
from support import TINY, Finished, shard_pixels

from components.data.catalog import Catalog, Dataset
from components.data.shards import QUARANTINE, read_rows
from components.storage import Location

pytestmark = pytest.mark.slow
Command = Callable[..., Finished]
NAME = "faces"


def write(file: Path, number: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8), dtype=np.uint8)).save(file)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, command: Command) -> Path:
    """One version trained on 100 images, one that started from it on 20 more, and one of other images."""
    place = tmp_path_factory.mktemp("forget")
    for number in range(100):
        write(place / "source" / "a" / f"{number:03d}.png", number)
    write(place / "source" / "b" / "copy.png", 7)
    assert command("run", *arguments(place), "--json", cwd=place).code == 0
    started = command("run", *arguments(place, f"train.init_from=models:/{NAME}/1", "train.seed=1"), "--name", "second", "--json", cwd=place)
    assert started.code == 0, started.stderr
    other = command("run", "digits", *TINY, "registry.model_name=other", "--name", "other", "--json", cwd=place)
    assert other.code == 0, other.stderr
    return place


def arguments(place: Path, *more: str) -> list[str]:
    return ["digits", *TINY, f"data.source={place / 'source'}", "data.shard_bytes=1024", f"registry.model_name={NAME}", *more]


def test_which_models_learned_from_a_dataset_and_which_data_a_model(place: Path, command: Command):
    dataset = next(one for one in Catalog.of(Location.of(place / "storage")).datasets if one.manifest.source.endswith("source"))
    found = command("data", "models", dataset.name, "--json", cwd=place).json
    assert [(one["model"], one["version"], one["direct"]) for one in found] == [(NAME, 1, True), (NAME, 2, True)]
    data = command("models", "data", f"{NAME}/2", "--json", cwd=place).json
    assert [(one["version"], one["digest"], one["folder"]) for one in data] == [(number, dataset.manifest.digest, str(dataset.folder)) for number in (2, 1)]
    assert f"{NAME}/1" in command("models", "data", f"{NAME}/2", cwd=place).stdout


def test_a_forgotten_image_comes_into_no_dataset_again_whatever_it_is_called(place: Path, command: Command):
    storage = Location.of(place / "storage")
    before = next(one for one in Catalog.of(storage).datasets if one.manifest.source.endswith("source"))
    sha256 = hashlib.sha256((place / "source" / "a" / "007.png").read_bytes()).hexdigest()
    gone = np.asarray(Image.open(place / "source" / "a" / "007.png")).tobytes()
    assert gone in shard_pixels(before)
    done = command("data", "forget", "a/007.png", sha256.upper(), str(place / "source" / "a" / "011.png"), "--why", "asked for", "--json", cwd=place)
    assert done.code == 0, done.stderr
    assert len(done.json["forgotten"]) == 2
    assert [(one["model"], one["version"]) for one in done.json["versions"]] == [(NAME, 1), (NAME, 2)]
    assert set(done.json["runs"]) == {"digits", "second"}
    tags = mlflow.MlflowClient(f"sqlite:///{place / 'storage' / 'mlflow' / 'mlflow.db'}").get_model_version(NAME, "2").tags
    assert json.loads(tags["ddpm.forgotten"])["why"] == "asked for"
    assert sha256 in json.loads(tags["ddpm.forgotten"])["sha256"]
    write(place / "source" / "c" / "again.png", 7)  # the same content by another name
    for more in ([], ["--from", "preprocess"]):
        made = command("run" if more else "preprocess", *arguments(place), *more, "--name", "digits", "--json", cwd=place)
        assert made.code == 0, made.stderr
        receipt = made.json["preprocess"]
        assert receipt["quarantined"] == {"forgotten": 4}
        assert receipt["num_opened"] == (102 if more else 1)
        now = Dataset.of(Location.of(receipt["path"]))
        assert sha256 not in {value.hex() for value in read_rows(now.folder, now.manifest)["sha256"].to_pylist()}
        assert gone not in shard_pixels(now)
        assert now.manifest.num_rows == 98
        assert (now.folder / QUARANTINE).is_file()


def test_what_is_no_image_is_named_and_nothing_is_changed(place: Path, command: Command):
    before = sorted((place / "storage" / "forgotten").iterdir())
    done = command("data", "forget", "a/012.png", "nowhere.png", cwd=place)
    assert (done.code, "nowhere.png is no SHA-256, no file here, and no row of a dataset" in done.stderr) == (2, True), done.stderr
    assert sorted((place / "storage" / "forgotten").iterdir()) == before


def test_an_image_whose_tombstone_is_taken_away_comes_back(place: Path, command: Command):
    file: Any = place / "storage" / "forgotten" / f"{hashlib.sha256((place / 'source' / 'a' / '011.png').read_bytes()).hexdigest()}.json"
    assert json.loads(file.read_text())["why"] == "asked for"
    file.unlink()
    made = command("preprocess", *arguments(place), "--name", "digits", "--json", cwd=place)
    assert made.code == 0, made.stderr
    assert made.json["preprocess"]["quarantined"] == {"forgotten": 3}


def test_it_retrains_from_fresh_weights_where_asked_to(place: Path, command: Command):
    settings = [part for setting in arguments(place)[1:] for part in ("--set", setting)]
    done = command("data", "forget", "a/013.png", "--retrain", "digits", *settings, "--name", "without", "--json", cwd=place)
    assert done.code == 0, done.stderr
    assert done.json["retrained"].startswith("retrained: ")
    tags = mlflow.MlflowClient(f"sqlite:///{place / 'storage' / 'mlflow' / 'mlflow.db'}").get_model_version(NAME, "3").tags
    assert tags["weights.start"] == "fresh"
    assert "ddpm.forgotten" not in tags
