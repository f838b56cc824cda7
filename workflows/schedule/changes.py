"""When the source changes: one cheap look at its listing instead of an attempt that would only find out that nothing is new."""

import hashlib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from components.ingest.sources import DataConfig, list_source
from components.storage import Location
from workflows.schedule.plan import Plan

FILE = "seen.json"


class Seen(BaseModel):
    """What the latest attempt was made for.

    Attributes:
        fingerprint: of source and settings, empty before the first attempt.
        number: attempts asked for so far.
    """

    model_config = ConfigDict(frozen=True)

    fingerprint: str = ""
    number: int = 0

    @property
    def key(self) -> str:
        """Name of the next attempt, the same when it is asked for again after a crash."""
        return f"change-{self.number + 1}"

    def next(self, fingerprint: str) -> "Seen":
        """Returns what is seen once the next attempt has been asked for."""
        return Seen(fingerprint=fingerprint, number=self.number + 1)

    def save(self, folder: Location) -> None:
        """Writes it into a schedule's folder."""
        (folder / FILE).write_text(self.model_dump_json())

    @classmethod
    def load(cls, folder: Location) -> "Seen":
        """Returns what a schedule's folder says, nothing where it says nothing."""
        try:
            return cls.model_validate_json((folder / FILE).read_text())
        except (FileNotFoundError, ValidationError):
            return cls()


class Watch:
    """Tells when an attempt is due: the source differs from the one seen, and no longer moves."""

    def __init__(self, plan: Plan, seen: Seen) -> None:
        self._plan = plan
        self._before = ""
        self.seen = seen

    def is_due(self) -> bool:
        """Looks at the source once. Two looks must agree, so that no attempt begins while files are still being copied."""
        before, self._before = self._before, fingerprint(self._plan)
        return self._before == before != self.seen.fingerprint

    def asked(self, folder: Location) -> None:
        """Takes note that an attempt for the latest look has been asked for."""
        self.seen = self.seen.next(self._before)
        self.seen.save(folder)


def fingerprint(plan: Plan) -> str:
    """Returns a digest that changes with the source's listing, the preset's file or the settings laid on it.

    Settings are compared as text, for to read them would take as much memory as training does; an attempt sees what they mean.

    Raises:
        DataError: if the source cannot be listed.
        OSError: if the preset cannot be read.
    """
    _, listing = list_source(DataConfig.model_validate_json(plan.data), str(Location(plan.storage) / "downloads"))
    parts = [listing.digest().encode(), Path(plan.file).read_bytes(), *map(str.encode, plan.overrides)]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
