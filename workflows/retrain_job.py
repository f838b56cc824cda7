"""One attempt at retraining as a job of a Ray cluster, found again by whoever asks for the same one."""

import shlex
from collections.abc import Sequence

import typer

from cluster.config import ClusterError
from cluster.connect import quiet
from cluster.jobs import Job, JobServer
from components.names import why_no_name
from pipeline.config import RunConfig
from pipeline.errors import ConfigError
from workflows.outcome import said_in
from workflows.submit import CONFIG_FILE, Packages, check_paths, check_room, check_settings, follow_job, say_where, send, variables_of

ATTEMPT, AGAIN = "retrain~", "run the same command again to resume the attempt"


def retrain_on_cluster(config: RunConfig, name: str, *, address: str, tick: str | None, packages: Packages, pass_env: Sequence[str]) -> int:
    """Has a cluster make an attempt, follows it, and returns its exit code.

    Args:
        tick: what started it, such as a date or the id of a scheduler's run: the same tick finds its job again, in progress or done, and follows
            another only where that failed. Without one a job in progress is attached to, and else another one is submitted.

    Raises:
        ConfigError: if a setting cannot travel, the tick cannot be part of a name, or the job in progress has other settings.
        ClusterError: if the cluster does not answer, does not have what the run needs, or has lost the log that tells the outcome.
    """
    if tick is not None and (wrong := why_no_name(tick, "part of a job's name")):
        raise ConfigError(f"--tick {tick} {wrong}")
    quiet()
    check_paths(config)
    variables, server = variables_of(pass_env), JobServer(address)
    job_name = _job_name(name, tick)
    latest = server.latest(job_name)
    if latest is not None and tick is not None and latest.status in ("SUCCEEDED", "STOPPED"):
        return _ended(server, latest)
    job_id = _running(latest, config)
    if job_id is None:
        check_room(server, config)
        command = f"retrain {CONFIG_FILE} --name {shlex.quote(name)} --job"
        job_id = send(server, config, job_name, 1 if latest is None else latest.attempt + 1, command, variables, packages)
    say_where(server, job_id, job_name, variables)
    return follow_job(server, job_id, job_name, again=AGAIN) or _exit_code(server, job_id)


def _job_name(name: str, tick: str | None) -> str:
    """Returns what a job is found by. Neither names nor ticks hold a `~`, so that no two of them, and no run, make the same."""
    return f"{ATTEMPT}{name}" + (f"~{tick}" if tick else "")


def _ended(server: JobServer, job: Job) -> int:
    """Returns the exit code of a tick that is over: a scheduler that tries again must not start what a person stopped."""
    if job.status == "STOPPED":
        typer.echo(f"{job.id} was stopped; another --tick, or none, resumes the attempt")
        return job.outcome
    typer.echo(f"{job.id} is done already")
    return _exit_code(server, job.id)


def _running(latest: Job | None, config: RunConfig) -> str | None:
    """Returns the job that is in progress, None if there is none.

    Raises:
        ConfigError: if it has other settings.
    """
    if latest is None or not latest.is_running:
        return None
    check_settings(latest, config, f"{latest.id} is in progress", f"wait for it, or stop it with ddpm jobs stop {latest.name}")
    typer.echo(f"{latest.id} is in progress already; attached to it")
    return latest.id


def _exit_code(server: JobServer, job_id: str) -> int:
    """Returns what a job that succeeded said at its end: one that kept the champion, or skipped, has succeeded for Ray.

    Raises:
        ClusterError: if its log is gone or was cut short.
    """
    try:
        said, problem = said_in(server.log(job_id)), "does not say how"
    except ClusterError as error:
        said, problem = None, f"cannot be read: {error}"
    if said is None:
        raise ClusterError(
            f"{job_id} has ended without a failure, and whether it promoted, kept or skipped is lost, for its log {problem}; see ddpm models list"
        )
    return said.code
