import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support import ListedFile, write_dataset, write_listed

from components.data.batches import Batch, BatchPlan
from components.data.order import RowOrder
from components.data.reader import RowReader
from components.data.shards import Manifest
from components.diffusion.config import DiffusionConfig
from components.diffusion.schedule import Schedule
from components.spaces.pixels import PixelSpace
from components.storage import Location


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> tuple[Location, Manifest, np.ndarray]:
    folder = Location.of(tmp_path_factory.mktemp("dataset"))
    pixels = np.random.default_rng(0).integers(0, 256, (107, 3, 8, 8), dtype=np.uint8)
    manifest = write_dataset(folder, np.split(pixels, [40, 41, 90]), ["c", "a", "b", None])
    return folder, manifest, pixels


def plan(flip: bool = True) -> BatchPlan:
    return BatchPlan(RowOrder(107, 24, 4, seed=5), draw_times=Schedule(DiffusionConfig()).draw_times, mirrored=PixelSpace().mirrored if flip else None)


def told(label_dropout: float) -> BatchPlan:
    return replace(plan(), num_classes=3, label_dropout=label_dropout)


def test_rows_by_number_are_the_rows_that_were_written(dataset: tuple[Location, Manifest, np.ndarray]):
    folder, manifest, pixels = dataset
    rows = np.random.default_rng(1).permutation(107)
    assert np.array_equal(RowReader(folder, manifest).rows(rows), pixels[rows])
    assert np.array_equal(RowReader(folder, manifest, cache_bytes=1).rows(rows), pixels[rows])
    assert np.array_equal(np.concatenate(list(RowReader(folder, manifest).batches(7))), pixels)


def test_a_row_outside_the_dataset_is_refused(dataset: tuple[Location, Manifest, np.ndarray]):
    with pytest.raises(IndexError, match="107"):
        RowReader(dataset[0], dataset[1]).rows(np.asarray([3, 107]))


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_any_number_of_workers_sees_the_same_rows_pixels_timesteps_noise_and_labels_at_every_step(
    dataset: tuple[Location, Manifest, np.ndarray], num_workers: int
):
    reader, batches = RowReader(dataset[0], dataset[1]), told(0.5)
    for step in range(12):
        whole = batches.batch(reader, step, range(4))
        parts = [batches.batch(reader, step, batches.lanes_of(rank, num_workers)) for rank in range(num_workers)]
        for field in ("rows", "data", "t", "eps", "labels"):
            assert torch.equal(torch.cat([getattr(part, field) for part in parts]), getattr(whole, field)), field


def test_the_thread_that_reads_ahead_gives_the_same_batches(dataset: tuple[Location, Manifest, np.ndarray]):
    reader, batches = RowReader(dataset[0], dataset[1]), plan()
    for batch in batches.batches(reader, range(3, 9), range(4)):
        again = batches.batch(reader, batch.step, range(4))
        assert torch.equal(batch.eps, again.eps)
        assert torch.equal(batch.data, again.data)


def test_an_error_of_the_reading_thread_reaches_the_caller(dataset: tuple[Location, Manifest, np.ndarray], tmp_path: Path):
    folder, manifest, _ = dataset
    (tmp_path / "set").mkdir()
    shutil.copy(folder.path / manifest.rows_file, tmp_path / "set")
    reader = RowReader(Location.of(tmp_path / "set"), manifest)
    with pytest.raises(FileNotFoundError):
        next(plan().batches(reader, range(2), range(4)))


def test_flips_mirror_about_half_of_the_images_and_nothing_else(dataset: tuple[Location, Manifest, np.ndarray]):
    folder, manifest, pixels = dataset
    reader, flipped = RowReader(folder, manifest), 0
    for step in range(40):
        batch: Batch = plan().batch(reader, step, range(4))
        for image, row in zip(batch.data.numpy(), batch.rows.numpy(), strict=True):
            straight = np.array_equal(image, pixels[row])
            assert straight or np.array_equal(image, pixels[row][:, :, ::-1])
            flipped += not straight
    assert 0.42 < flipped / (40 * 24) < 0.58


CLASSES = np.repeat([2, 0, 1, 3], [40, 1, 49, 17])  # the places of c, a, b in their sorted order; the rows without a label have the label past all


def test_the_label_of_a_row_is_the_place_of_its_name_in_the_manifest(dataset: tuple[Location, Manifest, np.ndarray]):
    folder, manifest, _ = dataset
    rows = np.random.default_rng(1).permutation(107)
    labels = RowReader(folder, manifest).labels(rows)
    names = np.asarray([*manifest.label_names, None], object)[labels]
    assert manifest.label_names == ["a", "b", "c"]
    assert names.tolist() == np.repeat(np.asarray(["c", "a", "b", None], object), [40, 1, 49, 17])[rows].tolist()


def test_labels_are_numbered_as_the_rows_of_their_split_are(tmp_path: Path):
    files = [ListedFile(f"{number}.png", label="xy"[number % 2], split="holdout" if number % 3 else "train") for number in range(12)]
    manifest = write_listed(Location.of(tmp_path / "set"), files)
    for split, expected in (("train", [0, 1, 0, 1]), ("holdout", [1, 0, 0, 1, 1, 0, 0, 1])):
        reader = RowReader(Location.of(tmp_path / "set"), manifest, split)
        assert reader.labels(np.arange(len(reader))).tolist() == expected


def test_without_dropout_every_label_is_told_and_with_dropout_one_none_is(dataset: tuple[Location, Manifest, np.ndarray]):
    reader = RowReader(dataset[0], dataset[1])
    for step in range(12):
        always, never = (told(rate).batch(reader, step, range(4)) for rate in (0.0, 1.0))
        assert always.labels is not None
        assert never.labels is not None
        assert always.labels.tolist() == CLASSES[always.rows].tolist()
        assert never.labels.tolist() == [3] * 24


def test_label_dropout_forgets_that_part_of_the_labels_and_nothing_else_changes(dataset: tuple[Location, Manifest, np.ndarray]):
    reader, forgotten, labelled = RowReader(dataset[0], dataset[1]), 0, 0
    for step in range(60):
        batch, without = told(0.3).batch(reader, step, range(4)), plan().batch(reader, step, range(4))
        assert without.labels is None
        assert all(torch.equal(getattr(batch, field), getattr(without, field)) for field in ("rows", "data", "t", "eps"))
        assert batch.labels is not None
        classes = torch.from_numpy(CLASSES)[batch.rows]
        kept = batch.labels == classes
        assert torch.all(batch.labels[~kept] == 3)
        forgotten, labelled = forgotten + int((~kept).sum()), labelled + int((classes != 3).sum())
    assert 0.25 < forgotten / labelled < 0.35


def test_steps_and_lanes_never_share_noise(dataset: tuple[Location, Manifest, np.ndarray]):
    reader, batches = RowReader(dataset[0], dataset[1]), plan()
    noises = torch.cat([batches.batch(reader, step, range(4)).eps for step in range(5)]).flatten(1)
    assert len(torch.unique(noises, dim=0)) == len(noises)


def test_every_lane_is_carried_once_by_any_number_of_workers_up_to_the_lanes():
    for num_workers in range(1, 5):
        parts = [plan().lanes_of(rank, num_workers) for rank in range(num_workers)]
        assert [lane for part in parts for lane in part] == [0, 1, 2, 3]
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    with pytest.raises(ValueError, match="num_workers=5 is above lanes=4"):
        plan().lanes_of(0, 5)
