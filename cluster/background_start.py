"""Starts a Ray of our own while the command does other things."""

import threading
from collections.abc import Callable


class BackgroundStart:
    """A start in a thread, which lives as long as that Ray: the kernel ends the processes that a thread started together with the thread."""

    def __init__(self, start: Callable[[], None]) -> None:
        """Begins at once.

        Args:
            start: starts Ray, and raises where that fails.
        """
        self._start = start
        self._error: BaseException | None = None
        self._done, self._over = threading.Event(), threading.Event()
        threading.Thread(target=self._run, name="ray", daemon=True).start()

    def _run(self) -> None:
        try:
            self._start()
        except BaseException as error:  # whoever waits raises it
            self._error = error
        self._done.set()
        self._over.wait()

    def wait(self) -> None:
        """Waits until Ray has started. Raises what kept it from that."""
        self._done.wait()
        if self._error is not None:
            raise self._error

    def settle(self) -> None:
        """Waits until Ray has started, or has not."""
        self._done.wait()

    def end(self) -> None:
        """Ends the thread, when Ray has ended."""
        self._over.set()
