"""What lies below a storage root, read from the records that the stages left there. Nothing is changed here."""

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from components.errors import DataError
from components.model.manifest import MANIFEST
from components.model.retention import checkpoints
from components.storage import Location
from pipeline.artifacts import Evaluation, ShardSet, TrainedModel
from pipeline.lease import LeaseHeldError, held
from pipeline.retraining.attempts import Attempt, Journal

LOCK, RECEIPT = ".lock", "receipt.json"
Record = TypeVar("Record", bound=BaseModel)
LEASE_FRESH_S = 120.0
"""Since when a lease on S3, which its holder renews every few seconds, must have been written to be somebody's."""


@dataclass(frozen=True)
class Kept(Generic[Record]):
    """A receipt where it lies.

    Attributes:
        written: seconds since 1970.
    """

    folder: Location
    receipt: Record
    written: float


@dataclass(frozen=True)
class Training:
    """A folder of checkpoints.

    Attributes:
        receipt: None where the training has not ended.
        written: when its receipt or its last checkpoint was, seconds since 1970.
    """

    folder: Location
    receipt: TrainedModel | None
    written: float


@dataclass(frozen=True)
class RunRecords:
    """What a run left.

    Attributes:
        busy: whether a process works on it.
        settings: what it was last called with; empty where that cannot be read.
        pins: texts of the files that say what names in its settings meant.
        registered: when its last receipt of a registered version was written, seconds since 1970; 0 where it has none. The version may be deleted since.
        unreadable: receipts that cannot be read.
    """

    name: str
    folder: Location
    busy: bool
    settings: dict[str, Any]
    pins: tuple[str, ...]
    datasets: tuple[Kept[ShardSet], ...]
    latents: tuple[Kept[ShardSet], ...]
    trainings: tuple[Training, ...]
    evaluations: tuple[Kept[Evaluation], ...]
    registered: float = 0.0
    unreadable: tuple[Location, ...] = ()

    @property
    def newest_training(self) -> Training | None:
        """The training that ended last."""
        return max((one for one in self.trainings if one.receipt is not None), key=lambda one: one.written, default=None)


@dataclass(frozen=True)
class JournalRecords:
    """The attempts of one name."""

    name: str
    attempts: tuple[Attempt, ...]


@dataclass(frozen=True)
class Records:
    """All of it.

    Attributes:
        trials: runs that were trials of a sweep which has ended: the best of them is registered.
    """

    storage: Location
    runs: tuple[RunRecords, ...]
    journals: tuple[JournalRecords, ...]
    problems: tuple[str, ...] = field(default=())
    trials: frozenset[str] = frozenset()

    @classmethod
    def of(cls, storage: Location, mine: frozenset[Location] = frozenset()) -> "Records":
        """Reads the records of a storage root.

        Args:
            mine: locks that this process holds.

        Raises:
            OSError: if it cannot be looked through.
        """
        runs = tuple(read_run(storage / "runs" / name, mine) for name in (storage / "runs").folders())
        journals, problems = [], [f"{place} cannot be read, and its run is kept" for run in runs for place in run.unreadable]
        for name in (storage / "retrain").folders():
            try:
                journals.append(JournalRecords(name, tuple(Journal(storage / "retrain" / name).attempts())))
            except DataError as error:
                problems.append(str(error))
                journals.append(JournalRecords(name, ()))
        ended = [storage / "sweeps" / name for name in (storage / "sweeps").folders() if (storage / "sweeps" / name / "sweep.json").is_file()]
        return cls(storage, runs, tuple(journals), tuple(problems), frozenset(trial for sweep in ended for trial in sweep.folders()))


def read_run(folder: Location, mine: frozenset[Location]) -> RunRecords:
    """Returns what a run left."""
    unreadable: list[Location] = []
    settings: dict[str, Any] = {}
    with suppress(OSError, yaml.YAMLError, UnicodeDecodeError):
        found = yaml.safe_load((folder / "config.yaml").read_text())
        settings = found if isinstance(found, dict) else {}
    pins = [name for name in folder.files() if name.endswith(".json")]
    return RunRecords(
        name=folder.name,
        folder=folder,
        busy=folder / LOCK not in mine and is_held(folder / LOCK),
        settings=settings,
        pins=tuple((folder / name).read_text() for name in pins),
        datasets=tuple(_receipts(folder / "preprocess", ShardSet, unreadable)),
        latents=tuple(_receipts(folder / "encode", ShardSet, unreadable)),
        trainings=tuple(_training(folder / "train" / name, unreadable) for name in (folder / "train").folders()),
        evaluations=tuple(_receipts(folder / "evaluate", Evaluation, unreadable)),
        registered=max(((folder / "register" / name / RECEIPT).modified() for name in (folder / "register").folders()), default=0.0),
        unreadable=tuple(unreadable),
    )


def _receipts(folder: Location, kind: type[Record], unreadable: list[Location]) -> Iterator[Kept[Record]]:
    for name in folder.folders():
        place = folder / name / RECEIPT
        if (receipt := _read(place, kind, unreadable)) is not None:
            yield Kept(folder / name, receipt, place.modified())


def _read(place: Location, kind: type[Record], unreadable: list[Location]) -> Record | None:
    try:
        return kind.model_validate_json(place.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError):
        unreadable.append(place)
        return None


def _training(folder: Location, unreadable: list[Location]) -> Training:
    receipt, written = _read(folder / RECEIPT, TrainedModel, unreadable), (folder / RECEIPT).modified()
    last = max((place.modified() for checkpoint in checkpoints(folder)[:2] if (place := checkpoint / MANIFEST)), default=0.0)
    return Training(folder, receipt, max(written, last))


def is_held(lock: Location) -> bool:
    """Tells whether a process holds a lock or renews a lease at present."""
    if not lock.is_local:
        return lock.is_file() and time.time() - lock.modified() < LEASE_FRESH_S
    if not lock.is_file():
        return False
    try:
        with held(lock, wait=False):
            return False
    except LeaseHeldError:
        return True
    except OSError:
        return True


def autoencoder_of(checkpoint: Location) -> str | None:
    """Returns the digest of the autoencoder in whose latents a checkpoint works; None where it works on rows as they are, or is not there."""
    with suppress(OSError, ValueError):
        space = json.loads((checkpoint / "denoiser.json").read_text()).get("space")
        found = space.get("autoencoder") if isinstance(space, dict) else None
        return str(found) if found else None
    return None
