"""A server that speaks the few calls of Kubernetes' API that a CronJob's pod needs, over TLS and with a token."""

import datetime
import http.server
import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

Tree = dict[str, Any]
TOKEN = "account-token"
RAYJOBS = "/apis/ray.io/v1/namespaces/team-a/rayjobs"
PODS = "/api/v1/namespaces/team-a/pods"


@dataclass
class Cluster:
    """The server's state.

    Attributes:
        rayjobs: by name.
        states: that each GET of a RayJob moves it through.
        logs: of the pods by which KubeRay submitted, by the RayJob's name, the oldest first.
        failures: answers to give before any other.
        forbidden: beginning of addresses that the account may not use.
        account: folder of a service account that may call it.
    """

    account: Path
    port: int = 0
    rayjobs: dict[str, Tree] = field(default_factory=dict)
    states: list[tuple[str, ...]] = field(default_factory=list)
    logs: dict[str, list[str]] = field(default_factory=dict)
    failures: list[int] = field(default_factory=list)
    forbidden: str = ""
    calls: list[str] = field(default_factory=list)
    looked: threading.Event = field(default_factory=threading.Event)

    @property
    def env(self) -> dict[str, str]:
        """What Kubernetes tells a pod of it."""
        return {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(self.port)}

    def answer(self, method: str, path: str, body: Tree) -> tuple[int, Tree | str]:
        self.calls.append(f"{method} {path}")
        if self.failures:
            return self.failures.pop(0), {"message": "refused"}
        if self.forbidden and path.startswith(self.forbidden):
            return 403, {}
        if path.startswith(PODS):
            return self._pods(path.removeprefix(PODS))
        if method == "POST":
            name = body["metadata"]["name"]
            return (409, {}) if name in self.rayjobs else (201, self.rayjobs.setdefault(name, body))
        if path.startswith(f"{RAYJOBS}?"):
            return 200, {"items": list(self.rayjobs.values())}
        rayjob = self.rayjobs.get(path.rpartition("/")[2])
        if rayjob is None:
            return 404, {}
        if self.states:
            rayjob["status"] = dict(zip(("jobDeploymentStatus", "jobStatus", "message"), self.states.pop(0), strict=False))
        self.looked.set()
        return 200, rayjob

    def _pods(self, path: str) -> tuple[int, Tree | str]:
        """Answers with the pods of a batch Job, in no useful order, or with the log of one."""
        parts = urlsplit(path)
        if parts.path:
            name, number = parts.path.split("/")[1].rsplit("-", 1)
            return 200, self.logs[name][int(number)]
        job = parse_qs(parts.query)["labelSelector"][0].removeprefix("batch.kubernetes.io/job-name=")
        pods = [
            {"metadata": {"name": f"{job}-{index}", "creationTimestamp": f"2026-01-0{index + 1}T00:00:00Z"}} for index in range(len(self.logs.get(job, ())))
        ]
        return 200, {"items": pods[::-1]}


def make_certificate(path: Path) -> Path:
    """Writes a certificate of 127.0.0.1 and its key into one file."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "kubernetes")])
    built = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + datetime.timedelta(days=1))
    for extension, critical in (
        (x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), False),
        (x509.BasicConstraints(ca=True, path_length=None), True),
    ):
        built = built.add_extension(extension, critical)
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(built.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM) + private)
    return path


@contextmanager
def kubernetes_api(folder: Path) -> Iterator[Cluster]:
    """Serves on 127.0.0.1 for as long as the block lasts.

    Args:
        folder: for the certificate and the service account.
    """
    certificate, account = make_certificate(folder / "server.pem"), folder / "account"
    account.mkdir()
    for name, text in {"token": TOKEN, "namespace": "team-a", "ca.crt": certificate.read_text()}.items():
        (account / name).write_text(text)
    state = Cluster(account)

    class Handler(http.server.BaseHTTPRequestHandler):
        def _serve(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
            allowed = self.headers["Authorization"] == f"Bearer {TOKEN}"
            status, answer = state.answer(self.command, self.path, body) if allowed else (401, {})
            content = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain" if isinstance(answer, str) else "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

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
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
