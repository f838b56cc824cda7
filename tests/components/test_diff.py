"""What changed between datasets, against what a loop over rows finds."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from support import ListedFile, write_listed

from components.data.catalog import Dataset
from components.data.diff import DatasetDiff, diff_datasets, matches
from components.spaces.pixels import PixelSpace
from components.storage import Location


def a_dataset(folder: Path, files: list[ListedFile], recipe: PixelSpace | None = None, **fields: Any) -> Dataset:
    write_listed(Location.of(folder), files, recipe, **fields)
    return Dataset.of(Location.of(folder))


def random_files(rng: np.random.Generator) -> list[ListedFile]:
    files = []
    for number in np.flatnonzero(rng.random(60) < 0.8):
        if rng.random() < 0.1:
            files.append(ListedFile(f"{number:02d}", reason=str(rng.choice(["empty", "truncated"]))))
            continue
        label, split = rng.choice(["cat", "dog"]), rng.choice(["train", "holdout"])
        files.append(ListedFile(f"{number:02d}", f"content {number + int(rng.random() < 0.1)}", str(label), "train" if split == "train" else "holdout"))
    return files


def by_a_loop(before: list[ListedFile], after: list[ListedFile]) -> dict[str, int]:
    old, new = ({file.path: file for file in files if not file.reason} for files in (before, after))
    gone, come = (Counter(side[path].content for path in side.keys() - other.keys()) for side, other in ((old, new), (new, old)))
    return {
        "added": (come - gone).total(),
        "removed": (gone - come).total(),
        "renamed": (gone & come).total(),
        "changed": sum(old[path].content != new[path].content for path in old.keys() & new.keys()),
    }


@pytest.mark.parametrize("seed", range(8))
def test_changes_are_those_that_a_loop_over_rows_finds(tmp_path: Path, seed: int):
    rng = np.random.default_rng(seed)
    before, after = random_files(rng), random_files(rng)
    one, other = a_dataset(tmp_path / "a" / "one", before), a_dataset(tmp_path / "b" / "other", after)
    found, back = diff_datasets(one, other), diff_datasets(other, one)
    counts = {name: change.count for name, change in found.rows.items()}
    assert counts.items() >= by_a_loop(before, after).items()
    assert one.manifest.num_rows - counts["removed"] + counts["added"] == other.manifest.num_rows
    assert found.same_rows + counts["changed"] + counts["renamed"] + counts["removed"] == one.manifest.num_rows
    mirrored = {"added": "removed", "removed": "added"}
    assert {mirrored.get(name, name): change.count for name, change in back.rows.items()} == counts
    bad = [{file.path: file.reason for file in files if file.reason} for files in (before, after)]
    assert found.quarantine["newly"].by == Counter(bad[1][path] for path in bad[1].keys() - bad[0].keys())
    assert found.quarantine["no_longer"].by == Counter(bad[0][path] for path in bad[0].keys() - bad[1].keys())
    assert found.quarantine["other_reason"].count == sum(bad[0][path] != bad[1][path] for path in bad[0].keys() & bad[1].keys())


def counts(found: DatasetDiff) -> dict[str, tuple[int, dict[str, int], tuple[str, ...]]]:
    return {name: (of.count, of.by, of.examples) for name, of in (found.rows | found.quarantine).items() if of.count}


def test_each_kind_of_change_is_told_with_its_examples(tmp_path: Path):
    stays = [ListedFile("same", label="cat")]
    before = [
        *stays,
        ListedFile("gone"),
        ListedFile("cat/1", "1", "cat"),
        ListedFile("edited", "2", "dog"),
        ListedFile("m", "3", None),
        ListedFile("bad", reason="empty"),
    ]
    after = [*stays, ListedFile("dog/1", "1", "dog"), ListedFile("edited", "4", "dog"), ListedFile("m", "3", None, "holdout"), ListedFile("new", label="dog")]
    found = diff_datasets(a_dataset(tmp_path / "one", before), a_dataset(tmp_path / "other", after))
    assert counts(found) == {
        "added": (1, {"dog": 1}, ("new",)),
        "removed": (1, {"(no label)": 1}, ("gone",)),
        "renamed": (1, {}, ("cat/1 -> dog/1",)),
        "changed": (1, {"dog": 1}, ("edited",)),
        "relabelled": (1, {"cat -> dog": 1}, ("dog/1",)),
        "moved": (1, {"train -> holdout": 1}, ("m",)),
        "no_longer": (1, {"empty": 1}, ("bad",)),
    }
    assert (found.same_rows, found.equal, found.other_pixels, found.settings) == (2, False, False, {})


def test_a_dataset_is_equal_to_its_copy_and_to_nothing_with_another_source(tmp_path: Path):
    files = [ListedFile(path) for path in "abc"]
    one, copy = a_dataset(tmp_path / "one", files), a_dataset(tmp_path / "copy", files)
    assert diff_datasets(one, copy).equal
    other = diff_datasets(one, a_dataset(tmp_path / "other", files, source="elsewhere"))
    assert (other.equal, other.same_digest, other.same_rows, other.settings) == (False, True, 3, {"source": ("test", "elsewhere")})


@pytest.mark.parametrize(("field", "value", "other_pixels"), [("resize", "pad", True), ("min_side", 4, False), ("max_pixels", 1000, False)])
def test_a_recipe_that_makes_other_pixels_is_told_from_one_with_other_limits(tmp_path: Path, field: str, value: object, other_pixels: bool):
    files, recipe = [ListedFile(path) for path in "abc"], PixelSpace(image_size=8)
    changed = PixelSpace.model_validate(recipe.model_dump() | {field: value})
    found = diff_datasets(a_dataset(tmp_path / "one", files, recipe), a_dataset(tmp_path / "other", files, changed))
    assert found.settings == {f"space.{field}": (str(getattr(recipe, field)), str(value))}
    assert (found.other_pixels, found.same_rows, found.equal) == (other_pixels, 3, False)


def test_examples_are_the_first_ten_of_all(tmp_path: Path):
    few, many = [ListedFile("a"), ListedFile("b")], [ListedFile(f"{number:03d}") for number in range(100)]
    added = diff_datasets(a_dataset(tmp_path / "few", few), a_dataset(tmp_path / "many", [*few, *many])).rows["added"]
    assert (added.count, added.examples) == (100, tuple(f"{number:03d}" for number in range(10)))


def test_equal_values_are_paired_one_to_one_in_their_order():
    left, right = matches(pa.chunked_array([["a", "b"], ["a", "c", "a"]]), pa.chunked_array([["c", "a"], ["a", "d"]]))
    assert (left.tolist(), right.tolist()) == ([0, 2, 3], [1, 2, 0])
