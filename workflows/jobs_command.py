"""`ddpm jobs`: runs on a cluster."""

import contextlib
from collections.abc import Iterator
from typing import Annotated

import typer

from workflows.options import Commands

INTERRUPTED = 130

jobs_app = Commands(
    name="jobs",
    help="Runs on a cluster: list, status, logs, stop.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

JobName = Annotated[str, typer.Argument(metavar="NAME", help="The run's name, or a job's id.")]
Address = Annotated[str, typer.Option("--address", metavar="URL", help="The cluster's Ray dashboard, such as http://HEAD:8265.")]


@contextlib.contextmanager
def detaching() -> Iterator[None]:
    """Makes Ctrl-C end a block that only looks on, with its exit code."""
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


@jobs_app.command("list")
def jobs_list(address: Address, as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False) -> None:
    """List the runs that were submitted to a cluster."""
    from workflows.jobs import print_jobs

    print_jobs(address, as_json)


@jobs_app.command("status")
def jobs_status(run_name: JobName, address: Address, as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False) -> None:
    """Print the status of a run; the exit code is 0 while it runs or when it succeeded."""
    from workflows.jobs import print_status

    raise typer.Exit(print_status(run_name, address, as_json))


@jobs_app.command("logs")
def jobs_logs(
    run_name: JobName, address: Address, follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Go on until the job ends; Ctrl-C detaches.")] = True
) -> None:
    """Print the log of a run, from its beginning, and follow it."""
    from workflows.jobs import print_logs

    with detaching():
        raise typer.Exit(print_logs(run_name, address, follow))


@jobs_app.command("stop")
def jobs_stop(run_name: JobName, address: Address) -> None:
    """Stop a run. Submit it again under its name to resume from its last checkpoint."""
    from workflows.jobs import stop

    stop(run_name, address)
