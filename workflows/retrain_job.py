"""One attempt at retraining as a job of a Ray cluster, found again by whoever asks for the same one."""

import re
import shlex
from collections.abc import Sequence

import typer

from cluster.config import ClusterError
from cluster.connect import quiet
from cluster.jobs import Job, JobServer
from pipeline.config import RunConfig
from pipeline.errors import ConfigError
from workflows.submit import CONFIG_FILE, Packages, check_paths, check_room, follow_job, say_where, send, variables_of

OUTCOME = "ddpm retrain: exit code "
_TICK = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def retrain_on_cluster(config: RunConfig, name: str, *, address: str, tick: str | None, packages: Packages, pass_env: Sequence[str]) -> int:
    """Has a cluster make an attempt, follows it, and returns its exit code.

    Args:
        tick: what started it, such as a date or the id of a scheduler's run: the same tick finds its job again, in progress or done. Without one a job
            in progress is attached to, and else another one is submitted.

    Raises:
        ConfigError: if a setting cannot travel, or the tick cannot be part of a name.
        ClusterError: if the cluster does not answer, or does not have what the run needs.
    """
    if tick is not None and not _TICK.fullmatch(tick):
        raise ConfigError(f"--tick {tick} cannot be part of a job's name; use letters, digits, '.', '_' and '-'")
    quiet()
    check_paths(config)
    variables, server = variables_of(pass_env), JobServer(address)
    job_name = f"retrain-{name}" + (f"-{tick}" if tick else "")
    latest = server.latest(job_name)
    if latest is not None and latest.status == "SUCCEEDED" and tick is not None:
        typer.echo(f"{latest.id} is done already")
        return _exit_code(server, latest)
    if latest is not None and latest.is_running:
        typer.echo(f"{latest.id} is in progress already; attached to it")
        job_id = latest.id
    else:
        check_room(server, config)
        command = f"retrain {CONFIG_FILE} --name {shlex.quote(name)} --job"
        job_id = send(server, config, job_name, 1 if latest is None else latest.attempt + 1, command, variables, packages)
    say_where(server, job_id, job_name, variables)
    return follow_job(server, job_id, job_name) or _exit_code(server, server.get(job_id))


def _exit_code(server: JobServer, job: Job) -> int:
    """Returns what an attempt's job said at its end: a job that kept the champion, or skipped, has succeeded for Ray."""
    said = [line for line in server.log(job.id).splitlines() if line.startswith(OUTCOME)]
    if not said:
        raise ClusterError(f"{job.id} has ended and its log does not say how; look at {server.page(job.id)}")
    return int(said[-1].removeprefix(OUTCOME))
