"""MLflow's own pages, on loopback, over the store of a storage root."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import typer

from components.storage import Location
from pipeline.errors import ConfigError, RegistryError
from pipeline.tracking import connect, public_uri, tracking_uri, ui_link

HOST = "127.0.0.1"
READY_TIMEOUT_S = 180
_ENVIRONMENT = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def serve(storage: Location, port: int) -> None:
    """Serves the pages until interrupted; prints the link of the models page when they are ready.

    Raises:
        ConfigError: if the port is taken.
        RegistryError: if there is no store yet, or the server does not come up.
    """
    uri = tracking_uri(storage)
    if uri.startswith("http"):
        typer.echo(f"MLFLOW_TRACKING_URI names a server that is running elsewhere: {ui_link(public_uri(uri), 'models')}")
        return
    _check_free(port)
    connect(storage, create=False)
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", uri, "--artifacts-destination", str(storage / "mlflow" / "served")]
    signal.signal(signal.SIGTERM, _interrupt)
    server = subprocess.Popen(command, env={**os.environ, **_ENVIRONMENT}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        _wait_until_ready(server, port)
        typer.echo(f"models  {ui_link(f'http://{HOST}:{port}', 'models')}")
        typer.echo(f"runs    {ui_link(f'http://{HOST}:{port}', 'experiments')}")
        typer.echo("Ctrl-C ends it")
        server.wait()
    except KeyboardInterrupt:
        pass
    finally:
        _end(server)


def _end(server: "subprocess.Popen[bytes]") -> None:
    """Ends the server and the workers it started, the whole process group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
            server.wait(timeout=10)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ConfigError(f"--port {port} is taken ({error.strerror}); choose another") from error


def _wait_until_ready(server: "subprocess.Popen[bytes]", port: int) -> None:
    for _ in range(READY_TIMEOUT_S * 2):
        if server.poll() is not None:
            raise RegistryError(f"the MLflow server ended with code {server.returncode}; run `mlflow server` by hand to see why")
        try:
            with urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    raise RegistryError(f"the MLflow server did not answer on port {port} within {READY_TIMEOUT_S} s")
