"""What is left of a local Ray session: the logs of the last few, bounded, wherever the temporary folder is."""

import tempfile
from pathlib import Path

import pytest

from cluster.config import ClusterConfig
from cluster.connect import LONGEST_FOLDER
from components.storage import Location
from pipeline import ray_session as module
from pipeline.ray_session import KEPT_SESSIONS, keep_logs, logs_folder, ray_session

SESSION = "session_2026-11-26_16-17-0{}_052883_9767"


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "t"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(module, "LONGEST_FOLDER", 1000)
    return folder


def a_session(folder: Path, number: int = 0, **files: bytes) -> Path:
    """Writes what Ray writes: logs, one of them in a folder, beside sockets and a link to the session."""
    logs = folder / SESSION.format(number) / "logs"
    (logs / "train").mkdir(parents=True)
    for name, content in (files or {"raylet": b"started", "empty": b""}).items():
        (logs / f"{name}.out").write_bytes(content)
    (logs / "train" / "controller.log").write_bytes(b"controller")
    (folder / "session_latest").symlink_to(logs.parent)
    (folder / "run.txt").write_text("digits")
    return logs


def test_a_session_that_ends_leaves_its_logs_and_nothing_else(temporary: Path, tmp_path: Path):
    storage, told = Location.of(tmp_path / "storage"), list[str]()
    with ray_session(ClusterConfig(), storage, "digits", told.append):
        (folder,) = [path for path in temporary.iterdir() if path.is_dir()]
        a_session(folder)
    assert list(temporary.iterdir()) == []
    (kept,) = logs_folder(storage).iterdir()
    assert kept.name == "2026-11-26_16-17-00_052883_9767-digits"
    assert {str(file.relative_to(kept)): file.read_bytes() for file in kept.rglob("*") if file.is_file()} == {
        "raylet.out": b"started",
        "train/controller.log": b"controller",
    }
    assert told == []


def test_a_failure_names_the_logs_and_an_interruption_does_not(temporary: Path, tmp_path: Path):
    storage, told = Location.of(tmp_path / "storage"), list[str]()

    def fail(error: BaseException, number: int) -> None:
        with ray_session(ClusterConfig(), storage, "digits", told.append):
            a_session(next(path for path in temporary.iterdir() if path.is_dir()), number)
            raise error

    with pytest.raises(RuntimeError):
        fail(RuntimeError("workers failed"), 0)
    with pytest.raises(KeyboardInterrupt):
        fail(KeyboardInterrupt(), 1)
    assert told == [f"  Ray's logs are in {logs_folder(storage)}/2026-11-26_16-17-00_052883_9767-digits"]


def test_a_block_that_starts_no_ray_leaves_and_says_nothing(temporary: Path, tmp_path: Path):
    storage, told = Location.of(tmp_path / "storage"), list[str]()
    with pytest.raises(ValueError, match="no"), ray_session(ClusterConfig(), storage, "digits", told.append):
        raise ValueError("no")
    assert told == []
    assert not logs_folder(storage).exists()
    assert list(temporary.iterdir()) == []


def test_the_logs_of_a_run_that_was_killed_are_kept_by_the_next(temporary: Path, tmp_path: Path):
    storage = Location.of(tmp_path / "storage")
    left = temporary / "ddpm-ray-01234567"
    a_session(left)
    left.with_name(left.name + ".lock").touch()
    with ray_session(ClusterConfig(), storage, "another", print):
        assert not left.exists()
    assert [path.name for path in logs_folder(storage).iterdir()] == ["2026-11-26_16-17-00_052883_9767-digits"]


def test_only_the_last_few_sessions_stay(tmp_path: Path):
    kept = tmp_path / "kept"
    for number in range(KEPT_SESSIONS + 2):
        folder = tmp_path / str(number)
        a_session(folder, number)
        keep_logs(folder, kept)
    assert [path.name[:19] for path in sorted(kept.iterdir())] == [f"2026-11-26_16-17-0{number}" for number in range(2, KEPT_SESSIONS + 2)]


def test_of_a_long_log_the_end_stays_and_a_session_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "LAST_BYTES", 4)
    monkeypatch.setattr(module, "KEPT_BYTES", 11)
    a_session(tmp_path, a=b"12", b=b"123456", c=b"12345678", d=b"123456789")
    copy = keep_logs(tmp_path, tmp_path / "kept")
    assert copy is not None
    assert {file.name: file.read_bytes() for file in copy.iterdir() if file.is_file()} == {"a.out": b"12", "b.out": b"3456", "c.out": b"5678"}


def test_a_temporary_folder_whose_name_leaves_no_room_for_sockets_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    short = Path("/var/tmp")
    for temporary, used in ((short, short), (tmp_path / ("x" * LONGEST_FOLDER), Path("/tmp"))):
        monkeypatch.setattr(tempfile, "tempdir", str(temporary))
        assert module._within() == used


def test_logs_of_runs_whose_storage_is_remote_lie_in_the_temporary_folder(temporary: Path):
    assert logs_folder(Location.of("s3://bucket/team")).parent == temporary
