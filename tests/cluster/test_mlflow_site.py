"""What starts a team's MLflow: the launcher's refusals, and compose file, manifest and image, which start nothing but the launcher."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes_schema import core_errors
from support import ROOT

MLFLOW = ROOT / "cluster" / "mlflow"
RIGHT = {
    "MLFLOW_BACKEND_STORE_URI": "postgresql://mlflow@127.0.0.1:1/mlflow",
    "MLFLOW_ARTIFACTS_DESTINATION": "/artifacts",
    "MLFLOW_AUTH_ADMIN_PASSWORD": "planted-1",
    "MLFLOW_FLASK_SERVER_SECRET_KEY": "planted-2",
    "MLFLOW_SERVER_ALLOWED_HOSTS": "mlflow.example.com",
    "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": "https://mlflow.example.com",
}
SECRET = re.compile(r"PASSWORD|SECRET|KEY")
Tree = dict[str, Any]


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder with a program `mlflow` that prints what it is told: arguments, settings of its own, and the file of settings."""
    program = tmp_path / "bin" / "mlflow"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "$@"\n[ "$1" = server ] && env | grep -E "^(MLFLOW|DO_NOT)" && cat "$MLFLOW_AUTH_CONFIG_PATH"\nexit 0\n')
    program.chmod(0o755)
    return program.parent


def serve(programs: Path, settings: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    env = {"PATH": f"{programs}:{os.environ['PATH']}", "TMPDIR": str(programs.parent)} | settings
    return subprocess.run([str(MLFLOW / "serve.sh")], env=env, cwd=programs.parent, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("name", RIGHT)
def test_the_launcher_refuses_to_start_without_a_setting(programs: Path, name: str):
    done = serve(programs, {key: value for key, value in RIGHT.items() if key != name})
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"error: (set )?{name} .*\n", done.stderr)
    assert "planted" not in done.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"MLFLOW_BACKEND_STORE_URI": "postgresql://mlflow:planted@db/mlflow"},
            "holds a password, which the machine's process list would show; put it in PGPASSWORD",
        ),
        ({"MLFLOW_BACKEND_STORE_URI": "postgresql://db/mlflow?user=me&password=planted"}, "holds a password"),
        ({"MLFLOW_BACKEND_STORE_URI": "sqlite:///mlflow.db"}, "sqlite:///mlflow.db is no database of a team; use postgresql://USER@HOST/DATABASE"),
        ({"MLFLOW_BACKEND_STORE_URI": "./mlruns"}, "MLFLOW_BACKEND_STORE_URI=./mlruns is no database of a team"),
        ({"MLFLOW_ARTIFACTS_DESTINATION": "artifacts"}, "set MLFLOW_ARTIFACTS_DESTINATION to an absolute folder or s3://BUCKET/PREFIX"),
        ({"MLFLOW_DEFAULT_ARTIFACT_ROOT": "s3://bucket/x"}, "one of the two"),
        ({"MLFLOW_DEFAULT_ARTIFACT_ROOT": "/artifacts", "MLFLOW_ARTIFACTS_DESTINATION": ""}, "MLFLOW_DEFAULT_ARTIFACT_ROOT to s3://BUCKET/PREFIX"),
    ],
    ids=lambda value: ",".join(value.values()) if isinstance(value, dict) else "",
)
def test_the_launcher_refuses_what_no_team_should_run(programs: Path, settings: dict[str, str], message: str):
    done = serve(programs, RIGHT | settings)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert message in done.stderr
    assert "planted" not in done.stderr


def told(programs: Path, settings: dict[str, str]) -> tuple[list[str], list[str], str]:
    """Returns the arguments of the two commands that the launcher starts, and the rest of what the second one knows."""
    done = serve(programs, RIGHT | settings)
    assert done.returncode == 0, done.stderr
    first, second, rest = done.stdout.split("\n", 2)
    return first.split(), second.split(), rest


def test_the_launcher_upgrades_the_database_then_serves_with_passwords_and_without_telemetry_and_jobs(programs: Path):
    upgrade, server, rest = told(programs, {"MLFLOW_BACKEND_STORE_URI": "postgresql://mlflow@db/a%20b"})
    assert upgrade == ["db", "upgrade", "postgresql://mlflow@db/a%20b"]
    assert server[:3] == ["server", "--app-name", "basic-auth"]
    assert server[server.index("--host") + 1] == "127.0.0.1"
    assert server[server.index("--artifacts-destination") + 1] == "/artifacts"
    assert {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false", "MLFLOW_DISABLE_TELEMETRY=true", "DO_NOT_TRACK=true"} <= set(rest.splitlines())
    assert "database_uri = postgresql://mlflow@db/a%%20b\n" in rest, "configparser reads %% as %"
    (config,) = [path for path in programs.parent.iterdir() if path.is_file()]
    assert config.stat().st_mode & 0o777 == 0o600
    assert "planted" not in config.read_text() + " ".join(server)


def test_files_go_straight_to_s3_where_that_is_asked_for(programs: Path):
    _, server, _ = told(programs, {"MLFLOW_ARTIFACTS_DESTINATION": "", "MLFLOW_DEFAULT_ARTIFACT_ROOT": "s3://bucket/x"})
    assert "--no-serve-artifacts" in server
    assert server[server.index("--default-artifact-root") + 1] == "s3://bucket/x"
    assert "--serve-artifacts" not in server


def test_the_installed_mlflow_knows_every_option_of_the_launcher():
    script = "\n".join(line for line in (MLFLOW / "serve.sh").read_text().splitlines() if not line.startswith("#"))
    option = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
    command = [sys.executable, "-m", "mlflow", "server", "--help"]
    shown = subprocess.run(command, env=os.environ | {"COLUMNS": "200"}, capture_output=True, text=True, check=True).stdout
    listed = "\n".join(line for line in shown.splitlines() if line.lstrip().startswith("-"))
    used = set(option.findall(script))
    assert len(used) >= 10
    assert used <= set(option.findall(listed))


def documents() -> list[Tree]:
    return list(yaml.safe_load_all((MLFLOW / "kubernetes.yaml").read_text()))


def only(kind: str, name: str = "mlflow") -> Tree:
    return next(document for document in documents() if (document["kind"], document["metadata"]["name"]) == (kind, name))


def pods() -> Iterator[Tree]:
    yield from (document["spec"]["template"]["spec"] for document in documents() if "template" in document["spec"])


def test_every_object_is_valid_by_kubernetes_schemas():
    assert {document["kind"] for document in documents()} == {
        "Deployment", "Service", "PersistentVolumeClaim", "Ingress", "StatefulSet", "NetworkPolicy"
    }  # fmt: skip
    assert [error for document in documents() for error in core_errors(document)] == []


def test_the_schemas_find_mistakes():
    wrong = only("Deployment")
    wrong["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    assert "readinesProbe" in str(core_errors(wrong))


def test_every_secret_of_a_pod_is_a_key_of_the_secret_and_no_secret_is_in_the_manifest():
    names = {"mlflow": set[str](), "postgres": set[str]()}
    for pod in pods():
        (container,) = pod["containers"]
        for variable in container["env"]:
            if SECRET.search(variable["name"]):
                assert variable["valueFrom"]["secretKeyRef"]["name"] == "mlflow"
                names[container["name"]].add(variable["name"])
    assert names["mlflow"] >= {"PGPASSWORD", "MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY"}
    assert names["postgres"] == {"POSTGRES_PASSWORD"}
    assert "Secret" not in {document["kind"] for document in documents()}


def test_every_container_has_limits_and_no_privileges():
    for pod in pods():
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert not pod["automountServiceAccountToken"]
        assert {"cpu", "memory"} <= set(container["resources"]["limits"])
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_selectors_ports_and_claims_of_the_manifest_meet():
    for name in ("mlflow", "mlflow-database"):
        workload = only("Deployment" if name == "mlflow" else "StatefulSet", name)
        labels = workload["spec"]["template"]["metadata"]["labels"]
        assert labels == only("Service", name)["spec"]["selector"] == workload["spec"]["selector"]["matchLabels"]
        (container,) = workload["spec"]["template"]["spec"]["containers"]
        assert container["ports"][0]["name"] == only("Service", name)["spec"]["ports"][0]["targetPort"]
    pod = only("Deployment")["spec"]["template"]["spec"]
    claims = {volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume}
    assert claims == {only("PersistentVolumeClaim", "mlflow-artifacts")["metadata"]["name"]}
    backend = only("Ingress")["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]
    assert backend == {"name": "mlflow", "port": {"name": only("Service")["spec"]["ports"][0]["name"]}}
    policy = only("NetworkPolicy", "mlflow-database")["spec"]
    assert policy["podSelector"]["matchLabels"] == only("StatefulSet", "mlflow-database")["spec"]["template"]["metadata"]["labels"]


def test_the_pod_is_asked_by_the_names_it_answers_to_and_reads_no_service_link():
    pod = only("Deployment")["spec"]["template"]["spec"]
    env = {variable["name"]: variable.get("value") for variable in pod["containers"][0]["env"]}
    host = only("Ingress")["spec"]["rules"][0]["host"]
    assert only("Ingress")["spec"]["tls"][0]["hosts"] == [host]
    assert {host, "mlflow:5000"} <= set(env["MLFLOW_SERVER_ALLOWED_HOSTS"].split(","))
    assert env["MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"] == f"https://{host}"
    assert pod["enableServiceLinks"] is False, "a Service named mlflow would set MLFLOW_PORT"
    assert {pod["containers"][0][probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")} == {"/health"}


def compose() -> Tree:
    return yaml.safe_load((MLFLOW / "compose.yaml").read_text())


def test_compose_publishes_the_proxy_and_nothing_else():
    services = compose()["services"]
    assert {name: service["ports"] for name, service in services.items() if "ports" in service} == {"proxy": ["80:80", "443:443"]}
    assert not [name for name, service in services.items() if "network_mode" in service]
    assert services["database"]["networks"] == ["inside"]
    assert compose()["networks"]["inside"] == {"internal": True}
    assert "reverse_proxy mlflow:5000" in (MLFLOW / "Caddyfile").read_text()


def test_compose_holds_no_password_and_starts_without_none():
    for name, service in compose()["services"].items():
        for variable, value in service.get("environment", {}).items():
            if SECRET.search(variable):
                assert value is None or re.fullmatch(r"\$\{MLFLOW_\w+:\?\}", value), (name, variable)
    env = compose()["services"]["mlflow"]["environment"]
    assert {variable for variable in RIGHT if variable not in env} == set()
    asked = set(re.findall(r"\$\{(\w+):\?", (MLFLOW / "compose.yaml").read_text()))
    made = set(re.findall(r"^(MLFLOW_\w+)=", (MLFLOW / "README.md").read_text(), re.MULTILINE))
    assert asked == made, "the README makes what compose asks for"


def test_the_image_is_the_project_s_mlflow_as_locked_and_the_launcher():
    dockerfile = (MLFLOW / "Dockerfile").read_text().replace("\\\n", "")
    instructions = dict(line.split(maxsplit=1) for line in dockerfile.splitlines() if line and not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (mlflow,) = [entry for entry in project["dependencies"] if entry.startswith("mlflow")]
    installed = [word for word in shlex.split(instructions["RUN"]) if word.startswith("mlflow[")]
    assert installed == [mlflow.replace("mlflow", "mlflow[auth]")]
    assert installed[0] in project["optional-dependencies"]["server"]
    assert "-c /opt/ddpm/requirements.lock" in instructions["RUN"]
    assert instructions["USER"] == "1000:100"
    assert (instructions["COPY"], instructions["CMD"]) == ("cluster/mlflow/serve.sh /opt/ddpm/", '["/opt/ddpm/serve.sh"]')
    assert os.access(MLFLOW / "serve.sh", os.X_OK)
