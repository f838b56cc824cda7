"""A command in a process of its own, and every process that came of it, each known by its id and the moment of its birth.

Ray's daemons change parents when the one that started them ends; whoever was seen once is remembered, so that none escapes.
"""

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

TRAINING_WORKER = "RayTrainWorker"
POLL_S = 0.05
SETTLE_S = 2.0
_SHARED_MEMORY = Path("/dev/shm")


class ProcessTree:
    """A running command and its descendants. Only these are ever ended, by id, and never one that merely got the id of one."""

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str], stdout: Path, stderr: Path) -> None:
        """Starts the command in a session of its own, so that Ctrl-C on a terminal reaches only who watches it.

        Args:
            stdout: file for what it prints, written anew.
            stderr: file for what else it says, appended to.
        """
        with stdout.open("wb") as out, stderr.open("ab") as err:
            self._main = subprocess.Popen(command, env=dict(env), stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True)
        self._members = {psutil.Process(self._main.pid)}

    def code(self) -> int | None:
        """Returns the exit code of the command, None while it runs."""
        return self._main.poll()

    def look(self) -> list[psutil.Process]:
        """Returns who is alive, new descendants included, the eldest first; to be called often, for it is how they become known."""
        children = _by_parent()
        unseen = [member for member in self._members if is_alive(member)]
        while unseen:
            for child in children.get(unseen.pop().pid, []):
                if child not in self._members:
                    self._members.add(child)
                    unseen.append(child)
        return sorted((member for member in self._members if is_alive(member)), key=lambda member: (member.create_time(), member.pid))

    @property
    def main(self) -> psutil.Process:
        """The command itself."""
        return psutil.Process(self._main.pid)

    def training_workers(self) -> list[psutil.Process]:
        """Returns Ray Train's workers, the eldest first."""
        return self.called(TRAINING_WORKER)

    def called(self, title: str) -> list[psutil.Process]:
        """Returns who has something in its command line, the eldest first."""
        return [member for member in self.look() if title in _title(member)]

    def wait(self, seconds: float) -> list[str]:
        """Waits until nobody is alive any more, and returns who is after that many seconds, such as `123 raylet`."""
        deadline = time.monotonic() + seconds
        while (alive := self.look()) and time.monotonic() < deadline:
            self._main.poll()
            time.sleep(POLL_S)
        return [f"{member.pid} {_title(member)[:60]}" for member in alive]

    def kill(self) -> int:
        """Ends everybody with SIGKILL, the command first, waits until nobody is left, and returns how many there were."""
        count = len(self.look())
        self._main.kill()
        self._main.wait()
        while alive := self.look():
            for member in alive:
                with suppress(psutil.NoSuchProcess):
                    member.kill()
            time.sleep(POLL_S)
        return count


def _by_parent() -> dict[int, list[psutil.Process]]:
    children: dict[int, list[psutil.Process]] = {}
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            children.setdefault(process.ppid(), []).append(process)
    return children


def is_alive(process: psutil.Process) -> bool:
    """Tells whether it runs; what is dead and only waits to be taken note of does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""


def shared_memory_files() -> set[str]:
    """Returns the names of this user's files in shared memory; none where the system keeps it elsewhere."""
    found = set()
    for file in _SHARED_MEMORY.glob("*"):
        with suppress(OSError):
            if file.is_file() and file.stat().st_uid == os.getuid():
                found.add(file.name)
    return found


def without_owner(names: set[str]) -> list[str]:
    """Returns which files in shared memory stay while no living process has mapped or opened them; others' come and go."""
    time.sleep(SETTLE_S)
    used: set[str] = set()
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            used.update(file.path for file in process.memory_maps())
            used.update(file.path for file in process.open_files())
    return sorted(name for name in names if str(_SHARED_MEMORY / name) not in used and (_SHARED_MEMORY / name).exists())
