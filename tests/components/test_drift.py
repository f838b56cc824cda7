"""How far new images are from those before, against scipy, exact counts, and data whose drift is known."""

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import wasserstein_distance
from support import ListedFile, write_dataset, write_listed

from components.data import drift as drift_module
from components.data.catalog import Dataset
from components.data.drift import NO_DISTANCE, Distance, Drift, label_distance, measure_drift, rows_of, value_distance
from components.data.drift_picture import drift_picture
from components.data.images import to_image
from components.ingest.ledger import DUPLICATE
from components.spaces.pixels import PixelSpace
from components.storage import Location

COUNTS = st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 50), min_size=1)
NEW, BEFORE = (slice(86, 148), slice(150, 430)), (slice(158, 220), slice(150, 430))
"""Where the picture shows images of 8 x 8, five of each."""
VALUES = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=30)


def listed(folder: Path, files: list[ListedFile], recipe: PixelSpace | None = None) -> Dataset:
    write_listed(Location.of(folder), files, recipe)
    return Dataset.of(Location.of(folder))


def pixels_around(rng: np.random.Generator, count: int, mean: float, channels: int = 1) -> np.ndarray:
    level = rng.normal(mean, 15, (count, 1, 1, 1))
    return np.clip(level + rng.normal(0, 20, (count, channels, 8, 8)), 0, 255).astype(np.uint8)


def two_days(folder: Path, before: dict[str | None, np.ndarray], new: dict[str | None, np.ndarray]) -> tuple[Dataset, Dataset]:
    pieces, labels = list(before.values()), list(before)
    for name, arrays, names in (("before", pieces, labels), ("after", [*pieces, *new.values()], [*labels, *new])):
        write_dataset(Location.of(folder / name), arrays, names)
    return Dataset.of(Location.of(folder / "before")), Dataset.of(Location.of(folder / "after"))


def test_new_is_what_the_dataset_before_has_not_by_content_and_by_path_of_bad_files(tmp_path: Path):
    stays = [ListedFile(f"{n}", label="cat", split="holdout" if n % 3 else "train") for n in range(9)]
    bad = [ListedFile("b1", reason="truncated"), ListedFile("b2", reason="empty")]
    before = listed(tmp_path / "before", [*stays, ListedFile("gone"), ListedFile("moved", "m", "dog"), *bad])
    come = [ListedFile("new", label="cat"), ListedFile("again", "new", "cat"), ListedFile("0", "changed"), ListedFile("elsewhere", "m", "cat")]
    worse = [ListedFile("b3", reason="truncated"), ListedFile("b4", reason="truncated"), ListedFile("b5", reason=DUPLICATE), ListedFile("b1", reason="empty")]
    after = listed(tmp_path / "after", [*stays[1:], *come, *worse])
    found = measure_drift(before, after)
    assert (found.num_before, found.new_images, found.removed_images) == (11, 2, 2)
    assert found.quarantined == {"truncated": 2, DUPLICATE: 1}
    assert (found.bad_files, found.bad_fraction) == (2, 0.5)
    assert {entry.name: (entry.before, entry.new) for entry in found.label_counts} == {"cat": (9, 1), "dog": (1, 0), "(no label)": (1, 1)}
    assert (found.num_unseen_labels, found.unseen_labels) == (0, {})
    assert Drift.model_validate_json(found.model_dump_json()) == found


def test_nothing_new_is_at_no_distance(tmp_path: Path):
    files = [ListedFile(f"{n}", label="cat") for n in range(5)]
    one, fewer = listed(tmp_path / "one", files), listed(tmp_path / "fewer", files[1:])
    found = measure_drift(one, fewer)
    assert (found.new_images, found.removed_images, found.bad_fraction) == (0, 1, 0)
    assert found.labels == found.brightness == found.contrast == NO_DISTANCE


def test_images_alike_do_not_drift_and_darker_ones_do(tmp_path: Path):
    rng = np.random.default_rng(0)
    before: dict[str | None, np.ndarray] = {None: pixels_around(rng, 600, 120)}
    alike = measure_drift(*two_days(tmp_path / "alike", before, {None: pixels_around(rng, 60, 120)}))
    assert alike.labels == Distance(value=0, p_value=1)
    assert not alike.brightness.exceeds(0)
    assert not alike.contrast.exceeds(0)
    darker = measure_drift(*two_days(tmp_path / "darker", before, {None: pixels_around(rng, 60, 69)}))
    assert darker.brightness.exceeds(0.15)
    assert darker.brightness.value == pytest.approx(51 / 255, abs=0.02)
    assert darker.grey.mean_before - darker.grey.mean_new == pytest.approx(51 / 255, abs=0.02)
    assert (sum(darker.grey.before), sum(darker.grey.new)) == (600, 60)


def test_labels_that_come_in_other_shares_drift_and_unseen_ones_are_named(tmp_path: Path):
    rng = np.random.default_rng(0)
    before: dict[str | None, np.ndarray] = {label: pixels_around(rng, 100, 120) for label in ("cat", "dog")}
    alike = measure_drift(*two_days(tmp_path / "alike", before, {"cat": pixels_around(rng, 22, 120), "dog": pixels_around(rng, 18, 120)}))
    assert alike.labels.value == pytest.approx(0.05)
    assert not alike.labels.exceeds(0)
    other = measure_drift(*two_days(tmp_path / "other", before, {"cat": pixels_around(rng, 10, 120), "horse": pixels_around(rng, 30, 120)}))
    assert other.labels.value == pytest.approx(0.75)
    assert other.labels.exceeds(0.7)
    assert other.unseen_labels == {"horse": 30}


def test_of_many_labels_the_most_changed_are_kept(tmp_path: Path):
    rng = np.random.default_rng(0)
    before: dict[str | None, np.ndarray] = {f"{n:03d}": pixels_around(rng, 2, 120) for n in range(200)}
    counts = {"007": 3, "150": 3} | {f"new {n:02d}": 1 for n in range(12)}
    new: dict[str | None, np.ndarray] = {label: pixels_around(rng, count, 120) for label, count in counts.items()}
    found = measure_drift(*two_days(tmp_path, before, new))
    assert (found.num_labels, found.num_unseen_labels, len(found.unseen_labels)) == (212, 12, 10)
    assert {entry.name: entry.new for entry in found.label_counts}.items() >= {"007": 3, "150": 3}.items()
    assert len(found.label_counts) == 10


def test_the_same_sample_is_read_a_part_at_a_time_from_any_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = PixelSpace(image_size=8)
    files = [ListedFile(f"{n}", split="holdout" if n % 3 == 0 else "train") for n in range(50)]
    before, after = listed(tmp_path / "before", files[:30], recipe), listed(tmp_path / "after", files, recipe)
    numbers = np.array([3, 49, 0, 17])
    assert np.array_equal(rows_of(after, numbers), np.stack([files[number].pixels(recipe) for number in numbers]))
    whole = measure_drift(before, after)
    monkeypatch.setattr(drift_module, "BATCH_BYTES", 3 * recipe.row_bytes)
    monkeypatch.setattr(drift_module, "BATCH_VALUES", 100)
    in_parts = measure_drift(before, after)
    assert in_parts.grey == whole.grey
    assert in_parts.brightness.value == whole.brightness.value
    grey = [np.asarray(to_image(file.pixels(recipe)).convert("L")).mean() / 255 for file in files]
    assert whole.grey.mean_before == pytest.approx(np.mean(grey[:30]), abs=0.003)
    assert whole.brightness.value == pytest.approx(wasserstein_distance(grey[:30], grey[30:]), abs=0.003)


def test_brightness_is_that_of_the_picture_in_grey(tmp_path: Path):
    colours = np.array([[200, 30, 10], [0, 0, 250], [10, 220, 90]], np.uint8)
    pieces = [np.broadcast_to(colour[None, :, None, None], (1, 3, 8, 8)) for colour in colours]
    before, after = two_days(tmp_path, {None: pieces[0]}, {"blue": pieces[1], "green": pieces[2]})
    grey = [np.asarray(to_image(piece[0]).convert("L")).mean() / 255 for piece in pieces]
    found = measure_drift(before, after).grey
    assert (found.mean_before, found.mean_new) == (pytest.approx(grey[0], abs=0.003), pytest.approx(np.mean(grey[1:]), abs=0.003))


def test_a_large_dataset_is_sampled_by_content_whatever_the_order_of_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(drift_module, "SAMPLE", 20)
    files = [ListedFile(f"{n}", label=f"{n % 3}") for n in range(80)]
    found = [measure_drift(listed(tmp_path / f"{name}1", part[:60]), listed(tmp_path / f"{name}2", [*part[:60], *files[60:]]))
             for name, part in (("a", files[:60]), ("b", files[:60][::-1]))]  # fmt: skip
    assert sum(found[0].grey.before) == sum(found[0].grey.new) == 20
    assert found[0].new_images == 20
    shown = {"shown_before", "shown_new"}
    assert found[0].model_dump(exclude=shown) == found[1].model_dump(exclude=shown)


@given(VALUES, VALUES)
def test_the_distance_between_values_is_that_of_scipy(before: list[float], new: list[float]):
    found = value_distance(np.array(before, float), np.array(new, float)).value
    assert found == pytest.approx(wasserstein_distance(before, new), abs=1e-9)
    assert value_distance(np.array(new, float), np.array(before, float)).value == pytest.approx(found, abs=1e-12)


@given(COUNTS, COUNTS)
def test_the_distance_between_labels_is_half_the_sum_of_differences_of_shares(before: dict[str, int], new: dict[str, int]):
    found = label_distance(before, new, before, new).value
    shares = [[side.get(name, 0) / sum(side.values()) for name in before | new] for side in (before, new)]
    assert found == pytest.approx(sum(abs(one - other) for one, other in zip(*shares, strict=True)) / 2)
    assert 0 <= found <= 1
    assert label_distance({f"{n}": 1 for n in range(4000)}, new, before, new).value == 1


def test_chance_is_what_counting_all_divisions_gives():
    before, new = np.array([0.1, 0.2, 0.35, 0.5, 0.9]), np.array([0.7, 0.8, 0.95])
    values = np.concatenate([before, new])
    divisions = [list(chosen) for chosen in itertools.combinations(range(len(values)), len(new))]
    areas = [wasserstein_distance(np.delete(values, chosen), values[chosen]) for chosen in divisions]
    exact = np.mean(np.array(areas) >= wasserstein_distance(before, new) - 1e-12)
    assert value_distance(before, new).p_value == pytest.approx(exact, abs=0.03)
    names = ["a"] * 5 + ["b"] * 3 + ["c"] * 2
    counted = [label_distance(*[dict(Counter(part)) for part in ([name for place, name in enumerate(names) if place not in chosen],
                              [names[place] for place in chosen])] * 2).value for chosen in itertools.combinations(range(10), 4)]  # fmt: skip
    found = label_distance(*[{"a": 4, "b": 2}, {"a": 1, "b": 1, "c": 2}] * 2)
    assert found.p_value == pytest.approx(np.mean(np.array(counted) >= found.value - 1e-12), abs=0.03)


def test_a_few_images_alone_are_never_far_beyond_chance():
    rng = np.random.default_rng(0)
    before = rng.uniform(0, 1, 500)
    assert value_distance(before, np.array([0.99])).value > 0.4
    assert not value_distance(before, np.array([0.99])).exceeds(0.15)
    ten = {f"{n}": 50 for n in range(10)}
    found = label_distance(ten, {"3": 1}, ten, {"3": 1})
    assert (found.value, found.p_value) == (pytest.approx(0.9), 1.0)


@pytest.mark.parametrize(("count", "channels"), [(0, 1), (1, 3), (10, 1), (200, 3)])
def test_the_picture_shows_new_images_over_those_before_for_any_number_of_labels(tmp_path: Path, count: int, channels: int):
    rng = np.random.default_rng(0)
    names: list[str | None] = [f"$label_{n}" for n in range(count)] or [None]
    before, after = two_days(
        tmp_path, {name: pixels_around(rng, max(1, 200 // len(names)), 120, channels) for name in names}, {names[0]: pixels_around(rng, 12, 250, channels)}
    )
    drift = measure_drift(before, after)
    picture = np.asarray(drift_picture(drift, before, after, max_label_drift=0.3, max_brightness_drift=0.15).convert("L"))
    top, bottom = picture[NEW], picture[BEFORE]
    assert top.mean() > bottom.mean() + 80
    assert picture[:, [0, -1]].min() == 255
    assert picture[-1].min() == 255
    red = np.asarray(drift_picture(drift, before, after, max_label_drift=1, max_brightness_drift=0.15)).astype(int)
    fine = np.asarray(drift_picture(drift, before, after, max_label_drift=1, max_brightness_drift=1)).astype(int)
    assert [(np.abs(each - (190, 36, 44)).sum(-1) < 30).any() for each in (red, fine)] == [True, False]


def test_a_picture_without_new_images_shows_those_before(tmp_path: Path):
    files = [ListedFile(f"{n}", label="cat") for n in range(5)]
    one, fewer = listed(tmp_path / "one", files), listed(tmp_path / "fewer", [*files[1:], ListedFile("bad", reason="empty")])
    picture = drift_picture(measure_drift(one, fewer), one, fewer, max_label_drift=0.3, max_brightness_drift=0.15)
    assert isinstance(picture, Image.Image)
    assert np.asarray(picture)[NEW].min() == 255
    assert np.asarray(picture)[BEFORE].min() < 100
