"""Image files below a folder or an S3 prefix: one walk that finds them and names all that it passes over, and one way to read them."""

import errno
import heapq
import os
import re
import socket
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

from ..counts import counted
from ..errors import DataError
from ..storage import Location
from .listing import UNSEEN, Item, Listing, ListingBuilder, label_of, printable

JPEG_2000 = frozenset([".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"])
NETPBM = frozenset([".ppm", ".pgm", ".pbm", ".pnm"])
SUFFIXES = JPEG_2000 | NETPBM | {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".avif", ".avifs"}
# Images of formats that are not read: they are listed all the same, so that each gets its line in the quarantine.
UNREAD_SUFFIXES = frozenset([".heic", ".heif", ".jxl", ".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".rw2", ".raf", ".psd", ".pfm"])
IMAGES = SUFFIXES | UNREAD_SUFFIXES
PARQUET = ".parquet"
SEEN = "linked folder, seen already"
NAMED_LIKE_AN_IMAGE = "folder named like an image"
PASSING = re.compile(r"AWS Error (UNKNOWN|NETWORK|SLOW|THROTTL|INTERNAL|SERVICE_UNAVAIL|REQUEST_TIME)")
PAGE_KEYS = 1000  # the most that S3 gives
PAUSES_S = (1.0, 5.0)  # Arrow has tried for six seconds by itself before the first of them
Result = TypeVar("Result")


@dataclass
class Found:
    """What a walk over a folder came by.

    Attributes:
        images: files with the suffix of an image.
        parquets: parquet files.
        unlisted: folders that could not be listed.
        ignored: what was passed over, by suffix or kind.
    """

    images: ListingBuilder = field(default_factory=ListingBuilder)
    parquets: list[Item] = field(default_factory=list)
    unlisted: list[Item] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)

    @property
    def num_listed(self) -> int:
        """Files so far that are images or parquet by their names."""
        return len(self.images) + len(self.parquets)

    def wants(self, name: str) -> bool:
        """Tells by its name whether a file is one to list, and counts it if it is not."""
        if name.startswith("."):
            self.ignored["hidden file"] += 1
            return False
        suffix = _suffix(name)
        if suffix not in IMAGES and suffix != PARQUET:
            self.ignored[printable(suffix) or "no suffix"] += 1
            return False
        return True

    def add(self, item: Item) -> None:
        """Takes a file in whose name was wanted."""
        if _suffix(item.path) == PARQUET:
            self.parquets.append(item)
        else:
            self.images.add(item)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


@dataclass(frozen=True)
class FolderSource:
    """Image files below a folder, recursively; the first folder level is the label.

    Attributes:
        root: an absolute path, or s3://BUCKET/PREFIX.
    """

    root: str

    @property
    def is_remote(self) -> bool:
        return not Location(self.root).is_local

    def listing(self) -> Listing:
        return self.listing_of(walk(Location(self.root)))

    def listing_of(self, found: Found) -> Listing:
        """Returns the listing that follows from a walk, which it uses up. Raises DataError if there are no images."""
        ignored = found.ignored + Counter({PARQUET: len(found.parquets)})
        for folder in found.unlisted:
            found.images.add(folder)
        if not len(found.images):
            other = counted(ignored.total(), "other file") if ignored else "nothing"
            raise DataError(f"data.source={self.root} holds no images but {other}; name a folder with .jpg, .png, .webp ... files")
        return found.images.build(ignored)

    def open(self) -> None:
        check_there(self.root)

    def fetch(self, path: str) -> bytes:
        try:
            return patiently((Location(self.root) / path).read_bytes) if self.is_remote else _read_file(f"{self.root}/{path}")
        except (OSError, ValueError) as error:
            raise DataError(why_unreadable(error), "unreadable") from error


def _read_file(path: str) -> bytes:
    # Without O_NONBLOCK the mere opening of a FIFO waits for someone to write to it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "no regular file")
        content = os.read(descriptor, status.st_size + 1)
        if len(content) == status.st_size:
            return content
        with open(descriptor, "rb", closefd=False) as file:  # it grows, or is larger than one read may be
            return content + file.read()
    finally:
        os.close(descriptor)


def patiently(read: Callable[[], Result]) -> Result:
    """Returns what a read from S3 returns, tried again after errors that may pass. Raises OSError or ValueError as the read does."""
    for pause in PAUSES_S:
        try:
            return read()
        except OSError as error:
            if not PASSING.search(str(error)):
                raise
        time.sleep(pause)
    return read()


def why_unreadable(error: Exception) -> str:
    """Returns an error's kind and meaning, the same words each time: without addresses, ports and request numbers."""
    name = type(error).__name__
    if isinstance(error, OSError) and error.errno is not None:
        known = error.errno != errno.EINVAL
        return f"{name}: {os.strerror(error.errno) if known else error.strerror}"
    answer = re.search(r"AWS Error [A-Z_]+( \(HTTP status \d+\))?", str(error))
    return f"{name}: {answer.group() if answer else error}"[:200]


def check_there(root: str) -> None:
    """Makes sure that this machine sees a source's folder or prefix.

    Raises:
        DataError: if it does not.
    """
    if not Location(root).is_local:
        _reach(root)
    elif not os.path.isdir(root):
        raise DataError(f"data.source={root} is not there on {socket.gethostname()}; every machine of the run needs it at the same path")


@lru_cache(maxsize=4)
def _reach(root: str) -> None:
    if not any(page.get("KeyCount") for page in _pages(Location(root), 1)):
        raise DataError(f"data.source={root} holds nothing as seen from {socket.gethostname()}; name a bucket and prefix that are there")


def walk(root: Location, found: Found | None = None) -> Found:
    """Lists a folder or S3 prefix with all below it, once.

    Args:
        found: what it adds to, for whoever wants to see how far it is.

    Raises:
        DataError: if the root itself cannot be listed.
    """
    found = Found() if found is None else found
    return _walk_disk(str(root.path), found) if root.is_local else _walk_bucket(root, found)


def _walk_disk(root: str, found: Found) -> Found:
    """Lists each folder once, as reached over the fewest links, and among those by the first path in the order of bytes."""
    seen = set[tuple[int, int]]()
    # What a folder leads to sorts behind it, so the first path that comes up for a folder is the one to take.
    folders = [(0, b"", "")]
    while folders:
        links, _, path = heapq.heappop(folders)
        try:
            status = os.stat(os.path.join(root, path))
            if (status.st_dev, status.st_ino) in seen:
                found.ignored[SEEN] += 1
                continue
            seen.add((status.st_dev, status.st_ino))
            for name, is_link in _scan(root, path, found):
                heapq.heappush(folders, (links + is_link, os.fsencode(name), name))
        except OSError as error:
            if not path:
                raise DataError(f"data.source={root} cannot be listed ({error.strerror}); give read permission") from error
            found.unlisted.append(Item(path, label_of(path), -1, UNSEEN))
    return found


def _scan(root: str, folder: str, found: Found) -> list[tuple[str, bool]]:
    """Takes in the files of one folder; returns its subfolders, and of each whether it is a link. Raises OSError if it cannot be listed."""
    below: list[tuple[str, bool]] = []
    with os.scandir(os.path.join(root, folder)) as entries:
        for entry in entries:
            path = f"{folder}/{entry.name}" if folder else entry.name
            if _is_folder(entry):
                hidden = entry.name.startswith(".")
                found.ignored["hidden folder"] += hidden
                found.ignored[NAMED_LIKE_AN_IMAGE] += not hidden and _suffix(entry.name) in IMAGES
                below += [] if hidden else [(path, entry.is_symlink())]
            elif found.wants(entry.name):
                found.add(_look(entry, path))
    return below


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _look(entry: "os.DirEntry[str]", path: str) -> Item:
    try:
        status = entry.stat()
    except OSError:
        return Item(path, label_of(path), -1, UNSEEN)
    if not stat.S_ISREG(status.st_mode):
        return Item(path, label_of(path), -1, UNSEEN)
    stamp = str(status.st_mtime_ns) if os.access(entry.path, os.R_OK) else UNSEEN
    return Item(path, label_of(path), status.st_size, stamp)


def _walk_bucket(root: Location, found: Found) -> Found:
    count, hidden = 0, ""
    prefix = _prefix(root)[1]
    for page in _pages(root, PAGE_KEYS):
        for entry in page.get("Contents", ()):
            count += 1
            path = entry["Key"][len(prefix) :]
            folder = _hidden_folder(path)
            # Keys come in the order of their bytes, so those of one folder follow each other.
            found.ignored["hidden folder"] += bool(folder) and folder != hidden
            hidden = folder or hidden
            if path.endswith("/") or not path:
                found.ignored["folder marker"] += 1
            elif not folder and found.wants(path.rpartition("/")[2]):
                found.add(Item(path, label_of(path), entry["Size"], entry["ETag"].strip('"')))
    if not count:
        raise DataError(f"data.source={root} does not exist; name a bucket and prefix that are there, as s3://BUCKET/PREFIX")
    return found


def _hidden_folder(path: str) -> str:
    """Returns the first hidden folder that a key lies in, empty where there is none."""
    parts = path.split("/")[:-1] if "/." in path or path.startswith(".") else []
    first = next((depth for depth, part in enumerate(parts) if part.startswith(".")), None)
    return "" if first is None else "/".join(parts[: first + 1])


def _prefix(root: Location) -> tuple[str, str]:
    bucket, _, folder = root.uri.partition("://")[2].partition("/")
    return bucket, f"{folder}/" if folder else ""


def _pages(root: Location, page_keys: int) -> Iterator[dict[str, Any]]:
    """Yields the answers of S3 to a listing of a prefix, each of at most so many keys.

    Raises:
        DataError: if S3 cannot be reached or refuses.
    """
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, prefix = _prefix(root)
    try:
        client = boto3.client("s3", config=Config(retries={"mode": "standard", "max_attempts": 6}))
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, PaginationConfig={"PageSize": page_keys})
        yield from pages
    except (BotoCoreError, ClientError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"data.source={root} cannot be listed ({reason}); name a bucket and prefix that are there, "
            "and look at the AWS_* credentials, their permission to list, and AWS_ENDPOINT_URL"
        ) from error
