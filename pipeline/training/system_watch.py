"""Notes what the machines of the training workers do."""

import threading
import time

from cluster.machine import SystemMetrics
from pipeline.training.metrics_log import Attempt, MetricsLine, MetricsLogWriter, system_folder

WATCH_EVERY_S = 10.0
_LEAVE_S = 5.0


class SystemMetricsMonitor:
    """Writes down what this machine does while a block trains, on behalf of an attempt, in a metrics log of the node's own.

    It reads and writes in a thread of its own, and a failure of any kind leaves a gap in the curves and nothing else.
    """

    def __init__(self, attempt: Attempt, node: int, *, alone: bool) -> None:
        """Prepares the watch of a node.

        Args:
            node: the node's rank.
            alone: whether no other node trains, so that names need not tell which it was.
        """
        self._attempt, self._node = attempt, node
        self._prefix = "system/" if alone else f"system/{node}/"
        self._writer: MetricsLogWriter | None = None
        self._gauges = SystemMetrics()
        self._looked = -WATCH_EVERY_S
        self._thread: threading.Thread | None = None

    def look(self, step: int) -> None:
        """Starts a look at the machine after a step, unless the last one was less than ten seconds ago or goes on still."""
        now = time.monotonic()
        if now - self._looked < WATCH_EVERY_S or (self._thread is not None and self._thread.is_alive()):
            return
        self._looked = now
        self._thread = threading.Thread(target=self._note, args=(step,), name="system-watch", daemon=True)
        self._thread.start()

    def _note(self, step: int) -> None:
        try:
            metrics = {f"{self._prefix}{name}": value for name, value in self._gauges.read().items()}
            self._writer = self._writer or MetricsLogWriter(self._attempt, system_folder(self._attempt.folder, self._node))
            self._writer.append(MetricsLine(step=step, timestamp_ms=time.time_ns() // 1_000_000, metrics=metrics))
            self._writer.flush()
        except Exception:  # whatever it is, training goes on
            return

    def __enter__(self) -> "SystemMetricsMonitor":
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._thread.join(_LEAVE_S)
