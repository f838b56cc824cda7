"""Whether a cluster can do a run, asked before the run begins: its plan for a person, and every node's view of storage and images."""

import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from cluster.config import ClusterConfig, ClusterError
from cluster.connect import connect
from cluster.nodes import Failure, Node, ask_every_node, count, living_nodes
from cluster.placement import fewer_for_gpus, place
from components.storage import Location
from pipeline.context import Reporter

ANSWER_S = 300.0
PACKAGES = ("torch", "numpy", "pyarrow")


def check_cluster(cluster: ClusterConfig, needed: Mapping[str, str | None], storage: Location, reporter: Reporter) -> ClusterConfig:
    """Connects to a cluster, says what the run will ask of it, and checks that every node sees the storage root and the files that it needs.

    Args:
        needed: paths by setting; those that are not absolute paths do not count.

    Returns:
        The settings, `accelerator=auto` decided once for the whole run, with as many workers as there are GPUs where these are fewer.

    Raises:
        ClusterError: naming what the cluster lacks, or the node that cannot do its part and why.
    """
    if storage.is_local and not Path(cluster.storage).is_absolute():
        raise ClusterError(f"cluster.storage={cluster.storage} is relative; on a cluster use s3://BUCKET/PREFIX, or an absolute path that every node mounts")
    connect(cluster)
    placement = place(cluster, reporter.line)
    for line in placement.lines:
        reporter.line(line)
    nodes = [node for node in living_nodes() if node.amount("CPU") or node.amount("GPU")]
    with reporter.waiting(f"checking from {count(len(nodes), 'node')} that {storage} is shared"), _probe(storage) as (folder, token):
        paths = {key: path for key, path in needed.items() if path and os.path.isabs(os.path.expanduser(path))}
        answers, failures = ask_every_node(nodes, probe_from_node, (str(folder), token, paths), ANSWER_S)
        unseen = [Failure(node, "wrote a file that this process does not see") for node in nodes if node.id in answers and not _left_its_mark(folder, node)]
    if failures or unseen:
        raise ClusterError(*(_explain(failure, cluster) for failure in [*failures, *unseen]))
    _check_versions(nodes, answers)
    fewer = {}
    if (line := fewer_for_gpus(cluster, placement)) is not None:
        reporter.line(line)
        fewer = {"num_workers": placement.max_workers}
    return cluster.model_copy(update={"accelerator": "gpu" if placement.use_gpu else "cpu"} | fewer)


@contextmanager
def _probe(storage: Location) -> Iterator[tuple[Location, str]]:
    folder, token = storage / f".probe-{uuid.uuid4().hex[:12]}", uuid.uuid4().hex
    (folder / "token").write_text(token)
    try:
        yield folder, token
    finally:
        folder.remove_tree()


def probe_from_node(folder: str, token: str, needed: Mapping[str, str]) -> dict[str, str]:
    """Runs on a node: reads what the driver wrote, leaves a mark, and returns the versions of the packages that decide bits.

    Raises:
        FileNotFoundError: if something is not there.
        OSError: if the storage cannot be read or written.
    """
    import ray

    seen = (Location.of(folder) / "token").read_text()
    if seen != token:
        raise FileNotFoundError(f"{folder} has other content on this node")
    (Location.of(folder) / ray.get_runtime_context().get_node_id()).write_text("seen")
    for setting, path in needed.items():
        if not os.path.exists(os.path.expanduser(path)):
            raise FileNotFoundError(f"{setting}={path} does not exist there")
    return {package: version(package) for package in PACKAGES}


def _left_its_mark(folder: Location, node: Node) -> bool:
    return (folder / node.id).is_file()


def _explain(failure: Failure, cluster: ClusterConfig) -> str:
    return (
        f"node {failure.node.name} cannot work with cluster.storage={cluster.storage}: {failure.reason}; "
        "every node must see the same files at the same paths, or, for s3://BUCKET/PREFIX, have AWS_* credentials"
    )


def _check_versions(nodes: list[Node], answers: Mapping[str, Mapping[str, str]]) -> None:
    first = answers[nodes[0].id]
    for node in nodes[1:]:
        unlike = [f"{name} {answers[node.id][name]}, not {first[name]}" for name in PACKAGES if answers[node.id][name] != first[name]]
        if unlike:
            raise ClusterError(f"node {node.name} has {'; '.join(unlike)} as {nodes[0].name} has; give all nodes the same image")
