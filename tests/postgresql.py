"""A real PostgreSQL for tests, Debian's or any other on this machine, with a password, gone when the block ends."""

import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import keeper
from servers import environment, free_ports

DEBIAN = Path("/usr/lib/postgresql")
NOBODY = 65534
USER = DATABASE = "mlflow"


@dataclass(frozen=True)
class PostgreSQL:
    """A server with one empty database.

    Attributes:
        uri: address of the database, without the password.
        env: what a client process needs in its environment, the password.
    """

    uri: str
    env: dict[str, str]


def find_programs() -> Path | None:
    """Returns the folder of PostgreSQL's programs, the newest of Debian's where several are installed; None where none is."""
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else sorted(DEBIAN.glob("*/bin"), key=lambda folder: float(folder.parent.name), reverse=True)
    return next((folder for folder in folders if (folder / "initdb").is_file() and (folder / "postgres").is_file()), None)


@contextmanager
def postgresql_server(log: Path) -> Iterator[PostgreSQL]:
    """Starts PostgreSQL on loopback; as nobody where the tests run as root, whom it refuses."""
    programs = find_programs()
    assert programs is not None
    unprivileged = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"] if os.geteuid() == 0 else []
    with tempfile.TemporaryDirectory(prefix="ddpm-postgresql-") as name:
        folder, password, port = Path(name), secrets.token_urlsafe(16), free_ports(1)[0]
        data, secret = folder / "data", folder / "password"
        secret.write_text(password)
        if unprivileged:
            os.chown(folder, NOBODY, NOBODY)
            os.chown(secret, NOBODY, NOBODY)
        env = environment({"PGPASSWORD": password, "LC_ALL": "C.UTF-8"})
        initdb = [str(programs / "initdb"), "--pgdata", str(data), "--username", USER, "--auth=scram-sha-256", f"--pwfile={secret}", "--no-sync"]
        _call([*unprivileged, *initdb], env, folder)
        command = [str(programs / "postgres"), "-D", str(data), "-h", "127.0.0.1", "-p", str(port), "-k", name, "-F"]
        kept = keeper.start([*unprivileged, "env", "-C", name, *command], log=log, env=env)
        try:
            where = ["--host=127.0.0.1", f"--port={port}", f"--username={USER}"]
            _wait_until_ready([str(programs / "pg_isready"), *where], env, kept)
            _call([str(programs / "createdb"), *where, DATABASE], env, folder)
            yield PostgreSQL(f"postgresql://{USER}@127.0.0.1:{port}/{DATABASE}", {"PGPASSWORD": password})
        finally:
            # Killed at once, it would leave a segment of shared memory behind.
            stop = [*unprivileged, str(programs / "pg_ctl"), "stop", "--pgdata", str(data), "--mode=immediate", "--silent"]
            subprocess.run(stop, env=env, cwd=folder, capture_output=True, check=False)
            kept.end()


def _call(command: Sequence[str], env: Mapping[str, str], folder: Path) -> None:
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def _wait_until_ready(probe: Sequence[str], env: Mapping[str, str], kept: keeper.Kept) -> None:
    deadline = time.monotonic() + 60
    while subprocess.run(probe, env=env, capture_output=True, check=False).returncode:
        assert kept.is_running(), kept.tail()
        assert time.monotonic() < deadline, kept.tail()
        time.sleep(0.1)
