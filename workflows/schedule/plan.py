"""What is run and when: the record that the scheduler's processes share."""

import re
import shlex
import sys
from datetime import UTC, datetime
from typing import Self
from zoneinfo import ZoneInfo

from pydantic import BaseModel, ConfigDict

from components.storage import Location
from pipeline.errors import ConfigError

FILE = "plan.json"
FLOW = "retrain"
ANCHOR = datetime(2024, 1, 1, tzinfo=UTC)
"""A Monday's midnight that intervals are counted from, so that a restart moves none of their times."""
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(r"([1-9][0-9]*)([smhd])")


class When(BaseModel):
    """When an attempt is made: one of three is set.

    Attributes:
        cron: five fields, read in the time zone.
        interval_s: seconds between two attempts.
        poll_s: seconds between two looks at the source; an attempt follows a change.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    cron: str | None = None
    interval_s: int | None = None
    poll_s: int | None = None
    time_zone: str = "Etc/UTC"

    @classmethod
    def of(cls, cron: str | None, interval: str | None, on_change: bool, poll: str, time_zone: str) -> Self:
        """Returns what a person asked for.

        Raises:
            ConfigError: if that is none or several of the three, or one of them cannot be read.
        """
        asked = [name for name, value in (("--cron", cron), ("--interval", interval), ("--on-change", on_change)) if value]
        if len(asked) != 1:
            raise ConfigError(f"{' and '.join(asked) or 'no time'} asked for; use one of --cron '0 3 * * *', --interval 1h and --on-change")
        if cron is not None and len(cron.split()) != 5:
            raise ConfigError(f"--cron {cron!r} has {len(cron.split())} fields; use five: minute, hour, day, month, day of the week, such as '0 3 * * *'")
        check_zone(time_zone)
        interval_s = None if interval is None else seconds_of("--interval", interval)
        return cls(cron=cron, interval_s=interval_s, poll_s=seconds_of("--poll", poll) if on_change else None, time_zone=time_zone)

    def __str__(self) -> str:
        if self.cron is not None:
            return f"at {self.cron} ({self.time_zone})"
        if self.interval_s is not None:
            return f"every {duration_of(self.interval_s)}, counted from midnight UTC"
        return f"when source or preset have changed, looked at every {duration_of(self.poll_s or 0)}"


def seconds_of(option: str, text: str) -> int:
    """Returns a duration such as 90s, 15m, 1h or 1d in seconds.

    Raises:
        ConfigError: if it is none.
    """
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ConfigError(f"{option} {text} is no duration; use a number and a unit, such as 90s, 15m, 1h or 1d")
    return int(match[1]) * _UNITS_S[match[2]]


def duration_of(seconds: int) -> str:
    """Returns seconds as `seconds_of` reads them, in the largest unit that fits."""
    unit = next(unit for unit, size in reversed(_UNITS_S.items()) if seconds % size == 0)
    return f"{seconds // _UNITS_S[unit]}{unit}"


def check_zone(name: str) -> None:
    """Checks the name of a time zone. Raises ConfigError if there is none such."""
    try:
        ZoneInfo(name)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"--time-zone {name} is unknown; use a name such as Europe/Berlin or Etc/UTC") from error


class Plan(BaseModel):
    """One preset and its schedule.

    Attributes:
        file: the preset's.
        overrides: settings laid on it.
        data: its section `data` as JSON, which says what source to look at.
        name: of the run, of the deployment and of the schedule's folder.
        cwd: folder that relative paths of the settings start from.
        retries: times that a failed stage is tried again within one run.
        command: what an attempt runs, without the options that choose a stage.
        storage: root of what the runs make.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    overrides: tuple[str, ...] = ()
    data: str
    name: str
    when: When
    cwd: str
    storage: str
    port: int = 4200
    retries: int = 1
    command: tuple[str, ...]

    def __str__(self) -> str:
        return shlex.join(self.command)

    @property
    def api(self) -> str:
        """Address of the server's API."""
        return f"{self.page}/api"

    @property
    def page(self) -> str:
        """Address of the page."""
        return f"http://127.0.0.1:{self.port}"

    def save(self, folder: Location) -> None:
        """Writes the plan for the processes that carry it out."""
        (folder / FILE).write_text(self.model_dump_json(indent=2))

    @classmethod
    def load(cls, folder: Location) -> Self:
        """Returns the plan of a schedule's folder."""
        return cls.model_validate_json((folder / FILE).read_text())


def retrain_command(preset: str, overrides: tuple[str, ...], name: str) -> tuple[str, ...]:
    """Returns the command of an attempt, the same that crontab or Kubernetes would call."""
    return (sys.executable, "-m", "workflows", "retrain", preset, *overrides, "--name", name)
