"""Messages to a webhook: signed, sent beside the caller's work, kept in an outbox until they have arrived.

POST of JSON, with these headers:

X-Ddpm-Delivery   names the message, equal for every try, so that a receiver can ignore the second of two
X-Ddpm-Timestamp  seconds since 1970 of this try
X-Ddpm-Signature  sha256=HEX, HMAC-SHA256 of `TIMESTAMP.BODY` under the secret; absent where there is none

A message is written to an outbox, STORAGE/.../outbox/MILLISECONDS-ID.json, before the first try and removed once the receiver answers 2xx, so that
the next attempt delivers what this one could not, oldest first. It is given up after a week. Neither address nor secret, which for many receivers
are the same thing, is ever part of a message, a file or a sentence: those name the host alone.
"""

import hashlib
import hmac
import ipaddress
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

from pydantic import JsonValue
from pydantic_core import to_json

from components.storage import Location
from pipeline.errors import ConfigError

ATTEMPTS, TOTAL_S, TIMEOUT_S, BACKOFF_S = 3, 30.0, 5.0, 0.5
KEEP_S = 7 * 86400.0
INSECURE = "http+insecure"
_AGAIN = (408, 425, 429)
_NAME = re.compile(r"(\d{14})-[0-9a-f]{32}\.json")

Outcome = Literal["delivered", "unreached", "refused", "given up"]


@dataclass(frozen=True)
class Delivery:
    """What became of a message.

    Attributes:
        id: names the message; empty where the sentence is about all of them.
        outcome: but for `delivered` and `given up` the message stays in the outbox.
        said: a sentence for the journal, without address and secret.
    """

    id: str
    outcome: Outcome
    said: str


def check_url(url: str) -> None:
    """Checks an address that messages may go to: https, or http on this machine; elsewhere without encryption only as http+insecure://HOST/PATH.

    Raises:
        ConfigError: naming the host alone.
    """
    host, right = _host(url), "use https://HOST/PATH, or http:// on this machine"
    if not host:
        raise ConfigError(f"retrain.webhook is not the address of a web server; {right}")
    scheme = urlsplit(url).scheme
    if scheme == "http" and not _is_loopback(host):
        raise ConfigError(f"retrain.webhook to {host} is not encrypted; {right}, or where the network is to be trusted {INSECURE}://HOST/PATH")
    if scheme not in ("https", "http", INSECURE):
        raise ConfigError(f"retrain.webhook has the scheme {scheme!r}, which is not supported; {right}")


def _host(url: str) -> str:
    """Returns the host of an address, nothing where it is none."""
    try:
        parts = urlsplit(url)
        return "" if parts.port == 0 else parts.hostname or ""
    except ValueError:
        return ""


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def signature(secret: str, timestamp: str, body: bytes) -> str:
    """Returns what the header X-Ddpm-Signature must be; a receiver compares it by `hmac.compare_digest`."""
    return f"sha256={hmac.new(secret.encode(), timestamp.encode() + b'.' + body, hashlib.sha256).hexdigest()}"


@dataclass(frozen=True)
class _Receiver:
    """Where messages go, and how long to try.

    Attributes:
        deadline: of `time.monotonic`; no try begins after it.
    """

    url: str = field(repr=False)
    secret: str | None = field(repr=False)
    attempts: int
    timeout_s: float
    deadline: float

    @property
    def host(self) -> str:
        return _host(self.url)

    @property
    def left_s(self) -> float:
        return self.deadline - time.monotonic()


def _id(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()[:32]


def _send(receiver: _Receiver, body: bytes) -> Delivery:
    """Sends a message, several times if need be: no answer in time, 408, 425, 429 and 5xx may be otherwise a moment later."""
    try:
        check_url(receiver.url)
    except ConfigError as error:
        return Delivery(_id(body), "refused", str(error))
    outcome, what, tries, pause_s = "unreached", "had no time left", 0, BACKOFF_S
    while outcome == "unreached" and tries < receiver.attempts and receiver.left_s > 0:
        outcome, what = _judged(_post(receiver, body))
        tries += 1
        if outcome == "unreached" and tries < receiver.attempts:
            time.sleep(pause_s)
            pause_s *= 2
    return Delivery(_id(body), outcome, f"retrain.webhook: {receiver.host} {what}, {tries} {'try' if tries == 1 else 'tries'}")


def _post(receiver: _Receiver, body: bytes) -> int | str:
    """Returns the status of an answer, or the kind of error where there is none: an error's text could hold the address."""
    import requests

    timestamp = str(int(time.time()))
    headers = {"Content-Type": "application/json", "User-Agent": "ddpm-pipeline", "X-Ddpm-Delivery": _id(body), "X-Ddpm-Timestamp": timestamp}
    if receiver.secret:
        headers["X-Ddpm-Signature"] = signature(receiver.secret, timestamp, body)
    url = receiver.url.replace(INSECURE, "http", 1) if receiver.url.startswith(INSECURE) else receiver.url
    try:
        with requests.Session() as session:
            # A proxy of the environment is for the world outside this machine.
            session.trust_env = not _is_loopback(receiver.host)
            # A redirect would carry the message elsewhere. The answer's body, which may be endless, is never read.
            with session.post(url, data=body, headers=headers, timeout=receiver.timeout_s, allow_redirects=False, stream=True) as answer:
                return answer.status_code
    except (OSError, ValueError) as error:
        return type(error).__name__


def _judged(status: int | str) -> tuple[Outcome, str]:
    if isinstance(status, str):
        return "unreached", f"gave no answer ({status})"
    if status in _AGAIN or status >= 500:
        return "unreached", f"answered {status}"
    if 200 <= status < 300:
        return "delivered", f"answered {status}"
    if 300 <= status < 400:
        return "refused", f"answered {status}, a redirect, which is not followed; give the address that it leads to"
    return "refused", f"answered {status}; look at the address and at DDPM_WEBHOOK_SECRET"


class WebhookSender:
    """Messages on their way, in a thread of their own.

    Args:
        outbox: folder of messages that have not arrived.
        unsaved: one that could not be written there.
    """

    def __init__(self, outbox: Location, receiver: _Receiver, unsaved: bytes | None) -> None:
        self._outbox, self._receiver, self._unsaved = outbox, receiver, unsaved
        self._done: list[Delivery] = []
        # A daemon, because a receiver that never ends its answer must not keep the process alive.
        self._thread = threading.Thread(target=self._run, name="webhook", daemon=True)
        self._thread.start()

    def wait(self, seconds: float | None = None) -> tuple[Delivery, ...]:
        """Returns what became of the messages so far, oldest first, once all are done or the time is over; what is left stays in the outbox.

        Args:
            seconds: by default until `total_s` after the start.
        """
        self._thread.join(max(0.0, self._receiver.left_s if seconds is None else seconds))
        late = Delivery("", "unreached", f"retrain.webhook: {self._receiver.host} takes too long; the next attempt tries again")
        return (*self._done, late) if self._thread.is_alive() else tuple(self._done)

    def _run(self) -> None:
        try:
            self._deliver_all()
        except OSError as error:
            self._done.append(Delivery("", "unreached", f"retrain.webhook: {self._outbox} cannot be read or written ({error}); look at the storage root"))
        if self._unsaved is not None:
            self._done.append(_send(self._receiver, self._unsaved))

    def _deliver_all(self) -> None:
        """Delivers what is there, up to the first message that finds nobody: later ones would not either, and would overtake it."""
        for name in self._outbox.files():
            if match := _NAME.fullmatch(name):
                delivery = self._deliver(self._outbox / name, time.time() - int(match[1]) / 1000)
                self._done.append(delivery)
                if delivery.outcome == "unreached":
                    return

    def _deliver(self, file: Location, age_s: float) -> Delivery:
        delivery = _send(self._receiver, file.read_bytes())
        if delivery.outcome != "delivered" and age_s <= KEEP_S:
            return delivery
        file.remove()
        if delivery.outcome == "delivered":
            return delivery
        return Delivery(delivery.id, "given up", f"{delivery.said}; given up, {age_s / 86400:.0f} days after the first try")


def post(
    outbox: Location,
    url: str,
    payload: Mapping[str, JsonValue],
    *,
    secret: str | None,
    attempts: int = ATTEMPTS,
    timeout_s: float = TIMEOUT_S,
    total_s: float = TOTAL_S,
) -> WebhookSender:
    """Puts a message in an outbox, and begins to deliver all that is there; raises nothing, whatever storage and receiver do.

    An equal message that is still there is not put a second time. One that was sent by a process that died before it could remove it is sent again,
    under the same X-Ddpm-Delivery.

    Args:
        outbox: of one receiver, used by one process at a time.
        secret: signs the messages; None leaves them unsigned.
        timeout_s: to connect, and for each part of the answer's head.
        total_s: no try begins later, for all messages together.
    """
    body, unsaved = to_json(payload, inf_nan_mode="null"), None
    try:
        if not any(name.endswith(f"-{_id(body)}.json") for name in outbox.files()):
            (outbox / f"{int(time.time() * 1000):014d}-{_id(body)}.json").write_bytes(body)
    except OSError:
        unsaved = body
    return WebhookSender(outbox, _Receiver(url, secret, attempts, timeout_s, time.monotonic() + total_s), unsaved)
