"""Temporary folders that go with their owner: what a killed process leaves is removed when the next folder for the same purpose is made.

TMPDIR/ddpm-PURPOSE-01234567         the folder
TMPDIR/ddpm-PURPOSE-01234567.lock    locked by its owner, whatever ends the owner ends the lock

The lock is there before the folder and goes after it, so a folder beside which there is none is not from here and is left alone.
"""

import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX, _LOCK, _NAME_BYTES = "ddpm-", ".lock", 4  # short, for Ray puts sockets below such a folder, whose names have a limit
_TOKEN = re.compile(r"[0-9a-f]{8,16}")  # earlier versions had 16


@contextmanager
def scratch(purpose: str, *, within: Path | None = None, salvage: Callable[[Path], object] = lambda folder: None) -> Iterator[Path]:
    """Gives a block an empty folder that only this user may read, and removes it when the block ends.

    Args:
        purpose: what it is for, part of its name; left ones of the same purpose and the same user are removed first.
        within: where it is made; the temporary folder by default.
        salvage: is given each left one before it is removed.

    Raises:
        OSError: if no folder can be made; that a left one cannot be removed is none.
    """
    within = within or Path(tempfile.gettempdir())
    with suppress(OSError):
        _sweep(within, purpose, salvage)
    folder, lock = _claim(within, purpose)
    try:
        folder.mkdir(mode=0o700)
        yield folder
    finally:
        _remove(folder)
        os.close(lock)


def _claim(within: Path, purpose: str) -> tuple[Path, int]:
    """Returns a folder that is still to be made, and the descriptor that holds its lock; programs that are started do not inherit it."""
    while True:
        folder = within / f"{_PREFIX}{purpose}-{secrets.token_hex(_NAME_BYTES)}"
        try:
            lock = os.open(_lock_of(folder), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            continue
        # A sweep that came between the two has the lock, or has removed it.
        if _take(lock, _lock_of(folder)):
            return folder, lock
        os.close(lock)


def _sweep(within: Path, purpose: str, salvage: Callable[[Path], object]) -> None:
    """Removes the folders whose owners are gone, as far as that is possible."""
    for file in within.glob(f"{_PREFIX}{purpose}-*{_LOCK}"):
        if _TOKEN.fullmatch(file.name.removeprefix(f"{_PREFIX}{purpose}-").removesuffix(_LOCK)):  # else it is of a purpose that begins alike
            with suppress(OSError):
                _remove_left(file.with_suffix(""), salvage)


def _remove_left(folder: Path, salvage: Callable[[Path], object]) -> None:
    lock = os.open(_lock_of(folder), os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if _is_mine(os.fstat(lock), stat.S_IFREG) and _take(lock, _lock_of(folder)) and _may_go(folder):
            with suppress(OSError):
                salvage(folder)
            _remove(folder)
    finally:
        os.close(lock)


def _take(lock: int, file: Path) -> bool:
    """Locks an open file unless another holds it, and tells whether the file under that name is locked by this now."""
    import fcntl  # a registered model brings this file along, and is loaded on Windows too, where this is not

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(lock), os.lstat(file))
    except (BlockingIOError, FileNotFoundError):
        return False


def _may_go(folder: Path) -> bool:
    """Tells whether what stands beside a lock is a folder of this user, or nothing: its owner may have been killed before it was made."""
    try:
        return _is_mine(os.lstat(folder), stat.S_IFDIR)
    except FileNotFoundError:
        return True


def _is_mine(found: os.stat_result, kind: int) -> bool:
    return stat.S_IFMT(found.st_mode) == kind and found.st_uid == os.geteuid()


def _remove(folder: Path) -> None:
    """Removes a folder, then its lock; the lock stays where the folder does, and the next sweep tries again."""
    shutil.rmtree(folder, ignore_errors=True)
    if not os.path.lexists(folder):
        _lock_of(folder).unlink(missing_ok=True)


def _lock_of(folder: Path) -> Path:
    return folder.with_name(folder.name + _LOCK)
