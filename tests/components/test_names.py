"""Which names and paths are taken: those that every file system can hold, and why the others are not."""

from pathlib import Path

import pytest

from components.errors import DataError
from components.names import (
    MAX_MODEL_NAME,
    MAX_NAME,
    MAX_ROOT,
    is_plain,
    namesake,
    what_is_no_folder,
    why_no_model_name,
    why_no_name,
    why_no_path,
    why_no_root,
)
from components.storage import Location

DEVICES = ["con", "CON", "con.txt", "Con.a.b", "prn", "aux", "nul", "NUL.yaml", "com1", "COM9.x", "lpt1", "lpt9"]


@pytest.mark.parametrize("name", ["a", "digits", "Digits-2", "0", "2026-01-31", "a..b", "v1.0", "console", "com10", "icon", "nul-1", "a_b", "a" * MAX_NAME])
def test_a_name_of_plain_letters_is_taken_for_runs_and_models(name: str):
    assert (why_no_name(name), why_no_model_name(name)) == (None, None)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        *((name, "is no run name") for name in ("", " ", ".", "..", "-a", "_a", ".a", "a b", " a", "a ", "a/b", "a\\b", "a:b")),
        *((name, "is no run name") for name in ("a\nb", "a\n", "a\0", "~", "é", "a\udcff")),
        *((name, "is the name of a device") for name in DEVICES),
        ("a.", "ends in a dot"),
        ("a" * (MAX_NAME + 1), f"has {MAX_NAME + 1} characters; use up to {MAX_NAME}"),
        ("a" * 5000, "has 5000 characters"),
    ],
)
def test_a_name_that_some_file_system_cannot_hold_is_no_run_name(name: str, wrong: str):
    assert (why_no_name(name, "run name") or "").startswith(wrong)


@pytest.mark.parametrize("name", ["my model", "_private", "a. b", "a" * MAX_MODEL_NAME])
def test_a_model_may_have_spaces_between(name: str):
    assert why_no_model_name(name) is None


@pytest.mark.parametrize("name", ["", " ", " a", "a ", ".", "..", "...", "a.", "-a", "a/b", "a:b", "a\n", "a'b", "é", "a" * (MAX_MODEL_NAME + 1), *DEVICES])
def test_a_name_that_mlflow_or_a_file_system_cannot_hold_is_no_model_name(name: str):
    assert why_no_model_name(name) is not None


def test_the_longest_names_fit_where_a_file_system_holds_143_bytes():
    longest = "a" * MAX_MODEL_NAME
    assert len(f"{longest} champion log") <= 143
    assert len(f"job-driver-ddpm-retrain~{'a' * MAX_NAME}~{'a' * MAX_NAME}-100.log") <= 255


@pytest.mark.parametrize(
    "path", ["a", ".", "..", "/", "a b", "é/ü", "a\udcff", "~", "~/x", "a'b", "con", "a/" * 200, "a" * 255, "é" * 127, "s3://bucket", "s3://b/a/b", ""]
)
def test_a_path_that_can_be_there_is_taken(path: str):
    assert why_no_path(path) is None


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        ("a" * 256, "has a name of 256 bytes in it, and file systems hold 255"),
        ("x/" + "é" * 128 + "/y", "has a name of 256 bytes"),
        ("/".join(["a" * 200] * 30), "is a path of "),
        ("a\nb", "holds a line break"),
        ("a\0b", "holds a line break or another control character"),
        ("a\x1b[31m", "holds a line break or another control character"),
        ("a\ud800", "holds a character that no path can hold"),
        ("~no-such-user/x", "begins with the home folder of a user who is not known here"),
        ("s3://" + "a" * 64, "has a bucket of 64 bytes; use up to 63"),
        ("s3://b/" + "a" * 901, "has a key of 901 bytes"),
    ],
)
def test_a_path_that_no_file_system_holds_is_told_from_its_text_and_is_no_location(path: str, wrong: str):
    assert (why_no_path(path) or "").startswith(wrong)
    with pytest.raises(DataError, match=wrong[:20]):
        Location.of(path)


@pytest.mark.parametrize(
    ("path", "wrong"), [("/a?b", "has a '?' in its path"), ("/a\udcff", "has bytes in its path that are no UTF-8"), ("/" + "a/" * MAX_ROOT, "is a path of")]
)
def test_a_storage_root_leaves_room_for_what_lies_below_and_holds_mlflows_database(path: str, wrong: str):
    assert (why_no_root(path) or "").startswith(wrong)
    assert why_no_path(path) is None


def test_a_relative_storage_root_is_judged_by_the_folder_it_lies_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "what?").mkdir()
    monkeypatch.chdir(tmp_path / "what?")
    assert "'?'" in (why_no_root("./storage") or "")


def test_what_stands_in_the_way_of_a_folder_is_found(tmp_path: Path):
    (tmp_path / "file").write_text("")
    assert what_is_no_folder(tmp_path / "file" / "a" / "b") == what_is_no_folder(tmp_path / "file") == tmp_path / "file"
    assert what_is_no_folder(tmp_path) is what_is_no_folder(tmp_path / "a" / "b") is None


@pytest.mark.parametrize(
    ("name", "there", "is_there", "same"),
    [
        ("Digits", ["digits", "other"], True, "digits"),
        ("digits", ["DIGITS"], True, "DIGITS"),
        ("Digits", ["digits"], False, None),  # tells capital letters from small ones
        ("digits", ["digits", "Digits"], True, None),
        ("digits", [], False, None),
        ("new", ["digits"], False, None),
    ],
)
def test_a_name_has_a_namesake_only_where_the_file_system_finds_it_under_another(name: str, there: list[str], is_there: bool, same: str | None):
    assert namesake(name, there, is_there) == same


def test_plain_text_is_of_one_line_and_of_unicode():
    assert is_plain("a b é '\"")
    assert not any(map(is_plain, ("a\nb", "a\0", "\udcff", "\u2028", "\x85")))
