"""A team's MLflow as `cluster/mlflow/serve.sh` runs it: with PostgreSQL and files through the server, with SQLite and files straight to S3.

Both servers have a password. The one on PostgreSQL is stopped and started again after the run, so that all that is asked of it is what it kept.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import psutil
import pytest
import requests
from PIL import Image
from postgresql import PostgreSQL, find_programs, postgresql_server
from servers import S3Server, TeamServer, environment, s3_server, team_server
from support import ROOT, TINY, Finished

from components.storage import Location
from pipeline.errors import RegistryError
from pipeline.registry.versions import fetch_checkpoint
from pipeline.tracking import connect

PASSWORD, WRONG, ADAS = "planted-Secret-51b7", "planted-Secret-0d2e", "planted-Secret-a86f"
pytestmark = pytest.mark.slow
PAGES = "https://mlflow.example.com"
Command = Callable[..., Finished]


@dataclass(frozen=True)
class Site:
    """A server with what one run left in it.

    Attributes:
        client: what the process that ran it had in its environment.
        prefix: where in the bucket the files of runs lie.
    """

    server: TeamServer
    client: dict[str, str]
    prefix: str
    run: dict[str, Any]

    def ask(self, path: str, *, user: str = "", password: str = PASSWORD, method: str = "GET", **options: Any) -> requests.Response:
        """Asks the server over HTTP, without a password unless a user is named."""
        with requests.Session() as session:
            session.trust_env = False
            return session.request(method, self.server.url + path, auth=(user, password) if user else None, timeout=60, **options)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def bucket(home: Path) -> Iterator[S3Server]:
    with s3_server(home) as server:
        yield server


def register(command: Command, home: Path, env: dict[str, str]) -> dict[str, Any]:
    """Runs all four stages; the first three once for all servers."""
    done = command("register", "digits", *TINY, "--json", cwd=home, env=env)
    assert done.code == 0, done.stderr
    return done.json


@pytest.fixture(scope="module")
def postgresql(home: Path) -> Iterator[PostgreSQL]:
    if find_programs() is None:
        pytest.skip("PostgreSQL is not installed: neither on the PATH nor in /usr/lib/postgresql")
    with postgresql_server(home / "postgresql.log") as database:
        yield database


@pytest.fixture(scope="module")
def on_postgresql(home: Path, bucket: S3Server, postgresql: PostgreSQL, command: Command) -> Iterator[Site]:
    env = {"MLFLOW_BACKEND_STORE_URI": postgresql.uri, "MLFLOW_ARTIFACTS_DESTINATION": "s3://bucket/through"} | postgresql.env | bucket.env
    with team_server(home / "on-postgresql", env, PASSWORD) as server:
        run = register(command, home, server.env())
    with team_server(home / "on-postgresql", env, PASSWORD) as server:
        yield Site(server, server.env(), "through/", run)


@pytest.fixture(scope="module")
def on_sqlite(home: Path, bucket: S3Server, command: Command) -> Iterator[Site]:
    env = {"MLFLOW_BACKEND_STORE_URI": f"sqlite:///{home / 'team.db'}", "MLFLOW_DEFAULT_ARTIFACT_ROOT": "s3://bucket/straight"} | bucket.env
    with team_server(home / "on-sqlite", env, PASSWORD) as server:
        client = server.env() | bucket.env
        yield Site(server, client, "straight/", register(command, home, client))


@pytest.fixture(params=["on_postgresql", "on_sqlite"])
def site(request: pytest.FixtureRequest) -> Site:
    return request.getfixturevalue(request.param)


def picture(site: Site) -> str:
    return f"/get-artifact?run_id={site.run['register']['mlflow_run_id']}&path=evaluate%2Fgrid.png"


def test_the_command_lists_the_version_with_its_number_and_alias(site: Site, command: Command, tmp_path: Path):
    done = command("models", "ddpm-digits", "--json", cwd=tmp_path, env=site.server.env())
    assert done.code == 0, done.stderr
    (version,) = done.json[0]["versions"]
    assert (version["version"], version["aliases"]) == (1, ["candidate", "champion"])
    assert version["value"] == site.run["evaluate"]["metric"]["value"]
    assert version["run_id"] == site.run["register"]["mlflow_run_id"]


def test_files_lie_on_s3_and_the_pages_show_them(site: Site, bucket: S3Server):
    s3 = boto3.client("s3", endpoint_url=bucket.url, aws_access_key_id="test", aws_secret_access_key="test", region_name="us-east-1")
    keys = [entry["Key"] for entry in s3.list_objects_v2(Bucket=bucket.bucket, Prefix=site.prefix)["Contents"]]
    assert any(key.endswith(f"{site.run['register']['mlflow_run_id']}/artifacts/evaluate/grid.png") for key in keys)
    assert any(key.endswith("/MLmodel") for key in keys)
    shown = site.ask(picture(site), user="admin")
    assert (shown.status_code, shown.content) == (200, Path(site.run["evaluate"]["grid"]).read_bytes())


def test_a_model_comes_back_from_the_server_elsewhere(site: Site, command: Command, tmp_path: Path):
    done = command("sample", "models:/ddpm-digits@champion", "--num", "4", "--steps", "2", cwd=tmp_path, env=site.client)
    assert done.code == 0, done.stderr
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size[0] >= 8


def test_nobody_sees_or_writes_anything_without_the_right_password(site: Site):
    files = "/api/2.0/mlflow-artifacts/artifacts"
    asked = ["/", "/version", "/api/2.0/mlflow/registered-models/search", "/ajax-api/2.0/mlflow/registered-models/search", picture(site), files]
    for path in asked:
        assert site.ask(path).status_code == 401, path
        assert site.ask(path, user="admin", password=WRONG).status_code == 401, path
    assert site.ask(f"{files}/1/planted", method="PUT", data=b"planted").status_code == 401
    assert site.ask("/api/2.0/mlflow/experiments/create", method="POST", json={"name": "planted"}).status_code == 401
    assert site.ask("/health").text == "OK"


def test_foreign_hosts_and_foreign_pages_are_refused(site: Site):
    create = {"method": "POST", "user": "admin", "path": "/ajax-api/2.0/mlflow/experiments/create"}
    assert site.ask("/", user="admin", headers={"Host": "evil.example"}).status_code == 403
    assert site.ask(**create, json={"name": "theirs"}, headers={"Origin": "https://evil.example"}).status_code == 403
    assert site.ask(**create, json={"name": "ours"}, headers={"Origin": PAGES}).status_code == 200
    page = site.ask("/", user="admin")
    assert (page.status_code, "<title>MLflow</title>" in page.text) == (200, True)


def test_a_wrong_password_ends_the_command_with_one_message_before_the_work(on_sqlite: Site, command: Command, tmp_path: Path):
    done = command("run", "digits", *TINY, cwd=tmp_path, env=on_sqlite.server.env("admin", WRONG))
    wanted = f"error: MLFLOW_TRACKING_URI={on_sqlite.server.url} refuses MLFLOW_TRACKING_USERNAME=admin with its password; "
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr == wanted + "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to those of a user of that server\n"
    assert not (tmp_path / "storage" / "datasets").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "MLFLOW_TRACKING_URI={url} asks for a user and a password; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        ({"MLFLOW_TRACKING_URI": "http://localhost:{port}"}, "MLFLOW_TRACKING_URI=http://localhost:{port} is not a name of that server; .* --allowed-hosts"),
        ({"MLFLOW_TRACKING_URI": "http://admin:" + WRONG + "@127.0.0.1:{port}"}, "MLFLOW_TRACKING_URI={url} asks for a user and a password"),
    ],
    ids=["no password", "another host", "a password in the address"],
)
def test_what_a_server_refuses_is_said_with_what_would_be_right(
    on_sqlite: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, settings: dict[str, str], message: str
):
    url = on_sqlite.server.url
    port = str(urlsplit(url).port)
    for name, value in ({"MLFLOW_TRACKING_URI": url} | settings).items():
        monkeypatch.setenv(name, value.replace("{port}", port))
    with pytest.raises(RegistryError, match=message.format(url=url, port=port)) as caught:
        connect(Location.of(tmp_path))
    assert WRONG not in str(caught.value)


def test_without_keys_of_the_bucket_the_message_names_them(on_sqlite: Site, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    # In a process of its own, because MLflow keeps the keys of whoever asked before.
    env = on_sqlite.server.env() | {"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path)}
    done = command("sample", "models:/ddpm-digits@champion", "--num", "1", cwd=tmp_path, env=env)
    assert done.code == 2
    assert "keeps files on S3, which refuses: Unable to locate credentials; set AWS_ACCESS_KEY_ID" in done.stderr


def test_the_database_opened_past_its_server_is_told(on_postgresql: Site, postgresql: PostgreSQL, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name, value in ({"MLFLOW_TRACKING_URI": postgresql.uri} | postgresql.env).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RegistryError, match="names files that only the server can fetch which made them; set MLFLOW_TRACKING_URI to that server's") as caught:
        fetch_checkpoint(connect(Location.of(tmp_path)), "models:/ddpm-digits@champion", Location.of(tmp_path))
    assert postgresql.env["PGPASSWORD"] not in str(caught.value)


def test_a_user_made_as_the_readme_says_reads_at_once_and_registers_when_granted(on_sqlite: Site, command: Command, home: Path, tmp_path: Path):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "cluster" / "mlflow" / "README.md").read_text(), re.DOTALL)
    create, grant = re.split(r"^(?=for kind)", block, flags=re.MULTILINE)
    again = ("run", "digits", *TINY, "--from", "register", "--json")
    env = on_sqlite.client | on_sqlite.server.env("ada", ADAS)

    def follow(code: str) -> None:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            input=ADAS + "\n",
            env=environment(on_sqlite.server.env()),
            cwd=tmp_path,
            text=True,
            capture_output=True,
            check=False,
            start_new_session=True,
        )
        assert done.returncode == 0, done.stderr

    follow(create)
    assert on_sqlite.ask(picture(on_sqlite), user="ada", password=ADAS).status_code == 200
    refused = command(*again, cwd=home, env=env)
    assert refused.code == 2
    assert "does not let ada do this" in refused.stderr
    assert "an administrator may grant EDIT on the experiment and the model" in refused.stderr
    follow(re.sub(r'^ask\("POST", "2.*\n', "", create, flags=re.MULTILINE) + grant)
    granted = command(*again, cwd=home, env=env)
    assert granted.code == 0, granted.stderr
    assert granted.json["register"]["version"] == on_sqlite.run["register"]["version"]


def test_no_secret_is_in_the_log_the_process_list_a_receipt_or_a_file_beside_the_server(site: Site):
    listed = b"".join(read(path) for path in Path("/proc").glob("[0-9]*/cmdline"))
    assert str(urlsplit(site.server.url).port).encode() in listed
    assert b"planted-Secret" not in listed + site.server.log.read_bytes() + json.dumps(site.run).encode()
    assert list((site.server.log.parent / "cwd").iterdir()) == []


def read(path: Path) -> bytes:
    """Returns what a file of a process holds, nothing where it has just ended."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_the_server_listens_on_loopback_alone_and_runs_no_jobs(site: Site):
    port = urlsplit(site.server.url).port
    family = {process.pid: process for process in psutil.process_iter() if process.pid != os.getpid() and str(site.server.log.parent / "cwd") == cwd(process)}
    sockets = [connection.laddr for process in family.values() for connection in process.net_connections() if connection.status == "LISTEN"]
    assert {tuple(socket) for socket in sockets} == {("127.0.0.1", port)}
    assert not [process for process in family.values() if "huey" in " ".join(process.cmdline())]


def cwd(process: Any) -> str:
    try:
        return process.cwd()
    except psutil.Error:
        return ""
