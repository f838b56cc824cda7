"""Folders that go with their owner, with owners in processes of their own that are really killed."""

import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from support import ROOT

from components.scratch import scratch

OWNER = """
import subprocess, sys
from components.scratch import scratch
with scratch("test") as folder:
    (folder / "deep").mkdir()
    (folder / "deep" / "file").write_text("x")
    child = subprocess.Popen(["sleep", "600"], close_fds=False, stdout=subprocess.DEVNULL)
    print(folder, child.pid, flush=True)
    sys.stdin.read()
child.kill()
"""


class Owner:
    """A process that holds a folder, and has started one that outlives it."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        name, _, pid = process.stdout.readline().rpartition(" ")
        self.folder, self.child, self._process = Path(name), psutil.Process(int(pid)), process

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, of this process and those that it starts."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def start_owner(temporary: Path) -> Iterator[Callable[[], Owner]]:
    with ExitStack() as stack:

        def start() -> Owner:
            command, env = [sys.executable, "-c", OWNER], os.environ | {"PYTHONPATH": str(ROOT)}
            process = stack.enter_context(subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            stack.callback(process.kill)
            owner = Owner(process)
            stack.callback(owner.child.kill)
            return owner

        yield start


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def leave(folder: Path, name: str) -> Path:
    """Makes a folder as a killed owner leaves it."""
    left = folder / name
    left.mkdir()
    (left / "file").write_text("x")
    (folder / f"{name}.lock").touch()
    return left


def test_a_folder_is_empty_private_and_gone_when_its_block_ends(temporary: Path):
    with scratch("test") as folder:
        assert (folder.parent, folder.name[:10]) == (temporary, "ddpm-test-")
        assert (list(folder.iterdir()), folder.stat().st_mode & 0o777) == ([], 0o700)
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("x")
    assert names(temporary) == set()


def test_a_folder_is_gone_when_its_block_ends_in_an_error(temporary: Path):
    def fail() -> None:
        with scratch("test") as folder:
            (folder / "file").write_text("x")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert names(temporary) == set()


def test_a_folder_that_its_block_removed_is_no_error(temporary: Path):
    with scratch("test") as folder:
        folder.rmdir()
    assert names(temporary) == set()


def test_what_a_killed_owner_left_goes_with_the_next_folder_though_a_process_that_it_started_lives(temporary: Path, start_owner: Callable[[], Owner]):
    owner = start_owner()
    owner.kill()
    assert owner.child.is_running()
    assert (owner.folder / "deep" / "file").is_file()
    with scratch("test") as folder:
        assert names(temporary) == {folder.name, f"{folder.name}.lock"}
    assert owner.child.is_running()


def test_what_a_living_owner_has_stays_until_it_is_killed(temporary: Path, start_owner: Callable[[], Owner]):
    owner, other = start_owner(), start_owner()
    assert owner.folder != other.folder
    with scratch("test"):
        pass
    other.kill()
    with scratch("test"):
        assert (owner.folder / "deep" / "file").is_file()
        assert not other.folder.exists()
    assert names(temporary) == {owner.folder.name, f"{owner.folder.name}.lock"}


def test_what_was_left_for_another_purpose_stays(temporary: Path):
    left = [leave(temporary, name) for name in ("ddpm-other-0123456789abcdef", "ddpm-test-more-0123456789abcdef")]
    with scratch("test"):
        pass
    assert all((folder / "file").is_file() for folder in left)
    for purpose in ("other", "test-more"):
        with scratch(purpose):
            pass
    assert names(temporary) == set()


def test_what_a_killed_owner_left_is_shown_before_it_goes(temporary: Path):
    left, seen = leave(temporary, "ddpm-test-01234567"), []
    with scratch("test", salvage=lambda folder: seen.append((folder, (folder / "file").is_file()))):
        assert seen == [(left, True)]
    assert names(temporary) == set()


def test_a_salvage_that_fails_keeps_nothing(temporary: Path):
    leave(temporary, "ddpm-test-01234567")

    def fail(folder: Path) -> None:
        raise PermissionError(folder)

    with scratch("test", salvage=fail):
        pass
    assert names(temporary) == set()


def test_another_place_than_the_temporary_folder_is_swept_too(tmp_path: Path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    leave(elsewhere, "ddpm-test-01234567")
    with scratch("test", within=elsewhere) as folder:
        assert folder.parent == elsewhere
        assert [path.name for path in elsewhere.iterdir() if path.is_dir()] == [folder.name]
    assert names(elsewhere) == set()


def test_an_owner_that_was_killed_before_it_had_a_folder_leaves_nothing_for_good(temporary: Path):
    (temporary / "ddpm-test-0123456789abcdef.lock").touch()
    with scratch("test"):
        pass
    assert names(temporary) == set()


def test_a_sweep_just_before_a_lock_is_taken_does_not_leave_an_owner_without_one(temporary: Path, monkeypatch: pytest.MonkeyPatch):
    flock, swept = fcntl.flock, []

    def late(lock: int, how: int) -> None:
        if not swept:
            swept.append(True)
            with scratch("test"):
                pass
        flock(lock, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with scratch("test") as folder:
        assert swept
        assert names(temporary) == {folder.name, f"{folder.name}.lock"}
    assert names(temporary) == set()


def test_a_folder_without_a_lock_is_somebody_elses(temporary: Path):
    left = leave(temporary, "ddpm-test-0123456789abcdef")
    (temporary / f"{left.name}.lock").unlink()
    with scratch("test"):
        pass
    assert (left / "file").is_file()


@pytest.mark.parametrize("what", ["folder", "lock", "file in place of a folder", "folder in place of a lock"])
def test_links_and_what_has_the_wrong_kind_are_left_alone(temporary: Path, tmp_path_factory: pytest.TempPathFactory, what: str):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "file").write_text("kept")
    left, lock = leave(temporary, "ddpm-test-0123456789abcdef"), temporary / "ddpm-test-0123456789abcdef.lock"
    if what == "folder":
        (left / "file").unlink()
        left.rmdir()
        left.symlink_to(elsewhere)
    elif what == "lock":
        lock.unlink()
        lock.symlink_to(elsewhere / "file")
    elif what == "file in place of a folder":
        (left / "file").unlink()
        left.rmdir()
        left.write_text("kept")
    else:
        lock.unlink()
        lock.mkdir()
    before = names(temporary)
    with scratch("test"):
        pass
    assert names(temporary) == before
    assert (elsewhere / "file").read_text() == "kept"


def test_links_inside_a_left_folder_are_not_followed(temporary: Path, tmp_path_factory: pytest.TempPathFactory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "file").write_text("kept")
    (leave(temporary, "ddpm-test-0123456789abcdef") / "link").symlink_to(elsewhere)
    with scratch("test"):
        pass
    assert names(temporary) == set()
    assert (elsewhere / "file").read_text() == "kept"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make what belongs to another user")
@pytest.mark.parametrize("foreign", ["folder", "lock"])
def test_what_belongs_to_another_user_is_left_alone(temporary: Path, foreign: str):
    left = leave(temporary, "ddpm-test-0123456789abcdef")
    os.chown(left if foreign == "folder" else temporary / f"{left.name}.lock", 12345, 12345)
    with scratch("test"):
        pass
    assert (left / "file").is_file()


def test_many_at_once_keep_what_they_have(temporary: Path):
    def use(number: int) -> bool:
        with scratch("test") as folder:
            (folder / "file").write_text(str(number))
            with scratch("test") as other:
                return other.is_dir() and (folder / "file").read_text() == str(number)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(use, range(400)))
    assert names(temporary) == set()


@pytest.fixture
def plain_user(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder for temporary files of a process that is not root, for whom no folder is write-protected."""
    if os.geteuid():
        yield temporary
        return
    # Not below pytest's own folder, which nobody else may enter.
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        os.chown(folder, 12345, 12345)
        os.seteuid(12345)
        try:
            yield Path(folder)
        finally:
            os.seteuid(0)


def test_what_cannot_be_removed_stays_for_another_time_and_keeps_nobody_from_a_folder(plain_user: Path):
    left = leave(plain_user, "ddpm-test-0123456789abcdef")
    left.chmod(0o500)
    with scratch("test") as folder:
        assert folder.is_dir()
    assert names(plain_user) == {left.name, f"{left.name}.lock"}
    left.chmod(0o700)
    with scratch("test"):
        pass
    assert names(plain_user) == set()
