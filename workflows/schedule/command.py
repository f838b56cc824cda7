"""`ddpm schedule`: retrain at times, with a page that shows each run."""

import importlib.util
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from components.scratch import scratch
from workflows.options import Commands, run_name_of, storage_of
from workflows.preset_files import find_preset

if TYPE_CHECKING:
    from components.storage import Location

schedule_app = Commands()
_CRON_CHECK = """
import sys
from prefect.schedules import Cron
try:
    Cron(sys.argv[1])
except ValueError as error:
    sys.exit(str(error))
"""


@schedule_app.command(rich_help_panel="Run")
def schedule(
    preset: Annotated[str, typer.Argument(metavar="PRESET", help="A preset's name or the path of a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings laid on the preset.")] = None,
    cron: Annotated[str | None, typer.Option(metavar="LINE", help="Retrain at these times: five cron fields, such as '0 3 * * *'.")] = None,
    interval: Annotated[str | None, typer.Option(metavar="DURATION", help="Retrain every so often: 30m, 1h, 1d.")] = None,
    on_change: Annotated[bool, typer.Option("--on-change", help="Retrain when the source or the preset has changed.")] = False,
    poll: Annotated[str, typer.Option(metavar="DURATION", help="With --on-change: how often to look.")] = "30s",
    time_zone: Annotated[str, typer.Option(help="Time zone of --cron.")] = "Etc/UTC",
    name: Annotated[str | None, typer.Option("--name", help="What to call runs and schedule; the preset's name by default.")] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the page on 127.0.0.1.")] = 4200,
    retries: Annotated[int, typer.Option(min=0, help="Times that a failed stage is tried again within its run.")] = 1,
    storage: Annotated[
        str | None, typer.Option("--storage", metavar="FOLDER", help="Where the schedule keeps its database and password; by default below cluster.storage.")
    ] = None,
) -> None:
    """Retrain on a schedule, in the foreground, with a page of all runs; needs the extra "schedule"."""
    _check_installed()
    from components.storage import Location
    from pipeline.config import load_config
    from pipeline.names import check_namesake
    from workflows.schedule.plan import Plan, When, retrain_command

    when = When.of(cron, interval, on_change, poll, time_zone)
    file, laid = find_preset(preset), tuple(overrides or ())
    run_name = run_name_of(name, file)
    config = load_config(file, laid)
    root = Location.of(config.cluster.storage)
    folder = folder_of(root, storage, run_name)
    check_namesake(folder.parent, run_name)
    _check_cron(when.cron)
    plan = Plan(
        file=str(file.absolute()),
        overrides=laid,
        data=config.data.model_dump_json(),
        name=run_name,
        when=when,
        cwd=os.getcwd(),
        storage=str(root),
        port=port,
        retries=retries,
        command=retrain_command(preset, laid, run_name),
    )
    # In the place of this process, which holds half a gigabyte of libraries now that it has read the settings; the scheduler waits for days.
    os.execv(sys.executable, [sys.executable, "-m", "workflows.schedule.supervisor", plan.model_dump_json(), str(folder)])


def folder_of(root: "Location", storage: str | None, name: str) -> "Location":
    """Returns a schedule's own folder: a database lies there, so that it is on a disk of this machine.

    Args:
        root: storage root of the runs.
        storage: folder that a person chose instead.

    Raises:
        ConfigError: if the person chose one that is none.
    """
    import hashlib

    from components.storage import Location
    from pipeline.errors import ConfigError

    chosen = None if storage is None else storage_of(storage)
    if chosen is not None and not chosen.is_local:
        raise ConfigError(f"--storage {storage} can hold no database; name a folder on this machine")
    if chosen is None and not root.is_local:
        return Location.of("~/.ddpm") / "schedule" / hashlib.sha256(str(root).encode()).hexdigest()[:8] / name
    return (chosen or root) / "schedule" / name


def _check_installed() -> None:
    from pipeline.errors import ConfigError

    if not is_installed():
        raise ConfigError("ddpm schedule needs Prefect, which is not installed; install the extra: uv pip install -e '.[schedule]'")


def is_installed() -> bool:
    """Tells whether the extra is there."""
    return importlib.util.find_spec("prefect") is not None


def _check_cron(line: str | None) -> None:
    """Asks the engine itself, in a process of its own: its import makes a folder, which should not be the home folder of whoever mistyped."""
    if line is None:
        return
    from pipeline.errors import ConfigError

    with scratch("cron") as folder:
        env = os.environ | {"PREFECT_HOME": str(folder)}
        done = subprocess.run([sys.executable, "-c", _CRON_CHECK, line], env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        why = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise ConfigError(f"--cron {line!r} is no time ({why[0]}); use minute, hour, day, month, day of the week, such as '0 3 * * *'")
