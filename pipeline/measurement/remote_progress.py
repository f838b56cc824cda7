"""How far remote work is while it goes on: actors and tasks put notes on the key-value store, and the driver shows them."""

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from cluster.key_value_store import KeyValueStore, StoreLostError
from pipeline.context import Advance
from pipeline.progress import repeatedly

REPORT_EVERY_S, LOOK_EVERY_S = 1.0, 2.0


@dataclass(frozen=True)
class RemoteProgress:
    """Where one piece of work says how far it is; it travels."""

    store: str
    piece: str

    def report(self) -> Callable[[float], None]:
        """Returns a function that says how much is done, at most once a second; saying so never fails, for the work is worth more."""
        store, reported = KeyValueStore(self.store), time.monotonic()

        def say(done: float) -> None:
            nonlocal reported
            if time.monotonic() - reported >= REPORT_EVERY_S:
                reported = time.monotonic()
                with suppress(StoreLostError):
                    store.put(self.piece, repr(done))

        return say


class ProgressCollector:
    """The driver's side: one piece of work after the other is under way, then done."""

    def __init__(self, advance: Advance) -> None:
        self._advance, self._store = advance, KeyValueStore(f"work-{uuid.uuid4().hex}")
        self._done: dict[str, float] = {}
        self._shown = 0.0

    def progress(self, piece: object) -> RemoteProgress:
        """Returns where a piece of work says how far it is."""
        return RemoteProgress(self._store.name, str(piece))

    def finish(self, piece: object, amount: float) -> None:
        """Takes note of a piece of work that is done."""
        self._done[str(piece)] = amount
        self._show(sum(self._done.values()))

    def look(self) -> None:
        """Shows what is done of the pieces that are under way, too."""
        with suppress(StoreLostError, ValueError):
            under_way = {piece: float(note) for piece, note in self._store.below("").items() if piece not in self._done}
            self._show(sum(self._done.values()) + sum(under_way.values()))

    def _show(self, now: float) -> None:
        if now > self._shown:
            self._advance(now - self._shown)
            self._shown = now

    def clear(self) -> None:
        """Takes the notes off the key-value store."""
        with suppress(StoreLostError):
            self._store.clear()


@contextmanager
def collecting_progress(advance: Advance) -> Iterator[ProgressCollector]:
    """Looks again and again during a block how far the pieces are that it has done, and shows that by advancing."""
    found = ProgressCollector(advance)
    try:
        with repeatedly(LOOK_EVERY_S, found.look):
            yield found
    finally:
        found.clear()
