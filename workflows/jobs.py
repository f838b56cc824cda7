"""What the command tells of runs on a cluster."""

import json
import sys
from dataclasses import asdict
from datetime import UTC, datetime

import typer
from rich.console import Console
from rich.table import Table

from cluster.connect import quiet
from cluster.jobs import Job, JobServer
from workflows.retrain_job import AGAIN, ATTEMPT
from workflows.submit import SUBMIT_AGAIN, follow_job


def _server(address: str) -> JobServer:
    quiet()
    return JobServer(address)


def print_jobs(address: str, as_json: bool) -> None:
    """Prints the runs of a cluster, the latest first."""
    jobs = _server(address).jobs()
    if as_json:
        typer.echo(json.dumps([asdict(job) for job in jobs], indent=2))
        return
    if not jobs:
        typer.echo("no runs yet; ddpm submit PRESET --address URL makes one")
        return
    table = Table()
    for column in ("run", "job", "status", "started (UTC)", "took", "config"):
        table.add_column(column, overflow="fold")
    for job in jobs:
        table.add_row(job.name, job.id, job.status.lower(), _moment(job.started_ms), _duration(job), job.config_digest)
    Console(highlight=False, width=None if sys.stdout.isatty() else 140).print(table)


def print_status(name: str, address: str, as_json: bool) -> int:
    """Prints how a run stands and returns the exit code that follows from it."""
    server = _server(address)
    job = server.find(name)
    if as_json:
        typer.echo(json.dumps(asdict(job), indent=2))
    else:
        typer.echo(f"{job.name} {job.status.lower()}: {job.id}, started {_moment(job.started_ms)} UTC, {_duration(job)}")
        typer.echo(f"{job.message.strip().splitlines()[0]}\n{server.page(job.id)}" if job.message.strip() else server.page(job.id))
    return 0 if job.is_running else job.outcome


def print_logs(name: str, address: str, follow: bool) -> int:
    """Prints the log of a run; where it is followed, returns the exit code that follows from its end."""
    server = _server(address)
    job = server.find(name)
    if follow:
        return follow_job(server, job.id, job.name, again=AGAIN if job.name.startswith(ATTEMPT) else SUBMIT_AGAIN)
    sys.stdout.write(server.log(job.id))
    return 0


def stop(name: str, address: str) -> None:
    """Stops a run and says how it goes on."""
    server = _server(address)
    job = server.find(name)
    if not job.is_running:
        typer.echo(f"{job.id} has {job.status.lower()} already")
        return
    job = server.stop(job.id)
    again = f"submit it again under the name {job.name} to resume from the last checkpoint"
    if job.name.startswith(ATTEMPT):
        again = "ddpm retrain with another --tick, or none, resumes the attempt"
    typer.echo(f"{job.id} {job.status.lower()}; {again}")


def _moment(milliseconds: int | None) -> str:
    return "" if milliseconds is None else datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _duration(job: Job) -> str:
    if job.started_ms is None:
        return "waiting"
    ended = job.ended_ms or int(datetime.now(UTC).timestamp() * 1000)
    minutes, seconds = divmod((ended - job.started_ms) // 1000, 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
