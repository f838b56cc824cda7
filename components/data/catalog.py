"""Which datasets lie below a storage root, and the one that a person means."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..counts import counted
from ..errors import DataError
from ..names import why_no_path
from ..storage import Location
from .shards import MANIFEST, Manifest, read_manifest

MOST_NAMED = 10


@dataclass(frozen=True)
class Dataset:
    """A dataset where it lies.

    Attributes:
        written: when its manifest was written, seconds since 1970.
    """

    folder: Location
    manifest: Manifest
    written: float

    @classmethod
    def of(cls, folder: Location) -> "Dataset":
        """Returns the dataset in a folder. Raises DataError if there is none, or its manifest cannot be read."""
        return cls(folder, read_manifest(folder), (folder / MANIFEST).modified())

    @property
    def name(self) -> str:
        """The folder's name, which begins with the digest."""
        return self.folder.name

    @property
    def shard_bytes(self) -> int:
        """Bytes of its shards, some of which other datasets of the same source may share."""
        return sum(shard.bytes for shard in self.manifest.shards)


@dataclass(frozen=True)
class Catalog:
    """The datasets of a storage root.

    Attributes:
        datasets: newest last.
        unreadable: what is wrong with those whose manifest cannot be read, by folder.
    """

    storage: Location
    datasets: tuple[Dataset, ...]
    unreadable: dict[Location, DataError]

    @classmethod
    def of(cls, storage: Location) -> "Catalog":
        """Looks through a storage root.

        Raises:
            DataError: if it cannot be looked through.
        """
        found, unreadable = [], {}
        for folder in _folders(storage):
            try:
                found.append(Dataset.of(folder))
            except DataError as error:
                unreadable[folder] = error
        return cls(storage, tuple(sorted(found, key=lambda dataset: (dataset.written, dataset.folder))), unreadable)

    def find(self, beginning: str) -> Dataset:
        """Returns the dataset whose name or digest begins so; of several with one digest the newest.

        Raises:
            DataError: if there is none, or several of different digests.
        """
        found = [dataset for dataset in self.datasets if beginning and (dataset.name.startswith(beginning) or dataset.manifest.digest.startswith(beginning))]
        for folder, error in self.unreadable.items():
            if not found and beginning and folder.name.startswith(beginning):
                raise error
        if not found:
            there = f"there are {_named(self.datasets)}" if self.datasets else "there are none yet, and `ddpm preprocess` makes one"
            raise DataError(f"dataset {beginning!r} is neither a dataset's folder nor the beginning of a name in {self.storage / 'datasets'}; {there}")
        if len({dataset.manifest.digest for dataset in found}) > 1:
            raise DataError(f"dataset {beginning!r} is the beginning of several: {_named(found)}; write more of the name")
        return found[-1]


def find_dataset(address: str, storage: Location) -> Dataset:
    """Returns the dataset that a person means.

    Args:
        address: a dataset's folder, or how its name or digest begins below the storage root.

    Raises:
        DataError: if there is none, or several that differ.
    """
    if "/" not in address and why_no_path(address):
        return Catalog.of(storage).find(address)
    folder = Location.of(address)
    try:
        is_folder = "/" in address or (address and (folder / MANIFEST).is_file())
    except OSError as error:
        raise DataError(f"{folder} cannot be looked at ({error.strerror}); give permission") from error
    return Dataset.of(folder) if is_folder else Catalog.of(storage).find(address)


def _folders(storage: Location) -> list[Location]:
    root = storage / "datasets"
    try:
        folders = [root / source / version for source in root.folders() for version in (root / source).folders()]
        return [folder for folder in folders if (folder / MANIFEST).is_file()]
    except OSError as error:
        right = "give read permission" if storage.is_local else "look at the bucket's name, the AWS_* credentials and AWS_ENDPOINT_URL"
        raise DataError(f"--storage {storage} cannot be looked through ({' '.join(str(error).split())[:300]}); {right}") from error


def _named(datasets: Sequence[Dataset]) -> str:
    names = [f"{dataset.name} ({dataset.manifest.source}, {counted(dataset.manifest.num_rows, 'row')})" for dataset in datasets[-MOST_NAMED:]]
    return ", ".join(names) + (f" and {len(datasets) - MOST_NAMED} older ones" if len(datasets) > MOST_NAMED else "")
