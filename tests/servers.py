"""The servers that the pipeline talks to, real ones, each in a process of its own: object storage and MLflow."""

import os
import random
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import keeper
from support import ROOT

Conditions = Literal["honoured", "writes", "ignored", "refused"]
"""What a store makes of conditional writes and deletions; `writes` are honoured alone."""

SERVE = ROOT / "cluster" / "mlflow" / "serve.sh"
MOTO = Path(__file__).with_name("moto_store.py")
_FETCH = """
import sys, urllib.request
method, url, token = sys.argv[1:]
headers = {"Authorization": f"Bearer {token}"} if token else {}
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
with opener.open(urllib.request.Request(url, method=method, headers=headers), timeout=20) as answer:
    sys.stdout.buffer.write(answer.read())
"""


@dataclass(frozen=True)
class S3Server:
    """An S3 that keeps everything in memory.

    Attributes:
        env: what a client process needs in its environment.
    """

    url: str
    bucket: str
    env: dict[str, str]


@dataclass(frozen=True)
class TeamServer:
    """MLflow as `cluster/mlflow/serve.sh` runs it for a team.

    Attributes:
        password: the administrator's.
        log: what the server writes.
    """

    url: str
    password: str
    log: Path

    def env(self, user: str = "admin", password: str | None = None) -> dict[str, str]:
        """Returns what a client process needs in its environment, by default the administrator's."""
        password = self.password if password is None else password
        return {"MLFLOW_TRACKING_URI": self.url, "MLFLOW_TRACKING_USERNAME": user, "MLFLOW_TRACKING_PASSWORD": password}


def fetch(url: str, *, method: str = "GET", token: str = "", prefix: Sequence[str] = ()) -> bytes:
    """Returns what an address answers, asked from where the prefix runs commands.

    Raises:
        OSError: if it does not answer, or answers an error.
    """
    done = subprocess.run([*prefix, sys.executable, "-I", "-S", "-c", _FETCH, method, url, token], capture_output=True, check=False, timeout=60)
    if done.returncode:
        raise OSError(f"{method} {url}: {done.stderr.decode(errors='replace').strip().splitlines()[-1:]}")
    return done.stdout


def free_ports(count: int) -> list[int]:
    """Returns ports that nobody listens on, below those that the kernel hands out by itself."""
    found: list[int] = []
    for port in random.SystemRandom().sample(range(20000, 32000), 1000):
        with socket.socket() as trial:
            try:
                trial.bind(("", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise OSError(f"found only {len(found)} of {count} free ports")


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Returns this process' environment without settings of Ray, MLflow and AWS, the Python of the tests first in PATH, and what is extra."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_", "AWS_"))}
    path = f"{Path(sys.executable).parent}:{kept.get('PATH', os.defpath)}"
    return kept | {"PATH": path, "no_proxy": "*", "NO_PROXY": "*"} | dict(extra)


@contextmanager
def s3_server(folder: Path, *, host: str = "127.0.0.1", prefix: Sequence[str] = (), conditions: Conditions = "honoured") -> Iterator[S3Server]:
    """Starts moto's server with one empty bucket.

    Args:
        folder: where its log goes.
        host: address to listen on, one of the place where the prefix runs commands.
    """
    url = f"http://{host}:{free_ports(1)[0]}"
    env = {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    port = url.rpartition(":")[2]
    with _server([sys.executable, "-P", str(MOTO), host, port, conditions], folder / "moto.log", f"{url}/moto-api/", {}, prefix):
        fetch(f"{url}/bucket", method="PUT", prefix=prefix)
        yield S3Server(url, "bucket", env)


@contextmanager
def mlflow_server(
    folder: Path, *, host: str = "127.0.0.1", port: int | None = None, prefix: Sequence[str] = (), env: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Starts MLflow with SQLite and artifacts below the folder, which it serves itself; gives its address.

    Args:
        port: by default one that is free.
        env: extra variables, such as those of `s3_server` when a run's artifacts lie there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = port or free_ports(1)[0]
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1", "--serve-artifacts"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "artifacts")]
    command += ["--allowed-hosts", f"{host},{host}:{port},localhost:{port}"]
    url = f"http://{host}:{port}"
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "1"}
    with _server(command, folder / "mlflow.log", f"{url}/health", quiet | dict(env or {}), prefix):
        yield url


@contextmanager
def team_server(folder: Path, env: Mapping[str, str], password: str) -> Iterator[TeamServer]:
    """Starts MLflow for a team by the launcher that Docker, compose and Kubernetes start, from an empty folder.

    Args:
        env: which database and artifact store to use, and what these need.
        password: the administrator's.
    """
    port, log, cwd = free_ports(1)[0], folder / "mlflow.log", folder / "cwd"
    cwd.mkdir(parents=True, exist_ok=True)
    url = f"http://127.0.0.1:{port}"
    settings = {
        "MLFLOW_PORT": str(port),
        "MLFLOW_WORKERS": "1",
        "MLFLOW_SERVER_ALLOWED_HOSTS": f"127.0.0.1:{port}",
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": "https://mlflow.example.com",
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
    }
    with _server(["env", "-C", str(cwd), str(SERVE)], log, f"{url}/health", settings | dict(env), ()):
        yield TeamServer(url, password, log)


@contextmanager
def _server(command: Sequence[str], log: Path, health: str, env: Mapping[str, str], prefix: Sequence[str]) -> Iterator[None]:
    """Runs a server for as long as the block lasts, which begins when it answers."""
    log.parent.mkdir(parents=True, exist_ok=True)
    kept = keeper.start(command, log=log, env=environment(env), wrapper=prefix)
    try:
        _wait_for(health, kept, prefix)
        yield
    finally:
        kept.end()


def _wait_for(health: str, kept: keeper.Kept, prefix: Sequence[str], timeout: float = 180) -> None:
    deadline = time.monotonic() + timeout
    while True:
        try:
            fetch(health, prefix=prefix)
        except OSError as error:
            if not kept.is_running() or time.monotonic() > deadline:
                raise RuntimeError(f"{health} does not answer ({error}):\n{kept.tail()}") from error
            time.sleep(0.3)
        else:
            return
