"""From ClusterConfig and the nodes there are to what Ray is asked for: workers, their CPUs and GPUs, samplers, restarts."""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .config import ClusterConfig, ClusterError
from .nodes import Node, count, describe, living_nodes

if TYPE_CHECKING:
    from ray.train import UserCallback
    from ray.train.v2.api.config import RunConfig, ScalingConfig

POLL_S, REPORT_S, SETTLE_POLLS = 2.0, 30.0, 8


@dataclass(frozen=True)
class Placement:
    """What a cluster gives a run.

    Attributes:
        num_workers: training workers that fit now.
        min_workers, max_workers: range of workers to ask Ray for; less than the settings' where there are fewer GPUs.
        per_worker: what each training worker asks Ray for.
        use_gpu: one GPU for each worker.
        threads: torch threads of each training worker.
        num_samplers: actors that draw samples.
        per_sampler: options of each sampling actor: one CPU, or a share of a GPU.
        lines: the plan, for a person.
    """

    num_workers: int
    min_workers: int
    max_workers: int
    per_worker: Mapping[str, float]
    use_gpu: bool
    threads: int
    num_samplers: int
    per_sampler: Mapping[str, Any]
    lines: tuple[str, ...]


def place(config: ClusterConfig, report: Callable[[str], None] = lambda line: None) -> Placement:
    """Returns the placement of a run on the cluster that this process is connected to; waits for nodes at most `cluster.wait_s`.

    Args:
        tell: is given a line for a person while there is something to wait for.

    Raises:
        ClusterError: if the cluster does not have what the run needs.
    """
    try:
        placement = plan(config, living_nodes())
    except ClusterError as error:
        if not config.wait_s:
            raise
        placement = _wait_for_nodes(config, report, error)
    if config.address != "local":
        _report_if_busy(placement, report)
    return placement


def fewer_for_gpus(config: ClusterConfig, placement: Placement) -> str | None:
    """Returns a line for a person where a run trains with fewer workers than its settings say, because there are fewer GPUs."""
    if placement.max_workers >= config.min_workers:
        return None
    wanted, workers = config.num_workers if isinstance(config.num_workers, int) else list(config.num_workers), placement.max_workers
    return f"  cluster.num_workers={wanted}, and {count(workers, 'GPU')}: {count(workers, 'worker')} will train, for how many they are is no part of a result"


def _wait_for_nodes(config: ClusterConfig, report: Callable[[str], None], missing: ClusterError) -> Placement:
    started, reported = time.monotonic(), -REPORT_S
    _ask_autoscaler(config)
    try:
        while (waited := time.monotonic() - started) < config.wait_s:
            if waited - reported >= REPORT_S:
                report(f"  waiting up to {config.wait_s - waited:.0f} s for nodes: {missing}")
                reported = waited
            time.sleep(POLL_S)
            try:
                return plan(config, living_nodes())
            except ClusterError as error:
                missing = error
    finally:
        # The request stands until the next one, and would keep nodes running that nobody uses.
        _ask_autoscaler(None)
    raise ClusterError(f"{missing} (waited {config.wait_s} s for more, cluster.wait_s)")


def _report_if_busy(placement: Placement, report: Callable[[str], None]) -> None:
    """Says so where others hold what the run needs, and Ray will let it wait."""
    import ray

    wanted = {name: amount * placement.min_workers for name, amount in placement.per_worker.items()}
    for _ in range(SETTLE_POLLS):
        free = ray.available_resources()
        lacking = {name: amount for name, amount in wanted.items() if free.get(name, 0.0) < amount}
        if not lacking:
            return
        time.sleep(1.0)
    report(
        "  others hold part of the cluster: " + ", ".join(f"{free.get(name, 0):g} of {amount:g} {name} free" for name, amount in lacking.items()) + "; waiting"
    )


def _ask_autoscaler(config: ClusterConfig | None) -> None:
    """Asks for nodes for the fewest workers that will do, or, without a config, for none any more; a cluster without autoscaler ignores it."""
    from ray.autoscaler.sdk import request_resources

    wanted = [] if config is None else [_per_worker(config, use_gpu=config.accelerator == "gpu")] * config.min_workers
    labels = [dict(config.worker_labels)] * len(wanted) if config is not None and config.worker_labels else None
    request_resources(bundles=wanted, bundle_label_selectors=labels)


def plan(config: ClusterConfig, nodes: Sequence[Node]) -> Placement:
    """Returns the placement of a run on some nodes.

    Raises:
        ClusterError: naming what is missing, and what there is.
    """
    if config.preprocess_labels and not any(node.amount("CPU") >= 1 and node.matches(config.preprocess_labels) for node in nodes):
        raise ClusterError(f"cluster.preprocess_labels={config.preprocess_labels} is on no node that has a CPU; the cluster has {describe(nodes)}")
    gpus = _gpu_workers(config, nodes)
    use_gpu = config.accelerator == "gpu" or gpus > 0
    if 0 < gpus < config.min_workers and config.accelerator == "auto":
        config = config.model_copy(update={"num_workers": gpus})
    per_worker = _per_worker(config, use_gpu=use_gpu)
    rooms = _rooms(config, nodes, per_worker)
    workers = min(config.max_workers, _capacity(config, rooms))
    if workers < config.min_workers:
        raise ClusterError(_missing(config, per_worker, nodes))
    assigned = _assign(config, rooms, workers)
    threads = _threads(config, assigned)
    per_sampler: dict[str, Any] = {"num_gpus": config.gpus_per_sampler} if use_gpu else {"num_cpus": 1}
    per_sampler |= {"label_selector": dict(config.worker_labels)} if config.worker_labels else {}
    samplers = _samplers(config, nodes, use_gpu)
    lines = _lines(config, nodes, per_worker, assigned, threads, samplers)
    return Placement(workers, config.min_workers, config.max_workers, per_worker, use_gpu, threads, samplers, per_sampler, lines)


def _gpu_workers(config: ClusterConfig, nodes: Sequence[Node]) -> int:
    """Returns how many workers have room on GPUs, 0 where none are to be used."""
    return 0 if config.accelerator == "cpu" else _capacity(config, _rooms(config, nodes, _per_worker(config, use_gpu=True)))


def _per_worker(config: ClusterConfig, *, use_gpu: bool) -> dict[str, float]:
    """Returns what a training worker asks for; one CPU unless told otherwise, so that helpers always find room."""
    return {"CPU": float(config.cpus_per_worker or 1)} | ({"GPU": 1.0} if use_gpu else {}) | config.worker_resources


def _rooms(config: ClusterConfig, nodes: Sequence[Node], per_worker: Mapping[str, float]) -> list[tuple[Node, int]]:
    """Returns the nodes that can hold workers, with how many, the roomiest first."""
    able = [node for node in nodes if node.matches(config.worker_labels)]
    rooms = [(node, min(int(node.amount(name) // amount) for name, amount in per_worker.items() if amount)) for node in able]
    return sorted(((node, room) for node, room in rooms if room), key=lambda entry: (-entry[1], entry[0].name, entry[0].id))


def _capacity(config: ClusterConfig, rooms: Sequence[tuple[Node, int]]) -> int:
    if config.strategy == "strict_pack":
        return rooms[0][1] if rooms else 0
    return len(rooms) if config.strategy == "strict_spread" else sum(room for _, room in rooms)


def _assign(config: ClusterConfig, rooms: Sequence[tuple[Node, int]], workers: int) -> list[tuple[Node, int]]:
    """Returns how many workers each node is likely to get; Ray decides in the end."""
    given = [0] * len(rooms)
    while sum(given) < workers:
        open_nodes = [index for index, (_, room) in enumerate(rooms) if given[index] < room]
        given[open_nodes[0] if "pack" in config.strategy else min(open_nodes, key=lambda index: (given[index], index))] += 1
    return [(node, workers) for (node, _), workers in zip(rooms, given, strict=True) if workers]


def _threads(config: ClusterConfig, assigned: Sequence[tuple[Node, int]]) -> int:
    if config.cpus_per_worker:
        return config.cpus_per_worker
    return max(1, min(_cpus(config, node) // workers for node, workers in assigned))


def _cpus(config: ClusterConfig, node: Node) -> int:
    """Returns a node's CPUs; on this machine the real ones, for Ray is told of one more there."""
    cpus = int(node.amount("CPU"))
    return min(cpus, os.cpu_count() or 1) if config.address == "local" else cpus


def _samplers(config: ClusterConfig, nodes: Sequence[Node], use_gpu: bool) -> int:
    able = [node for node in nodes if node.matches(config.worker_labels)]
    if use_gpu:
        return max(1, sum(math.floor(node.amount("GPU") / config.gpus_per_sampler + 1e-9) for node in able))
    return max(1, sum(_cpus(config, node) for node in able))


def _missing(config: ClusterConfig, per_worker: Mapping[str, float], nodes: Sequence[Node]) -> str:
    amounts = [
        count(amount * config.min_workers, name) if name in ("CPU", "GPU") else f"{amount * config.min_workers:g} {name}" for name, amount in per_worker.items()
    ]
    labels = [f"on nodes with {key}={value}" for key, value in config.worker_labels.items()]
    strict = {"strict_pack": ["on one node"], "strict_spread": ["each on a node of its own"]}.get(config.strategy, [])
    wanted = config.num_workers if isinstance(config.num_workers, int) else list(config.num_workers)
    return (
        f"cluster.num_workers={wanted} with cluster.accelerator={config.accelerator} needs {' '.join([', '.join(amounts), *labels, *strict])}; "
        f"the cluster has {describe(nodes)}; use fewer workers{', cluster.accelerator=cpu,' if 'GPU' in per_worker else ''} or a larger cluster"
    )


def _lines(
    config: ClusterConfig, nodes: Sequence[Node], per_worker: Mapping[str, float], assigned: Sequence[tuple[Node, int]], threads: int, samplers: int
) -> tuple[str, ...]:
    if config.address == "local":
        return ()
    workers = sum(number for _, number in assigned)
    span = f" of {config.min_workers} to {config.max_workers}" if config.is_elastic else ""
    each = " + ".join(f"{amount:g} {name}" for name, amount in per_worker.items())
    places = ", ".join(f"{number} on {node.name}" for node, number in assigned)
    share = f"{config.gpus_per_sampler:g} GPU" if "GPU" in per_worker else "1 CPU"
    where = f" on nodes with {config.preprocess_labels}" if config.preprocess_labels else ""
    return (
        f"  cluster     {describe(nodes)}",
        f"  preprocess  tasks of 1 CPU{where}",
        f"  train       {count(workers, 'worker')}{span} x ({each}), {count(threads, 'thread')} each, {config.strategy}: {places}",
        f"  evaluate    {count(samplers, 'sampler')} x {share}",
    )


def scaling_config(config: ClusterConfig, placement: Placement) -> "ScalingConfig":
    """Returns Ray Train's request for the workers."""
    from ray.train.v2.api.config import ScalingConfig

    return ScalingConfig(
        num_workers=placement.max_workers if placement.min_workers == placement.max_workers else (placement.min_workers, placement.max_workers),
        use_gpu=placement.use_gpu,
        resources_per_worker=dict(placement.per_worker),
        placement_strategy=config.strategy.upper(),
        label_selector=dict(config.worker_labels) or None,
        elastic_resize_monitor_interval_s=float(config.resize_interval_s),
    )


def run_config(config: ClusterConfig, *, bookkeeping: str, name: str, callbacks: "Sequence[UserCallback]" = ()) -> "RunConfig":
    """Returns how often a failed group of workers starts again, a folder for Ray's notes, and whom it tells of failures.

    Checkpoints are not reported to Ray, so its notes decide nothing and may lie on the driver's machine alone.
    """
    from ray.train import LoggingConfig
    from ray.train.v2.api.config import FailureConfig, RunConfig

    return RunConfig(
        name=name,
        storage_path=bookkeeping,
        failure_config=FailureConfig(max_failures=config.max_failures),
        logging_config=LoggingConfig(log_level="ERROR"),
        callbacks=list(callbacks),
    )
