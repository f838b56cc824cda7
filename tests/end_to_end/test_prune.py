"""Removing what nothing needs: bounded storage over many attempts, and every version that is kept loads, samples and names its data."""

import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keeper
import mlflow
import pandas as pd
import pytest
from servers import environment
from support import TINY, Finished, ddpm_command, write_digits

from components.data.catalog import Catalog
from components.data.shards import check_whole
from components.storage import Location
from pipeline.housekeeping.items import Item, Retention, below
from pipeline.housekeeping.prune import look, prune
from pipeline.lease import held
from pipeline.tracking import Tracking, connect

pytestmark = pytest.mark.slow
Command = Callable[..., Finished]
NAME = "photos"


def arguments(home: Path, *more: str) -> list[str]:
    settings = [f"data.source={home / 'source'}", "data.shard_bytes=4000", f"registry.model_name={NAME}", "evaluate.extractor=dct8"]
    return ["digits", *TINY, *settings, "--name", NAME, *more]


def registry(home: Path) -> tuple[Location, Tracking]:
    storage = Location.of(home / "storage")
    return storage, connect(storage)


def inventory(home: Path, keep_days: float = 0.0, keep_versions: int | None = None) -> list[Item]:
    storage, tracking = registry(home)
    return list(look(storage, tracking, Retention(keep_days, keep_versions)).items)


def check_versions(home: Path) -> list[int]:
    """Loads and samples every version, and finds the data that each names, whole; returns their numbers."""
    storage, tracking = registry(home)
    found = tracking.client.search_model_versions(f"name='{NAME}'")
    digests = {dataset.manifest.digest: dataset for dataset in Catalog.of(storage).datasets}
    for version in found:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MLflow's, of type hints that the model does without
            model = mlflow.pyfunc.load_model(f"models:/{NAME}/{version.version}")
        drawn: Any = model.predict(pd.DataFrame([{"num_images": 1, "steps": 2, "format": "array"}]))
        assert drawn.shape == (1, 8, 8, 1)
        dataset = digests[version.tags["dataset.digest"]]
        check_whole(dataset.folder, dataset.manifest)
    return sorted(int(version.version) for version in found)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, command: Command) -> Path:
    """Three attempts, each on more images."""
    home = tmp_path_factory.mktemp("prune")
    for number in range(3):
        write_digits(home / "source", 100 * number, 100 * number + 100)
        done = command("retrain", *arguments(home), "--json", cwd=home)
        assert done.code in (0, 10), done.stderr
    return home


def needed(items: list[Item], kind: str) -> dict[str, str]:
    return {item.name: item.needed for item in items if item.kind == kind}


def test_all_is_needed_that_versions_and_the_last_attempt_need(home: Path):
    items = inventory(home)
    assert all(needed(items, "version").values())
    assert all(needed(items, "dataset").values())
    trainings = {name.partition("/")[0]: why for name, why in needed(items, "training").items()}
    _, tracking = registry(home)
    aliased = {int(number) for number in tracking.client.get_registered_model(NAME).aliases.values()}
    for run, why in trainings.items():
        assert bool(why) == (int(run.rpartition("-")[2]) in aliased), (run, why, aliased)
    sizes = sum(size for _, size, _ in Location.of(home / "storage").tree())
    assert sum(item.bytes for item in items) == pytest.approx(sizes, rel=0.02)


def test_what_was_written_within_days_is_kept(home: Path):
    assert [item for item in inventory(home, keep_days=1.0) if not item.needed and item.kind != "shards"] == []


def test_a_run_in_progress_keeps_what_it_works_on(home: Path):
    storage, tracking = registry(home)
    spare = {item.name for item in look(storage, tracking, Retention(0.0, 1)).spare if item.kind == "training"}
    assert spare
    one = sorted(spare)[0]
    with held(storage / "runs" / one.partition("/")[0] / ".lock", wait=False):
        items = look(storage, tracking, Retention(0.0, 1)).items
        assert one in {item.name for item in items if item.needed == "a process works on its run"}
        # What a process has just made it may not have noted yet.
        assert [item for item in items if not item.needed and item.kind in ("dataset", "shards", "samples", "cache")] == []


def test_a_removal_that_is_killed_leaves_nothing_half_and_goes_on(home: Path, command: Command):
    storage, _ = registry(home)
    arguments_ = ["prune", "--keep-days", "0", "--keep-versions", "1", "--storage", str(storage)]
    draw = random.Random(0)
    for number in range(3):
        kept = keeper.start(ddpm_command(*arguments_), log=home / f"prune-{number}.log", env=environment({}))
        time.sleep(draw.uniform(2.0, 6.0))
        kept.end()
        for dataset in Catalog.of(storage).datasets:
            if any(below(item.places[0]) == below(dataset.folder) and item.needed for item in inventory(home, keep_versions=1) if item.kind == "dataset"):
                check_whole(dataset.folder, dataset.manifest)
        assert 3 in check_versions(home)
    done = command(*arguments_, cwd=home)
    assert done.code == 0, done.stderr
    assert [item for item in inventory(home, keep_versions=1) if not item.needed] == []
    check_versions(home)


def test_of_many_versions_the_last_and_those_with_an_alias_stay_and_all_of_them_load(home: Path, command: Command):
    storage, tracking = registry(home)
    for number in (3, 4):
        write_digits(home / "source", 100 * number, 100 * number + 100)
        assert command("retrain", *arguments(home), "--json", cwd=home).code in (0, 10)
    before = sum(size for _, size, _ in storage.tree())
    dry = command("prune", "--keep-days", "0", "--keep-versions", "1", "--dry-run", "--json", cwd=home)
    done = command("prune", "--keep-days", "0", "--keep-versions", "1", "--json", cwd=home)
    assert (dry.code, done.code) == (0, 0), dry.stderr + done.stderr
    versions = [{item["name"] for item in items if item["kind"] == "version"} for items in (dry.json["items"], done.json["removed"])]
    assert versions[0] == versions[1]
    assert set(check_versions(home)) == {int(number) for number in tracking.client.get_registered_model(NAME).aliases.values()} | {5}
    assert sum(size for _, size, _ in storage.tree()) < before
    assert command("prune", "--keep-days", "0", "--keep-versions", "1", "--json", cwd=home).json["removed"] == []


def test_retraining_goes_on_behind_it_and_removes_by_itself_where_its_settings_say_so(home: Path, command: Command):
    again = command("retrain", *arguments(home), "--json", cwd=home)
    assert again.json["outcome"] == "skipped", again.stderr  # the images are those of the last attempt
    write_digits(home / "source", 500, 560)
    more = command("retrain", *arguments(home), "retrain.keep_days=0", "retrain.keep_versions=1", "--json", cwd=home)
    assert more.code in (0, 10), more.stderr
    assert 6 in check_versions(home)
    assert [item for item in inventory(home, keep_versions=1) if not item.needed] == []
    wrong = command("retrain", *arguments(home), "retrain.keep_versions=1", cwd=home)
    assert (wrong.code, "keep_versions=1 needs keep_days" in wrong.stderr) == (2, True), wrong.stderr


def test_an_empty_storage_root_says_so(tmp_path: Path, command: Command):
    done = command("storage", "--json", cwd=tmp_path)
    assert (done.code, done.json["items"]) == (0, []), done.stderr


@pytest.mark.timeout(1800)
def test_a_month_of_attempts_with_retention_stays_within_bounds(tmp_path: Path, command: Command):
    write_digits(tmp_path / "source", 0, 150)
    sizes = []
    for night in range(30):
        write_digits(tmp_path / "source", 150 + 20 * night, 170 + 20 * night)
        done = command("retrain", *arguments(tmp_path), "retrain.keep_days=0", "retrain.keep_versions=3", "--json", cwd=tmp_path)
        assert done.code in (0, 10), done.stderr
        sizes.append(sum(size for _, size, _ in Location.of(tmp_path / "storage").tree()))
    numbers = check_versions(tmp_path)
    assert len(numbers) <= 6  # three, and champion, previous and candidate
    assert numbers[-1] == 30
    # The data grow from 170 to 750 images of 64 bytes, and notes of attempts by some kilobytes each; nothing else does.
    assert sizes[-1] < 1.5 * max(sizes[5:10])


@pytest.mark.timeout(1800)
def test_after_any_sequence_of_runs_and_removals_every_version_loads_samples_and_names_its_data(tmp_path: Path, command: Command):
    draw, images = random.Random(0), 120
    write_digits(tmp_path / "source", 0, images)
    for step in range(10):
        what = draw.choice(["retrain", "retrain", "run", "rollback", "prune", "killed prune"]) if step > 1 else "retrain"
        if what == "retrain":
            write_digits(tmp_path / "source", images, images + 15)
            images += 15
            assert command("retrain", *arguments(tmp_path), "--json", cwd=tmp_path).code in (0, 10)
        elif what == "run":
            done = command("run", *arguments(tmp_path, "--json")[:-3], f"train.seed={draw.randrange(3)}", "--name", f"own-{draw.randrange(2)}", cwd=tmp_path)
            assert done.code == 0, done.stderr
        elif what == "rollback":
            command("models", "rollback", NAME, "--why", "drawn", cwd=tmp_path)
        elif what == "prune":
            _, tracking = registry(tmp_path)
            prune(Location.of(tmp_path / "storage"), tracking, Retention(0.0, draw.choice([1, 2, None])), _reporter())
        else:
            killed = ddpm_command("prune", "--keep-days", "0", "--keep-versions", "1", "--storage", str(tmp_path / "storage"))
            kept = keeper.start(killed, log=tmp_path / "log", env=environment({}))
            time.sleep(draw.uniform(1.0, 5.0))
            kept.end()
        assert check_versions(tmp_path), what


def _reporter() -> Any:
    from pipeline.context import Reporter

    return Reporter()
