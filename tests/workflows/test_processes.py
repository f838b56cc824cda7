"""Whom a command's family counts in, and whom it never touches."""

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from workflows import processes
from workflows.processes import ProcessTree, shared_memory_files, without_owner

SLEEP = "import time; time.sleep(300)"
DAEMON = f"""
import os, subprocess, sys, time
if os.fork() == 0:
    os.setsid()
    subprocess.Popen([sys.executable, "-c", {SLEEP!r}])
    time.sleep(300)
while not os.path.exists(sys.argv[1]):
    time.sleep(0.02)
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., ProcessTree]]:
    families = []

    def call(*arguments: str) -> ProcessTree:
        families.append(ProcessTree([sys.executable, *arguments], env=os.environ, stdout=tmp_path / "out", stderr=tmp_path / "err"))
        return families[-1]

    yield call
    for family in families:
        family.kill()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_daemon_and_its_child_belong_to_the_family_after_the_command_has_ended(start: Callable[..., ProcessTree], tmp_path: Path):
    family = start("-c", DAEMON, str(tmp_path / "end"))
    wait_until(lambda: len(family.look()) == 3)
    (tmp_path / "end").touch()
    wait_until(lambda: family.code() == 0)
    assert len(family.look()) == 2
    assert len(family.wait(0.2)) == 2
    assert family.kill() == 2
    assert family.look() == []
    assert family.wait(60) == []


def test_killing_a_family_leaves_everybody_else_alone(start: Callable[..., ProcessTree]):
    other = subprocess.Popen([sys.executable, "-c", SLEEP])
    try:
        family = start("-c", SLEEP)
        assert [member.pid for member in family.look()] != [other.pid]
        assert family.kill() == 1
        assert psutil.Process(other.pid).is_running()
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_the_exit_code_and_what_was_said_are_the_commands(start: Callable[..., ProcessTree], tmp_path: Path):
    family = start("-c", "import sys; print('out'); print('err', file=sys.stderr); sys.exit(7)")
    wait_until(lambda: family.code() is not None)
    assert (family.code(), (tmp_path / "out").read_text(), (tmp_path / "err").read_text()) == (7, "out\n", "err\n")


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs /dev/shm")
def test_a_file_in_shared_memory_is_left_behind_once_nobody_has_it_open(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processes, "SETTLE_S", 0.0)
    name = f"ddpm-test-{uuid.uuid4().hex}"
    try:
        with Path("/dev/shm", name).open("w"):
            assert name in shared_memory_files()
            assert without_owner({name, "not-there"}) == []
        assert without_owner({name, "not-there"}) == [name]
    finally:
        Path("/dev/shm", name).unlink()
