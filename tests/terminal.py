"""Runs a command in a terminal of its own, as ssh does, and closes that terminal on SIGUSR1: `python terminal.py COMMAND...`. Ends with the command's code."""

import fcntl
import os
import signal
import subprocess
import sys
import termios
import threading


def main() -> int:
    """Runs the command that the arguments are."""
    ours, theirs = os.openpty()
    closing = threading.Event()
    signal.signal(signal.SIGUSR1, lambda *_: (os.close(ours), closing.set()))
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    process = subprocess.Popen(sys.argv[1:], **streams, start_new_session=True, preexec_fn=take_terminal)  # noqa: PLW1509 - there are no threads yet
    os.close(theirs)
    threading.Thread(target=read, args=(ours, closing), daemon=True).start()
    return process.wait()


def take_terminal() -> None:
    """Makes the new session's terminal the one of stdin, and undoes what nohup does."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def read(terminal: int, closing: threading.Event) -> None:
    """Passes on what the command says, until the terminal is closed."""
    while not closing.is_set():
        try:
            os.write(2, os.read(terminal, 1 << 16))
        except OSError:
            return


if __name__ == "__main__":
    sys.exit(main())
