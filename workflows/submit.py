"""A run on a cluster: the working tree and the resolved settings travel there, the driver runs there, and this machine may go."""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import typer
import yaml

from cluster.config import ClusterError
from cluster.connect import quiet
from cluster.jobs import Job, JobServer
from cluster.placement import plan
from cluster.tree import COMMIT_FILE, stage_tree
from components.ingest.sources import TORCHVISION
from components.scratch import scratch
from pipeline.config import RunConfig, config_digest
from pipeline.errors import ConfigError
from pipeline.tracking import git_commit, ui_link
from workflows.settings import SECRETS, paths_of, travelling_settings

CONFIG_FILE = "submitted.yaml"
SUBMIT_AGAIN = "submit it again under the same name to resume from the last checkpoint"
DRIVER = {"PYTHONUNBUFFERED": "1", "RAY_JOB_STOP_WAIT_TIME_S": "60"}  # seconds to close the run before a stopped driver is killed
Packages = Literal["image", "lock"]
# `uv run` makes the environment once for each node; Ray starts its workers with the same words.
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
PYTHON = {"image": "python", "lock": f"uv run --no-project --isolated --python {VERSION} --with-requirements requirements.lock python"}


def submit(config: RunConfig, name: str, *, address: str, packages: Packages, pass_env: Sequence[str], follow: bool) -> int:
    """Submits a run, or attaches to the one of that name that is in progress, and returns the exit code of the command.

    Raises:
        ConfigError: if a setting cannot travel.
        ClusterError: if the cluster does not answer, or does not have what the run needs.
    """
    quiet()
    check_paths(config)
    variables = variables_of(pass_env)
    server = JobServer(address)
    latest = server.latest(name)
    job_id = _running(latest, config, name)
    if job_id is None:
        check_room(server, config)
        command = f"run {CONFIG_FILE} --name {shlex.quote(name)}"
        job_id = send(server, config, name, 1 if latest is None else latest.attempt + 1, command, variables, packages)
    say_where(server, job_id, name, variables)
    return follow_job(server, job_id, name) if follow else 0


def _running(latest: Job | None, config: RunConfig, name: str) -> str | None:
    """Returns the job of this run that is in progress, None if there is none.

    Raises:
        ConfigError: if it has other settings.
    """
    if latest is None or not latest.is_running:
        return None
    instead = f"stop it with ddpm jobs stop {name}, or choose another --name"
    check_settings(latest, config, f"--name {name} is in progress as {latest.id}", instead)
    typer.echo(f"{name} is in progress already; attached to it")
    return latest.id


def check_settings(job: Job, config: RunConfig, what: str, instead: str) -> None:
    """Checks that a job in progress does what is asked for.

    Args:
        what: says of the job that it is in progress.
        instead: what would be right.

    Raises:
        ConfigError: if it has other settings.
    """
    if job.config_digest != config_digest(config):
        raise ConfigError(f"{what} with other settings (digest {job.config_digest}, not {config_digest(config)}); {instead}")


def check_paths(config: RunConfig) -> None:
    """Checks that every path among the settings means the same on another machine.

    Raises:
        ConfigError: naming the first that does not.
    """
    named = {"cluster.storage": config.cluster.storage, "data.root": config.data.root, "evaluate.inception_weights": config.evaluate.inception_weights}
    paths = paths_of(named, config.data.source, TORCHVISION)
    for key, path in paths.items():
        if not path.startswith("s3://") and not Path(path).is_absolute():
            right = "s3://BUCKET/PREFIX or an absolute path" if key == "cluster.storage" else "an absolute path"
            raise ConfigError(f"{key}={path} is relative to this machine's folder; for a cluster name {right} that every node mounts")


def check_room(server: JobServer, config: RunConfig) -> None:
    """Says at once what the cluster does not have, and otherwise what the run will ask for; with `cluster.wait_s` the job itself waits."""
    cluster = config.cluster.model_copy(update={"address": "auto"})
    try:
        for line in plan(cluster, server.nodes()).lines:
            typer.echo(line)
    except ClusterError as error:
        if not cluster.wait_s:
            raise
        typer.echo(f"  the job will wait up to {cluster.wait_s} s: {error}")


def send(server: JobServer, config: RunConfig, name: str, attempt: int, command: str, variables: Mapping[str, str], packages: Packages) -> str:
    """Sends the working tree with the settings in it, has the cluster run `ddpm COMMAND` there, and returns the job's id.

    Args:
        name: what the job is found by.
    """
    tree = config.model_dump(mode="json")
    tree["cluster"]["address"] = "auto"
    extra = {CONFIG_FILE: yaml.safe_dump(tree, sort_keys=False), COMMIT_FILE: git_commit() + "\n"}
    entrypoint = f"{PYTHON[packages]} -m workflows {command}"
    with scratch("tree") as folder:
        size = stage_tree(folder, extra)
        typer.echo(f"sending {size / 2**20:.1f} MiB of working tree")
        runtime_env: dict[str, Any] = {"working_dir": str(folder), "env_vars": dict(variables) | DRIVER}
        return server.submit(entrypoint, name=name, attempt=attempt, config_digest=config_digest(config), runtime_env=runtime_env)


def variables_of(pass_env: Sequence[str]) -> dict[str, str]:
    """Returns what the driver's environment is given: settings that are no secrets, and what was asked for by name."""
    found = travelling_settings(os.environ, "into the environment of the cluster's nodes")
    for name in pass_env:
        if name not in os.environ:
            raise ConfigError(f"--pass-env {name} is not set here; set it, or leave the option out")
        typer.echo(f"warning: {name} is sent with the job, where everyone who may use the cluster can read it", err=True)
        found[name] = os.environ[name]
    kept = [name for name in SECRETS if os.environ.get(name) and name not in found]
    if kept:
        typer.echo(f"{', '.join(kept)} {'is' if len(kept) == 1 else 'are'} not sent: secrets come from the cluster's own environment", err=True)
    return found


def say_where(server: JobServer, job_id: str, name: str, variables: Mapping[str, str]) -> None:
    """Says where a job and its model are seen, and how it is followed."""
    typer.echo(f"job     {job_id}")
    typer.echo(f"page    {server.page(job_id)}")
    if variables.get("MLFLOW_TRACKING_URI", "").startswith("http"):
        typer.echo(f"models  {ui_link(variables['MLFLOW_TRACKING_URI'], 'models')}")
    typer.echo(f"follow  ddpm jobs logs {name} --address {server.address}")


def follow_job(server: JobServer, job_id: str, name: str, again: str = SUBMIT_AGAIN) -> int:
    """Writes a job's log to stdout until it ends, and returns the exit code that follows from its end; Ctrl-C leaves the job alone.

    Args:
        again: how a job that failed goes on.

    Raises:
        KeyboardInterrupt: on Ctrl-C, after saying how to come back.
    """
    try:
        job = server.follow(job_id, _write)
    except KeyboardInterrupt:
        typer.echo(f"\ndetached; {job_id} keeps running. Attach again with: ddpm jobs logs {name} --address {server.address}", err=True)
        raise
    typer.echo(f"{job.id} {job.status.lower()}{_reason(job, again)}", err=True)
    return job.outcome


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _reason(job: Job, again: str) -> str:
    if job.status == "SUCCEEDED":
        return ""
    return f" with exit code {job.exit_code}; {again}" if job.exit_code is not None else f"; {again}"
