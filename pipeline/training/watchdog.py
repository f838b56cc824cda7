"""The driver's watch over its workers while they train: who stands still, which node goes, whether to save before leaving."""

import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

from rich.markup import escape

from cluster.config import ClusterConfig, ClusterError, HeadLostError
from cluster.interrupt import Interrupted
from cluster.key_value_store import KeyValueStore, StoreLostError
from cluster.nodes import count, draining_nodes, kill_process
from pipeline.errors import ConfigError
from pipeline.training.hang_detection import HangDetector
from pipeline.training.heartbeat import BEATS, DRAINED, GIVEN_UP, REASON, SAVE, SAVED, TROUBLE, Beat

LOOK_S, LAST_MOMENT_S = 0.5, 10.0
HEAD_LOST_S = {True: 20.0, False: 45.0}
"""Patience with a head of our own, which does not come back, and with a cluster's, which may; Ray ends the process after a minute."""
_ASKED_BY: dict[int, str] = {signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP: its terminal, or who read what it prints, went away"}
_LEAVING = "leaving"

Handler = Callable[[int, FrameType | None], Any] | int | None


class Watchdog:
    """Watches during a block; the block's main thread is interrupted when there is nothing to wait for any more.

    SIGTERM and SIGHUP have the workers save before the command leaves; a second SIGTERM ends it at once. A terminal that closes sends several
    SIGHUPs, and whoever ends a session SIGTERM and SIGHUP together, so no other signal is in a hurry.

    Attributes:
        failure: what the block is to raise, None while there is nothing.
        left: whether it was interrupted because of such a signal.
    """

    def __init__(
        self, store: KeyValueStore, config: ClusterConfig, hang_timeout_s: float, *, before: int, report: Callable[[str], None], interrupt: Callable[[], None]
    ) -> None:
        """Prepares the watch.

        Args:
            hang_timeout_s: seconds without a step after which workers are taken to hang.
            before: number of the last attempt of an earlier command, 0 where there was none.
            tell: is given lines for a person.
            interrupt: raises KeyboardInterrupt in the block's main thread.
        """
        self._store, self._config, self._say, self._interrupt = store, config, report, interrupt
        self._hangs = HangDetector(hang_timeout_s)
        self._told_attempt = self._before = before
        self._told_trouble = ""
        self._condemned = before
        self._draining: set[tuple[str, bool]] = set()
        self._leave, self._ended = threading.Event(), threading.Event()
        self._deadline: float | None = None
        self._lost_since: float | None = None
        self._handlers: dict[int, Handler] = {}
        self._asked: list[int] = []
        self.failure: Exception | None = None
        self.left = False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def _report(self, line: str) -> None:
        """Tells a person, if there still is one: a closed pipe ends the process where rich finds it."""
        with suppress(OSError, SystemExit):
            self._say(line)

    def _watch(self) -> None:
        while not self._ended.wait(LOOK_S):
            try:
                self._look()
                self._lost_since = None
            except StoreLostError:
                self._lost_since = self._lost_since or time.monotonic()
                silent_s = time.monotonic() - self._lost_since
                if silent_s >= HEAD_LOST_S[self._config.address == "local"] or self._leave.is_set():
                    self.failure = HeadLostError(
                        f"Ray's head has not answered for {silent_s:.0f} s; run the same command again to resume from the last checkpoint"
                    )
            except Exception:
                self.left = self._leave.is_set()  # a look that fails must not keep the command from ending
            if self.failure is not None or self.left:
                if not self._ended.is_set():
                    self._interrupt()
                return

    def _look(self) -> None:
        beats = self._beats()
        self._report_start(beats)
        self._report_trouble()
        if reason := self._store.get(GIVEN_UP):
            self.failure = ConfigError(reason)
        elif self._leave.is_set():
            self._go(beats)
        elif self._store.get(REASON):
            return  # a start is under way
        elif hung := self._hangs.look(beats, time.monotonic()):
            self._restart(hung)
        else:
            self._handle_draining(beats)

    def _beats(self) -> list[Beat]:
        """Returns the last beat of each worker of the newest attempt of this command, by rank."""
        notes = [Beat.model_validate_json(note) for note in self._store.below(BEATS).values()]
        newest = max((beat.attempt for beat in notes), default=0)
        return sorted((beat for beat in notes if beat.attempt == newest > self._before), key=lambda beat: beat.rank)

    def _report_start(self, beats: Sequence[Beat]) -> None:
        if beats and beats[0].attempt > max(1, self._told_attempt):
            beat = beats[0]
            self._report(f"  start {beat.attempt}: from step {beat.first} with {count(beat.num_workers, 'worker')}")
        self._told_attempt = max(self._told_attempt, beats[0].attempt if beats else 0)

    def _report_trouble(self) -> None:
        trouble = self._store.get(TROUBLE) or ""
        if trouble and trouble != self._told_trouble:
            self._report(f"  [yellow]warning[/] a checkpoint cannot be written ({escape(trouble)}); training goes on, and it is tried again")
        elif trouble != self._told_trouble:
            self._report("  checkpoints can be written again")
        self._told_trouble = trouble

    def _restart(self, hung: Sequence[Beat]) -> None:
        """Names the workers that hang, and kills the first: Ray then starts the group again."""
        if hung[0].attempt <= self._condemned:
            return
        named = ", ".join(f"worker {beat.rank} ({beat.node}, pid {beat.pid}, {beat.phase} after step {beat.step})" for beat in hung)
        reason = f"{named} made no step for too long (train.hang_timeout_s)"
        self._store.put(REASON, reason)
        try:
            was_there = kill_process(hung[0].node_id, hung[0].pid)
        except ClusterError as error:
            self._report(f"  [yellow]warning[/] {escape(str(error))}; it is tried again")
            self._store.put(REASON, "")
            return
        self._condemned = hung[0].attempt
        if was_there:
            self._report(f"  [yellow]warning[/] {escape(reason)}; the workers start again")
        else:
            self._store.put(REASON, "")

    def _handle_draining(self, beats: Sequence[Beat]) -> None:
        """Has a checkpoint saved when a node with workers on it is to be taken away, and another shortly before it is."""
        if self._config.address == "local":
            return
        named = {beat.node_id: beat.node for beat in beats}
        for node_id, deadline in draining_nodes().items():
            soon = 0 < deadline - time.time() < LAST_MOMENT_S
            if node_id in named and (node_id, soon) not in self._draining:
                self._draining |= {(node_id, False), (node_id, soon)}
                self._store.put(SAVE, f"{node_id} is drained{' now' if soon else ''}")
                self._store.put(DRAINED, f"node {named[node_id]} was taken away")
                self._report(f"  node {named[node_id]} is to be taken away{' now' if soon else ''}; saving a checkpoint")

    def _go(self, beats: Sequence[Beat]) -> None:
        """Saves before leaving, within the grace period."""
        if not beats:
            self.left = True
            return
        if self._deadline is None:
            self._deadline = time.monotonic() + self._config.grace_s
            self._store.put(SAVE, _LEAVING)
            self._report(f"  termination requested: saving a checkpoint, for at most {self._config.grace_s} s")
        saved = self._store.get(SAVED) or ""
        name, _, step = saved.rpartition(" ")
        if name == _LEAVING:
            self._report(f"  saved at step {step}")
            self.left = True
        elif time.monotonic() >= self._deadline:
            self._report(f"  [yellow]warning[/] no checkpoint was saved within {self._config.grace_s} s; the last one before is used")
            self.left = True

    def why(self, error: BaseException) -> str:
        """Returns in a line why the block ends with an error."""
        if self.left:
            return f"the command was asked to end ({_ASKED_BY[self._asked[0]]})"
        if isinstance(error, KeyboardInterrupt) and self.failure is None:
            return "the command was interrupted"
        return " ".join(str(self.failure or error).split())[:300] or type(error).__name__

    def explain(self) -> None:
        """Raises in the main thread why it was interrupted, if the watch did it."""
        if self.failure is not None:
            raise self.failure
        if self.left:
            self._forward()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._asked.append(number)
        self._leave.set()
        if self._asked.count(signal.SIGTERM) > 1:
            self._forward()

    def _forward(self) -> None:
        """Lets whoever answered the first signal before this watch answer it now."""
        handler = self._handlers.get(self._asked[0])
        if callable(handler):
            handler(self._asked[0], None)

    def __enter__(self) -> "Watchdog":
        if threading.current_thread() is threading.main_thread():
            for number in _ASKED_BY:
                if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                    self._handlers[number] = signal.signal(number, self._on_signal)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        with suppress(Interrupted):  # the watch may have asked for it just now
            self._thread.join()
        with suppress(StoreLostError):
            if self.failure is None:
                self._report_start(self._beats())  # one that was too short for a look
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if kind is None and self._leave.is_set():
            self._forward()  # it came when the block was over anyway
