"""Which models learned from which data: by the dataset that a version was trained on, and by the versions whose weights it started from."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from pipeline.registry.browse import VersionFacts, list_models
from pipeline.tracking import Tracking, translated

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

FORGOTTEN_TAG = "ddpm.forgotten"
MOST_NAMED = 50
_MODEL = re.compile(r"models:/(.+)/(\d+)$")
Key = tuple[str, int]


@dataclass(frozen=True)
class Learned:
    """A version that learned from data.

    Attributes:
        how: by which dataset, or from which version's weights.
        direct: whether it was trained on the data itself.
    """

    version: VersionFacts
    how: str
    direct: bool

    def to_json(self) -> dict[str, object]:
        """Returns what a script needs."""
        version = self.version
        return {"model": version.name, "version": version.version, "aliases": list(version.aliases), "run": version.run, "how": self.how, "direct": self.direct}


def start_of(version: VersionFacts) -> Key | None:
    """Returns the version whose weights a version started from; None for fresh ones, and for weights that are no version's."""
    found = _MODEL.search(version.tags.get("weights.start", ""))
    return (found.group(1), int(found.group(2))) if found else None


def learned_from(tracking: Tracking, digests: Mapping[str, str]) -> list[Learned]:
    """Returns the versions that learned from datasets, their own first, then those that started from their weights, from these, and so on.

    Args:
        digests: what to call each dataset, by its digest.
    """
    versions = [version for found in list_models(tracking, None).values() for version in reversed(found)]
    known = {(version.name, version.version): version for version in versions}
    found = {
        key: Learned(version, f"trained on {digests[digest]}", True)
        for key, version in known.items()
        if (digest := version.tags.get("dataset.digest", "")) in digests
    }
    while more := {key: _by_start(known[key], start) for key in known.keys() - found.keys() if (start := start_of(known[key])) in found}:
        found |= more
    return sorted(found.values(), key=lambda one: (not one.direct, one.version.name, one.version.version))


def _by_start(version: VersionFacts, start: Key | None) -> Learned:
    assert start is not None
    return Learned(version, f"started from {start[0]} version {start[1]}", False)


def ancestors(tracking: Tracking, version: "ModelVersion") -> Iterator[VersionFacts]:
    """Yields a version, the one whose weights it started from, and so on, as far as the registry still has them."""
    known = {(one.name, one.version): one for found in list_models(tracking, None).values() for one in found}
    key: Key | None = (str(version.name), int(version.version))
    while key is not None and (found := known.pop(key, None)) is not None:
        yield found
        key = start_of(found)


def tag_forgotten(tracking: Tracking, learned: Iterable[Learned], hashes: Iterable[str], why: str) -> None:
    """Notes on versions that they learned from images which are to be forgotten."""
    new = set(hashes)
    for one in learned:
        try:
            before = json.loads(one.version.tags.get(FORGOTTEN_TAG, "{}"))
        except ValueError:
            before = {}
        named = sorted(new | set(before.get("sha256", [])))
        note = {
            "images": max(len(named), int(before.get("images", 0))),
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "why": why[:500],
            "how": one.how,
        }
        value = json.dumps({**note, "sha256": named[:MOST_NAMED]})
        with translated(tracking.uri):
            tracking.client.set_model_version_tag(one.version.name, str(one.version.version), FORGOTTEN_TAG, value)
