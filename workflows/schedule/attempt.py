"""One stage of an attempt: `ddpm retrain --until STAGE` in a process of its own, its words passed on, its exit code read. Knows no Prefect."""

import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from typing import IO, Literal

from pydantic import BaseModel, ValidationError

from workflows.schedule import processes

STAGES = ("preprocess", "train", "evaluate", "register")
SUCCEEDED, KEPT, SKIPPED, STOPPED, USER_ERROR = 0, 10, 11, 12, 2
GRACE_S = 20.0
"""Seconds to close the run before it is killed; Prefect gives a cancelled run 30 in all."""
_FINAL = (STOPPED, USER_ERROR)
_SHOWN_LINES = 5


class Outcome(BaseModel):
    """What `ddpm retrain --json` prints, as far as the page shows it."""

    outcome: Literal["promoted", "kept", "skipped", "stopped", "open"]
    reason: str
    name: str
    attempt: int | None = None
    run_name: str | None = None
    mlflow_run_id: str | None = None
    mlflow_uri: str | None = None
    model: str | None = None
    report: str | None = None
    summary: str | None = None

    @property
    def is_open(self) -> bool:
        """Whether stages of the attempt are still to come."""
        return self.outcome == "open"


class StageError(Exception):
    """Raised where a stage failed, with what it said last.

    Attributes:
        is_final: whether the same command would say the same again.
        is_stopped: whether a guard stopped the attempt.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.is_final = code in _FINAL
        self.is_stopped = code == STOPPED


def run_stage(command: Sequence[str], stage: str, cwd: str, say: Callable[[str], None]) -> Outcome:
    """Does an attempt up to a stage; what was done is found again by the command itself.

    Interrupted, it asks the command to close its run, and leaves no process behind.

    Args:
        say: is given each line that the command writes to stderr.

    Raises:
        StageError: if the stage failed, or a guard stopped the attempt.
    """
    until = [] if stage == STAGES[-1] else ["--until", stage]
    with tempfile.TemporaryFile() as stdout:
        with subprocess.Popen(
            [*command, *until, "--json"], cwd=cwd, env=_environment(), stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE
        ) as process:
            try:
                said = _pass_on(process, say)
                code = process.wait()
            finally:
                if process.returncode is None:
                    processes.end(processes.with_descendants(process.pid), GRACE_S)
        stdout.seek(0)
        return read_outcome(code, stdout, said)


def _environment() -> dict[str, str]:
    """Returns this environment without Prefect's settings, one of which is a password."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}


def _pass_on(process: subprocess.Popen[bytes], say: Callable[[str], None]) -> list[str]:
    """Passes on each line of stderr; returns the last ones."""
    assert process.stderr is not None
    said: list[str] = []
    for raw in process.stderr:
        line = raw.decode(errors="replace").rstrip()
        if line:
            say(line)
            said = [*said[-_SHOWN_LINES:], line]
    return said


def read_outcome(code: int, stdout: IO[bytes], said: Sequence[str]) -> Outcome:
    """Returns what a finished command says of the attempt.

    Raises:
        StageError: if it failed, or a guard stopped the attempt.
    """
    try:
        outcome = Outcome.model_validate_json(stdout.read())
    except ValidationError as error:
        outcome = None
        if code in (SUCCEEDED, KEPT, SKIPPED):
            raise StageError(f"exit code {code} without the JSON object that --json asks for; is this another version of ddpm?", USER_ERROR) from error
    if code == STOPPED and outcome is not None:
        raise StageError(outcome.reason, code)
    if outcome is None or code not in (SUCCEEDED, KEPT, SKIPPED):
        raise StageError(f"exit code {code}: {said[-1] if said else 'it said nothing'}", code)
    return outcome
