"""Copies of remote files on this machine, shared by its processes and bounded in size; what was used longest ago goes first."""

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ..errors import DataError
from ..storage import Location

Opened = TypeVar("Opened")
_LOCK = ".lock"
_ATTEMPTS = 3


@dataclass(frozen=True)
class ShardCache:
    """A folder of copies, named by the SHA-256 of their content.

    Attributes:
        limit_bytes: how much the folder may hold; one file is always kept.
    """

    folder: Path
    limit_bytes: int

    @classmethod
    def of(cls, folder: str | None = None, limit_bytes: int = 20 << 30) -> "ShardCache":
        """Returns copies in a folder; by default one below this machine's temporary folder, which the processes of a user share."""
        return cls(Path(folder).expanduser() if folder else Path(tempfile.gettempdir()) / f"ddpm-copies-{os.getuid()}", limit_bytes)

    def use(self, file: Location, sha256: str, open_file: Callable[[Path], Opened]) -> Opened:
        """Opens a file: itself where it lies on a file system, else its copy on this machine.

        Raises:
            DataError: if the file's content is not the one that was named.
        """
        if file.is_local:
            return open_file(file.path)
        for _ in range(_ATTEMPTS):
            # Another process may remove the copy before it is open; once open, removal does not matter.
            with suppress(FileNotFoundError):
                return open_file(self._fetch(file, sha256))
        raise DataError(f"the shard cache {self.folder} evicts copies before they are opened; set cluster.cache_bytes higher")

    def _fetch(self, file: Location, sha256: str) -> Path:
        self._make_folder()
        target = self.folder / sha256
        with (self.folder / f"{sha256}{_LOCK}").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.is_file() or _sha256(target) != sha256:
                self._copy(file, sha256, target)
            os.utime(target)
        self._evict(target)
        return target

    def _make_folder(self) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.folder.stat().st_uid != os.getuid():
            raise DataError(f"{self.folder} belongs to another user; set cluster.cache to a folder of this one")

    def _copy(self, file: Location, sha256: str, target: Path) -> None:
        staging = target.with_name(f"{sha256}.{os.getpid()}.tmp")
        for left in self.folder.glob(f"{sha256}.*.tmp"):
            left.unlink(missing_ok=True)
        try:
            file.download(staging)
            if _sha256(staging) != sha256:
                raise DataError(f"{file} does not match the checksum in its manifest; delete the dataset and run preprocess again")
            staging.replace(target)
        except OSError as error:
            raise DataError(f"{file} cannot be copied to {self.folder} ({error}); look whether it is there, and whether the disk is full") from error
        finally:
            staging.unlink(missing_ok=True)

    def _evict(self, keep: Path) -> None:
        with (self.folder / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            copies = sorted((path for path in self.folder.iterdir() if path.suffix == ""), key=_last_use)
            held = sum(map(_bytes, copies))
            for path in copies:
                if held <= self.limit_bytes:
                    return
                if path != keep and path.name != _LOCK:
                    held -= _bytes(path)
                    path.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _last_use(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
