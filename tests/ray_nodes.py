"""Real Ray clusters for tests: a head and workers by `ray start`, as processes of this machine or in network namespaces of their own.

On loopback every node has an address of its own (127.77.x.1, .2, ...), its own ports and its own temporary folder; no rights are needed.
In namespaces (needs root) a node is a machine: its own network behind a bridge, its own processes, /dev/shm and temporary folder. The
bridge is a machine too, on which clients and servers run (`prefix`, `host`), and which `cut` never takes away.
"""

import json
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import keeper
from networks import Loopback, Namespaces, Network, can_make_namespaces
from servers import S3Server, environment, fetch, mlflow_server, s3_server

__all__ = ["Alive", "RayNodes", "S3Server", "can_make_namespaces", "environment", "fetch", "mlflow_server", "s3_server", "start_nodes"]

OBJECT_STORE_BYTES = 100_000_000
QUICK_TO_DECLARE_DEAD = {"RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "2000", "RAY_health_check_failure_threshold": "3"}
_ATTEMPTS = 4
_HEAD_PORTS = ("port", "dashboard-port", "ray-client-server-port")
_NODE_PORTS = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port", "metrics-export-port")


@dataclass(frozen=True)
class Alive:
    """A node that the cluster counts on."""

    ip: str
    name: str
    node_id: str
    resources: dict[str, float]
    labels: dict[str, str]


@dataclass
class RayNodes:
    """A running cluster. Node 0 is the head.

    Attributes:
        env: what a client process needs in its environment, and what every node has.
        token_file: the token that all of them share; readable by its owner only.
    """

    folder: Path
    token_file: Path
    env: dict[str, str]
    node_env: dict[str, str]
    network: Network
    _kept: dict[int, keeper.Kept] = field(default_factory=dict)
    _ports: dict[str, int] = field(default_factory=dict)
    _cpus: list[int] = field(default_factory=list)

    @property
    def dashboard_url(self) -> str:
        """Address for job submission, as seen from where `prefix` runs commands."""
        return f"http://{self.network.ip(0)}:{self._ports['dashboard-port']}"

    @property
    def gcs_address(self) -> str:
        return f"{self.network.ip(0)}:{self._ports['port']}"

    @property
    def prefix(self) -> tuple[str, ...]:
        """Runs a command as on a machine beside the nodes, which reaches all of them; empty on loopback."""
        return self.network.prefix

    @property
    def host(self) -> str:
        """Address at which nodes reach a server that `prefix` started."""
        return self.network.host

    def ip(self, index: int) -> str:
        return self.network.ip(index)

    def on(self, index: int) -> tuple[str, ...]:
        """Returns the prefix that runs a command on a node, with that node's network, processes and folders; empty on loopback."""
        return self.network.inside(index, self._kept[index].pid)

    def alive(self) -> list[Alive]:
        """Returns the nodes that the GCS holds for alive.

        Raises:
            OSError: if the head does not answer.
        """
        url = f"{self.dashboard_url}/api/v0/nodes?detail=1&limit=1000&filter_keys=state&filter_predicates=%3D&filter_values=ALIVE"
        answer = json.loads(fetch(url, token=self.token_file.read_text(), prefix=self.prefix))
        nodes = answer["data"]["result"]["result"]
        return [Alive(node["node_ip"], node["node_name"], node["node_id"], node["resources_total"], node["labels"] or {}) for node in nodes]

    def wait_until(self, condition: Callable[[list[Alive]], bool], timeout: float = 120) -> list[Alive]:
        """Returns the living nodes as soon as they meet a condition.

        Raises:
            TimeoutError: if they do not.
        """
        deadline = time.monotonic() + timeout
        nodes: list[Alive] = []
        while time.monotonic() < deadline:
            with suppress(OSError):
                nodes = self.alive()
                if condition(nodes):
                    return nodes
            time.sleep(0.3)
        raise TimeoutError(f"after {timeout} s these nodes are alive: {nodes}")

    def add(self, cpus: int) -> int:
        """Starts one more node and returns its index once it is alive."""
        self._cpus.append(cpus)
        self.restart(len(self._cpus) - 1)
        return len(self._cpus) - 1

    def restart(self, index: int) -> None:
        """Starts a node that was killed or fenced off, at its old address, with an empty folder.

        Raises:
            RuntimeError: if it does not come up, four times in a row; the message ends with what it wrote.
        """
        for _ in range(_ATTEMPTS):
            self.kill(index)
            if self._start(index):
                return
        raise RuntimeError(f"node {index} does not start:\n{self._kept[index].tail()}")

    def kill(self, index: int) -> None:
        """Kills all processes of a node with SIGKILL."""
        if index in self._kept:
            self._kept[index].end()
            self.network.clear(index)

    def cut(self, index: int) -> None:
        """Takes the link of a node away; its processes go on. In namespaces only."""
        self.network.set_link(index, "down")

    def heal(self, index: int) -> None:
        """Gives the link back. A node that was declared dead meanwhile ends itself; `restart` brings it back."""
        self.network.set_link(index, "up")

    def close(self) -> None:
        for index in self._kept:
            self.kill(index)

    def _start(self, index: int) -> bool:
        """Starts a node; returns whether it came up. A raylet whose agent is slow to start gives up, and a port may be taken meanwhile."""
        known = {node.node_id for node in self.alive()} if index else set()
        disk = self.network.disk(index)
        wrapper = self.network.join(index)
        own = {"TMPDIR": f"{disk}/tmp", "RAY_TMPDIR": f"{disk}/ray"}
        command = ["bash", "-c", f'rm -rf {disk}/* && mkdir -p {disk}/tmp && exec "$@"', "_", *self._command(index, disk)]
        self._kept[index] = keeper.start(command, log=self.folder / f"node-{index}.log", env=self.node_env | own, wrapper=wrapper)
        if self._kept[index].code(timeout=120) != 0:
            return False
        try:
            self.wait_until(lambda nodes: any(node.ip == self.ip(index) and node.node_id not in known for node in nodes), timeout=60)
        except TimeoutError:
            return False
        return True

    def _command(self, index: int, disk: Path) -> list[str]:
        """Returns the `ray start` of a node."""
        options: dict[str, object] = {"num-cpus": self._cpus[index], "object-store-memory": OBJECT_STORE_BYTES}
        options |= {"node-ip-address": self.ip(index), "node-name": f"node-{index}", "temp-dir": f"{disk}/ray"}
        ports = self.network.ports(_NODE_PORTS if index else _HEAD_PORTS + _NODE_PORTS)
        if index:
            options |= ports | {"address": self.gcs_address}
        else:
            self._ports = ports
            options |= ports | {"dashboard-host": self.ip(0)}
        flags = [f"--{name}={value}" for name, value in options.items()]
        return [sys.executable, "-m", "ray.scripts.scripts", "start", *(["--head"] if index == 0 else []), "--disable-usage-stats", *flags]


@contextmanager
def start_nodes(
    folder: Path, cpus: Sequence[int] = (0, 1, 1), *, in_namespaces: bool, env: Mapping[str, str] | None = None, quick_to_declare_dead: bool = False
) -> Iterator[RayNodes]:
    """Runs a Ray cluster for as long as the block lasts; nothing of it is left behind.

    Args:
        folder: where the token and the logs of `ray start` go; all nodes see it at the same path, as they see the whole disk.
        cpus: CPUs of each node, the head first.
        in_namespaces: one network namespace for each node, which needs root.
        env: extra variables for every process of the cluster.
        quick_to_declare_dead: a silent node is dead after some 10 s instead of a minute.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        root = Path(tempfile.mkdtemp(prefix="nodes-", dir="/tmp"))
        stack.callback(shutil.rmtree, root)
        network = Namespaces(root) if in_namespaces else Loopback(root)
        stack.callback(network.remove)
        network.make()
        token_file = _write_token(folder / "token")
        client_env = _client_environment(token_file)
        health = QUICK_TO_DECLARE_DEAD if quick_to_declare_dead else {}
        node_env = environment(client_env | {"RAY_raylet_start_wait_time_s": "40"} | health | dict(env or {}))
        nodes = RayNodes(folder, token_file, client_env, node_env, network)
        stack.callback(nodes.close)
        for count in cpus:
            nodes.add(count)
        yield nodes


def _client_environment(token_file: Path) -> dict[str, str]:
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_USAGE_STATS_ENABLED": "0",
        "no_proxy": "*",
        "NO_PROXY": "*",
    }


def _write_token(path: Path) -> Path:
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    return path
