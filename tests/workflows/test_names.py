"""What a person gives as a name or path is checked first: one line that names it, exit code 2, and nothing is made, whatever the command."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from components.errors import DataError
from components.storage import Location
from pipeline.config import load_config
from pipeline.errors import ConfigError
from pipeline.names import check_cache, check_namesake
from workflows.messages import MAX_LINE, lines_of, one_line
from workflows.options import file_to_write, folder_to_write
from workflows.preset_files import PRESETS

Run = Callable[..., tuple[int, str, str]]
LONG = "a" * 300
NO_SOURCE = "data.source=/no/such/folder"
ON_KUBERNETES = ("cluster.storage=/x", "--claim", "c")

NAMED = {
    **{name: (name, "digits", NO_SOURCE) for name in ("run", "preprocess", "train", "evaluate", "register", "retrain")},
    "submit": ("submit", "digits", "--address", "http://127.0.0.1:9", "cluster.storage=/x"),
    "schedule": ("schedule", "digits", "--interval", "1h"),
    **{f"manifest {kind}": ("manifest", kind, "digits", *ON_KUBERNETES) for kind in ("rayjob", "cronjob")},
}
NAMES = {
    "": "--name '' is empty; give a value, or leave it out",
    LONG: "...(300 characters)...",
    "a" * 5000: "has 5000 characters; use up to 100",
    "a" * 101: "has 101 characters; use up to 100",
    "con": "--name con is the name of a device on some systems",
    "nul.yaml": "--name nul.yaml is the name of a device",
    "a.": "--name a. ends in a dot",
    **{name: f"--name {name} is no run name; use letters, digits" for name in (".", "..", "-a", "a b", "a/b", "é", "~")},
    "a\nb": r"--name a\nb is no run name",
    "a\n": r"--name a\n is no run name",
    "a\udcff": r"--name a\udcff is no run name",
}
WRITERS = {
    "sample": (("sample", "no/such/checkpoint", "--out"), ".png"),
    "data show": (("data", "show", "nothing", "--out"), ".png"),
    "compare": (("compare", "no/such/checkpoint", "--dataset", "nothing", "--out"), ""),
    "reference": (("reference", "nothing", "--out"), ".npz"),
    "manifest": (("manifest", "rayjob", "digits", *ON_KUBERNETES, "--code"), ".zip"),
}
FILES = {
    "": "'' is empty",
    "missing/folder/x": ": there is no folder missing/folder; make it, or name another",
    "~/no-such-folder/x": "there is no folder",
    "~no-such-user/x": "begins with the home folder of a user who is not known here",
    "a-file/x": "a-file is no folder; name another",
    "/etc/passwd/x": ": /etc/passwd is no folder; name another",
    "/proc/x": "cannot be written (No such file or directory)",
    LONG: "bytes in it, and file systems hold 255",
    "/".join(["a" * 200] * 30): "use one of up to 3500",
    "a\nx": "holds a line break",
    "http://host/x": "is not written to from here",
}
ROOTED = {
    "data list": ("data", "list"),
    "data show": ("data", "show", "nothing"),
    "data diff": ("data", "diff", "a", "b"),
    **{f"models {name}": ("models", name, "a/1") for name in ("list", "show", "log", "compare", "promote", "rollback", "delete")},
    "sample": ("sample", "models:/a@champion"),
    "compare": ("compare", "models:/a@champion"),
    "reference": ("reference", "nothing"),
    "ui": ("ui",),
    "schedule": ("schedule", "digits", "--interval", "1h"),
}
ROOTS = {
    "": "--storage '' is empty",
    LONG: "has a name of 300 bytes in it",
    "/".join(["a" * 100] * 6): "use one of up to 500",
    "a-file": "a-file is not one; name a folder, or s3://BUCKET/PREFIX",
    "a-file/x": "a-file is not one; name a folder, or s3://BUCKET/PREFIX",
    "a\nb": r"--storage a\nb holds a line break",
    "a?b": "--storage a?b has a '?' in its path",
    "~no-such-user/x": "--storage ~no-such-user/x begins with the home folder of a user",
    "http://x": "--storage http://x is no storage",
}
PRESET_NAMES = {
    "": "PRESET '' is empty; give a value",
    **{
        text: "is neither a file nor one of" for text in (LONG, "a" * 5000, "/" + LONG, ".", "a-folder", "a-file/x", "a\nb", "\udcff", "con", "~no-such-user/x")
    },
    "my preset (1).yaml": "preset my preset (1).yaml gives its name to the run, and 'my preset (1)' is no run name",
    "con.yaml": "'con' is the name of a device on some systems; use another; give another by --name, or rename the file",
    f"{'a' * 120}.yaml": "has 120 characters; use up to 100",
}
OBJECTS = {
    "": "is empty",
    **{name: "is not a valid name in Kubernetes; use up to" for name in ("A", "a_b", "a/b", "a b", "-a", "a-", "a.", "é", "a\nb", "a" * 254)},
}
FILES_OF_EVALUATE = ("evaluate.inception_weights", "evaluate.dinov2_weights", "evaluate.reference")
PATH_SETTINGS = ("data.source", "data.root", *FILES_OF_EVALUATE, "cluster.cache", "cluster.storage")
SETTINGS = {
    "": "is empty; name a path, or leave the setting out",
    "  ": "is empty; name a path, or leave the setting out",
    LONG: "has a name of 300 bytes in it",
    "/".join(["a" * 200] * 30): "is a path of",
    "a\nb": "holds a line break",
    "a\0b": "holds a line break or another control character",
    "~no-such-user/x": "begins with the home folder of a user",
}


def pairs(commands: Mapping[str, object], values: Mapping[str, str]) -> list[ParameterSet]:
    """Returns every command with every value, as a table."""
    return [
        pytest.param(how, value, said, id=f"{command}-{ascii(value[:20])[1:-1] or 'empty'}-{len(value)}")
        for command, how in commands.items()
        for value, said in values.items()
    ]


@pytest.fixture
def refused(run: Run, tmp_path: Path) -> Callable[..., str]:
    """Returns a function that calls the command, which must refuse: it returns the one line, and nothing was made."""
    (tmp_path / "a-file").write_text("")
    (tmp_path / "a-folder").mkdir()

    def call(*arguments: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        code, out, err = run(*arguments)
        lines = err.splitlines()
        assert (code, out, len(lines)) == (2, "", 1), err
        assert len(lines[0]) < 1200
        assert sorted(tmp_path.rglob("*")) == before
        return lines[0].removeprefix("error: ")

    return call


@pytest.mark.parametrize(("command", "name", "said"), pairs(NAMED, NAMES))
def test_a_run_name_that_cannot_be_held_is_refused(refused: Callable[..., str], command: tuple[str, ...], name: str, said: str):
    assert said in refused(*command, f"--name={name}")


@pytest.mark.parametrize(("writer", "file", "said"), pairs(WRITERS, FILES))
def test_a_file_that_cannot_be_written_is_refused_before_the_work(refused: Callable[..., str], writer: tuple, file: str, said: str):
    (*command, option), suffix = writer
    line = refused(*command, f"{option}={file + suffix if file else file}")
    assert line.startswith(option)
    assert said.removesuffix("; name another") in line


@pytest.mark.parametrize(("command", "suffix"), [(command, suffix) for command, suffix in WRITERS.values() if suffix])
def test_a_folder_where_a_file_is_to_be_written_is_refused(refused: Callable[..., str], tmp_path: Path, command: tuple[str, ...], suffix: str):
    (tmp_path / f"folder{suffix}").mkdir()
    assert refused(*command, f"folder{suffix}") == f"{command[-1]} folder{suffix} is a folder; name a file"


def test_a_file_where_a_folder_is_to_be_written_is_refused(refused: Callable[..., str]):
    assert refused("compare", "x", "--dataset", "y", "--out", "a-file") == "--out a-file is a file; name a folder"


@pytest.mark.parametrize("command", ["sample", "data show"])
@pytest.mark.parametrize("file", ["grid.xyz", "grid", ".png", "a-folder"])
def test_a_picture_of_another_kind_than_png_is_refused(refused: Callable[..., str], command: str, file: str):
    assert refused(*WRITERS[command][0], file) == f"--out {file} is no PNG file; use a name that ends in .png"


def test_what_can_be_written_is_taken_and_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.png").write_text("old")
    assert [file_to_write("--out", name, ".png") for name in ("old.png", "new.PNG", "./new.png")] == [Path("old.png"), Path("new.PNG"), Path("new.png")]
    assert [folder_to_write("--out", name) for name in ("new", ".", "new/")] == [Path("new"), Path(), Path("new")]
    assert (sorted(os.listdir()), Path("old.png").read_text()) == (["old.png"], "old")


@pytest.mark.parametrize(("command", "root", "said"), pairs(ROOTED, ROOTS))
def test_a_storage_root_that_can_be_no_folder_is_refused(refused: Callable[..., str], command: tuple[str, ...], root: str, said: str):
    assert said in refused(*command, f"--storage={root}")


@pytest.mark.parametrize(
    ("command", "preset", "said"), pairs({"run": ("run",), "retrain": ("retrain",), "schedule": ("schedule", "--interval=1h")}, PRESET_NAMES)
)
def test_a_preset_that_is_none_or_gives_no_name_is_refused(refused: Callable[..., str], tmp_path: Path, command: tuple[str, ...], preset: str, said: str):
    if preset.endswith(".yaml"):
        (tmp_path / preset).write_text("")
    assert said in refused(*command, preset)


def test_a_preset_may_have_any_file_name_where_run_and_model_have_names(run: Run, tmp_path: Path):
    (tmp_path / "my preset (1).yaml").write_text("")
    message = "registry.model_name: 'ddpm-my preset (1)' is not a valid model name"
    assert message in run("run", "my preset (1).yaml", "--name", "mine")[2]
    assert run("config", "my preset (1).yaml", "registry.model_name=mine")[0] == 0
    assert NO_SOURCE in run("run", "my preset (1).yaml", "--name", "mine", "registry.model_name=mine", NO_SOURCE)[2]


@pytest.mark.parametrize("setting", PATH_SETTINGS)
@pytest.mark.parametrize("text", SETTINGS, ids=lambda text: f"{text[:10]!a}-{len(text)}")
def test_a_setting_that_names_no_path_is_refused(tmp_path: Path, setting: str, text: str):
    section, key = setting.split(".")
    preset = tmp_path / "preset.yaml"
    preset.write_text("\n".join([f"{section}:", f"  {key}: {as_yaml(text)}"]))
    with pytest.raises(ConfigError) as caught:
        load_config(preset)
    (line,) = lines_of(caught.value)
    assert line.startswith(setting)
    assert SETTINGS[text] in line or (text == "" and "at least 1 character" in line)


def as_yaml(text: str) -> str:
    """Returns text in double quotes, with what YAML writes by an escape."""
    return '"' + text.replace("\n", "\\n").replace("\0", "\\0") + '"'


@pytest.mark.parametrize("setting", ["data.root", "cluster.cache"])
def test_a_folder_of_a_machine_is_not_on_s3(setting: str):
    with pytest.raises(ConfigError, match=f"{setting}=s3://b/x is not read from there"):
        load_config(PRESETS / "digits.yaml", [f"{setting}=s3://b/x"])


@pytest.mark.parametrize("name", ["", LONG, "a" * 129, " a", "a ", ".", "..", "a.", "con", "a\nb", "a\n", "a/b", "a:b", "é"])
def test_a_model_name_that_cannot_be_held_is_refused(refused: Callable[..., str], name: str):
    line = refused("run", "digits", f"registry.model_name={name}")
    assert line.startswith("registry.model_name: ")
    assert "where it is not set, it follows from the preset's file name" in line


@pytest.mark.parametrize(("option", "name", "said"), pairs({name: name for name in ("namespace", "queue", "secret", "claim", "service-account")}, OBJECTS))
def test_an_object_that_kubernetes_cannot_hold_is_refused(refused: Callable[..., str], option: str, name: str, said: str):
    claim = () if option == "claim" else ("--claim", "c")
    line = refused("manifest", "cronjob", "digits", "cluster.storage=/x", *claim, f"--{option}={name}")
    assert line.startswith(f"--{option} ")
    assert said in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("manifest", "rayjob", "digits", *ON_KUBERNETES, "--image", "a b"), "--image a b is not an image"),
        (("manifest", "cronjob", "digits", *ON_KUBERNETES, "--time-zone", "Mars/Base"), "--time-zone Mars/Base is unknown"),
        (("manifest", "cronjob", "digits", *ON_KUBERNETES, "--namespace", "a.b"), "--namespace a.b is not a valid name in Kubernetes; use up to 63"),
        (("retrain", "digits", "--address", "http://h", "--tick", "a" * 101), "has 101 characters; use up to 100"),
        (("retrain", "digits", "--tick", ""), "--tick '' is empty"),
        (("compare", "x", "--dataset", ""), "--dataset '' is empty"),
        (("sample", "x", "--label", ""), "--label '' is empty"),
        (("data", "show", ""), "DATASET '' is empty; give a value"),
        (("data", "show", LONG), "is neither a dataset's folder nor the beginning of a name"),
        (("data", "show", f"./{LONG}"), "has a name of 300 bytes in it"),
        (("sample", LONG), "has a name of 300 bytes in it"),
        (("sample", "~no-such-user/x"), "begins with the home folder of a user"),
        (("run", "digits", ""), "SECTION.KEY=VALUE '' is empty"),
        (("run", "digits", f"train.steps=x{LONG}"), "is wrong: input should be a valid integer"),
        (("config", "digits", f"train.{LONG}=1"), "is not a setting; `ddpm config PRESET` prints the"),
        (("run", "digits", "--from", LONG), "is no stage; use one of"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, tuple) else "",
)
def test_other_values_that_cannot_be_right_are_refused(refused: Callable[..., str], arguments: tuple[str, ...], said: str):
    assert said in refused(*arguments)


def test_a_cache_is_made_only_where_it_is_used_and_one_that_cannot_be_is_refused(tmp_path: Path):
    check_cache(str(tmp_path / "a" / "b"), is_used=False)
    assert not (tmp_path / "a").exists()
    check_cache(str(tmp_path / "a" / "b"), is_used=True)
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "a-file").write_text("")
    with pytest.raises(ConfigError, match=r"cluster\.cache=.*a-file/x cannot be a folder, because .*a-file is not one"):
        check_cache(str(tmp_path / "a-file" / "x"), is_used=False)
    with pytest.raises(ConfigError, match=r"cluster\.cache=/proc/x cannot be written"):
        check_cache("/proc/x", is_used=True)


@pytest.fixture
def folding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has this process see every folder as a file system shows it that takes capital letters for small ones."""
    exists = Path.exists

    def folded(path: Path) -> bool:
        return exists(path) or (exists(path.parent) and path.name.casefold() in (name.casefold() for name in os.listdir(path.parent)))

    monkeypatch.setattr(Path, "exists", folded)


@pytest.mark.parametrize(("command", "kind"), [("run", "runs"), ("preprocess", "runs"), ("retrain", "retrain"), ("schedule", "schedule")])
@pytest.mark.usefixtures("folding")
def test_a_name_that_differs_in_case_only_is_refused_where_it_would_share_a_folder(refused: Callable[..., str], tmp_path: Path, command: str, kind: str):
    (tmp_path / "storage" / kind / "digits").mkdir(parents=True)
    when = ("--interval", "1h") if command == "schedule" else ()
    said = refused(command, "digits", *when, "--name", "Digits", NO_SOURCE)
    assert said.startswith("--name Digits is the same as digits to the file system of ")


def test_names_that_differ_in_case_only_are_two_where_the_file_system_tells_them_apart(tmp_path: Path):
    (tmp_path / "digits").mkdir()
    (tmp_path / "is-it").mkdir()
    check_namesake(Location.of(tmp_path), "digits")
    if not (tmp_path / "IS-IT").exists():
        check_namesake(Location.of(tmp_path), "Digits")
    check_namesake(Location("s3://bucket/runs"), "Digits")


def test_a_message_is_one_line_whatever_its_values_hold():
    assert one_line("a\nb\r\x1b[31m\u2028c\x85") == r"a\nb\r\x1b[31m\u2028c\x85"
    assert one_line(f"--name {LONG} is long") == f"--name {'a' * 90}...(300 characters)...{'a' * 60} is long"
    assert one_line("word " * 200) == "word " * 200
    assert len(one_line("word " * 5000)) < MAX_LINE + 10


def test_an_error_of_several_parts_is_a_line_for_each():
    assert lines_of(ConfigError("one\n", "two")) == [r"one\n", "two"]
    assert str(ConfigError("one", "two")) == "one\ntwo"
    assert lines_of(DataError("bad a\nb.jpg", "truncated")) == [r"bad a\nb.jpg"]
