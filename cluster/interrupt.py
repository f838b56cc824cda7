"""Lets a watching thread end what the main thread waits for."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Interrupted(KeyboardInterrupt):
    """Raised in the main thread because another thread asked for it."""


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Gives a block of the main thread a function with which any thread raises `Interrupted` in it; elsewhere one that does nothing.

    It is SIGUSR1, which wakes the thread up wherever it waits, and which, unlike SIGINT, no shell makes processes ignore.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    main = threading.get_ident()
    previous = signal.signal(signal.SIGUSR1, _interrupt)
    try:
        yield lambda: signal.pthread_kill(main, signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, previous)


def _interrupt(*_: object) -> None:
    raise Interrupted
