"""What takes room below a storage root, as records."""

import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from components.counts import counted
from components.storage import Location

Kind = Literal["run", "training", "dataset", "latents", "shards", "autoencoder", "samples", "cache", "version", "mlflow", "logs", "other"]
_KIND_FOLDER = re.compile(r".*(/(?:runs|datasets|latents|autoencoders|samples|cache)/.*)$", re.DOTALL)
_PLURAL = {
    "shards": "shard",
    "latents": "set of latents",
    "samples": "set of samples",
    "logs": "log",
    "mlflow": "part of MLflow's store",
    "other": "other folder",
}


@dataclass(frozen=True)
class Item:
    """What is kept or removed as one.

    Attributes:
        name: how a person calls it.
        places: files and folders that it is made of.
        written: when it was written last, seconds since 1970.
        needed: who needs it; empty where nobody does.
        lock: what a process holds that works on it.
    """

    kind: Kind
    name: str
    places: tuple[Location, ...]
    bytes: int
    written: float
    needed: str = ""
    lock: Location | None = None

    @property
    def count(self) -> int:
        """How many things of its kind it is."""
        return len(self.places) if self.kind == "shards" else 1

    @property
    def facts(self) -> dict[str, object]:
        """What a script needs."""
        return {"kind": self.kind, "name": self.name, "bytes": self.bytes, "count": self.count, "written": self.written, "needed": self.needed}


@dataclass(frozen=True)
class Retention:
    """What is kept for other reasons than that it is needed.

    Attributes:
        keep_days: what was written within so many days is.
        keep_versions: newest versions of every model that are; None for all.
        model: the only model whose versions may go; None for any.
    """

    keep_days: float = 7.0
    keep_versions: int | None = None
    model: str | None = None


@dataclass(frozen=True)
class Inventory:
    """The items of a storage root.

    Attributes:
        problems: what could not be read, and was therefore kept.
    """

    items: tuple[Item, ...]
    problems: tuple[str, ...] = ()

    @property
    def spare(self) -> tuple[Item, ...]:
        """What nobody needs."""
        return tuple(item for item in self.items if not item.needed)


def below(place: Location | str) -> str:
    """Returns an address from its kind's folder on, such as `/datasets/SOURCE/NAME`: a storage root may have been moved since somebody wrote it down."""
    found = _KIND_FOLDER.match(str(place))
    return found.group(1) if found else str(place)


def size_of(places: Iterable[Location]) -> tuple[int, float]:
    """Returns the bytes of files and folders, and when they were written last, seconds since 1970."""
    total, last = 0, 0.0
    for place in places:
        found = place.tree()
        if not found:
            with suppress(OSError):
                found = [("", place.size(), place.modified())] if place.is_file() else []
        total += sum(size for _, size, _ in found)
        last = max([last, *(written for _, _, written in found)])
    return total, last


def in_words(items: Iterable[Item]) -> str:
    """Returns items counted by their kind, such as `3 datasets, 12 trainings`."""
    counts: dict[Kind, int] = {}
    for item in items:
        counts[item.kind] = counts.get(item.kind, 0) + item.count
    return ", ".join(_counted(count, kind) for kind, count in counts.items()) or "nothing"


def _counted(count: int, kind: Kind) -> str:
    noun, of, rest = _PLURAL.get(kind, kind).partition(" of ")
    return counted(count, noun) + of + rest
