"""`ddpm data`: what it finds, what it says of a dataset, and what it says changed."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from servers import S3Server
from support import Finished, ListedFile, write_listed

from components.data.shards import Manifest, shard_location
from components.storage import Location

Run = Callable[..., tuple[int, str, str]]
FILES = [
    *(ListedFile(f"cat/{number}", label="cat") for number in range(12)),
    *(ListedFile(f"dog/{number}", label="dog", split="holdout") for number in range(3)),
    *(ListedFile(f"dog/bad{number}", reason="truncated") for number in range(5)),
    ListedFile("dog/empty", reason="empty"),
]


def put(root: Location, name: str, files: list[ListedFile] = FILES, age: int = 0, **fields: Any) -> Manifest:
    """Writes a dataset below a storage root as if it were some seconds old."""
    folder = root / "datasets" / "source" / name
    manifest = write_listed(folder, files, **fields)
    if folder.is_local:
        os.utime((folder / "manifest.json").path, (2e9 - age, 2e9 - age))
    return manifest


@pytest.fixture
def storage(tmp_path: Path) -> Location:
    return Location.of(tmp_path / "storage")


def some(*paths: str) -> list[ListedFile]:
    return [*map(ListedFile, paths), ListedFile("z")]


def test_list_names_every_dataset_the_newest_last(run: Run, storage: Location):
    for name, age in (("bbb", 20), ("aaa", 10), ("ccc", 30)):
        put(storage, name, some(name), age=age, source=f"folder-{name}")
    code, out, err = run("data", "list", "--json")
    assert (code, err) == (0, "")
    assert [(line["name"], line["source"]) for line in json.loads(out)] == [("ccc", "folder-ccc"), ("bbb", "folder-bbb"), ("aaa", "folder-aaa")]
    _, table, _ = run("data", "list")
    assert [line.split()[1] for line in table.splitlines() if "folder-" in line] == ["ccc", "bbb", "aaa"]


def test_a_manifest_that_cannot_be_read_is_named_and_does_not_end_the_listing(run: Run, storage: Location):
    put(storage, "good")
    (storage / "datasets" / "source" / "broken" / "manifest.json").write_text("{")
    code, out, err = run("data", "list", "--json")
    assert code == 0
    assert [line["name"] for line in json.loads(out)] == ["good"]
    assert "source/broken is not a whole dataset" in err
    code, _, err = run("data", "show", "bro")
    assert code == 2
    assert "source/broken is not a whole dataset" in err


def test_an_empty_storage_root_is_said_to_be_empty(run: Run):
    assert run("data", "list", "--json")[:2] == (0, "[]\n")
    assert "ddpm preprocess digits makes one" in run("data", "list")[1]
    code, _, err = run("data", "show", "abc")
    assert code == 2
    assert "there are none yet" in err


def test_a_dataset_is_found_by_folder_and_by_any_beginning_of_name_or_digest(run: Run, storage: Location):
    digest = put(storage, "one", some("a")).digest
    put(storage, "two", some("b"))
    names = [json.loads(run("data", "show", text, "--json")[1])["name"] for text in (str(storage / "datasets" / "source" / "one"), "o", "one", digest[:9])]
    assert names == ["one"] * 4


def test_of_several_datasets_with_one_digest_the_newest_is_meant(run: Run, storage: Location):
    for name, age in (("same-1", 30), ("same-3", 10), ("same-2", 20)):
        put(storage, name, age=age)
    assert json.loads(run("data", "show", "same", "--json")[1])["name"] == "same-3"


def test_an_unknown_or_ambiguous_name_is_an_error_that_lists_what_there_is(run: Run, storage: Location):
    put(storage, "x1", some("a"), age=10, source="cats")
    put(storage, "x2", some("b"), source="dogs")
    code, out, err = run("data", "show", "x")
    assert (code, out) == (2, "")
    assert "'x' is the beginning of several: x1 (cats, 2 rows), x2 (dogs, 2 rows); write more of the name" in err.replace(
        "x2 (dogs, 2 rows), x1 (cats, 2 rows)", "x1 (cats, 2 rows), x2 (dogs, 2 rows)"
    )
    code, _, err = run("data", "diff", "x1", "nothing")
    assert code == 2
    assert "'nothing' is neither a dataset's folder nor the beginning of a name" in err
    assert "x1 (cats, 2 rows)" in err


def test_show_says_what_adds_up_and_draws_a_sheet(run: Run, storage: Location, tmp_path: Path):
    manifest = put(storage, "pets", ignored={".txt": 4}, num_ignored=4)
    (tmp_path / "pictures").mkdir()
    code, out, err = run("data", "show", "pets", "--out", "pictures/sheet.png", "--json")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert facts["listed"] == facts["rows"] + facts["quarantined"] == sum(facts["splits"].values()) + sum(of["count"] for of in facts["quarantine"].values())
    assert facts["quarantine"] == {
        "truncated": {"count": 5, "examples": ["dog/bad0", "dog/bad1", "dog/bad2"]},
        "empty": {"count": 1, "examples": ["dog/empty"]},
    }
    assert (facts["labels"], facts["largest_label"], facts["smallest_label"], facts["ignored"]) == ({"cat": 12, "dog": 3}, "cat", "dog", {".txt": 4})
    assert (facts["digest"], facts["space"]) == (manifest.digest, manifest.space.model_dump(mode="json"))
    assert facts["shard_bytes"] == sum((shard_location(Location(facts["folder"]), shard.name)).size() for shard in manifest.shards)
    with Image.open(tmp_path / facts["contact_sheet"]) as sheet:
        assert len(np.unique(np.asarray(sheet))) > 100
    _, text, _ = run("data", "show", "pets")
    for part in ("21 = 15 rows + 6 quarantined", "train 12, holdout 3", "largest cat (12), smallest dog (3)", "(4 .txt)", facts["quarantine_file"]):
        assert part in text
    bars = {line.split()[1]: line.count("█") for line in text.splitlines() if "█" in line}
    assert bars == {"cat": 40, "dog": 10}


def test_of_many_labels_the_largest_are_shown_and_the_others_counted(run: Run, storage: Location):
    put(storage, "many", [ListedFile(f"{label:02d}/{number}", label=f"[b]{label:02d}") for label in range(25) for number in range(label + 1)])
    text = run("data", "show", "many")[1]
    shown = [line.split()[1] for line in text.splitlines() if "█" in line]
    assert shown == [f"[b]{label:02d}" for label in range(24, 4, -1)]
    assert "and 5 more" in text
    assert " 15 " in next(line for line in text.splitlines() if "and 5 more" in line)


def test_a_dataset_with_a_missing_shard_is_an_error_that_names_it(run: Run, storage: Location):
    name = put(storage, "pets").shards[0].name
    (storage / "datasets" / "source" / "shards" / name).remove()
    code, out, err = run("data", "show", "pets")
    assert (code, out) == (2, "")
    assert f"{name} is missing" in err


@pytest.mark.parametrize(("out", "message"), [("sheet.jpg", "is no PNG file"), ("missing/x.png", "there is no folder missing; make it")])
def test_a_sheet_that_cannot_be_written_is_an_error(run: Run, storage: Location, out: str, message: str):
    put(storage, "pets")
    code, _, err = run("data", "show", "pets", "--out", out)
    assert code == 2
    assert re.search(f"--out {out}:? {message}", err)


def test_diff_prints_what_happened_and_equal_where_nothing_did(run: Run, storage: Location):
    put(storage, "one")
    put(storage, "other", [*FILES[1:], ListedFile("dog/new", label="dog")])
    assert "equal: nothing differs" in run("data", "diff", "one", "one")[1]
    code, text, _ = run("data", "diff", "one", "other")
    assert code == 0
    assert "rows added" in text
    assert "dog/new" in text
    assert "14 rows with path and content as before" in text
    facts = json.loads(run("data", "diff", "one", "other", "--json")[1])
    assert (facts["equal"], facts["before"]["name"], facts["after"]["name"]) == (False, "one", "other")
    assert facts["rows"]["removed"] == {"count": 1, "by": {"cat": 1}, "examples": ["cat/0"]}


def test_datasets_on_s3_are_listed_shown_and_compared_as_on_disk(run: Run, storage: Location, s3: S3Server, monkeypatch: pytest.MonkeyPatch):
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    remote = Location.of(f"s3://{s3.bucket}/data-command")
    for root in (storage, remote):
        put(root, "pets")
    there = json.loads(run("data", "show", "pets", "--storage", str(remote), "--out", "remote.png", "--json")[1])
    here = json.loads(run("data", "show", "pets", "--out", "local.png", "--json")[1])
    places = ("folder", "written", "quarantine_file", "contact_sheet")
    assert {key: value for key, value in there.items() if key not in places} == {key: value for key, value in here.items() if key not in places}
    assert there["written"] > "2020"
    assert Path("remote.png").read_bytes() == Path("local.png").read_bytes()
    assert "equal: nothing differs" in run("data", "diff", there["folder"], "pets")[1]


def test_diff_tells_what_was_done_to_a_folder(run: Run, command: Callable[..., Finished], make_images: Callable[..., Path], tmp_path: Path):
    source = make_images(tmp_path / "photos", count=24)
    names = []
    for number in range(2):
        done = command("preprocess", "cifar10-small", f"data.source={source}", "data.max_bad_fraction=0.5", "--json", cwd=tmp_path)
        assert done.code == 0, done.stderr
        names.append(Path(done.json["preprocess"]["path"]).name)
        if number == 0:
            (source / "cat" / "0000.png").rename(source / "dog" / "0000.png")
            (source / "cat" / "0002.jpg").unlink()
            (source / "dog" / "0001.jpg").write_bytes(b"\xff\xd8\xff")
            Image.new("RGB", (40, 40), "red").save(source / "cat" / "0004.jpg")
            (source / "notes.txt").write_text("no image")
    facts = json.loads(run("data", "diff", *names, "--json")[1])
    happened = {name: change["examples"] for part in ("rows", "quarantine") for name, change in facts[part].items() if change["count"]}
    assert happened == {
        "removed": ["cat/0002.jpg", "dog/0001.jpg"],
        "renamed": ["cat/0000.png -> dog/0000.png"],
        "changed": ["cat/0004.jpg"],
        "relabelled": ["dog/0000.png"],
        "newly": ["dog/0001.jpg"],
    }
    assert (facts["ignored"], facts["settings"], facts["same_rows"]) == ({".txt": [0, 1]}, {}, 20)
    shown = json.loads(run("data", "show", names[1], "--json")[1])
    assert shown["listed"] == shown["rows"] + shown["quarantined"] == 23
