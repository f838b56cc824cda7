"""The scheduler's processes: how they are recognised, also after a crash, and how they are ended."""

import contextlib
import os
import signal
from collections.abc import Iterable

import psutil

from workflows.processes import is_alive

MARK = "DDPM_SCHEDULE"
"""Environment variable that each process of a schedule inherits; it names the schedule's folder."""


def family(folder: str) -> list[psutil.Process]:
    """Returns the living processes of a schedule's folder, but for this one and those that started it.

    They are found by what they inherited, not by a file of numbers: so those are found too that a killed process had started, and no other
    process that was given a number of theirs since.
    """
    mine = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    return [process for process in psutil.process_iter() if process.pid not in mine and _mark_of(process) == folder and is_alive(process)]


def _mark_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(MARK)
    except (psutil.Error, OSError):
        return None


def end(processes: Iterable[psutil.Process], grace_s: float) -> None:
    """Asks processes to end, and kills those that have not within some seconds."""
    living = [process for process in processes if is_alive(process)]
    _send(living, signal.SIGTERM)
    _, living = psutil.wait_procs(living, timeout=grace_s)
    kill(living)


def kill(processes: Iterable[psutil.Process]) -> None:
    """Ends processes at once."""
    living = [process for process in processes if is_alive(process)]
    _send(living, signal.SIGKILL)
    psutil.wait_procs(living, timeout=10)


def _send(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def with_descendants(pid: int) -> list[psutil.Process]:
    """Returns a process and all that came of it, none where it has ended."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
