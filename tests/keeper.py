"""Runs a command and ends everything that it started, daemons too, when the one who asked for it is done or dead.

`start` is for the tests; the file itself is the program between a test and its command. It adopts what the command leaves behind
(`PR_SET_CHILD_SUBREAPER`), reports the command's exit code as one line, and kills all of its descendants once its standard input closes.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

_PR_SET_CHILD_SUBREAPER = 36


class Kept:
    """A command that runs until `end`."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.pid = process.pid
        self.log = log
        self._process = process

    def code(self, timeout: float) -> int | None:
        """Returns the exit code of the command, or None if it runs for longer than that many seconds."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], timeout)
        if not ready:
            return None
        return int(self._process.stdout.readline() or -1)

    def is_running(self) -> bool:
        return self.code(timeout=0) is None

    def tail(self, lines: int = 30) -> str:
        """Returns the last lines that the command wrote."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def end(self) -> None:
        """Kills the command and all that came of it; returns when they are gone. May be called again."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def start(command: Sequence[str], *, log: Path, env: Mapping[str, str], wrapper: Sequence[str] = ()) -> Kept:
    """Starts a command under a keeper.

    Args:
        log: file for what the command writes.
        wrapper: command that runs the keeper itself, such as `ip netns exec NAME`.
    """
    with log.open("ab") as sink:
        process = subprocess.Popen(
            [*wrapper, sys.executable, __file__, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=sink,
            env=dict(env),
            start_new_session=True,
        )
    return Kept(process, log)


def _keep(command: list[str]) -> None:
    """Runs the command until standard input closes, then leaves no descendant alive."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    null_for_stdin = (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)
    log_for_stdout = (os.POSIX_SPAWN_DUP2, 2, 1)
    default_signals = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
    main = os.posix_spawnp(command[0], command, os.environ, file_actions=[null_for_stdin, log_for_stdout], setsigdef=default_signals)
    while not select.select([0], [], [], 0.1)[0]:
        _reap(main)
    while children := psutil.Process().children(recursive=True):
        for child in children:
            child.kill() if child.is_running() else None
        _reap(main)
        time.sleep(0.02)


def _reap(main: int) -> None:
    """Takes note of the dead, of which there are many; reports the command's own exit code."""
    try:
        while (dead := os.waitpid(-1, os.WNOHANG))[0]:
            if dead[0] == main:
                os.write(1, b"%d\n" % os.waitstatus_to_exitcode(dead[1]))
    except (ChildProcessError, BrokenPipeError):
        return


if __name__ == "__main__":
    _keep(sys.argv[1:])
