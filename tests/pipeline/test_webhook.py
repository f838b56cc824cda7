"""Messages to a webhook, against real servers on this machine."""

import hashlib
import hmac
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from components.storage import Location
from pipeline.errors import ConfigError
from pipeline.retraining import webhook
from pipeline.retraining.webhook import Delivery, check_url, post

SECRET = "not to be told"
PATH = "/services/T0/token-in-the-path"


@dataclass
class Receiver:
    """A server that answers with one status after the other, the last one for good, and keeps what it was sent."""

    url: str
    statuses: list[int]
    bodies: list[bytes] = field(default_factory=list)
    headers: list[Message] = field(default_factory=list)

    @property
    def texts(self) -> list[str]:
        return [json.loads(body)["text"] for body in self.bodies]


Serve = Callable[..., Receiver]


@contextmanager
def receiver(statuses: Sequence[int], gate: threading.Event | None = None) -> Iterator[Receiver]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            kept.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            kept.headers.append(self.headers)
            if gate is not None:
                gate.wait(60)
                self.close_connection = True
                return
            self.send_response(kept.statuses.pop(0) if len(kept.statuses) > 1 else kept.statuses[0])
            self.send_header("Location", "/elsewhere")
            self.end_headers()

        do_GET = do_POST

        def log_message(self, format: str, *args: object) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        kept = Receiver(f"http://127.0.0.1:{server.server_port}{PATH}", list(statuses))
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield kept
        finally:
            if gate is not None:
                gate.set()
            server.shutdown()
            thread.join()


@pytest.fixture
def serve() -> Iterator[Serve]:
    with ExitStack() as stack:
        yield lambda *statuses, gate=None: stack.enter_context(receiver(statuses, gate))


@pytest.fixture
def outbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Location:
    monkeypatch.setattr(webhook, "BACKOFF_S", 0.01)
    return Location.of(tmp_path / "outbox")


def nobody() -> str:
    """Returns an address on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"http://127.0.0.1:{free.getsockname()[1]}{PATH}"


def outcomes(deliveries: Sequence[Delivery]) -> list[str]:
    assert not [said for said in (delivery.said for delivery in deliveries) if SECRET in said or PATH in said]
    return [delivery.outcome for delivery in deliveries]


def test_a_message_is_sent_as_json_with_a_signature_that_the_receiver_can_check(serve: Serve, outbox: Location):
    to = serve(200)
    deliveries = post(outbox, to.url, {"text": "naïve <b>", "number": float("nan")}, secret=SECRET).wait()
    assert outcomes(deliveries) == ["delivered"]
    assert deliveries[0].said == "retrain.webhook: 127.0.0.1 answered 200, 1 try"
    (body,), (headers,) = to.bodies, to.headers
    assert json.loads(body) == {"text": "naïve <b>", "number": None}
    assert headers["Content-Type"] == "application/json"
    expected = hmac.new(SECRET.encode(), headers["X-Ddpm-Timestamp"].encode() + b"." + body, hashlib.sha256).hexdigest()
    assert headers["X-Ddpm-Signature"] == f"sha256={expected}"
    assert abs(int(headers["X-Ddpm-Timestamp"]) - time.time()) < 60
    assert outbox.files() == {}


def test_without_a_secret_nothing_is_signed(serve: Serve, outbox: Location):
    to = serve(204)
    assert outcomes(post(outbox, to.url, {"text": "x"}, secret=None).wait()) == ["delivered"]
    assert to.headers[0]["X-Ddpm-Signature"] is None


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_receiver_that_fails_twice_gets_the_same_message_under_the_same_id_a_third_time(serve: Serve, outbox: Location, status: int):
    to = serve(status, status, 200)
    deliveries = post(outbox, to.url, {"text": "x"}, secret=SECRET).wait()
    assert outcomes(deliveries) == ["delivered"]
    assert deliveries[0].said.endswith("answered 200, 3 tries")
    assert len(to.bodies) == 3
    assert len(set(to.bodies)) == 1
    assert {headers["X-Ddpm-Delivery"] for headers in to.headers} == {deliveries[0].id}


def test_each_further_try_waits_twice_as_long(outbox: Location, monkeypatch: pytest.MonkeyPatch):
    pauses: list[float] = []
    monkeypatch.setattr(webhook.time, "sleep", pauses.append)
    post(outbox, nobody(), {"text": "x"}, secret=None, attempts=4).wait()
    assert pauses == [0.01, 0.02, 0.04]


def test_when_the_time_is_over_nothing_is_tried(serve: Serve, outbox: Location):
    to = serve(200)
    sending = post(outbox, to.url, {"text": "x"}, secret=None, total_s=0)
    assert outcomes(sending.wait(60)) == ["unreached"]
    assert to.bodies == []
    assert len(outbox.files()) == 1


@pytest.mark.parametrize("status", [301, 307, 400, 401, 404])
def test_a_refusal_is_not_tried_again_at_once_and_no_redirect_is_followed(serve: Serve, outbox: Location, status: int):
    to = serve(status)
    assert outcomes(post(outbox, to.url, {"text": "x"}, secret=SECRET).wait()) == ["refused"]
    assert len(to.bodies) == 1
    assert len(outbox.files()) == 1


def test_what_nobody_took_is_delivered_by_the_next_attempt_oldest_first(serve: Serve, outbox: Location):
    for text in ("monday", "tuesday"):
        assert outcomes(post(outbox, nobody(), {"text": text}, secret=SECRET, attempts=2).wait()) == ["unreached"]
    assert len(outbox.files()) == 2
    to = serve(200)
    assert outcomes(post(outbox, to.url, {"text": "wednesday"}, secret=SECRET).wait()) == ["delivered"] * 3
    assert to.texts == ["monday", "tuesday", "wednesday"]
    assert outbox.files() == {}


def test_a_refused_message_holds_up_no_later_one(serve: Serve, outbox: Location):
    post(outbox, serve(400).url, {"text": "monday"}, secret=None).wait()
    to = serve(400, 200)
    assert outcomes(post(outbox, to.url, {"text": "tuesday"}, secret=None).wait()) == ["refused", "delivered"]
    assert len(outbox.files()) == 1


def test_an_equal_message_waits_once(outbox: Location):
    for _ in range(2):
        post(outbox, nobody(), {"text": "x"}, secret=None, attempts=1).wait()
    assert len(outbox.files()) == 1


def test_after_a_week_a_message_is_given_up(outbox: Location):
    post(outbox, nobody(), {"text": "x"}, secret=None, attempts=1).wait()
    (name,) = outbox.files()
    (outbox / name).path.rename((outbox / f"{int((time.time() - 8 * 86400) * 1000):014d}{name[14:]}").path)
    deliveries = post(outbox, nobody(), {"text": "y"}, secret=None, attempts=1).wait()
    assert outcomes(deliveries) == ["given up", "unreached"]
    assert deliveries[0].said.endswith("given up, 8 days after the first try")
    assert len(outbox.files()) == 1


def test_a_silent_receiver_is_left_alone_after_its_timeout(serve: Serve, outbox: Location):
    to = serve(200, gate=threading.Event())
    deliveries = post(outbox, to.url, {"text": "x"}, secret=SECRET, attempts=2, timeout_s=0.1).wait()
    assert outcomes(deliveries) == ["unreached"]
    assert "gave no answer (ReadTimeout), 2 tries" in deliveries[0].said
    assert len(outbox.files()) == 1


def test_a_receiver_that_never_ends_its_answer_does_not_hold_up_the_caller(outbox: Location):
    stop = threading.Event()

    def drip() -> None:
        connection = server.accept()[0]
        with connection:
            while not stop.wait(0.02):
                connection.sendall(b"H")

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=drip)
        thread.start()
        sending = post(outbox, f"http://127.0.0.1:{server.getsockname()[1]}{PATH}", {"text": "x"}, secret=SECRET, attempts=1)
        deliveries = sending.wait(0.3)
        stop.set()
        thread.join()
    assert outcomes(deliveries) == ["unreached"]
    assert "takes too long" in deliveries[0].said
    assert outcomes(sending.wait()) == ["unreached"]
    assert len(outbox.files()) == 1


def test_a_message_is_sent_though_the_outbox_cannot_be_written(serve: Serve, tmp_path: Path):
    (tmp_path / "file").write_text("")
    to = serve(200)
    deliveries = post(Location.of(tmp_path / "file" / "outbox"), to.url, {"text": "x"}, secret=None).wait()
    assert outcomes(deliveries)[-1] == "delivered"
    assert to.texts == ["x"]


def test_no_file_in_the_outbox_holds_address_or_secret(outbox: Location):
    post(outbox, nobody(), {"text": "x"}, secret=SECRET, attempts=1).wait()
    (name,) = outbox.files()
    assert (outbox / name).read_text() == '{"text":"x"}'


def refused(url: str) -> bool:
    try:
        check_url(url)
    except ConfigError:
        return True
    return False


def test_an_address_must_be_encrypted_or_on_this_machine_or_say_that_it_is_neither():
    fine = ["https://hooks.example/x", "http://127.0.0.1:80/", "http://localhost/", "http://[::1]:8080/", "http+insecure://10.0.0.7/hook"]
    assert [url for url in [*fine, "http://10.0.0.7/hook", "http://localhost.example/"] if not refused(url)] == fine


def test_an_address_that_says_it_is_not_encrypted_is_reached(serve: Serve, outbox: Location):
    to = serve(200)
    assert outcomes(post(outbox, to.url.replace("http", "http+insecure", 1), {"text": "x"}, secret=None).wait()) == ["delivered"]
    assert to.texts == ["x"]


@pytest.mark.parametrize(
    "url",
    [
        "http://hooks.example/token",
        "http://10.0.0.7/token",
        "ftp://hooks.example/token",
        "hooks.example/token",
        "https:///token",
        "",
        "https://a:b/token",
        "http://[::1/token",
    ],
)
def test_any_other_address_is_refused_without_telling_it(url: str, outbox: Location):
    with pytest.raises(ConfigError, match=r"^retrain\.webhook ") as error:
        check_url(url)
    assert "token" not in str(error.value)
    deliveries = post(outbox, url, {"text": "x"}, secret=None).wait()
    assert outcomes(deliveries) == ["refused"]
    assert deliveries[0].said == str(error.value)
