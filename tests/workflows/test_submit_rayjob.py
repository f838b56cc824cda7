"""What a CronJob's pod does, against a server that speaks the few calls of Kubernetes' API that it needs, over TLS and with a token."""

import datetime
import http.server
import json
import os
import signal
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from support import ROOT

Tree = dict[str, Any]
BATCH_JOB, JOB, UID, TOKEN = "ddpm-digits-29000000", "ddpm-digits-29000000-run", "0b1c", "account-token"
RAYJOBS = "/apis/ray.io/v1/namespaces/team-a/rayjobs"


@dataclass
class Cluster:
    """The server's state: RayJobs by name, the states that each GET moves them through, and answers to give before any other."""

    port: int = 0
    rayjobs: dict[str, Tree] = field(default_factory=dict)
    states: list[tuple[str, str]] = field(default_factory=list)
    failures: list[int] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    looked: threading.Event = field(default_factory=threading.Event)

    def answer(self, method: str, path: str, body: Tree) -> tuple[int, Tree]:
        self.calls.append(f"{method} {path}")
        if self.failures:
            return self.failures.pop(0), {"message": "refused"}
        if method == "POST":
            name = body["metadata"]["name"]
            return (409, {}) if name in self.rayjobs else (201, self.rayjobs.setdefault(name, body))
        if path.startswith(f"{RAYJOBS}?"):
            return 200, {"items": list(self.rayjobs.values())}
        rayjob = self.rayjobs.get(path.rpartition("/")[2])
        if rayjob is None:
            return 404, {}
        if self.states:
            rayjob["status"] = dict(zip(("jobDeploymentStatus", "jobStatus"), self.states.pop(0), strict=True))
        self.looked.set()
        return 200, rayjob


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of 127.0.0.1 and its key, in one file."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "kubernetes")])
    built = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + datetime.timedelta(days=1))
    for extension, critical in (
        (x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), False),
        (x509.BasicConstraints(ca=True, path_length=None), True),
    ):
        built = built.add_extension(extension, critical)
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(built.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM) + private)
    return path


@pytest.fixture
def cluster(certificate: Path) -> Iterator[Cluster]:
    state = Cluster()

    class Handler(http.server.BaseHTTPRequestHandler):
        def _serve(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
            allowed = self.headers["Authorization"] == f"Bearer {TOKEN}"
            status, answer = state.answer(self.command, self.path, body) if allowed else (401, {})
            text = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = _serve

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    state.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def start(cluster: Cluster, certificate: Path, tmp_path: Path):
    """Returns a function that starts the module as the pod does, with changes to its environment."""
    template = {"apiVersion": "ray.io/v1", "kind": "RayJob", "spec": {"entrypoint": "true"}}
    metadata = {"name": "ddpm-digits", "namespace": "elsewhere", "labels": {"app.kubernetes.io/instance": "ddpm-digits"}}
    (tmp_path / "rayjob.yaml").write_text(yaml.safe_dump(template | {"metadata": metadata}))
    (tmp_path / "account").mkdir()
    for name, text in {"token": TOKEN, "namespace": "team-a", "ca.crt": certificate.read_text()}.items():
        (tmp_path / "account" / name).write_text(text)

    def run(*arguments: str, **changes: str) -> subprocess.Popen[str]:
        kubernetes = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(cluster.port), "JOB_NAME": BATCH_JOB, "JOB_UID": UID}
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "NO_PROXY": "*"} | kubernetes | changes
        options = ["--template", str(tmp_path / "rayjob.yaml"), "--account", str(tmp_path / "account"), "--poll", "0.05", "--patience", "1"]
        command = [sys.executable, "-W", "error", "-m", "workflows.submit_rayjob", *options, *arguments]
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return run


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_a_tick_makes_one_rayjob_named_after_its_batch_job_and_waits_for_it(cluster: Cluster, start):
    cluster.states = [("", ""), ("Initializing", ""), ("Running", "RUNNING"), ("Running", "RUNNING"), ("Complete", "SUCCEEDED")]
    code, out, err = finish(start("--wait"))
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"RayJob {JOB} is made",
        f"RayJob {JOB}: Initializing",
        f"RayJob {JOB}: Running, job RUNNING",
        f"RayJob {JOB}: Complete, job SUCCEEDED",
    ]
    assert list(cluster.rayjobs) == [JOB]
    assert cluster.rayjobs[JOB]["metadata"]["ownerReferences"] == [{"apiVersion": "batch/v1", "kind": "Job", "name": BATCH_JOB, "uid": UID}]
    assert JOB != BATCH_JOB, "KubeRay submits by a batch Job of the RayJob's name"
    assert "namespace" not in cluster.rayjobs[JOB]["metadata"]
    assert cluster.calls[:2] == [f"GET {RAYJOBS}?labelSelector=app.kubernetes.io/instance%3Dddpm-digits", f"POST {RAYJOBS}"]


def test_a_second_pod_of_the_same_tick_follows_the_rayjob_that_is_there(cluster: Cluster, start):
    cluster.rayjobs[JOB] = {"metadata": {"name": JOB}, "status": {"jobDeploymentStatus": "Running"}}
    cluster.states = [("Running", "RUNNING"), ("Complete", "SUCCEEDED")]
    code, out, _ = finish(start("--wait"))
    assert code == 0
    assert f"RayJob {JOB} is there already; following it" in out
    assert len(cluster.rayjobs) == 1


@pytest.mark.parametrize("end", [("Failed", "FAILED"), ("Complete", "STOPPED"), ("ValidationFailed", "")])
def test_the_exit_code_follows_the_run(cluster: Cluster, start, end: tuple[str, str]):
    cluster.states = [("Running", "RUNNING"), end]
    code, out, _ = finish(start("--wait"))
    assert code == 1
    assert f"RayJob {JOB}: {end[0]}" in out


def test_a_tick_starts_nothing_while_the_rayjob_of_an_earlier_one_runs(cluster: Cluster, start):
    cluster.rayjobs["ddpm-digits-28999999-run"] = {"metadata": {"name": "ddpm-digits-28999999-run"}, "status": {"jobDeploymentStatus": "Running"}}
    cluster.rayjobs["ddpm-digits-28999998-run"] = {"metadata": {"name": "ddpm-digits-28999998-run"}, "status": {"jobDeploymentStatus": "Complete"}}
    code, out, _ = finish(start("--wait"))
    assert (code, out) == (0, "RayJob ddpm-digits-28999999-run of an earlier tick still runs; nothing is started\n")
    assert JOB not in cluster.rayjobs


def test_without_wait_the_pod_ends_once_the_rayjob_is_made(cluster: Cluster, start):
    code, out, _ = finish(start())
    assert (code, out) == (0, f"RayJob {JOB} is made\n")


def test_sigterm_leaves_the_rayjob_alive(cluster: Cluster, start):
    cluster.states = [("Running", "RUNNING")]
    process = start("--wait")
    assert cluster.looked.wait(60)
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)
    assert (code, err) == (143, "")
    assert "the RayJob goes on" in out
    assert JOB in cluster.rayjobs
    assert {call.partition(" ")[0] for call in cluster.calls} == {"GET", "POST"}


def test_an_api_that_stumbles_is_asked_again(cluster: Cluster, start):
    cluster.failures, cluster.states = [503, 429], [("Complete", "SUCCEEDED")]
    assert finish(start("--wait"))[0] == 0


def test_a_rayjob_that_somebody_deleted_is_told(cluster: Cluster, start):
    cluster.failures = []
    process = start("--wait")
    assert cluster.looked.wait(60)
    cluster.rayjobs.clear()
    code, _, err = finish(process)
    assert code == 2
    assert err == f"error: RayJob {JOB} is gone: somebody deleted it\n"


@pytest.mark.parametrize(
    ("failures", "changes", "message"),
    [
        ([403], {}, "was refused (HTTP 403"),
        ([500] * 50, {}, "does not answer for 1 s (HTTP 500"),
        ([], {"KUBERNETES_SERVICE_PORT": "9"}, "does not answer for 1 s (ConnectionError)"),
        ([], {"JOB_NAME": ""}, "JOB_NAME or JOB_UID is not set"),
        ([], {"KUBERNETES_SERVICE_HOST": ""}, "run this in a pod that has a service account"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(cluster: Cluster, start, failures: list[int], changes: dict[str, str], message: str):
    cluster.failures = failures
    code, out, err = finish(start("--wait", **changes))
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1
    assert TOKEN not in err


def test_another_certificate_is_not_trusted(cluster: Cluster, start, tmp_path: Path):
    import certifi

    (tmp_path / "account" / "ca.crt").write_text(Path(certifi.where()).read_text())
    code, _, err = finish(start("--wait"))
    assert code == 2
    assert "SSLError" in err
    assert cluster.calls == []


def test_the_pod_s_command_runs_from_the_zip_alone(cluster: Cluster, start, tmp_path: Path):
    from cluster.package import pack

    (tmp_path / "ddpm.zip").write_bytes(pack("", "abc"))
    code, out, err = finish(start(PYTHONPATH=str(tmp_path / "ddpm.zip")))
    assert (code, out) == (0, f"RayJob {JOB} is made\n"), err
