"""`ddpm schedule` in the foreground: Prefect's server and the runner, both on loopback, begun and ended together."""

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
import typer

from components.storage import Location
from pipeline.errors import ConfigError
from pipeline.lease import LeaseHeldError, held
from workflows.foreground import ASKED_TO_END, HOST, READY_TIMEOUT_S, becomes_ready, check_free, handle_signals, last_output
from workflows.schedule import processes
from workflows.schedule.plan import Plan

PASSWORD = "password"
GRACE_S = 30.0

Child = subprocess.Popen[bytes]


class SchedulerError(Exception):
    """Raised where the server or the runner ended by itself, or does not begin. The message has its last lines."""


def supervise(plan: Plan, folder: Location) -> int:
    """Runs a schedule until asked to end; leaves no process behind.

    Args:
        folder: the schedule's own: database, password, logs.

    Returns:
        The exit code: 1 where the server or the runner did not stay.

    Raises:
        ConfigError: if another process runs it already, or the port is taken.
    """
    try:
        folder.path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made ({error.strerror}); name a folder with write permission by --storage") from error
    try:
        with held(folder / "lock", wait=False):
            handle_signals()
            _supervise(plan, folder)
    except LeaseHeldError as error:
        raise ConfigError(f"--name {plan.name} is scheduled already by {error}; end that one, or choose another --name and --port") from error
    except SchedulerError as error:
        typer.echo(f"error: {error}", err=True)
        return 1
    except KeyboardInterrupt:
        typer.echo("ended; what was interrupted resumes at the next start", err=True)
    return 0


def _supervise(plan: Plan, folder: Location) -> None:
    end_leftovers(folder)
    check_free(plan.port)
    plan.save(folder)
    password = password_of(folder)
    env = environment(plan, folder, password)
    try:
        typer.echo("starting Prefect, which takes some seconds", err=True)
        # Each in a session of its own, so that Ctrl-C reaches this process alone, which ends them in order.
        server = _start([sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(plan.port)], "server", folder, env)
        _wait_until_ready(server, plan, folder)
        typer.echo(f"page     {plan.page} (it asks for the text in {folder / PASSWORD})")
        typer.echo(f"runs     {plan}")
        typer.echo(f"logs     {_log(folder, 'server')}, {_log(folder, 'runner')}")
        runner = _start([sys.executable, "-m", "workflows.schedule.runner"], "runner", folder, env, for_a_person=True)
        _watch({"server": server, "runner": runner}, folder)
    finally:
        _end_in_order(folder)


def end_leftovers(folder: Location) -> None:
    """Ends what an earlier start left running because it was killed; whatever that was doing goes on from where it was."""
    if left := processes.family(str(folder)):
        typer.echo(f"an earlier start was killed and left {len(left)} processes; ending them", err=True)
        _end_in_order(folder)


def _end_in_order(folder: Location) -> None:
    """Ends the runner first, so that it begins nothing more, then the runs, which tell the server, and the server last."""
    heeded = {number: signal.signal(number, signal.SIG_IGN) for number in ASKED_TO_END}
    try:
        living = {process: " ".join(_words(process)) for process in processes.family(str(folder))}
        server = [process for process, words in living.items() if "prefect server start" in words]
        processes.kill(process for process, words in living.items() if words.endswith("workflows.schedule.runner"))
        processes.end([process for process in living if process not in server], GRACE_S)
        processes.end(server, GRACE_S)
        processes.kill(processes.family(str(folder)))
    finally:
        for number, handler in heeded.items():
            signal.signal(number, handler)


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def environment(plan: Plan, folder: Location, password: str) -> dict[str, str]:
    """Returns the environment of the scheduler's processes: Prefect's settings are these alone, whatever a person has set.

    By the environment, for the process list shows arguments.
    """
    mine = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    origins = ",".join(f"http://{host}:{plan.port}" for host in (HOST, "localhost"))
    direct = ",".join(filter(None, [mine.get("NO_PROXY") or mine.get("no_proxy"), HOST, "localhost"]))
    return mine | {
        processes.MARK: str(folder),
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_API_URL": plan.api,
        "PREFECT_API_AUTH_STRING": password,
        "PREFECT_SERVER_API_AUTH_STRING": password,
        "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS": origins,
        "PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED": "true",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        # Kept in memory, the place of a run would stay taken for good after the server was killed.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
        "DO_NOT_TRACK": "1",
        "NO_PROXY": direct,
        "no_proxy": direct,
    }


def password_of(folder: Location) -> str:
    """Returns what the page asks for, made at the first start and readable by its owner only."""
    file = (folder / PASSWORD).path
    if not file.is_file():
        with (folder / PASSWORD).staged() as staging:
            descriptor = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as content:
                content.write(f"ddpm:{secrets.token_urlsafe(24)}\n")
    return file.read_text().strip()


def _start(command: list[str], name: str, folder: Location, env: Mapping[str, str], for_a_person: bool = False) -> Child:
    """Starts a process that writes into its log; what it says to a person goes to this process' stdout."""
    with _log(folder, name).open("ab") as log:
        stdout = None if for_a_person else log
        return subprocess.Popen(command, env=dict(env), stdin=subprocess.DEVNULL, stdout=stdout, stderr=log, start_new_session=True)


def _log(folder: Location, name: str) -> Path:
    return (folder / f"{name}.log").path


def _wait_until_ready(server: Child, plan: Plan, folder: Location) -> None:
    try:
        if not becomes_ready(server, f"{plan.api}/health"):
            raise _ended("server", server.returncode, folder)
    except TimeoutError as error:
        advice = "look whether this machine is busy, and try again"
        raise SchedulerError(f"Prefect did not answer on port {plan.port} within {READY_TIMEOUT_S} s; {advice}") from error


def _watch(children: Mapping[str, Child], folder: Location) -> None:
    """Waits until one of the processes ends, which none should."""
    while True:
        for name, child in children.items():
            if child.poll() is not None:
                raise _ended(name, child.returncode, folder)
        time.sleep(0.5)


def _ended(name: str, code: int, folder: Location) -> SchedulerError:
    return SchedulerError(f"Prefect's {name} ended with code {code}; it said: {last_output(_log(folder, name).read_text(errors='replace'))}")


def main() -> None:
    """Runs the plan that is the first argument in the folder that is the second; a mistake is one message and exit code 2."""
    try:
        sys.exit(supervise(Plan.model_validate_json(sys.argv[1]), Location(sys.argv[2])))
    except ConfigError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
