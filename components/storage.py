"""Files and folders by address, on a file system or on S3, with the same few operations on both.

On S3 the credentials and the endpoint come from the usual AWS_* variables. A file appears whole or not at all on both: it is moved into
place on a file system, and an S3 object exists once its upload is complete.
"""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import DataError
from .names import why_no_path
from .scratch import scratch

if TYPE_CHECKING:
    from pyarrow import NativeFile
    from pyarrow.fs import FileInfo, FileSystem

_REMOTE = "s3://"
TEMPORARY = ".tmp"


@dataclass(frozen=True, order=True)
class Location:
    """A file or folder.

    Attributes:
        uri: an absolute path, or s3://BUCKET/KEY; no slash at the end.
    """

    uri: str

    @classmethod
    def of(cls, address: str | Path) -> "Location":
        """Returns the location that a person wrote: `~` and relative paths are resolved against this machine and folder.

        Raises:
            DataError: if no file system can hold it.
        """
        text = str(address)
        if wrong := why_no_path(text):
            raise DataError(f"{text} {wrong}", "no_path")
        return cls(text.rstrip("/")) if text.startswith(_REMOTE) else cls(str(Path(text).expanduser().absolute()))

    def __str__(self) -> str:
        return self.uri

    def __truediv__(self, name: str) -> "Location":
        return Location(f"{self.uri.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.uri.rpartition("/")[2]

    @property
    def parent(self) -> "Location":
        """The folder that holds it."""
        return Location(self.uri.rpartition("/")[0] or "/")

    @property
    def is_local(self) -> bool:
        """Whether this is a path on a file system."""
        return not self.uri.startswith(_REMOTE)

    @property
    def path(self) -> Path:
        """The path of a local location.

        Raises:
            ValueError: if it is on S3.
        """
        if not self.is_local:
            raise ValueError(f"{self.uri} is not on a file system")
        return Path(self.uri)

    def read_bytes(self) -> bytes:
        """Returns the content of a file. Raises OSError if it cannot be read, FileNotFoundError if it is not there."""
        if self.is_local:
            return self.path.read_bytes()
        with self._system.open_input_file(self._key) as file:
            return file.read()

    def open(self) -> "NativeFile":
        """Returns a file to read any part of, without the rest. Raises like `read_bytes`."""
        if not self.is_local:
            return self._system.open_input_file(self._key)
        import pyarrow as pa

        return pa.memory_map(os.fsencode(self.uri))

    def read_text(self) -> str:
        """Returns the content of a UTF-8 file; raises like `read_bytes`."""
        return self.read_bytes().decode("utf-8")

    def write_bytes(self, content: bytes | memoryview, *, staging: "Location | None" = None) -> None:
        """Writes a file atomically, its folder made if need be. Raises OSError if it cannot be written.

        Args:
            staging: folder on the same file system for the file while it is written; its own folder by default.
        """
        if self.is_local:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.staged(staging) as path:
                path.write_bytes(content)
            return
        with self._system.open_output_stream(self._key) as file:
            file.write(content)

    def write_text(self, text: str, *, staging: "Location | None" = None) -> None:
        """Writes a UTF-8 file atomically; takes and raises what `write_bytes` does."""
        self.write_bytes(text.encode("utf-8"), staging=staging)

    @contextlib.contextmanager
    def staged(self, within: "Location | None" = None) -> Iterator[Path]:
        """Gives a block a local file to write, which becomes this file, flushed to disk, when the block ends well.

        Args:
            within: folder for the file until then; by default its own. A file on S3 is written in a temporary one of this machine.
        """
        if not self.is_local:
            with scratch("upload") as scratched:
                yield scratched / self.name
                self._upload(scratched / self.name)
            return
        folder = (within or self.parent).path
        folder.mkdir(parents=True, exist_ok=True)
        staging = folder / f".{self.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}{TEMPORARY}"
        try:
            yield staging
            with staging.open("rb") as file:
                os.fsync(file.fileno())
            staging.replace(self.path)
        finally:
            staging.unlink(missing_ok=True)

    def is_file(self) -> bool:
        """Tells whether a file is there."""
        return self.path.is_file() if self.is_local else self._info().is_file

    def size(self) -> int:
        """Returns a file's bytes, -1 where there is no file."""
        if self.is_local:
            return self.path.stat().st_size if self.path.is_file() else -1
        info = self._info()
        return info.size if info.is_file else -1

    def modified(self) -> float:
        """Returns when a file was last written, seconds since 1970; 0 where there is no file."""
        if self.is_local:
            return self.path.stat().st_mtime if self.path.is_file() else 0.0
        written = self._info().mtime
        return written.timestamp() if written else 0.0

    def files(self) -> dict[str, int]:
        """Returns the files that lie directly in a folder, name -> bytes, sorted by name; none where there is no folder."""
        if self.is_local:
            return {name: size for name, size, is_folder in self._scan() if not is_folder and not name.endswith(TEMPORARY)}
        return {info.base_name: info.size for info in self._children() if info.is_file}

    def folders(self) -> list[str]:
        """Returns the names of the folders that lie directly in a folder, sorted; none where there is no folder."""
        if self.is_local:
            return [name for name, _, is_folder in self._scan() if is_folder and not name.endswith(TEMPORARY)]
        return [info.base_name for info in self._children() if not info.is_file]

    def tree(self) -> "list[tuple[str, int, float]]":
        """Returns all files below a folder, temporary ones too: address below it, bytes, when written in seconds since 1970; none where there is no folder."""
        if self.is_local:
            return sorted(_files_below(self.uri, ""))
        from pyarrow.fs import FileSelector

        found = self._system.get_file_info(FileSelector(self._key, allow_not_found=True, recursive=True))
        first = len(self._key) + 1
        return sorted((info.path[first:], info.size, info.mtime.timestamp() if info.mtime else 0.0) for info in found if info.is_file)

    def remove(self) -> None:
        """Removes a file, or nothing where there is none."""
        if self.is_local:
            self.path.unlink(missing_ok=True)
        else:
            with contextlib.suppress(FileNotFoundError):
                self._system.delete_file(self._key)

    def remove_tree(self) -> None:
        """Removes a folder with all it holds, or nothing where there is none."""
        if self.is_local:
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            with contextlib.suppress(FileNotFoundError):
                self._system.delete_dir(self._key)

    def rename(self, target: "Location") -> None:
        """Moves a folder: in one step on a file system; on S3 file by file, for there is no other way."""
        if self.is_local:
            self.path.rename(target.path)
            return
        with self.local_copy() as copy:
            target.upload(copy)
        self.remove_tree()

    def upload(self, folder: Path, last: str = "") -> None:
        """Copies the files of a local folder, its subfolders too, into this one.

        Args:
            last: the file that goes last, because it says that the others are there.
        """
        names = sorted((str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()), key=lambda name: (name == last, name))
        for name in names:
            target = self / name
            if target.is_local:
                with target.staged() as staging:
                    shutil.copyfile(folder / name, staging)
            else:
                target._upload(folder / name)

    def download(self, target: Path) -> None:
        """Copies a file to a local one. Raises OSError if it cannot be read."""
        if self.is_local:
            shutil.copyfile(self.path, target)
            return
        with self._system.open_input_stream(self._key) as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy, 4 << 20)

    @contextlib.contextmanager
    def local_copy(self, only: Sequence[str] | None = None) -> Iterator[Path]:
        """Gives a block this folder as a local one: itself on a file system, else a copy that lives as long as the block.

        Args:
            only: names of the files that are needed, subfolders excluded; all, with subfolders, by default.
        """
        if self.is_local:
            yield self.path
            return
        with scratch("copy") as copy:
            self._download_tree(copy, only)
            yield copy

    def _download_tree(self, target: Path, only: Sequence[str] | None) -> None:
        target.mkdir(parents=True, exist_ok=True)
        for name in self.files() if only is None else only:
            (self / name).download(target / name)
        for name in self.folders() if only is None else ():
            (self / name)._download_tree(target / name, None)

    def _upload(self, file: Path) -> None:
        try:
            with file.open("rb") as source, self._system.open_output_stream(self._key) as copy:
                shutil.copyfileobj(source, copy, 8 << 20)
        except BaseException:
            # Leaving the block closes the stream, which completes the object with what had been written so far.
            with contextlib.suppress(OSError):
                self.remove()
            raise

    def _scan(self) -> list[tuple[str, int, bool]]:
        try:
            with os.scandir(self.path) as entries:
                return sorted((entry.name, 0 if entry.is_dir() else entry.stat().st_size, entry.is_dir()) for entry in entries if _still_there(entry))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _children(self) -> "list[FileInfo]":
        from pyarrow.fs import FileSelector

        found = self._system.get_file_info(FileSelector(self._key, allow_not_found=True))
        return sorted(found, key=lambda info: info.base_name)

    def _info(self) -> "FileInfo":
        return self._system.get_file_info(self._key)

    @property
    def _key(self) -> str:
        return self.uri.removeprefix(_REMOTE)

    @property
    def _system(self) -> "FileSystem":
        return _file_system(self._key.split("/", 1)[0], os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"))


def _files_below(folder: str, prefix: str) -> Iterator[tuple[str, int, float]]:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _files_below(entry.path, f"{prefix}{entry.name}/")
            else:
                with contextlib.suppress(FileNotFoundError):
                    known = entry.stat(follow_symlinks=False)
                    yield prefix + entry.name, known.st_size, known.st_mtime


def _still_there(entry: "os.DirEntry[str]") -> bool:
    try:
        entry.stat()
    except OSError:
        return False
    return True


@lru_cache(maxsize=16)
def _file_system(bucket: str, endpoint: str | None) -> "FileSystem":
    """Returns the file system of a bucket at an endpoint, which `from_uri`, unlike the constructor, takes from the environment itself."""
    from pyarrow.fs import FileSystem

    return FileSystem.from_uri(f"{_REMOTE}{bucket}")[0]
