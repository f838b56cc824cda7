"""The same operations on a file system and on a real S3 server."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ray_nodes
from support import ROOT, write_dataset

from components.data.reader import RowReader
from components.data.shard_cache import ShardCache
from components.data.shards import Manifest, check_whole, column_rows, read_checked_shard, read_manifest, shard_location
from components.errors import DataError
from components.storage import Location


@pytest.fixture(params=["disk", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path, s3: ray_nodes.S3Server, monkeypatch: pytest.MonkeyPatch) -> Location:
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    return Location.of(tmp_path / "root") if request.param == "disk" else Location.of(f"s3://{s3.bucket}/{tmp_path.name}")


def test_what_is_written_is_read_back_listed_and_removed(root: Location):
    (root / "a" / "x.txt").write_text("one")
    (root / "a" / "x.txt").write_text("twoo")
    (root / "a" / "b" / "y").write_bytes(b"\0" * 5)
    assert (root / "a" / "x.txt").read_text() == "twoo"
    assert (root / "a").files() == {"x.txt": 4}
    assert (root / "a").folders() == ["b"]
    assert (root / "a" / "x.txt").is_file()
    assert not (root / "a").is_file()
    assert ((root / "a" / "b" / "y").size(), (root / "a" / "none").size()) == (5, -1)
    (root / "a" / "x.txt").remove()
    (root / "a" / "x.txt").remove()
    assert not (root / "a" / "x.txt").is_file()
    (root / "a").remove_tree()
    (root / "a").remove_tree()
    assert (root / "a" / "b").files() == {}
    with pytest.raises(FileNotFoundError):
        (root / "a" / "b" / "y").read_bytes()


def test_a_folder_moves_with_all_it_holds(root: Location, tmp_path: Path):
    (tmp_path / "up" / "deep").mkdir(parents=True)
    (tmp_path / "up" / "1.bin").write_bytes(os.urandom(9 << 20))
    (tmp_path / "up" / "deep" / "2").write_text("2")
    (root / "from").upload(tmp_path / "up", last="1.bin")
    (root / "from").rename(root / "to")
    assert (root / "from").files() == {}
    with (root / "to").local_copy() as copy:
        assert (copy / "1.bin").read_bytes() == (tmp_path / "up" / "1.bin").read_bytes()
        assert (copy / "deep" / "2").read_text() == "2"


def test_a_file_that_could_not_be_finished_does_not_appear(root: Location):
    def fail(location: Location) -> None:
        with location.staged() as staging:
            staging.write_text("half")
            raise RuntimeError

    (root / "kept").write_text("whole")
    for name in ("kept", "new"):
        with pytest.raises(RuntimeError):
            fail(root / name)
    assert (root / "kept").read_text() == "whole"
    assert root.files() == {"kept": 5}


def test_addresses_are_read_as_people_write_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert str(Location.of("a/b")) == f"{tmp_path}/a/b"
    assert str(Location.of("~/x")) == "/home/me/x"
    assert str(Location.of("s3://bucket/x/")) == "s3://bucket/x"
    assert (Location.of("s3://bucket/x").name, str(Location.of("s3://bucket/x/y").parent)) == ("x", "s3://bucket/x")
    with pytest.raises(ValueError, match="not on a file system"):
        _ = Location.of("s3://bucket/x").path


def make_dataset(folder: Location) -> tuple[Manifest, np.ndarray]:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 1, 8, 8), dtype=np.uint8)
    manifest = write_dataset(folder, np.split(pixels, 3), [None] * 3)
    return manifest, pixels


def test_a_dataset_is_the_same_wherever_it_lies(root: Location, tmp_path: Path):
    manifest, pixels = make_dataset(root / "set")
    assert manifest.digest == make_dataset(Location.of(tmp_path / "other"))[0].digest
    assert read_manifest(root / "set") == manifest
    check_whole(root / "set", manifest)
    assert np.array_equal(column_rows(read_checked_shard(shard_location(root / "set", manifest.shards[1].name))["pixels"], manifest.space), pixels[20:40])
    rows = np.random.default_rng(1).permutation(60)
    assert np.array_equal(RowReader(root / "set", manifest, copies=ShardCache(tmp_path / "copies", 1 << 20)).rows(rows), pixels[rows])
    shard_location(root / "set", manifest.shards[1].name).remove()
    with pytest.raises(DataError, match=rf"{manifest.shards[1].name} is missing"):
        check_whole(root / "set", manifest)


def test_copies_stay_within_their_limit_and_the_longest_unused_go_first(root: Location, tmp_path: Path):
    if root.is_local:
        pytest.skip("files on disk are not copied")
    manifest, _ = make_dataset(root / "set")
    copies = ShardCache(tmp_path / "copies", 2 * manifest.shards[0].bytes + 100)
    for shard in (0, 1, 0, 2):
        entry = manifest.shards[shard]
        copies.use(shard_location(root / "set", entry.name), entry.sha256, Path.read_bytes)
        os.utime(tmp_path / "copies" / entry.sha256, (shard + 1e9 + (shard == 0) * 5, shard + 1e9 + (shard == 0) * 5))
    held = {path.name for path in (tmp_path / "copies").iterdir() if not path.name.endswith(".lock")}
    assert held == {manifest.shards[0].sha256, manifest.shards[2].sha256}
    assert not list((tmp_path / "copies").glob("*.tmp"))


def test_a_copy_that_is_not_what_the_manifest_says_is_refused(root: Location, tmp_path: Path):
    if root.is_local:
        pytest.skip("files on disk are not copied")
    manifest, _ = make_dataset(root / "set")
    shard = shard_location(root / "set", manifest.shards[0].name)
    shard.write_bytes(b"other")
    with pytest.raises(DataError, match=rf"{shard.name} does not match the checksum"):
        ShardCache(tmp_path / "copies", 1 << 20).use(shard, manifest.shards[0].sha256, Path.read_bytes)
    assert not [path for path in (tmp_path / "copies").iterdir() if not path.name.endswith(".lock")]


USE = """
import json, sys
from pathlib import Path
from components.data.shard_cache import ShardCache
from components.storage import Location
copies = ShardCache(Path(sys.argv[1]), 1)
print(json.dumps([len(copies.use(Location.of(uri), sha256, Path.read_bytes)) for uri, sha256 in json.loads(sys.argv[2])]))
"""


def test_processes_of_a_node_share_copies_even_where_the_limit_is_far_too_small(root: Location, tmp_path: Path):
    if root.is_local:
        pytest.skip("files on disk are not copied")
    manifest, _ = make_dataset(root / "set")
    work = json.dumps([(str(shard_location(root / "set", shard.name)), shard.sha256) for shard in manifest.shards] * 10)
    command = [sys.executable, "-c", USE, str(tmp_path / "copies"), work]
    with contextlib.ExitStack() as stack:
        users = [stack.enter_context(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)) for _ in range(3)]
        for user in users:
            assert json.loads(user.communicate(timeout=60)[0]) == [shard.bytes for shard in manifest.shards] * 10
