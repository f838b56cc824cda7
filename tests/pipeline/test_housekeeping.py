"""What is needed of datasets, and removing the rest, on a file system and on a real S3 server."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import ray_nodes
from PIL import Image

from components.data.catalog import Catalog
from components.data.shards import SHARDS, check_whole
from components.storage import Location
from pipeline import lease
from pipeline.artifacts import ShardSet
from pipeline.config import load_config
from pipeline.context import Reporter
from pipeline.housekeeping.items import Item, Retention, below, in_words
from pipeline.housekeeping.prune import look, prune, remove
from pipeline.lease import held
from pipeline.run import run


@pytest.fixture(params=["disk", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, s3: ray_nodes.S3Server, monkeypatch: pytest.MonkeyPatch) -> Location:
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(lease, "SETTLE_S", 0.1)  # nobody else wants these leases
    return Location.of(tmp_path / "root") if request.param == "disk" else Location.of(f"s3://{s3.bucket}/{tmp_path.name}")


def preprocessed(storage: Location, folder: Path, numbers: range, name: str) -> ShardSet:
    for number in numbers:
        file = folder / f"{number:03d}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8), dtype=np.uint8)).save(file)
    config = load_config(None, [f"data.source={folder}", "data.image_size=8", "data.mode=L", "data.shard_bytes=1024", f"cluster.storage={storage}"])
    receipt = run(config, name, until="preprocess", reporter=Reporter())["preprocess"].receipt
    assert isinstance(receipt, ShardSet)
    return receipt


def of_datasets(items: Iterable[Item]) -> list[str]:
    """Returns the kinds of items that datasets are made of; a Ray that was started leaves logs beside them."""
    return [item.kind for item in items if item.kind in ("dataset", "shards")]


def test_all_files_below_a_folder_are_told_temporary_ones_too(storage: Location):
    (storage / "a" / "b" / "x").write_text("four")
    (storage / "a" / ".y.tmp").write_text("12")
    (storage / "c").write_text("")
    assert [(name, size) for name, size, _ in storage.tree()] == [("a/.y.tmp", 2), ("a/b/x", 4), ("c", 0)]
    assert all(written > 1e9 for _, _, written in storage.tree())
    assert (storage / "none").tree() == []
    remove(storage / "a")
    assert [name for name, _, _ in storage.tree()] == ["c"]


def test_a_dataset_goes_with_the_last_run_that_names_it_and_its_shards_with_the_last_dataset(storage: Location, tmp_path: Path):
    first = preprocessed(storage, tmp_path / "images", range(40), "one")
    (tmp_path / "images" / "000.png").unlink()
    second = preprocessed(storage, tmp_path / "images", range(40, 60), "two")
    # The newest dataset of each run is needed, and only the shards of both.
    assert of_datasets(prune(storage, None, Retention(0.0), Reporter()).removed) == []
    remove(storage / "runs" / "one")
    assert [(item.kind, below(item.places[0])) for item in look(storage, None, Retention(0.0)).spare if item.kind == "dataset"] == [
        ("dataset", below(first.path))
    ]
    assert of_datasets(look(storage, None, Retention(1.0)).spare) == []
    source = Location.of(second.path).parent
    before = len((source / SHARDS).files())
    with held(source / ".lock", wait=False):
        kept = prune(storage, None, Retention(0.0), Reporter())
    assert (of_datasets(kept.removed), of_datasets(kept.left)) == ([], ["dataset", "shards"])
    done = prune(storage, None, Retention(0.0), Reporter())
    assert of_datasets(done.removed) == ["dataset", "shards"]
    (dataset,) = Catalog.of(storage).datasets
    assert dataset.name == Location.of(second.path).name
    check_whole(dataset.folder, dataset.manifest)
    assert len((source / SHARDS).files()) == len(dataset.manifest.shards) < before
    remove(storage / "runs" / "two")
    prune(storage, None, Retention(0.0), Reporter())
    assert [name for name, _, _ in (storage / "datasets").tree() if not name.endswith(".lock")] == []


def test_items_are_counted_in_words():
    items = [Item("dataset", "a", (), 1, 0.0), Item("dataset", "b", (), 1, 0.0), Item("shards", "s", (Location("/a"), Location("/b"), Location("/c")), 3, 0.0)]
    assert in_words([*items, Item("latents", "l", (), 1, 0.0)]) == "2 datasets, 3 shards, 1 set of latents"
    assert in_words([]) == "nothing"
