"""An S3 as moto plays it, in memory, whose conditional writes are what a test asks for.

    python moto_store.py HOST PORT honoured|writes|ignored|refused

Moto looks and then writes, so that of two conditional writes at once both may succeed. Here they go one after the other, as on Amazon's.
`writes` drops the conditions of deletions, `ignored` those of writes too, `refused` answers each with 501: stores of all these kinds exist.
"""

import io
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import run_simple

Environ = dict[str, Any]
CONDITIONS = ("HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH")
REFUSAL = b"<Error><Code>NotImplemented</Code><Message>A header you provided implies functionality that is not implemented</Message></Error>"


class Store:
    """Moto behind a gate for writes."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._writing = threading.Lock()

    def __call__(self, environ: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] not in ("PUT", "DELETE"):
            return self._moto(environ, start_response)
        # Read before it is its turn: a client that stalls in the middle must not hold up the others.
        environ["wsgi.input"] = io.BytesIO(_body(environ))
        asked = [name for name in CONDITIONS if name in environ]
        if asked and self._kind == "refused":
            start_response("501 Not Implemented", [("Content-Type", "application/xml"), ("Content-Length", str(len(REFUSAL)))])
            return [REFUSAL]
        if self._kind == "ignored" or (self._kind == "writes" and environ["REQUEST_METHOD"] == "DELETE"):
            for name in asked:
                del environ[name]
        with self._writing:
            return self._moto(environ, start_response)


def _body(environ: Environ) -> bytes:
    if "CONTENT_LENGTH" in environ:
        return environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"] or 0))
    return environ["wsgi.input"].read() if environ.get("wsgi.input_terminated") else b""


if __name__ == "__main__":
    host, port, kind = sys.argv[1:]
    run_simple(host, int(port), Store(kind), threaded=True, request_handler=MotoRequestHandler)
