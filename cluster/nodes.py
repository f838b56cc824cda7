"""The nodes of a Ray cluster: what each has, and whether each can do its part."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .config import ClusterError

Answer = TypeVar("Answer")
KILL_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Node:
    """One node that is alive.

    Attributes:
        name: how people call it: host name and address.
        resources: Ray resource -> amount, all of it, taken or free.
        labels: Ray node labels.
    """

    id: str
    name: str
    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)

    def amount(self, resource: str) -> float:
        """Returns how much of a resource the node has."""
        return float(self.resources.get(resource, 0.0))

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Tells whether the node carries all of some labels."""
        return all(self.labels.get(key) == value for key, value in labels.items())


def node_from(entry: Mapping[str, Any]) -> Node:
    """Returns the node of an entry of `ray.nodes()`."""
    name = entry.get("NodeName") or entry["NodeManagerHostname"]
    return Node(entry["NodeID"], called(name, entry["NodeManagerAddress"]), entry.get("Resources", {}), entry.get("Labels") or {})


def called(name: str, address: str) -> str:
    """Returns what to call a node: its name and its address, once where they are the same."""
    return address if name == address else f"{name} ({address})"


def living_nodes() -> list[Node]:
    """Returns the nodes of the cluster that this process is connected to, sorted by name."""
    import ray

    return sorted((node_from(entry) for entry in ray.nodes() if entry["Alive"]), key=lambda node: (node.name, node.id))


def describe(nodes: Sequence[Node]) -> str:
    """Returns what a cluster has, in one line: equal nodes together."""
    kinds = Counter(_describe_one(node) for node in nodes)
    return "; ".join(f"{count(number, 'node')} with {kind}" for kind, number in sorted(kinds.items())) or "no node"


def _describe_one(node: Node) -> str:
    own = {name: amount for name, amount in node.resources.items() if not name.startswith(("node:", "memory", "object_store", "accelerator_type"))}
    amounts = [count(own.pop("CPU", 0), "CPU"), count(own.pop("GPU", 0), "GPU"), *(f"{amount:g} {name}" for name, amount in sorted(own.items()))]
    labels = [f"{key}={value}" for key, value in sorted(node.labels.items()) if not key.startswith("ray.io/node") or key.endswith("-group")]
    return ", ".join(amounts + labels)


def count(amount: float, thing: str) -> str:
    """Returns how many of a thing there are, in words: `1 CPU`, `2 CPUs`, `no GPU`."""
    return f"{amount:g} {thing}{'' if amount == 1 else 's'}" if amount else f"no {thing}"


@dataclass(frozen=True)
class Failure:
    """What one node could not do."""

    node: Node
    reason: str


def ask_every_node(
    nodes: Sequence[Node], question: Callable[..., Answer], arguments: Sequence[Any], timeout_s: float
) -> tuple[dict[str, Answer], list[Failure]]:
    """Runs a function on each of some nodes, all at once; takes no CPU from anyone.

    Returns:
        Answers by node id, and the nodes that raised or did not answer in time.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(question)
    asked = {task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote(*arguments): node for node in nodes}
    done, late = ray.wait(list(asked), num_returns=len(asked), timeout=timeout_s)
    answers: dict[str, Answer] = {}
    failures = [Failure(asked[reference], f"gave no answer within {timeout_s:g} s") for reference in late]
    for reference in done:
        try:
            answers[asked[reference].id] = ray.get(reference)
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error
            failures.append(Failure(asked[reference], f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"))
    return answers, failures


def draining_nodes() -> dict[str, float]:
    """Returns the nodes that are to be taken away, by id, with the deadline in seconds since 1970 (0 where there is none)."""
    from ray._private.state import state

    return {str(node): deadline / 1000 for node, deadline in state.get_draining_nodes().items()}


def kill_process(node_id: str, pid: int) -> bool:
    """Kills a worker process of Ray on a node, and tells whether there was one to kill.

    Raises:
        ClusterError: if the node does not answer, or the process is not ours to kill.
    """
    import ray

    if node_id == ray.get_runtime_context().get_node_id():
        return _kill_here(pid)  # no process has to start for it
    answers, failures = ask_every_node([Node(node_id, node_id[:8], {})], _kill_here, [pid], KILL_TIMEOUT_S)
    if failures:
        raise ClusterError(f"process {pid} of node {node_id[:8]} could not be ended ({failures[0].reason})")
    return answers[node_id]


def _kill_here(pid: int) -> bool:
    import psutil

    try:
        process = psutil.Process(pid)
        # The number may be another process's by now; Ray gives its workers titles.
        if "ray::" not in " ".join(process.cmdline()):
            return False
        process.kill()
    except psutil.NoSuchProcess:
        return False
    return True
