"""Where the nodes of a test cluster live: on loopback, or in network namespaces of their own.

A network gives each node an address, ports, a folder of its own, and the command that runs others there.
"""

import itertools
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from servers import free_ports

_PORTS = {"port": 6379, "dashboard-port": 8265}
_SERIAL = itertools.count()
_NAMESPACE = re.compile(r"^ddpm-(\d+)-\d+-\w+$")


class Network(Protocol):
    """Where nodes live: each has an address, a folder of its own, and a command that runs others there."""

    host: str
    prefix: tuple[str, ...]

    def make(self) -> None: ...
    def ip(self, index: int) -> str: ...
    def ports(self, names: Sequence[str]) -> dict[str, int]: ...
    def disk(self, index: int) -> Path: ...
    def join(self, index: int) -> tuple[str, ...]: ...
    def inside(self, index: int, pid: int) -> tuple[str, ...]: ...
    def set_link(self, index: int, state: str) -> None: ...
    def clear(self, index: int) -> None: ...
    def remove(self) -> None: ...


class Loopback:
    """Nodes as processes of this machine."""

    host = "127.0.0.1"
    prefix: tuple[str, ...] = ()

    def __init__(self, root: Path) -> None:
        self._root = root
        self._third = (os.getpid() + next(_SERIAL)) % 250 + 1

    def make(self) -> None:
        return

    def ip(self, index: int) -> str:
        return f"127.77.{self._third}.{index + 1}"

    def ports(self, names: Sequence[str]) -> dict[str, int]:
        return dict(zip(names, free_ports(len(names)), strict=True))

    def disk(self, index: int) -> Path:
        return self._root / str(index)

    def join(self, index: int) -> tuple[str, ...]:
        self.disk(index).mkdir(parents=True, exist_ok=True)
        return ()

    def inside(self, index: int, pid: int) -> tuple[str, ...]:
        return ()

    def set_link(self, index: int, state: str) -> None:
        raise NotImplementedError("nodes on loopback have no link of their own; use in_namespaces=True")

    def clear(self, index: int) -> None:
        return

    def remove(self) -> None:
        return


class Namespaces:
    """Nodes as machines: `ip netns` for the network, `unshare` for processes and mounts."""

    def __init__(self, root: Path) -> None:
        serial = next(_SERIAL)
        self._root = root
        self._name = f"ddpm-{os.getpid()}-{serial}"
        self._third = (os.getpid() + serial) % 250 + 1
        self._joined: list[int] = []
        self._hub = f"{self._name}-hub"
        self.host = f"10.77.{self._third}.254"
        self.prefix: tuple[str, ...] = ("ip", "netns", "exec", self._hub)

    def make(self) -> None:
        """Makes the bridge, a machine that nodes and clients reach each other by."""
        _remove_namespaces(_is_stale)
        _ip("netns", "add", self._hub)
        _ip("-n", self._hub, "link", "add", "br0", "type", "bridge")
        _ip("-n", self._hub, "addr", "add", f"{self.host}/24", "dev", "br0")
        _ip("-n", self._hub, "link", "set", "lo", "up")
        _ip("-n", self._hub, "link", "set", "br0", "up")

    def ip(self, index: int) -> str:
        return f"10.77.{self._third}.{index + 1}"

    def ports(self, names: Sequence[str]) -> dict[str, int]:
        return {name: _PORTS.get(name, 21000 + place) for place, name in enumerate(names)}

    def disk(self, index: int) -> Path:
        return self._root / "disk"

    def join(self, index: int) -> tuple[str, ...]:
        """Connects a node's namespace to the bridge, the first time; returns the command that starts a machine there."""
        if index not in self._joined:
            self._connect(index)
        own = self._root / f"disk-{index}"
        own.mkdir(exist_ok=True)
        self.disk(index).mkdir(exist_ok=True)
        mounts = f'mount --bind {own} {self.disk(index)} && mount -t tmpfs -o size=512m tmpfs /dev/shm && exec "$@"'
        machine = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
        return ("ip", "netns", "exec", self._node(index), *machine, "bash", "-c", mounts, "_")

    def inside(self, index: int, pid: int) -> tuple[str, ...]:
        first = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0]
        return ("nsenter", "--target", first, "--mount", "--net", "--pid", f"--wd={os.getcwd()}", "--")

    def set_link(self, index: int, state: str) -> None:
        _ip("-n", self._hub, "link", "set", f"p{index}", state)

    def clear(self, index: int) -> None:
        """Kills what still runs in a node's namespace, such as what a client started there."""
        _kill_in(self._node(index))

    def remove(self) -> None:
        _remove_namespaces(lambda name: name.startswith(f"{self._name}-"))

    def _node(self, index: int) -> str:
        return f"{self._name}-n{index}"

    def _connect(self, index: int) -> None:
        node = self._node(index)
        _ip("netns", "add", node)
        self._joined.append(index)
        _ip("link", "add", "eth0", "netns", node, "type", "veth", "peer", "name", f"p{index}", "netns", self._hub)
        _ip("-n", node, "addr", "add", f"{self.ip(index)}/24", "dev", "eth0")
        _ip("-n", node, "link", "set", "lo", "up")
        _ip("-n", node, "link", "set", "eth0", "up")
        _ip("-n", self._hub, "link", "set", f"p{index}", "master", "br0")
        _ip("-n", self._hub, "link", "set", f"p{index}", "up")


def can_make_namespaces() -> bool:
    """Returns whether this process may make network namespaces and bridges."""
    if os.geteuid() or not shutil.which("ip") or not shutil.which("unshare"):
        return False
    name = f"ddpm-{os.getpid()}-{next(_SERIAL)}-probe"
    try:
        _ip("netns", "add", name)
        _ip("-n", name, "link", "add", "br0", "type", "bridge")
    except subprocess.CalledProcessError:
        return False
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)
    return True


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def _kill_in(namespace: str) -> None:
    """Kills what runs in a network namespace, until nothing does."""
    while pids := _ip("netns", "pids", namespace).split():
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.05)


def _remove_namespaces(is_meant: Callable[[str], bool]) -> None:
    names = [line.split()[0] for line in _ip("netns", "list").splitlines()]
    for name in filter(is_meant, names):
        _kill_in(name)
        _ip("netns", "delete", name)


def _is_stale(name: str) -> bool:
    """Whether a namespace belongs to a test run that was killed before it could remove it."""
    owner = _NAMESPACE.match(name)
    return owner is not None and not Path(f"/proc/{owner[1]}").exists()
