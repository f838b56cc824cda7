"""Where images come from: a folder of files, parquet with image bytes, a torchvision dataset, or the built-in digits.

A source lists its images in a fixed order and fetches any one of them; it is small, so that it travels to every worker.
"""

import fcntl
import hashlib
import json
import os
import socket
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from ..errors import DataError
from .images import Mode

SUFFIXES = frozenset([".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm", ".pgm", ".jp2"])
TORCHVISION = {"cifar10": "CIFAR10", "mnist": "MNIST", "fashion-mnist": "FashionMNIST", "celeba": "CelebA"}


class DataConfig(BaseModel):
    """Which images, and what becomes of them."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    source: str = Field("digits", min_length=1)
    """A folder of images, a folder of parquet files with an image column, or one of `digits`, `cifar10`, `mnist`, `fashion-mnist`, `celeba`."""
    root: str | None = Field(None, json_schema_extra={"result": False})
    """Folder where torchvision datasets lie or are downloaded to; by default `downloads` below the storage root."""
    image_size: int = Field(32, ge=4, le=1024)
    """Height and width of every image after cropping and resizing, pixels."""
    mode: Mode = "RGB"
    """`RGB` or `L` (grey)."""
    image_column: str | None = None
    """Column of a parquet source that holds the images; by default the only one of type struct<bytes, path>."""
    label_column: str = "label"
    """Column of a parquet source that holds the labels, if it is there."""
    max_bad_fraction: float = Field(0.05, ge=0.0, le=1.0)
    """Largest share of images that may be quarantined before the stage stops."""
    shard_bytes: int = Field(16 << 20, ge=1 << 10)
    """Pixels per shard, bytes, approximately."""


class Item(NamedTuple):
    """One image of a source.

    Attributes:
        path: its name within the source, unique.
        label: class name, None without one.
        size: encoded bytes, -1 where that is not known.
        stamp: changes when the image may have changed.
    """

    path: str
    label: str | None
    size: int
    stamp: str


@dataclass(frozen=True)
class Listing:
    """The images of a source in a fixed order, and what was passed over.

    Attributes:
        ignored: files that are no images by their name, by suffix.
    """

    items: list[Item]
    ignored: Mapping[str, int]

    def digest(self) -> str:
        """Returns a digest that changes when an image is added, removed, renamed, relabelled or rewritten."""
        state = hashlib.sha256()
        for item in self.items:
            state.update(json.dumps(item).encode())
        return state.hexdigest()


class Source(Protocol):
    """A place that images come from."""

    def listing(self) -> Listing:
        """Returns every image, sorted. Raises DataError if there is none."""
        ...

    def open(self) -> None:
        """Makes sure that this machine has the source. Raises DataError if it has not: that is no fault of any image."""
        ...

    def fetch(self, path: str) -> bytes | np.ndarray:
        """Returns an image's encoded bytes, or uint8 values (H, W) or (H, W, 3). Raises DataError if it cannot be read."""
        ...


@dataclass(frozen=True)
class FolderSource:
    """Image files below a folder, recursively; the first folder level is the label."""

    root: str

    def listing(self) -> Listing:
        ignored: Counter[str] = Counter()
        items = sorted(self._items(ignored))
        if not items:
            found = f"{sum(ignored.values())} other files" if ignored else "nothing"
            raise DataError(f"data.source={self.root} holds no images but {found}; name a folder with {', '.join(sorted(SUFFIXES)[:6])} ... files")
        return Listing(items, dict(sorted(ignored.items())))

    def _items(self, ignored: Counter[str]) -> Iterator[Item]:
        for folder, folders, names in os.walk(self.root, onerror=_raise_unreadable):
            ignored.update({"hidden folder": sum(name.startswith(".") for name in folders)})
            ignored.update({"linked folder": sum(os.path.islink(os.path.join(folder, name)) for name in folders)})
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in names:
                suffix = os.path.splitext(name)[1].lower()
                if name.startswith(".") or suffix not in SUFFIXES:
                    ignored["hidden file" if name.startswith(".") else suffix or "no suffix"] += 1
                    continue
                yield self._item(os.path.join(folder, name))
        ignored += Counter()

    def _item(self, file: str) -> Item:
        path = os.path.relpath(file, self.root).replace(os.sep, "/")
        label = path.split("/", 1)[0] if "/" in path else None
        try:
            status = os.stat(file)
            return Item(path, label, status.st_size, str(status.st_mtime_ns))
        except OSError:
            return Item(path, label, -1, "")

    def open(self) -> None:
        _check_folder(self.root)

    def fetch(self, path: str) -> bytes:
        try:
            return (Path(self.root) / path).read_bytes()
        except OSError as error:
            raise DataError(f"{type(error).__name__}: {error.strerror}", "unreadable") from error


def _check_folder(root: str) -> None:
    if not os.path.isdir(root):
        raise DataError(f"data.source={root} is not there on {socket.gethostname()}; every machine of the run needs it at the same path")


def printable(path: str) -> str:
    """Returns a file name as text: bytes that are not UTF-8 are escaped in hexadecimal."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _raise_unreadable(error: OSError) -> None:
    raise DataError(f"data.source: folder {error.filename} cannot be listed ({error.strerror}); give read permission or move it away")


@dataclass(frozen=True)
class ParquetSource:
    """Parquet files with encoded images in a column, as dataset hubs export them: `image: struct<bytes, path>`, `label`."""

    root: str
    image_column: str | None
    label_column: str

    def listing(self) -> Listing:
        items: list[Item] = []
        for file in sorted(Path(self.root).rglob("*.parquet")):
            items += self._items_of(file, file.relative_to(self.root).as_posix())
        if not items:
            raise DataError(f"data.source={self.root} holds parquet files without rows; name a folder whose files have images")
        return Listing(items, {})

    def _items_of(self, file: Path, name: str) -> list[Item]:
        try:
            parquet = pq.ParquetFile(file)
            image_column(parquet.schema_arrow, self.image_column, name)
            labels = self._labels(parquet)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"data.source: {file} is not a readable parquet file ({error}); restore or remove it") from error
        status = file.stat()
        stamp = f"{status.st_size}:{status.st_mtime_ns}"
        return [Item(f"{name}#{row}", label, -1, stamp) for row, label in enumerate(labels)]

    def _labels(self, parquet: pq.ParquetFile) -> list[str | None]:
        if self.label_column not in parquet.schema_arrow.names:
            return [None] * parquet.metadata.num_rows
        values = parquet.read(columns=[self.label_column]).column(0).to_pylist()
        names = _class_names(parquet.schema_arrow, self.label_column)
        return [None if value in (None, "") else names.get(value, str(value)) if isinstance(value, int) else str(value) for value in values]

    def open(self) -> None:
        _check_folder(self.root)

    def fetch(self, path: str) -> bytes:
        name, _, row = path.rpartition("#")
        try:
            value = _parquet_row(str(Path(self.root) / name), self.image_column, int(row))
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{type(error).__name__}: {error}"[:200], "unreadable") from error
        value = value["bytes"] if isinstance(value, dict) else value
        if not isinstance(value, bytes):
            raise DataError("the row has no image bytes", "unreadable")
        return value


def image_column(schema: pa.Schema, wanted: str | None, name: str) -> str:
    """Returns the name of the column that holds images.

    Raises:
        DataError: if it is not there, is of another type, or is not the only candidate.
    """
    candidates = [field.name for field in schema if _holds_images(field.type, named=field.name == wanted)]
    if wanted is not None:
        if wanted not in candidates:
            raise DataError(f"data.image_column={wanted} is no image column of {name}; use one of struct<bytes, path> or binary among {schema.names}")
        return wanted
    if len(candidates) != 1:
        raise DataError(f"{name} has {len(candidates)} columns of type struct<bytes, path> among {schema.names}; set data.image_column to the right one")
    return candidates[0]


def _holds_images(kind: pa.DataType, *, named: bool) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return named and (pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _class_names(schema: pa.Schema, column: str) -> dict[int, str]:
    metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = metadata.get("info", {}).get("features", {}).get(column, {})
    return dict(enumerate(feature.get("names", []))) if isinstance(feature, dict) else {}


@lru_cache(maxsize=4)
def _parquet_file(file: str, wanted: str | None) -> tuple[pq.ParquetFile, str, np.ndarray]:
    parquet = pq.ParquetFile(file, memory_map=True)
    ends = np.cumsum([parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)])
    return parquet, image_column(parquet.schema_arrow, wanted, file), ends


@lru_cache(maxsize=2)
def _parquet_group(file: str, wanted: str | None, group: int) -> pa.ChunkedArray:
    parquet, column, _ = _parquet_file(file, wanted)
    return parquet.read_row_group(group, columns=[column]).column(0)


def _parquet_row(file: str, wanted: str | None, row: int) -> object:
    ends = _parquet_file(file, wanted)[2]
    group = int(np.searchsorted(ends, row, side="right"))
    return _parquet_group(file, wanted, group)[row - (int(ends[group - 1]) if group else 0)].as_py()


@dataclass(frozen=True)
class TorchvisionSource:
    """The training part of a dataset that torchvision knows; it checks its files' MD5 sums before it opens them."""

    name: str
    root: str

    def listing(self) -> Listing:
        labels = _torchvision_labels(self.name, self.root)
        return Listing([Item(f"{self.name}#{row:07d}", label, -1, "") for row, label in enumerate(labels)], {})

    def open(self) -> None:
        _torchvision(self.name, self.root)

    def fetch(self, path: str) -> np.ndarray:
        image = _torchvision(self.name, self.root)[int(path.rpartition("#")[2])][0]
        return np.asarray(image)


@lru_cache(maxsize=1)
def _torchvision(name: str, root: str) -> Any:
    import torchvision

    options: dict[str, Any] = {"split": "train"} if name == "celeba" else {"train": True}
    factory = getattr(torchvision.datasets, TORCHVISION[name])
    try:
        with _alone(root):
            try:
                return factory(root, download=False, **options)
            except RuntimeError:
                return factory(root, download=True, **options)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"data.source={name} is not under data.root={root}, and could not be downloaded ({error}); "
            f"put torchvision's {TORCHVISION[name]} files there, or name a folder of images"
        ) from error


@contextmanager
def _alone(root: str) -> Iterator[None]:
    """Keeps the processes of a machine from unpacking the same download at once; a folder that cannot be written holds one already."""
    try:
        os.makedirs(root, exist_ok=True)
        lock = open(os.path.join(root, ".lock"), "w")  # noqa: SIM115
    except OSError:
        yield
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _torchvision_labels(name: str, root: str) -> list[str | None]:
    dataset = _torchvision(name, root)
    if name == "celeba":
        return [None] * len(dataset)
    return [dataset.classes[int(target)] for target in dataset.targets]


@dataclass(frozen=True)
class DigitsSource:
    """The 1,797 handwritten digits of 8x8 pixels that scikit-learn ships (UCI Optical Recognition of Handwritten Digits, test part)."""

    def listing(self) -> Listing:
        targets = _digits()[1]
        return Listing([Item(f"digits#{row:04d}", str(target), 64, "") for row, target in enumerate(targets)], {})

    def open(self) -> None:
        _digits()

    def fetch(self, path: str) -> np.ndarray:
        return _digits()[0][int(path.rpartition("#")[2])]


@lru_cache(maxsize=1)
def _digits() -> tuple[np.ndarray, list[int]]:
    from sklearn.datasets import load_digits

    values, targets = load_digits(return_X_y=True)
    return (np.asarray(values).reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8), np.asarray(targets).tolist()


def open_source(config: DataConfig, downloads: str = "downloads") -> Source:
    """Returns the source that `data.source` names.

    Args:
        downloads: where torchvision datasets go when `data.root` is not set.

    Raises:
        DataError: if it is neither a known name nor a readable folder.
    """
    if config.source == "digits":
        return DigitsSource()
    if config.source in TORCHVISION:
        return TorchvisionSource(config.source, os.path.abspath(os.path.expanduser(config.root or downloads)))
    root = Path(config.source).expanduser().absolute()
    if not root.is_dir():
        names: list[Literal["digits"] | str] = ["digits", *TORCHVISION]
        wrong = "is not a folder" if root.exists() else "does not exist"
        raise DataError(f"data.source={config.source} {wrong}; name a folder of images or parquet files, or one of {', '.join(names)}")
    if not os.access(root, os.R_OK | os.X_OK):
        raise DataError(f"data.source={config.source} cannot be read; give read permission")
    if next(root.rglob("*.parquet"), None) is not None:
        return ParquetSource(str(root), config.image_column, config.label_column)
    return FolderSource(str(root))
