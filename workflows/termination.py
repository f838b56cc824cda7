"""Being asked to end: SIGTERM, a terminal that closes, a reader of the output who has gone. All end a command alike, with exit code 75."""

import os
import select
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

ASKED = (signal.SIGTERM, signal.SIGHUP)
_GONE = select.POLLERR | select.POLLHUP


class Terminated(KeyboardInterrupt):
    """Raised where the process is asked to end, so that the run is closed as after Ctrl-C."""


@contextmanager
def handling_termination(*outputs: int) -> Iterator[None]:
    """Raises `Terminated` in a block of the main thread when the process is asked to end.

    Who started the command with SIGHUP ignored, as nohup does, wants it to live on: then neither SIGHUP nor a reader who has gone ends it.

    Args:
        outputs: descriptors that are written to. When nobody can read one any more, it leads nowhere from then on, and SIGHUP is sent.
    """
    before = {number: signal.getsignal(number) for number in (*ASKED, signal.SIGINT)}
    answer = _Answer()
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, answer)
    try:
        with _watching(outputs, hang_up=before[signal.SIGHUP] != signal.SIG_IGN):
            yield
    except KeyboardInterrupt as interrupt:
        if answer.asked:  # Ray raises a KeyboardInterrupt of its own for whatever interrupts its waiting
            raise Terminated from interrupt
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Answer:
    """Raises; but SIGHUP does not where the command is on its way out already.

    A terminal that closes sends several, and Ctrl-C ends who reads the output (`ddpm run ... | tee log`) as well.
    """

    def __init__(self) -> None:
        self.asked = self._is_leaving = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP and self._is_leaving:
            return
        self._is_leaving = True
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        raise Terminated


@contextmanager
def _watching(outputs: tuple[int, ...], *, hang_up: bool) -> Iterator[None]:
    ended, end = os.pipe()
    watch = threading.Thread(target=_watch, args=(outputs, ended, threading.get_ident() if hang_up else None), name="readers", daemon=True)
    watch.start()
    try:
        yield
    finally:
        os.close(end)
        watch.join()
        os.close(ended)


def _watch(outputs: tuple[int, ...], ended: int, main: int | None) -> None:
    """Waits until the other end of an output is closed, or that of `ended`."""
    poll = select.poll()
    for descriptor in (*outputs, ended):
        poll.register(descriptor, 0)
    while True:
        for descriptor, event in poll.poll():
            if descriptor == ended:
                return
            poll.unregister(descriptor)
            if event & _GONE:
                detach_streams(descriptor)
                if main is not None:
                    signal.pthread_kill(main, signal.SIGHUP)


def detach_streams(descriptor: int) -> None:
    """Makes what is written to a descriptor vanish."""
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor, inheritable=descriptor <= 2)
        os.close(nowhere)
