"""What `ddpm ui` and `ddpm schedule` share: a server of this machine that runs for as long as somebody watches it."""

import signal
import socket
import subprocess
import time
import urllib.request

from pipeline.errors import ConfigError

HOST = "127.0.0.1"
ASKED_TO_END = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
READY_TIMEOUT_S = 180
_LINES_SHOWN = 5


def handle_signals() -> None:
    """Makes a closed terminal and SIGTERM the same as Ctrl-C, but for what whoever started this has it ignore, as nohup does."""
    for number in ASKED_TO_END:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _interrupt)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def check_free(port: int) -> None:
    """Checks that nobody listens on a port.

    Raises:
        ConfigError: if somebody does.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ConfigError(f"--port {port} is taken ({error.strerror}); choose another") from error


def becomes_ready(server: "subprocess.Popen[bytes]", health: str) -> bool:
    """Waits until a server answers; returns False where it ended instead.

    Args:
        health: address that it answers when it is ready.

    Raises:
        TimeoutError: if it does neither within READY_TIMEOUT_S.
    """
    # Straight to loopback: a proxy of the environment would not find it.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(READY_TIMEOUT_S * 2):
        if server.poll() is not None:
            return False
        try:
            with opener.open(health, timeout=2):
                return True
        except OSError:
            time.sleep(0.5)
    raise TimeoutError


def last_output(log: str) -> str:
    """Returns the last lines of what a server wrote, in one."""
    said = [line for line in log.splitlines() if line.strip()]
    return " | ".join(said[-_LINES_SHOWN:]) or "nothing"
