"""From ClusterConfig to what Ray asks for: workers, their CPUs and GPUs, restarts."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .config import ClusterConfig, ClusterError

if TYPE_CHECKING:
    from ray.train.v2.api.config import RunConfig, ScalingConfig


@dataclass(frozen=True)
class Placement:
    """What a connected cluster gives a run.

    Attributes:
        use_gpu: one GPU for each worker.
        threads: torch threads of each training worker.
        num_samplers: actors that draw samples, one CPU thread or one GPU each.
    """

    num_workers: int
    use_gpu: bool
    threads: int
    num_samplers: int


def place(config: ClusterConfig) -> Placement:
    """Returns the placement of a run on the cluster that this process is connected to.

    Raises:
        ClusterError: if `cluster.accelerator=gpu` asks for more GPUs than there are.
    """
    import ray

    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    if config.accelerator == "gpu" and gpus < config.max_workers:
        raise ClusterError(
            f"cluster.num_workers={config.max_workers} with cluster.accelerator=gpu needs as many GPUs, and the cluster has {gpus}; "
            "use fewer workers, or cluster.accelerator=cpu"
        )
    use_gpu = config.accelerator != "cpu" and gpus >= config.max_workers
    cpus = min(int(resources.get("CPU", 1)), os.cpu_count() or 1) if config.address == "local" else int(resources.get("CPU", 1))
    threads = config.cpus_per_worker or max(1, cpus // config.max_workers)
    return Placement(config.max_workers, use_gpu, threads, config.max_workers if use_gpu else max(1, cpus))


def scaling_config(placement: Placement) -> "ScalingConfig":
    """Returns Ray Train's request for the workers; one CPU each is asked for, so that helpers always find room."""
    from ray.train.v2.api.config import ScalingConfig

    per_worker = {"CPU": 1.0} | ({"GPU": 1.0} if placement.use_gpu else {})
    return ScalingConfig(num_workers=placement.num_workers, use_gpu=placement.use_gpu, resources_per_worker=per_worker)


def run_config(config: ClusterConfig, *, storage_path: str, name: str) -> "RunConfig":
    """Returns Ray Train's bookkeeping: where it lies, and how often a failed group of workers starts again."""
    from ray.train import LoggingConfig
    from ray.train.v2.api.config import FailureConfig, RunConfig

    return RunConfig(
        name=name,
        storage_path=storage_path,
        failure_config=FailureConfig(max_failures=config.max_failures),
        logging_config=LoggingConfig(log_level="ERROR"),
    )
