"""MLflow's own pages, on loopback, over the store of a storage root."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import typer

from components.storage import Location
from pipeline.errors import RegistryError
from pipeline.tracking import connect, public_uri, tracking_uri, ui_link
from workflows.foreground import ASKED_TO_END, HOST, READY_TIMEOUT_S, becomes_ready, check_free, handle_signals, last_output

_ENVIRONMENT = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}

Server = subprocess.Popen[bytes]


def serve(storage: Location, port: int) -> None:
    """Serves the pages until interrupted; prints the link of the models page when they are ready.

    Raises:
        ConfigError: if the port is taken.
        RegistryError: if there is no store yet, or the server does not come up or does not stay.
    """
    uri = tracking_uri(storage)
    if uri.startswith("http"):
        typer.echo(f"MLFLOW_TRACKING_URI names a server that is running elsewhere: {ui_link(public_uri(uri), 'models')}")
        return
    check_free(port)
    connect(storage, create=False)
    handle_signals()
    try:
        with tempfile.TemporaryFile() as log, _server(storage, uri, port, log) as server:
            typer.echo("starting MLflow, which takes some seconds", err=True)
            _wait_until_ready(server, port, log)
            typer.echo(f"models  {ui_link(f'http://{HOST}:{port}', 'models')}")
            typer.echo(f"runs    {ui_link(f'http://{HOST}:{port}', 'experiments')}")
            typer.echo("Ctrl-C ends it")
            raise _ended(server.wait(), log)
    except KeyboardInterrupt:
        return


@contextmanager
def _server(storage: Location, uri: str, port: int, log: IO[bytes]) -> Iterator[Server]:
    """Starts the server; ends it and all its processes when the block is left.

    Files of an experiment that is made through it go where the local store keeps them, so that both can open them later.
    """
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    command += ["--no-serve-artifacts", "--default-artifact-root", (storage / "mlflow" / "artifacts").path.as_uri()]
    command += ["--uvicorn-opts", "--log-level=warning --no-access-log"]
    # By the environment: the address may hold a password, and the process list shows arguments.
    env = {**os.environ, **_ENVIRONMENT, "MLFLOW_BACKEND_STORE_URI": uri}
    server = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        yield server
    finally:
        _end(server)


def _end(server: Server) -> None:
    """Ends the server and the workers it started, the whole process group; a second Ctrl-C does not stop it from doing so."""
    for number in ASKED_TO_END:
        signal.signal(number, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
            server.wait(timeout=10)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def _wait_until_ready(server: Server, port: int, log: IO[bytes]) -> None:
    try:
        if not becomes_ready(server, f"http://{HOST}:{port}/health"):
            raise _ended(server.returncode, log)
    except TimeoutError as error:
        advice = "look whether this machine is busy, and try again"
        raise RegistryError(f"the MLflow server did not answer on port {port} within {READY_TIMEOUT_S} s; {advice}") from error


def _ended(code: int, log: IO[bytes]) -> RegistryError:
    """Returns what to say of a server that ended by itself: its last lines."""
    log.seek(0)
    return RegistryError(f"the MLflow server ended with code {code}; it said: {last_output(log.read().decode(errors='replace'))}")
