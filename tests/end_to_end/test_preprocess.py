"""The preprocess stage by the command, on real folders: what is killed, repeated, doubled, added or taken away changes no byte of the result."""

import contextlib
import json
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from hostile import RECIPE, write_good, write_hostile
from PIL import Image
from servers import S3Server
from support import Finished, ddpm_command

from components.data.reader import RowReader
from components.data.shards import column_rows, read_manifest, shard_location
from components.storage import Location

Command = Callable[..., Finished]


def write_photographs(folder: Path, count: int, first: int = 0, side: int = 160) -> None:
    """Writes PNG files that take a few milliseconds each to decode, in four folders."""
    coarse = np.random.default_rng(first)
    for number in range(first, first + count):
        target = folder / f"label {number % 4}" / f"{number:05d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(target, compress_level=1)


def settings(source: Path | str, storage: Path | str) -> list[str]:
    return ["cifar10-small", f"data.source={source}", f"cluster.storage={storage}", "data.shard_bytes=300000", "data.holdout_fraction=0.1"]


def contents(storage: Path) -> dict[str, bytes]:
    """Returns every file below `datasets`, but locks."""
    root = storage / "datasets"
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file() and path.name != ".lock"}


def preprocess(command: Command, cwd: Path, *arguments: str) -> Any:
    done = command("preprocess", *arguments, "--json", cwd=cwd)
    assert done.code == 0, done.stderr
    return done.json["preprocess"]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    write_photographs(folder, 800)
    shutil.copy(folder / "label 1" / "00001.png", folder / "label 2" / "twice.png")
    (folder / "label 3" / "text.png").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def undisturbed(photographs: Path, tmp_path_factory: pytest.TempPathFactory, command: Command) -> tuple[dict[str, bytes], Any, float]:
    """Returns what a run leaves that nobody disturbs, its receipt, and its seconds."""
    storage, started = tmp_path_factory.mktemp("undisturbed"), time.monotonic()
    receipt = preprocess(command, storage, *settings(photographs, storage))
    return contents(storage), receipt, time.monotonic() - started


def test_the_counts_add_up_and_every_row_is_there(undisturbed: tuple[dict[str, bytes], Any, float]):
    _, receipt, _ = undisturbed
    folder = Location.of(receipt["path"])
    manifest = read_manifest(folder)
    assert (receipt["num_listed"], receipt["num_rows"], receipt["quarantined"]) == (802, 800, {"duplicate": 1, "not_an_image": 1})
    assert (receipt["num_opened"], receipt["num_decoded"]) == (802, 802)
    assert manifest.splits["train"] + manifest.splits["holdout"] == 800
    assert 40 < manifest.splits["holdout"] < 120
    assert all(shard.bytes < 400_000 for shard in manifest.shards)
    lines = pq.read_table(folder.path / "quarantine.parquet").to_pylist()
    assert [(line["path"], line["reason"]) for line in lines] == [("label 2/twice.png", "duplicate"), ("label 3/text.png", "not_an_image")]
    shards = [pq.read_table(shard_location(folder, shard.name).path) for shard in manifest.shards]
    assert sum(len(RowReader(folder, manifest, split)) for split in manifest.splits) == sum(shard.num_rows for shard in shards) == 800
    assert str(shards[0].schema.field("pixels").type) == "fixed_size_binary[3072]"
    for split in manifest.splits:
        mine = [shard for shard, entry in zip(shards, manifest.shards, strict=True) if entry.split == split]
        sources = [source for shard in mine for source in shard["source"].to_pylist()]
        assert sources == sorted(sources)
        pixels = np.concatenate([column_rows(shard["pixels"], manifest.space) for shard in mine])
        assert np.array_equal(np.concatenate(list(RowReader(folder, manifest, split).batches(100))), pixels)
        with Image.open(Path(manifest.source) / sources[0]) as image:
            small = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC))
        assert np.array_equal(pixels[0], small.transpose(2, 0, 1))


@pytest.mark.slow
def test_killed_at_ten_random_moments_it_ends_with_the_same_bytes(
    photographs: Path, undisturbed: tuple[dict[str, bytes], Any, float], tmp_path: Path, command: Command
):
    expected, receipt, seconds = undisturbed
    moments = random.Random(4)
    for _ in range(10):
        run = subprocess.Popen(ddpm_command("preprocess", *settings(photographs, tmp_path)), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(moments.uniform(0.35, 1.0) * seconds)
        run.send_signal(signal.SIGKILL)
        run.wait()
    again = preprocess(command, tmp_path, *settings(photographs, tmp_path))
    assert again["digest"] == receipt["digest"]
    assert contents(tmp_path) == expected


@pytest.mark.parametrize("names", [("one", "two"), ("one", "one")], ids=["two runs", "one run twice"])
def test_two_at_once_end_with_one_dataset(photographs: Path, undisturbed: tuple[dict[str, bytes], Any, float], tmp_path: Path, names: tuple[str, str]):
    commands = [ddpm_command("preprocess", *settings(photographs, tmp_path), "--name", name, "--json") for name in names]
    runs = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for command in commands]
    outputs = [run.communicate(timeout=300) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    receipts = [json.loads(stdout)["preprocess"] for stdout, _ in outputs]
    assert {receipt["digest"] for receipt in receipts} == {undisturbed[1]["digest"]}
    assert sum(receipt["num_decoded"] for receipt in receipts if not receipt["skipped"]) == 802
    assert contents(tmp_path) == undisturbed[0]


def decoders_of(pid: int) -> Iterator[psutil.Process]:
    """Yields the processes of a run that decode."""
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "components.ingest.decoder" in " ".join(process.cmdline()):
                yield process


def test_decoders_that_are_killed_lose_no_file(photographs: Path, undisturbed: tuple[dict[str, bytes], Any, float], tmp_path: Path):
    with subprocess.Popen(ddpm_command("preprocess", *settings(photographs, tmp_path)), cwd=tmp_path, stdout=subprocess.DEVNULL) as run:
        killed: set[int] = set()
        while len(killed) < 2 and run.poll() is None:
            found = next((process for process in decoders_of(run.pid) if process.pid not in killed), None)
            if found is not None and len(list(tmp_path.glob("datasets/*/work/*/chunk-*.arrow"))) > len(killed):
                found.kill()
                killed.add(found.pid)
            time.sleep(0.01)
        assert run.wait(timeout=300) == 0
    assert len(killed) == 2
    assert contents(tmp_path) == undisturbed[0]


def test_eight_workers_make_the_same_bytes(photographs: Path, undisturbed: tuple[dict[str, bytes], Any, float], tmp_path: Path, command: Command):
    preprocess(command, tmp_path, *settings(photographs, tmp_path), "cluster.num_workers=8")
    assert contents(tmp_path) == undisturbed[0]


def write_small(folder: Path, numbers: range) -> None:
    """Writes small JPEG files, each of its own content."""
    for number in numbers:
        target = folder / f"{number % 10}" / f"{number:06d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(values).resize((24, 24)).save(target, quality=90)


def test_a_hundred_new_files_among_ten_thousand_cost_a_hundred(tmp_path: Path, command: Command):
    source, storage = tmp_path / "source", tmp_path / "storage"
    write_small(source, range(10_000))
    arguments = ["cifar10-small", f"data.source={source}", f"cluster.storage={storage}", "data.image_size=16"]
    first = preprocess(command, tmp_path, *arguments)
    old = read_manifest(Location.of(first["path"]))
    old_pixels = RowReader(Location.of(first["path"]), old).rows(np.arange(0, 10_000, 7))
    write_small(source, range(10_000, 10_100))
    second = preprocess(command, tmp_path, *arguments)
    assert (second["num_opened"], second["num_decoded"], second["num_rows"]) == (100, 100, 10_100)
    assert second["digest"] != first["digest"]
    new = read_manifest(Location.of(second["path"]))
    assert set(old.shards) < set(new.shards)
    assert np.array_equal(RowReader(Location.of(first["path"]), old).rows(np.arange(0, 10_000, 7)), old_pixels)

    assert preprocess(command, tmp_path, *arguments, "--name", "other")["num_opened"] == 0


def test_a_hostile_corpus_has_exact_counts_and_reasons(tmp_path: Path, command: Command):
    source, storage = tmp_path / "source", tmp_path / "storage"
    write_good(source / "good", 200)
    expected = write_hostile(source / "hostile")
    assert len(expected) >= 60
    recipe = [f"data.image_size={RECIPE.image_size}", f"data.min_side={RECIPE.min_side}"]
    arguments = ["cifar10-small", f"data.source={source}", f"cluster.storage={storage}", *recipe]
    refused = command("preprocess", *arguments, cwd=tmp_path)
    assert refused.code == 2
    assert "data.max_bad_fraction=0.05 is exceeded" in refused.stderr
    assert not list(storage.glob("datasets/*/*/manifest.json"))
    assert len(list(storage.glob("datasets/*/*/quarantine.parquet"))) == 1

    receipt = preprocess(command, tmp_path, *arguments, "data.max_bad_fraction=0.5")
    lines = pq.read_table(Path(receipt["path"]) / "quarantine.parquet").to_pylist()
    found = {line["path"].removeprefix("hostile/"): line["reason"] for line in lines}
    assert found == {path: reason for path, reason in expected.items() if reason != "row"}
    assert receipt["num_rows"] == 200 + sum(reason == "row" for reason in expected.values())
    assert receipt["num_listed"] == 200 + len(expected) == receipt["num_rows"] + receipt["num_quarantined"]


def test_source_and_storage_on_s3_give_the_same_dataset(s3: S3Server, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch):
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    source = tmp_path / "source"
    write_small(source, range(300))
    (source / "3" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    arguments = ["data.image_size=16", "data.shard_bytes=100000"]
    local = preprocess(command, tmp_path, "cifar10-small", f"data.source={source}", f"cluster.storage={tmp_path / 'storage'}", *arguments)
    bucket = Location.of(f"s3://{s3.bucket}/preprocess")
    (bucket / "images").upload(source)
    remote = [f"data.source={bucket / 'images'}", f"cluster.storage={bucket / 'storage'}", *arguments]
    done = command("preprocess", "cifar10-small", *remote, "--json", cwd=tmp_path)
    assert done.code == 0, done.stderr
    receipt = done.json["preprocess"]
    assert (receipt["digest"], receipt["num_rows"], receipt["quarantined"]) == (local["digest"], 300, {"truncated": 1})
