"""The preprocess stage in this process, on a Ray of its own: what is left behind by one run is right for the next."""

import contextlib
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster.config import ClusterConfig
from cluster.connect import connect, disconnect
from components.data.reader import RowReader
from components.data.shards import read_manifest, read_table, shard_location
from components.errors import DataError
from components.ingest.sources import DataConfig
from components.storage import Location
from pipeline.artifacts import ShardSet
from pipeline.context import Reporter, StageContext
from pipeline.preprocess import list_source, preprocess

Stage = Callable[..., ShardSet]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterConfig]:
    config = ClusterConfig(storage=str(tmp_path_factory.mktemp("ray")))
    connect(config)
    yield config
    disconnect()


@pytest.fixture
def stage(cluster: ClusterConfig, tmp_path: Path) -> Stage:
    """Returns a function that runs the stage over a folder with small shards, into `storage` by default."""

    def run(source: Path, storage: str = "storage", anew: bool = False, **settings: Any) -> ShardSet:
        config = DataConfig.model_validate({"source": str(source), "image_size": 8, "shard_bytes": 8 * 192, "max_bad_fraction": 0.3, **settings})
        root = Location.of(tmp_path / storage)
        context = StageContext(root, root / "stage", "inputs", "run", cluster, Reporter())
        return preprocess(config, list_source(config, root), context=context, anew=anew)

    return run


def write_images(folder: Path, numbers: range) -> Path:
    for number in numbers:
        target = folder / "ab"[number % 2] / f"{number:03d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(target)
    return folder


def contents(storage: Path) -> dict[str, bytes]:
    root = storage / "datasets"
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file() and path.name != ".lock"}


def pixels_of(receipt: ShardSet) -> np.ndarray:
    folder = Location.of(receipt.path)
    reader = RowReader(folder, read_manifest(folder))
    return reader.rows(np.arange(len(reader)))


class Killed(BaseException):
    pass


class Fuse:
    """Ends the stage before one of its writes, as a kill would.

    Attributes:
        writes: how many there were.
        moment: before which of them it ends; 0: never.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.writes = self.moment = 0
        for name in ("write_bytes", "remove_tree", "remove"):
            monkeypatch.setattr(Location, name, self._counted(getattr(Location, name)))

    def _counted(self, honest: Callable[..., None]) -> Callable[..., None]:
        def call(location: Location, *arguments: Any, **options: Any) -> None:
            self.writes += 1
            if self.writes == self.moment:
                raise Killed
            honest(location, *arguments, **options)

        return call


@pytest.mark.parametrize("is_first", [True, False], ids=["first run", "next run"])
def test_ended_before_any_of_its_writes_it_ends_with_the_same_bytes(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_first: bool):
    source = write_images(tmp_path / "source", range(30))
    (source / "a" / "text.png").write_text("none")
    (tmp_path / "before").mkdir()
    if not is_first:
        stage(source, "before")
        write_images(source, range(30, 40))
        (source / "b" / "001.png").unlink()
    shutil.copytree(tmp_path / "before", tmp_path / "undisturbed")
    fuse = Fuse(monkeypatch)
    stage(source, "undisturbed", holdout_fraction=0.3)
    expected, total = contents(tmp_path / "undisturbed"), fuse.writes
    assert total >= 6
    for moment in range(1, total + 1):
        storage = f"ended {moment}"
        shutil.copytree(tmp_path / "before", tmp_path / storage)
        fuse.writes, fuse.moment = 0, moment
        with pytest.raises(Killed):
            stage(source, storage, holdout_fraction=0.3)
        fuse.moment = 0
        stage(source, storage, holdout_fraction=0.3)
        assert contents(tmp_path / storage) == expected, f"ended before write {moment} of {total}"


def write_slow_images(folder: Path, count: int) -> Path:
    """Writes images that take some milliseconds each."""
    folder.mkdir()
    for number in range(count):
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (250, 250, 3), dtype=np.uint8)).save(folder / f"{number:03d}.png", compress_level=1)
    return folder


class Killer(threading.Thread):
    """Kills one worker of Ray Data while it works."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.killed, self.is_over = 0, threading.Event()

    def run(self) -> None:
        while not self.killed and not self.is_over.wait(0.01):
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if "ray::Map(_do_turn)" in " ".join(process.cmdline()) and process.children():
                        process.kill()
                        self.killed += 1
                        break


def test_ray_data_makes_the_bytes_that_threads_make_even_when_a_worker_of_it_is_killed(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = write_slow_images(tmp_path / "source", 120)
    monkeypatch.setattr("components.ingest.chunks.CHUNK_FILES", 4)
    stage(source, "by threads")
    monkeypatch.setattr("pipeline.parallel_map.HEAD_START_S", 0.0)
    killer = Killer()
    killer.start()
    stage(source, "by Ray Data")
    killer.is_over.set()
    killer.join()
    assert killer.killed == 1
    assert contents(tmp_path / "by Ray Data") == contents(tmp_path / "by threads")


def test_no_decoder_outlives_the_stage(stage: Stage, tmp_path: Path):
    stage(write_images(tmp_path / "source", range(6)))
    assert not [process for process in psutil.Process().children() if "components.ingest.decoder" in " ".join(process.cmdline())]


def test_a_grown_source_gives_what_a_fresh_start_does_and_costs_what_changed(stage: Stage, tmp_path: Path):
    source = write_images(tmp_path / "source", range(60))
    old = stage(source)
    old_pixels = pixels_of(old)
    write_images(source, range(60, 70))
    for number in (4, 14, 24):
        (source / "a" / f"{number:03d}.png").unlink()
    Image.new("RGB", (9, 9), (1, 2, 3)).save(source / "b" / "005.png")
    (source / "b" / "007.png").touch()
    grown, fresh = stage(source), stage(source, "fresh")
    assert (grown.num_opened, grown.num_decoded, grown.num_rows) == (12, 11, 67)
    assert (fresh.num_opened, fresh.num_decoded) == (67, 67)
    assert grown.digest == fresh.digest != old.digest
    assert np.array_equal(pixels_of(grown), pixels_of(fresh))
    assert np.array_equal(pixels_of(old), old_pixels)
    assert stage(source).num_opened == 0


def test_two_image_columns_of_one_file_are_two_datasets(stage: Stage, tmp_path: Path):
    source = write_images(tmp_path / "images", range(6))
    files = [path.read_bytes() for path in sorted(source.rglob("*.png"))]
    (tmp_path / "tables").mkdir()
    pq.write_table(pa.table({"photo": files, "mask": files[::-1]}), tmp_path / "tables" / "a.parquet")
    photo, mask = (stage(tmp_path / "tables", image_column=column) for column in ("photo", "mask"))
    assert photo.digest != mask.digest
    assert np.array_equal(pixels_of(photo), pixels_of(mask)[::-1])


def test_what_was_done_for_other_files_is_not_taken_for_these(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = write_images(tmp_path / "source", range(24))
    first = stage(source)
    folder = Location.of(first.path)
    shards = [shard_location(folder, shard.name).path for shard in read_manifest(folder).shards]
    kept = [shard.read_bytes() for shard in shards]

    def killed(*_: object) -> None:
        raise Killed

    shards[0].unlink()
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.preprocess._Making._pack", killed)
        with pytest.raises(Killed):
            stage(source)
    shards[0].write_bytes(kept[0])
    shards[1].unlink()
    again = stage(source)
    assert (again.digest, again.num_rows, again.quarantined) == (first.digest, 24, {})
    assert shards[1].read_bytes() == kept[1]


def test_rows_are_not_taken_from_a_damaged_shard(stage: Stage, tmp_path: Path):
    source = write_images(tmp_path / "source", range(24))
    folder = Location.of(stage(source).path)
    shard = shard_location(folder, read_manifest(folder).shards[0].name).path
    content = bytearray(shard.read_bytes())
    content[300] ^= 255
    shard.write_bytes(bytes(content))
    (source / "a" / "000.png").unlink()
    with pytest.raises(DataError, match=rf"{shard.name} is damaged: .* delete it and run preprocess again"):
        stage(source)
    shard.unlink()
    mended = stage(source)
    fresh = stage(source, "fresh")
    assert mended.digest == fresh.digest
    assert np.array_equal(pixels_of(mended), pixels_of(fresh))


def test_asked_for_anew_a_damaged_dataset_is_mended_in_place(stage: Stage, tmp_path: Path):
    source = write_images(tmp_path / "source", range(24))
    first = stage(source)
    before = contents(tmp_path / "storage")
    for shard in read_manifest(Location.of(first.path)).shards:
        path = shard_location(Location.of(first.path), shard.name).path
        path.write_bytes(bytes(len(path.read_bytes())))
    stage(source, anew=True)
    assert contents(tmp_path / "storage") == before


def test_each_shard_is_listed_with_the_split_of_its_rows(stage: Stage, tmp_path: Path):
    source = write_images(tmp_path / "source", range(24))
    for fraction in (0.0, 0.5, 0.2):
        receipt = stage(source, shard_bytes=1024, holdout_fraction=fraction)
        manifest = read_manifest(Location.of(receipt.path))
        held_out = sum(shard.rows for shard in manifest.shards if shard.split == "holdout")
        assert held_out == manifest.splits["holdout"] == receipt.num_rows - receipt.num_train
        if fraction:
            assert 0 < held_out < 24


def test_holding_out_nearly_everything_is_refused(stage: Stage, tmp_path: Path):
    source = write_images(tmp_path / "source", range(6))
    with pytest.raises(DataError, match=r"data\.holdout_fraction=0\.999 leaves 0 of 6 images to train on; hold fewer out"):
        stage(source, holdout_fraction=0.999)


def test_the_size_of_what_was_read_stands_in_the_lists(stage: Stage, tmp_path: Path):
    source = write_images(tmp_path / "images", range(6))
    files = [path.read_bytes() for path in sorted(source.rglob("*.png"))] + [b"no image"]
    (tmp_path / "tables").mkdir()
    pq.write_table(pa.table({"photo": files}), tmp_path / "tables" / "a.parquet")
    receipt = stage(tmp_path / "tables", image_column="photo")
    manifest = read_manifest(Location.of(receipt.path))
    assert manifest.source_bytes == sum(map(len, files[:-1]))
    assert pq.read_table(Path(receipt.path) / "quarantine.parquet")["bytes"].to_pylist() == [8]


def images_of(folder: Path, *numbers: int) -> None:
    for number in numbers:
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{number:03d}.png")


def rows_of(receipt: ShardSet) -> list[tuple[str, str]]:
    """Returns path and split of every row."""
    folder = Location.of(receipt.path)
    table = read_table(folder / read_manifest(folder).rows_file)
    return list(zip(table["source"].to_pylist(), table["split"].to_pylist(), strict=True))


def test_only_the_split_to_train_on_is_a_dataset_and_the_receipt_says_so(stage: Stage, tmp_path: Path):
    images_of(tmp_path / "source" / "train" / "a", 0, 1, 2)
    images_of(tmp_path / "source" / "test" / "a", 3, 4)
    receipt = stage(tmp_path / "source")
    assert [path for path, _ in rows_of(receipt)] == ["train/a/000.png", "train/a/001.png", "train/a/002.png"]
    assert (receipt.source_splits, receipt.source_split, receipt.holdout_split) == ({"train": 3, "test": 2}, "train", None)
    again = stage(tmp_path / "source")
    assert (again.digest, again.num_opened) == (receipt.digest, 0)


@pytest.mark.parametrize("duplicates", ["drop", "keep"])
@pytest.mark.parametrize("held", ["test", "validation"])
def test_what_is_held_out_is_not_trained_on_even_where_both_splits_have_it(stage: Stage, tmp_path: Path, held: str, duplicates: str):
    images_of(tmp_path / "source" / "train" / "a", 0, 1, 2, 3)
    images_of(tmp_path / "source" / held / "a", 3, 4)
    receipt = stage(tmp_path / "source", holdout_split=held, duplicates=duplicates)
    by_split = {split: {path[-7:] for path, found in rows_of(receipt) if found == split} for split in ("train", "holdout")}
    assert by_split == {"train": {"000.png", "001.png", "002.png"}, "holdout": {"003.png", "004.png"}}
    assert receipt.num_train == 3
    assert receipt.holdout_split == held


def test_a_split_that_is_held_out_later_moves_without_being_decoded_again(stage: Stage, tmp_path: Path):
    images_of(tmp_path / "source" / "train" / "a", 0, 1, 2)
    images_of(tmp_path / "source" / "test" / "a", 3, 4)
    whole = stage(tmp_path / "source", split="all")
    assert whole.num_rows == whole.num_train == 5
    later = stage(tmp_path / "source", holdout_split="test")
    assert (later.num_rows, later.num_train, later.num_decoded) == (5, 3, 0)
    fresh = stage(tmp_path / "source", storage="other", holdout_split="test")
    assert (fresh.digest, pixels_of(fresh).tobytes()) == (later.digest, pixels_of(later).tobytes())
