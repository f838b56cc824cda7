"""MLflow's own pages, on loopback, over the store of a storage root."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import typer

from components.storage import Location
from pipeline.errors import ConfigError, RegistryError
from pipeline.tracking import connect, public_uri, tracking_uri, ui_link

HOST = "127.0.0.1"
READY_TIMEOUT_S = 180
_ENVIRONMENT = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
_ASKED_TO_END = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LINES_SHOWN = 5

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
    _check_free(port)
    connect(storage, create=False)
    _heed_signals()
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
    for number in _ASKED_TO_END:
        signal.signal(number, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
            server.wait(timeout=10)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def _heed_signals() -> None:
    """Makes a closed terminal and SIGTERM the same as Ctrl-C, but for what whoever started this has it ignore, as nohup does."""
    for number in _ASKED_TO_END:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _interrupt)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ConfigError(f"--port {port} is taken ({error.strerror}); choose another") from error


def _wait_until_ready(server: Server, port: int, log: IO[bytes]) -> None:
    # Straight to loopback: a proxy of the environment would not find it.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(READY_TIMEOUT_S * 2):
        if server.poll() is not None:
            raise _ended(server.returncode, log)
        try:
            with opener.open(f"http://{HOST}:{port}/health", timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    raise RegistryError(f"the MLflow server did not answer on port {port} within {READY_TIMEOUT_S} s; look whether this machine is busy, and try again")


def _ended(code: int, log: IO[bytes]) -> RegistryError:
    """Returns what to say of a server that ended by itself: its last lines."""
    log.seek(0)
    said = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    return RegistryError(f"the MLflow server ended with code {code}; it said: {' | '.join(said[-_LINES_SHOWN:]) or 'nothing'}")
