"""`ddpm status`: what runs here and on a cluster, how far it is, and when it was last heard of."""

import json
from typing import Annotated

import typer

from workflows.options import storage_of

Storage = Annotated[str, typer.Option("--storage", help="Storage root: a folder, or s3://BUCKET/PREFIX.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the same as JSON, as the only thing on stdout.")]
WIDTH = 150


def status_command(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One run; all by default.")] = None,
    storage: Storage = "./storage",
    address: Annotated[str | None, typer.Option(metavar="URL", help="Ask a Ray cluster for its jobs, too: its dashboard, such as http://HEAD:8265.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what goes on: stage, step, speed, time left, age of the last checkpoint, last restart."""
    from pipeline.errors import ConfigError
    from pipeline.housekeeping.status import statuses
    from workflows.streams import stdout_to_stderr

    with stdout_to_stderr() as stdout:
        found = [status for status in statuses(storage_of(storage)) if name in (None, status.name)]
        if name is not None and not found:
            raise ConfigError(f"{name} is no run below {storage}; `ddpm status` lists them")
        jobs = _jobs(address) if address is not None else []
        if as_json:
            stdout.write(json.dumps({"runs": [status.to_json() for status in found], "jobs": jobs}, indent=2) + "\n")
            return
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        from pipeline.progress import duration

        console = Console(file=stdout, width=WIDTH, highlight=False)
        if not found and not jobs:
            console.print(f"no run below {escape(storage)} yet; ddpm run digits makes one")
            return
        table = Table(box=None)
        for column in ("run", "is", "stage", "step", "steps/s", "left", "loss", "last checkpoint", "last restart"):
            table.add_column(column, justify="right" if column in ("step", "steps/s", "left", "loss") else "left")
        for status in found:
            step = "" if status.step is None else f"{status.step:,}" + (f"/{status.steps:,}" if status.steps else "")
            speed = "" if status.steps_per_second is None else f"{status.steps_per_second:.3g}"
            left = "" if status.seconds_left is None else duration(status.seconds_left)
            age = "" if status.checkpoint_age is None else f"{duration(status.checkpoint_age)} ago"
            loss = "" if status.loss is None else f"{status.loss:.4g}"
            table.add_row(status.name, "running" if status.busy else "", status.stage, step, speed, left, loss, age, escape(status.restart or ""))
        console.print(table)
        for job in jobs:
            console.print(f"job {job['name']}: {job['status']}")


def _jobs(address: str) -> list[dict[str, str]]:
    from cluster.jobs import JobServer

    return [{"name": job.name, "status": job.status} for job in JobServer(address).jobs()]
