"""What the driver's watch does with SIGTERM and with what it reads on the key-value store; the key-value store is a dictionary, the signals are real."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from cluster.config import ClusterConfig, HeadLostError
from cluster.interrupt import interruptible
from cluster.key_value_store import StoreLostError
from pipeline.errors import ConfigError
from pipeline.training import watchdog as vigil_module
from pipeline.training.heartbeat import BEATS, GIVEN_UP, SAVE, SAVED, TROUBLE, Beat
from pipeline.training.watchdog import Watchdog


class Asked(KeyboardInterrupt):
    """What the command's own handler of SIGTERM raises."""


@dataclass
class Notes:
    """A key-value store in this process."""

    notes: dict[str, str] = field(default_factory=dict)
    is_lost: bool = False

    def put(self, key: str, note: str) -> None:
        self.check()
        self.notes[key] = note

    def get(self, key: str) -> str | None:
        self.check()
        return self.notes.get(key)

    def below(self, prefix: str) -> dict[str, str]:
        self.check()
        return {key: note for key, note in self.notes.items() if key.startswith(prefix)}

    def check(self) -> None:
        if self.is_lost:
            raise StoreLostError("gone")

    def beat(self, step: int, attempt: int = 1, first: int = 0) -> None:
        beat = Beat(number=step, attempt=attempt, rank=0, num_workers=1, node_id="n", node="host", pid=1, first=first, step=step, phase="computing")
        self.notes[f"{BEATS}{attempt}/0"] = beat.model_dump_json()


class Closed(list[str]):
    """Nobody to tell anything."""

    def append(self, line: str) -> None:
        raise SystemExit(1)


@pytest.fixture
def store() -> Notes:
    return Notes()


@pytest.fixture(autouse=True)
def asked() -> Iterator[None]:
    def raise_asked(*_: object) -> None:
        raise Asked

    before = {number: signal.signal(number, raise_asked) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def watch(store: Notes, block: Callable[[], None], told: list[str], before: int = 0, grace_s: int = 25) -> Watchdog:
    """Runs a block under the watch, as the training stage does."""
    config = ClusterConfig(grace_s=grace_s)
    with interruptible() as interrupt, Watchdog(store, config, 60, before=before, report=told.append, interrupt=interrupt) as watchdog:  # type: ignore[arg-type]
        try:
            block()
        except KeyboardInterrupt:
            watchdog.explain()
            raise
    return watchdog


def forever() -> None:
    time.sleep(60)
    raise AssertionError("not interrupted")


def send_sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def save_when_asked(store: Notes, ask: Callable[[], None] = send_sigterm) -> None:
    """Is asked to end, and answers as a worker does that has saved."""
    ask()
    while SAVE not in store.notes:
        time.sleep(0.05)
    store.put(SAVED, f"{store.notes[SAVE]} 8")
    forever()


def test_sigterm_has_a_checkpoint_saved_and_then_leaves(store: Notes):
    store.beat(7)
    told: list[str] = []

    with pytest.raises(Asked):
        watch(store, lambda: save_when_asked(store), told)
    assert told == ["  termination requested: saving a checkpoint, for at most 25 s", "  saved at step 8"]


def test_an_answer_to_another_request_is_not_taken_for_the_checkpoint_and_the_grace_period_ends(store: Notes):
    store.beat(7)
    store.put(SAVED, "abc is drained 3")
    told: list[str] = []
    with pytest.raises(Asked):
        watch(store, lambda: (send_sigterm(), forever()), told, grace_s=1)  # type: ignore[arg-type]
    assert told[-1] == "  [yellow]warning[/] no checkpoint was saved within 1 s; the last one before is used"


def test_before_the_workers_train_sigterm_leaves_at_once(store: Notes):
    store.beat(7, attempt=1)
    told: list[str] = []
    with pytest.raises(Asked):
        watch(store, lambda: (send_sigterm(), forever()), told, before=1)  # type: ignore[arg-type]
    assert told == []


def test_a_hangup_has_a_checkpoint_saved_too_and_neither_a_second_one_nor_a_first_sigterm_hurries(store: Notes):
    store.beat(7)
    told: list[str] = []

    def block() -> None:
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM):
            os.kill(os.getpid(), number)
        save_when_asked(store, ask=lambda: None)

    with pytest.raises(Asked):
        watch(store, block, told)
    assert told[-1] == "  saved at step 8"


def test_a_hangup_that_is_ignored_as_nohup_has_it_ends_nothing(store: Notes):
    store.beat(7)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    watch(store, lambda: os.kill(os.getpid(), signal.SIGHUP), [])
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_second_sigterm_waits_for_nothing(store: Notes):
    store.beat(7)

    def block() -> None:
        send_sigterm()
        send_sigterm()
        raise AssertionError("not ended")

    with pytest.raises(Asked):
        watch(store, block, [])


def test_sigterm_at_the_very_end_is_not_lost(store: Notes):
    with pytest.raises(Asked):
        watch(store, send_sigterm, [])
    with pytest.raises(Asked):
        send_sigterm()


def test_a_closed_terminal_keeps_no_checkpoint_from_being_saved(store: Notes):
    store.beat(7)

    with pytest.raises(Asked):
        watch(store, lambda: save_when_asked(store), Closed())


def test_what_a_worker_gives_up_for_ends_the_block(store: Notes):
    store.put(GIVEN_UP, "cluster.storage: cannot be written")
    with pytest.raises(ConfigError, match="cannot be written"):
        watch(store, forever, [])


def test_a_head_that_does_not_answer_ends_the_block_and_one_that_is_back_does_not(store: Notes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vigil_module, "LOOK_S", 0.01)
    monkeypatch.setattr(vigil_module, "HEAD_LOST_S", {True: 0.5, False: 60.0})

    def away_for_a_moment() -> None:
        store.is_lost = True
        time.sleep(0.1)
        store.is_lost = False
        time.sleep(0.6)

    assert watch(store, away_for_a_moment, []).failure is None
    store.is_lost = True
    with pytest.raises(HeadLostError):
        watch(store, forever, [])


def test_starts_and_troubles_are_told_once_each(store: Notes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vigil_module, "LOOK_S", 0.01)
    told: list[str] = []

    def block() -> None:
        for attempt, trouble in ((1, ""), (2, "No space left on device"), (2, "")):
            store.beat(attempt * 100, attempt=attempt, first=attempt * 10)
            store.put(TROUBLE, trouble)
            time.sleep(0.2)

    watch(store, block, told)
    assert told == [
        "  start 2: from step 20 with 1 worker",
        "  [yellow]warning[/] a checkpoint cannot be written (No space left on device); training goes on, and it is tried again",
        "  checkpoints can be written again",
    ]


def test_handlers_and_threads_are_as_before_when_the_block_is_over(store: Notes):
    handler, threads = signal.getsignal(signal.SIGTERM), threading.active_count()
    watch(store, lambda: None, [])
    assert signal.getsignal(signal.SIGTERM) is handler
    assert threading.active_count() == threads
