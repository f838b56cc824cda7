"""Leases on S3 between processes: races, killed and stopped holders, on stores that honour conditional writes and on those that do not."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from servers import Conditions, S3Server, environment
from support import ROOT

from components.storage import Location
from pipeline.lease_record import Record

SCRIPT = ROOT / "tests" / "lease_process.py"
BRIEF, LONG = 0.1, 1.5
"""Seconds after which a process looks again: enough for a breath, and for all others to have written even on a busy machine."""

Process = subprocess.Popen[str]


@dataclass
class Site:
    """One lease, and the processes that want it.

    Attributes:
        settle_s: how long they wait before they look again.
    """

    store: S3Server
    folder: Path
    settle_s: float
    started: list[Process] = field(default_factory=list)

    @property
    def uri(self) -> str:
        return f"s3://{self.store.bucket}/{self.folder.name}/.lock"

    def start(self, rounds: int, seconds: float, kind: str = "", witness: str = "witness") -> Process:
        command = [sys.executable, str(SCRIPT), self.uri, str(self.folder / witness), str(rounds), str(seconds), str(self.settle_s), *([kind] if kind else [])]
        env = environment(self.store.env | {"PYTHONPATH": str(ROOT)})
        self.started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env))
        return self.started[-1]

    def close(self) -> None:
        for process in self.started:
            process.kill()
            process.communicate()


def line(process: Process) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def ended(process: Process) -> tuple[int, list[str]]:
    """Returns the exit code, and what it said that was not read yet."""
    out, errors = process.communicate(timeout=200)
    assert not errors, errors
    return process.returncode, out.split("\n")[:-1]


@pytest.fixture
def site(request: pytest.FixtureRequest, s3_of_kind: Callable[[Conditions], S3Server], tmp_path: Path) -> Iterator[Site]:
    conditions, settle_s = request.param
    made = Site(s3_of_kind(conditions), tmp_path, settle_s)
    yield made
    made.close()


def on_stores(*kinds: Conditions) -> pytest.MarkDecorator:
    """Where conditions are honoured, it is they and not the wait that let one process in: so a breath is enough."""
    values = [(kind, LONG if kind == "ignored" else BRIEF) for kind in kinds]
    return pytest.mark.parametrize("site", values, indirect=True, ids=kinds)


@on_stores("honoured", "writes", "ignored")
def test_of_processes_that_race_one_is_in_the_block_at_a_time(site: Site):
    racers = [site.start(rounds=2, seconds=0.1) for _ in range(4)]
    assert [ended(racer) for racer in racers] == [(0, ["in", "out"] * 2)] * len(racers)


@pytest.mark.parametrize("site", [("honoured", LONG)], indirect=True, ids=["honoured"])
def test_one_that_uses_no_conditions_and_one_that_does_keep_each_other_out(site: Site):
    racers = [site.start(rounds=2, seconds=0.1, kind=kind) for kind in ("unconditional", "") * 2]
    assert [ended(racer) for racer in racers] == [(0, ["in", "out"] * 2)] * len(racers)


@on_stores("honoured", "ignored")
def test_after_a_killed_holder_one_of_those_who_wait_comes_in_and_then_the_others(site: Site):
    holder = site.start(rounds=1, seconds=600)
    assert line(holder) == "in"
    waiting = [site.start(rounds=1, seconds=0.1) for _ in range(3)]
    holder.kill()
    assert [ended(process) for process in waiting] == [(0, ["in", "out"])] * len(waiting)


@on_stores("honoured", "ignored")
def test_a_holder_that_was_stopped_for_too_long_is_told_and_leaves_the_lease_to_its_successor(site: Site, monkeypatch: pytest.MonkeyPatch):
    stopped = site.start(rounds=1, seconds=600)
    assert line(stopped) == "in"
    stopped.send_signal(signal.SIGSTOP)
    # The stopped process is in its block still, which no lease can make it leave, so the successor has a witness of its own.
    successor = site.start(rounds=1, seconds=600, witness="successor")
    assert line(successor) == "in"
    stopped.send_signal(signal.SIGCONT)
    code, said = ended(stopped)
    assert code == 4
    assert "another process may have taken over" in said[-1]
    for name, value in site.store.env.items():
        monkeypatch.setenv(name, value)
    found = Record.model_validate_json(Location.of(site.uri).read_text())
    assert found.holder.startswith(f"process {successor.pid} on ")
    assert successor.poll() is None
