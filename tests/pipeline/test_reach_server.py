"""What is said of an address where no MLflow server answers as it should, before any work begins."""

import datetime
import http.server
import ipaddress
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from components.storage import Location
from pipeline.errors import RegistryError
from pipeline.tracking import connect


class Guarded(http.server.BaseHTTPRequestHandler):
    """Says that it is well, and to all else that it wants a password."""

    health = 200

    def do_GET(self) -> None:
        self.send_response(self.health if self.path == "/health" else 401)
        self.end_headers()

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Stays silent."""


class Stranger(Guarded):
    """Knows no /health."""

    health = 404


@contextmanager
def web(handler: type[Guarded] = Guarded, certificate: Path | None = None) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"{'https' if certificate else 'http'}://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1 that signs itself, and its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, "mlflow")])
    now = datetime.datetime.now(datetime.UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + datetime.timedelta(days=1))
    made = made.add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
    made = made.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    path.write_bytes(made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM) + private)
    return path


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    monkeypatch.delenv("CURL_CA_BUNDLE", raising=False)


def said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, url: str) -> str:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    with pytest.raises(RegistryError) as caught:
        connect(Location.of(tmp_path))
    return str(caught.value)


def test_a_certificate_that_is_not_trusted_is_told_with_what_would_trust_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, certificate: Path):
    with web(certificate=certificate) as url:
        assert said(monkeypatch, tmp_path, url).startswith(f"MLFLOW_TRACKING_URI={url} has a certificate that is not trusted here; set REQUESTS_CA_BUNDLE")


@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "MLFLOW_TRACKING_SERVER_CERT_PATH"])
def test_a_certificate_is_trusted_by_either_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, certificate: Path, variable: str):
    monkeypatch.setenv(variable, str(certificate))
    with web(certificate=certificate) as url:
        assert "asks for a user and a password" in said(monkeypatch, tmp_path, url), "the first question after /health"


def test_something_else_than_mlflow_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with web(Stranger) as url:
        assert "is no MLflow server, or a broken one: /health answers 404" in said(monkeypatch, tmp_path, url)
