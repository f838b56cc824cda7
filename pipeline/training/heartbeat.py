"""What a training worker tells the driver while it trains, and what the driver asks of it: notes on the key-value store, one look a second."""

import os
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Literal

from pydantic import BaseModel, ConfigDict

from cluster.key_value_store import KeyValueStore, StoreLostError

BEAT_S = 1.0
BEATS, SAVE, SAVED, TROUBLE, GIVEN_UP, DRAINED, REASON, LINES = "beat/", "save", "saved", "trouble", "given-up", "drained", "reason", "told/"
"""Keys of the key-value store. Below TOLD are lines for a person. REASON says why the workers have to start again; it is there from then until they do."""


Phase = Literal["starting", "compiling", "waiting for data", "computing", "drawing samples", "validating", "saving", "ending", "ended"]


class Beat(BaseModel):
    """One worker, this second.

    Attributes:
        number: goes up with every beat, whatever the worker does.
        attempt: start of the group of workers that this one belongs to.
        first: step that the attempt went on from.
        step: optimiser steps done.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int
    attempt: int
    rank: int
    num_workers: int
    node_id: str
    node: str
    pid: int
    first: int
    step: int
    phase: Phase


class Heartbeat:
    """Beats in a thread of its own during a block; the training thread only sets what it is at.

    Attributes:
        step: optimiser steps done.
        phase: what the training thread is at.
        wanted: name of the last checkpoint that the driver asked for out of turn; empty where it asked for none.
    """

    def __init__(self, store: KeyValueStore, attempt: int, rank: int, num_workers: int, *, node_id: str, node: str, first: int) -> None:
        """Prepares the heartbeat of one worker.

        Args:
            first: step that this attempt goes on from.
        """
        self._store, self._number = store, 0
        self._who = {"attempt": attempt, "rank": rank, "num_workers": num_workers, "node_id": node_id, "node": node, "pid": os.getpid(), "first": first}
        self.step, self.wanted = first, ""
        self.phase: Phase = "starting"
        self._lines = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def say(self, key: str, note: str) -> None:
        """Puts a note on the key-value store, if the head answers."""
        with suppress(StoreLostError):
            self._store.put(key, note)

    def report(self, line: str) -> None:
        """Has the driver tell a person something."""
        self._lines += 1
        self.say(f"{LINES}{self._who['attempt']:06d}/{self._lines:03d}", line)

    def give_up(self, reason: str) -> None:
        """Has the driver end the run with a reason that starting again would not mend, and waits for that."""
        while not self._stop.is_set():
            self.say(GIVEN_UP, reason)
            time.sleep(BEAT_S)

    def _beat(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._stop.wait(BEAT_S if self._number else 0)
            self._number += 1
            with suppress(StoreLostError):
                beat = Beat.model_validate(self._who | {"number": self._number, "step": self.step, "phase": self.phase})
                self._store.put(f"{BEATS}{beat.attempt}/{beat.rank}", beat.model_dump_json())
                if beat.rank == 0:  # the one that writes checkpoints
                    self.wanted = self._store.get(SAVE) or ""

    def __enter__(self) -> "Heartbeat":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.phase = "ended"
        self._stop.set()
        self._thread.join()
