"""Lets `ddpm schedule` retrain every minute for some minutes, and prints each run: when it was due, when it began, how it ended, and whether two met.

    python benchmarks/schedule.py [--minutes 10] [--preset digits] [SECTION.KEY=VALUE ...]

All is kept in a folder of its own, which is removed at the end; --keep FOLDER keeps it.
"""

import argparse
import itertools
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from components.storage import Location
from workflows.schedule.plan import Plan
from workflows.schedule.supervisor import environment, password_of


def main() -> int:
    """Reads the options, measures, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--preset", default="digits")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--port", type=int, default=4299)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ddpm-schedule-") as folder:
        home = (options.keep or Path(folder)).absolute()
        home.mkdir(parents=True, exist_ok=True)
        return measure(home, options.preset, options.overrides, options.port, options.minutes)


def measure(home: Path, preset: str, overrides: list[str], port: int, minutes: float) -> int:
    """Runs the schedule and prints what it did; returns 1 where two runs met."""
    command = [sys.executable, "-m", "workflows", "schedule", preset, *overrides, "--cron", "* * * * *", "--port", str(port), "--name", "every-minute"]
    scheduler = subprocess.Popen(command, cwd=home, env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        time.sleep(minutes * 60)
        runs = runs_of(Location(str(home / "storage" / "schedule" / "every-minute")))
    finally:
        scheduler.send_signal(signal.SIGTERM)
        code = scheduler.wait()
    print(f"\n{'due':8}  {'began':8}  {'late s':>6}  {'took s':>7}  state")
    for run in runs:
        began = "" if run.began is None else f"{run.began:%H:%M:%S}  {(run.began - run.due).total_seconds():6.1f}  {run.took.total_seconds():7.1f}"
        print(f"{run.due:%H:%M:%S}  {began:25}  {run.state}")
    ran = [run for run in runs if run.began is not None]
    met = sum(run.ended > later.began for run, later in itertools.pairwise(ran) if later.began is not None)
    print(f"{len(ran)} runs began, {met} of them before the one before had ended; the scheduler ended with code {code}")
    return 1 if met or not ran else 0


@dataclass(frozen=True)
class Ran:
    """A run whose time has come.

    Attributes:
        began: None if it never did.
        ended: now, where it has not.
        took: time in which it was running, without an outage in between.
    """

    due: datetime
    began: datetime | None
    ended: datetime
    took: timedelta
    state: str


def runs_of(folder: Location) -> list[Ran]:
    """Returns the runs whose time has come, in the order of their times."""
    os.environ.update(environment(Plan.load(folder), folder, password_of(folder)))
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.sorting import FlowRunSort

    with get_client(sync_client=True) as client:
        found = client.read_flow_runs(sort=FlowRunSort.EXPECTED_START_TIME_ASC, limit=200)
    now = datetime.now(UTC)
    due = [(run, run.expected_start_time) for run in found if run.expected_start_time is not None and run.expected_start_time < now]
    return [Ran(time, run.start_time if run.run_count else None, run.end_time or now, run.estimated_run_time, said(run.state)) for run, time in due]


def said(state: object) -> str:
    """Returns a state's name and message."""
    return re.sub(r", type=\w+", "", str(state))


if __name__ == "__main__":
    sys.exit(main())
