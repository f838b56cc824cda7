"""Every start of the workers after the first: when, from which step, with how many workers, and why.

TRAINING/restarts/0002.json    of the second start, written by its first worker before it trains
TRAINING/ended.txt             why the last command ended before the training did, where it could still say so
"""

import time
from contextlib import suppress

from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.key_value_store import KeyValueStore, StoreLostError
from cluster.nodes import count
from components.storage import Location
from pipeline.training.heartbeat import BEATS, DRAINED, REASON, SAVE, TROUBLE, Beat

FOLDER, _ENDED = "restarts", "ended.txt"
KILLED = "the command was killed, or its machine was lost"


class Restart(BaseModel):
    """One start of the workers after the first.

    Attributes:
        attempt: 2 for the second start.
        time: UTC, ISO 8601.
        step: step that it went on from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    attempt: int
    time: str
    step: int
    num_workers: int
    reason: str

    def __str__(self) -> str:
        return f"{self.time} from step {self.step} with {count(self.num_workers, 'worker')}: {self.reason}"


def record_restart(folder: Location, store: KeyValueStore, attempt: int, step: int, num_workers: int) -> None:
    """Writes a start down, if it is not the first; a disk without room for it does not keep training from going on."""
    reason = _take_reason(store, attempt, num_workers)
    if attempt == 1:
        return
    with suppress(OSError):
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        restart = Restart(attempt=attempt, time=now, step=step, num_workers=num_workers, reason=reason)
        (folder / FOLDER / f"{attempt:04d}.json").write_text(restart.model_dump_json() + "\n")


def _take_reason(store: KeyValueStore, attempt: int, num_workers: int) -> str:
    """Returns why this attempt starts, and takes off what the last one left on the key-value store."""
    with suppress(StoreLostError):
        reasons = [store.get(key) for key in (DRAINED, REASON)]
        for key in (DRAINED, REASON, SAVE, TROUBLE):
            store.put(key, "")
        if reason := next(filter(None, reasons), None):
            return reason
        earlier = [beat for beat in map(Beat.model_validate_json, store.below(BEATS).values()) if beat.attempt < attempt]
        workers = max(earlier, key=lambda beat: beat.attempt).num_workers if earlier else num_workers
        if workers != num_workers:
            return f"the number of workers changed from {workers} to {num_workers}"
    return "its workers were lost"


def restarts_of(folder: Location) -> list[Restart]:
    """Returns the starts of a training after its first, the earliest first. Raises OSError if the storage cannot be reached."""
    found = []
    for name in sorted((folder / FOLDER).files()):
        with suppress(ValidationError):
            found.append(Restart.model_validate_json((folder / FOLDER / name).read_text()))
    return found


def record_end(folder: Location, reason: str) -> None:
    """Writes down why the command ends before the training does, for the next start to say."""
    with suppress(OSError):
        (folder / _ENDED).write_text(reason + "\n")


def pop_end(folder: Location) -> str:
    """Returns why the last command ended, once."""
    try:
        reason = (folder / _ENDED).read_text().strip()
        (folder / _ENDED).remove()
    except OSError:
        return KILLED
    return reason or KILLED
