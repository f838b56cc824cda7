"""Datasets with a name: those that torchvision knows, and the digits that scikit-learn ships."""

import fcntl
import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import UnidentifiedImageError

from ..errors import DataError
from .folders import why_unreadable
from .listing import Item, Listing, ListingBuilder

TORCHVISION = {"cifar10": "CIFAR10", "mnist": "MNIST", "fashion-mnist": "FashionMNIST", "celeba": "CelebA"}


@dataclass(frozen=True)
class TorchvisionSource:
    """The training part of a dataset that torchvision knows; it checks its files' MD5 sums before it opens them."""

    name: str
    root: str

    @property
    def is_remote(self) -> bool:
        return False

    def listing(self) -> Listing:
        return _numbered(f"{self.name}#%07d", _torchvision_labels(self.name, self.root), -1)

    def open(self) -> None:
        _torchvision(self.name, self.root)

    def fetch(self, path: str) -> np.ndarray:
        dataset = _torchvision(self.name, self.root)
        try:
            return np.asarray(dataset[int(path.rpartition("#")[2])][0])
        except MemoryError:
            raise
        # CelebA lies in a file for each image, which torchvision has Pillow read; nobody knows what that raises.
        except Exception as error:
            is_content = isinstance(error, UnidentifiedImageError) or not isinstance(error, OSError) or error.errno is None
            raise DataError(_why_bad(error), "corrupt" if is_content else "unreadable") from error


@dataclass(frozen=True)
class DigitsSource:
    """The 1,797 handwritten digits of 8x8 pixels that scikit-learn ships (UCI Optical Recognition of Handwritten Digits, test part)."""

    @property
    def is_remote(self) -> bool:
        return False

    def listing(self) -> Listing:
        return _numbered("digits#%04d", [str(target) for target in _digits()[1]], 64)

    def open(self) -> None:
        _digits()

    def fetch(self, path: str) -> np.ndarray:
        return _digits()[0][int(path.rpartition("#")[2])]


def _why_bad(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its words name the file, which differs from machine to machine
        return "UnidentifiedImageError: the file is no image that Pillow knows"
    return why_unreadable(error)


def _numbered(form: str, labels: Sequence[str | None], size: int) -> Listing:
    builder = ListingBuilder()
    for row, label in enumerate(labels):
        builder.add(Item(form % row, label, size, ""))
    return builder.build({})


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


@lru_cache(maxsize=1)
def _digits() -> tuple[np.ndarray, list[int]]:
    table = np.loadtxt(_digits_file(), delimiter=",")
    return (table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8), table[:, -1].astype(int).tolist()


def _digits_file() -> Path:
    """Returns the table that scikit-learn's `load_digits` reads; importing it for that takes a second in every process."""
    package = importlib.util.find_spec("sklearn")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
