"""Where a command's words go: what was asked for to stdout, all else to stderr."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import IO

from workflows.termination import detach_streams


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[IO[str]]:
    """Sends all that any library or child process prints to stderr, and gives the block the real stdout."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(os.dup(saved), "w", encoding="utf-8") as stdout:
            yield stdout
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)


@contextlib.contextmanager
def unread_is_fine(stream: IO[str]) -> Iterator[None]:
    """Takes it for no failure of a block that whoever reads what it prints has seen enough, as `head` has."""
    try:
        yield
        stream.flush()
    except (BrokenPipeError, SystemExit):  # rich makes an exit of it
        detach_streams(stream.fileno())


def open_missing() -> None:
    """Opens what a shell closed by `>&-` and the like, to lead nowhere: the next file to be opened would take its number, and get all that is printed."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    sys.stdout, sys.stderr = sys.stdout or os.fdopen(1, "w", closefd=False), sys.stderr or os.fdopen(2, "w", closefd=False)
