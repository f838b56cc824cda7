"""`ddpm plan`: what a run will take, before anything is trained or submitted; `--plan-first` refuses what is beyond `cluster.max_hours`."""

import json
import re
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO
from zoneinfo import ZoneInfo

import typer

from cluster.config import ClusterError
from cluster.connect import quiet
from cluster.jobs import JobServer
from components.storage import Location
from pipeline.autoencoder import PRESET
from pipeline.config import RunConfig
from pipeline.context import Reporter
from pipeline.errors import ConfigError
from pipeline.planning.estimate import over_budget
from pipeline.planning.make import First, plan_by_last, plan_by_probe
from pipeline.planning.records import Plan, Quantity
from workflows.autoencoder_first import autoencoder_config, trained_address
from workflows.plan_table import print_plan
from workflows.schedule.command import folder_of
from workflows.submit import CONFIG_FILE, Packages, check_paths, check_room, send, variables_of

MONTH_DAYS = 30
JOB = "plan~"
SAID = "ddpm plan: "
_SAID = re.compile(rf"^{SAID}(\{{.*\}})$", re.MULTILINE)


def plan_run(config: RunConfig, name: str, *, last: bool = False) -> Plan:
    """Returns the plan of a run where this command runs, or on the cluster that it has joined.

    Args:
        last: take what the last training of the same settings took, from MLflow, and try nothing.
    """
    reporter, first, often = Reporter(), _first(config), runs_per_month(config, name)
    if last:
        return plan_by_last(config, name, nodes=None, first=first, runs_per_month=often, reporter=reporter)
    return plan_by_probe(config, name, first=first, runs_per_month=often, reporter=reporter)


def plan_on_cluster(config: RunConfig, name: str, *, address: str, last: bool, packages: Packages, pass_env: Sequence[str]) -> Plan:
    """Returns the plan of a run on a Ray cluster: a job there measures, with workers as the run would have.

    Args:
        last: take what the last training of the same settings took on such devices, from MLflow, and try nothing.

    Raises:
        ConfigError: if a setting cannot travel, or the job says what is wrong.
        ClusterError: if the cluster does not answer, or does not have what the run needs.
    """
    quiet()
    check_paths(config)
    server = JobServer(address)
    if last:
        joined = config.model_copy(update={"cluster": config.cluster.model_copy(update={"address": "auto"})})
        return plan_by_last(joined, name, nodes=server.nodes(), first=_first(config), runs_per_month=runs_per_month(config, name), reporter=Reporter())
    check_room(server, config)
    latest = server.latest(JOB + name)
    command, attempt = f"plan {CONFIG_FILE} --name {shlex.quote(name)} --job", 1 if latest is None else latest.attempt + 1
    job_id = send(server, config, JOB + name, attempt, command, variables_of(pass_env), packages)
    try:
        job = server.follow(job_id, _progress)
    except KeyboardInterrupt:
        server.stop(job_id)
        raise
    log = server.log(job_id)
    found = _SAID.findall(log.replace("\r\n", "\n"))
    if found:
        return Plan.model_validate_json(found[-1])
    errors = [line.removeprefix("error: ") for line in log.splitlines() if line.startswith("error: ")]
    if errors:
        raise ConfigError(*errors)
    raise ClusterError(f"{job.id} {job.status.lower()} without a plan; ddpm jobs logs {JOB}{name} --address {server.address} shows why")


def _progress(text: str) -> None:
    """Shows a job's log as it grows, but for the line that is its result."""
    if SAID not in text:
        typer.echo(text, err=True, nl=False)


def say_plan(out: IO[str], plan: Plan, *, as_json: bool, as_job: bool = False) -> None:
    """Prints a plan, as a table or as JSON."""
    if as_job:
        out.write(f"{SAID}{plan.model_dump_json()}\n")
    elif as_json:
        out.write(json.dumps(plan.model_dump(mode="json"), indent=2) + "\n")
    else:
        print_plan(out, plan)


def check_budget(config: RunConfig, plan: Plan) -> None:
    """Raises ConfigError where a plan is over `cluster.max_hours`."""
    if problem := over_budget(plan, config.cluster.max_hours):
        raise ConfigError(problem)


def _first(config: RunConfig) -> First | None:
    """Returns the autoencoder that is trained first, None without one."""
    address = config.data.autoencoder
    if address is None or not address.startswith(PRESET):
        return None
    preset = address.removeprefix(PRESET)
    own, name = autoencoder_config(config, preset), Path(preset).stem
    return First(own, name, trained_address(own, Location.of(config.cluster.storage) / "runs" / name))


def runs_per_month(config: RunConfig, name: str) -> Quantity:
    """Returns how many attempts the schedule of a run makes in 30 days; one a day where there is no schedule of that name."""
    from workflows.schedule.plan import Plan as Schedule

    try:
        when = Schedule.load(folder_of(Location.of(config.cluster.storage), None, name)).when
    except (OSError, ValueError):
        return Quantity(value=MONTH_DAYS, basis="assumed")
    if when.interval_s is not None:
        return Quantity(value=MONTH_DAYS * 86400 / when.interval_s, basis="computed")
    if when.cron is not None:
        return Quantity(value=cron_starts(when.cron, when.time_zone), basis="computed")
    return Quantity(value=MONTH_DAYS, basis="assumed")


_NAMES = {name: number for names, first in (("jan feb mar apr may jun jul aug sep oct nov dec", 1), ("sun mon tue wed thu fri sat", 0))
          for number, name in enumerate(names.split(), first)}  # fmt: skip
_RANGES = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7))


def cron_starts(line: str, time_zone: str) -> int:
    """Returns how often a cron line of five fields comes in the 30 days from now on."""
    fields = [_numbers(text, *limits) for text, limits in zip(line.split(), _RANGES, strict=True)]
    day_of_month, day_of_week = (line.split()[place] != "*" for place in (2, 4))
    today, starts = datetime.now(UTC).astimezone(ZoneInfo(time_zone)).date(), 0
    for day in (today + timedelta(days=number) for number in range(MONTH_DAYS)):
        by_month, by_week = day.day in fields[2], bool({day.isoweekday(), day.isoweekday() % 7} & fields[4])
        matches = by_month or by_week if day_of_month and day_of_week else by_month and by_week
        starts += matches and day.month in fields[3]
    return starts * len(fields[0]) * len(fields[1])


def _numbers(text: str, low: int, high: int) -> set[int]:
    """Returns the numbers that a field of a cron line names."""
    found: set[int] = set()
    for part in text.lower().split(","):
        span, _, step = part.partition("/")
        first, dash, last = span.partition("-")
        begin = low if first == "*" else _NAMES.get(first, -1) if not first.isdigit() else int(first)
        end = high if first == "*" or (step and not dash) else begin if not dash else _NAMES.get(last, -1) if not last.isdigit() else int(last)
        found |= set(range(begin, end + 1, int(step or 1)))
    return found
