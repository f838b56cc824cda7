"""A local run's Ray: its session lies in a temporary folder that goes with the run, and of it the logs stay a while, for questions."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.markup import escape

from cluster.config import ClusterConfig
from cluster.connect import LONGEST_FOLDER, disconnecting, is_actor, session_in
from components.scratch import scratch
from components.storage import Location

LOGS = "ray-logs"
KEPT_SESSIONS, KEPT_BYTES, LAST_BYTES = 5, 16 << 20, 1 << 20
"""How many sessions' logs stay, how much of each, and how much of one file, its end."""
_RUN, _ROOM = "run.txt", len("/ddpm-ray-01234567")


@contextmanager
def ray_session(config: ClusterConfig, storage: Location, name: str, report: Callable[[str], None]) -> Iterator[None]:
    """Disconnects from Ray after a block; of one that the block started on this machine only its logs stay, `KEPT_SESSIONS` of them.

    In an actor, such as one that trains a sweep's trials, Ray belongs to whoever made the actor, and the block uses it as it is.

    Args:
        name: of the run, part of the logs' name.
        tell: is given a line that says where the logs are, where the block fails.
    """
    if is_actor():
        yield
        return
    if config.address != "local":
        with disconnecting():
            yield
        return
    kept = logs_folder(storage)
    with scratch("ray", within=_within(), salvage=lambda folder: keep_logs(folder, kept)) as folder:
        (folder / _RUN).write_text(name, encoding="utf-8")
        try:
            with session_in(folder), disconnecting():
                yield
        except BaseException as error:
            logs = _try_to_keep(folder, kept)
            if logs is not None and not isinstance(error, KeyboardInterrupt):
                report(f"  Ray's logs are in {escape(str(logs))}")
            raise
        _try_to_keep(folder, kept)


def logs_folder(storage: Location) -> Path:
    """Returns where the logs of the last sessions stay: below a storage root on this machine, else in the temporary folder."""
    return (storage / LOGS).path if storage.is_local else Path(tempfile.gettempdir()) / f"ddpm-{LOGS}-{os.getuid()}"


def _within() -> Path:
    """Returns the temporary folder, or the one that every system has where its name leaves no room for those of sockets."""
    temporary = tempfile.gettempdir()
    return Path(temporary if len(os.fsencode(temporary)) + _ROOM <= LONGEST_FOLDER else "/tmp")


def _try_to_keep(folder: Path, kept: Path) -> Path | None:
    with suppress(OSError):
        return keep_logs(folder, kept)
    return None


def keep_logs(folder: Path, kept: Path) -> Path | None:
    """Copies the logs of a session that lies in a folder, removes those of the oldest sessions, and returns where the copies are; None without a session."""
    logs = next(folder.glob("session_[0-9]*/logs"), None)
    if logs is None:
        return None
    session = logs.parent.name.removeprefix("session_")
    copy = kept / f"{session}-{(folder / _RUN).read_text(encoding='utf-8')}"
    room = KEPT_BYTES
    for file in sorted(filter(Path.is_file, logs.rglob("*")), key=lambda file: file.stat().st_size):
        content = _end_of(file)
        if content and len(content) <= room:
            room -= len(content)
            target = copy / file.relative_to(logs)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    for old in sorted(kept.iterdir())[:-KEPT_SESSIONS]:
        shutil.rmtree(old, ignore_errors=True)
    return copy


def _end_of(file: Path) -> bytes:
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - LAST_BYTES))
        return stream.read(LAST_BYTES)
