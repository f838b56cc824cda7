"""Says, while a run waits for machines, that it does and for what; gives up in the end instead of waiting in silence."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from .config import ClusterConfig, ClusterError
from .interrupt import interruptible
from .nodes import living_nodes
from .placement import REPORT_S, plan

LOOK_S = 5.0


@contextmanager
def reporting_missing_nodes(config: ClusterConfig, report: Callable[[str], None]) -> Iterator[None]:
    """Says, during a block in the main thread, which nodes it waits for, and ends it where that took too long.

    Raises:
        ClusterError: naming what the cluster no longer has.
    """
    with interruptible() as interrupt, NodeWatch(config, report, interrupt) as node_watch:
        try:
            yield
        except KeyboardInterrupt:
            if node_watch.failure is not None:
                raise node_watch.failure from None
            raise


class NodeWatch:
    """Watches during a block whether the cluster still has what a run needs.

    Attributes:
        failure: why it gave up, None while it did not.
    """

    def __init__(self, config: ClusterConfig, report: Callable[[str], None], give_up: Callable[[], None]) -> None:
        self._config, self._report, self._give_up = config, report, give_up
        self.failure: ClusterError | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="node-watch", daemon=True)

    def __enter__(self) -> "NodeWatch":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(LOOK_S)  # longer only where the head is gone, which it waits for

    @property
    def patience_s(self) -> float:
        """Seconds that a lost node is waited for."""
        return float(max(self._config.wait_s, self._config.group_timeout_s))

    def _watch(self) -> None:
        missing_since: float | None = None
        reported = 0.0
        while not self._stop.wait(LOOK_S):
            missing, now = self._missing(), time.monotonic()
            if missing is None:
                missing_since = None
                continue
            missing_since = missing_since or now
            if now - missing_since >= self.patience_s:
                self.failure = ClusterError(f"{missing} (waited {self.patience_s:.0f} s; run the same command again to resume from the last checkpoint)")
                self._give_up()
                return
            if now - reported >= REPORT_S:
                reported = now
                self._report(f"  waiting up to {self.patience_s - (now - missing_since):.0f} s for nodes: {missing}")

    def _missing(self) -> ClusterError | None:
        try:
            plan(self._config, living_nodes())
        except ClusterError as error:
            return error
        return None
