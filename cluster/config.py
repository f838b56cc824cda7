"""Where a run is placed. Nothing here is part of a result, so nothing here is part of a digest."""

import re
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

_S3 = re.compile(r"[a-z0-9][a-z0-9.-]*(/[A-Za-z0-9._=-]+)*")
Strategy = Literal["pack", "spread", "strict_pack", "strict_spread"]


class ClusterError(Exception):
    """Raised when a run cannot be placed. The message, or each of several, names the setting and says what would be right."""

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


class HeadLostError(ClusterError):
    """Raised when Ray's head is gone; the process has to end, for Ray ends it within a minute anyway. The same command goes on with a new one."""


class ClusterConfig(BaseModel):
    """Machines, workers and storage."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    storage: str = Field("./storage", min_length=1)
    """Root of everything that runs make: a folder, which every node of a cluster must mount at the same path, or s3://BUCKET/PREFIX."""
    address: str = Field("local", min_length=1)
    """`local` starts Ray on this machine for the run; `auto` or HOST:PORT joins a running Ray cluster."""
    num_workers: int | tuple[int, int] = 1
    """Training workers (DDP ranks); divides `train.lanes`. [MIN, MAX] trains with as many as there is room for, less when a node is lost."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """What workers compute on; `auto` takes GPUs where there are any, and trains with as many workers as these where they are fewer. A worker on GPU has
    exactly one."""
    cpus_per_worker: int = Field(0, ge=0)
    """CPUs of one training worker; 0 asks for one and shares the CPUs of a node among its workers."""
    strategy: Strategy = "pack"
    """Training workers on few nodes (`pack`) or on many (`spread`); `strict_` forbids the other."""
    worker_resources: dict[str, float] = Field(default_factory=dict)
    """Custom Ray resources that each training worker asks for, such as {infiniband: 1}."""
    worker_labels: dict[str, str] = Field(default_factory=dict)
    """Ray node labels that training workers and samplers need, such as {ray.io/accelerator-type: H100}."""
    preprocess_labels: dict[str, str] = Field(default_factory=dict)
    """Ray node labels that preprocessing needs; without them Ray prefers nodes that have no GPU."""
    gpus_per_sampler: float = Field(1.0, gt=0.0, le=1.0)
    """GPU share of one sampling actor; 0.5 puts two on each GPU."""
    wait_s: int = Field(0, ge=0)
    """Seconds to wait for nodes that the run needs and the cluster does not have yet (autoscaling); 0 says at once what is missing."""
    resize_interval_s: int = Field(60, ge=1)
    """Seconds between two looks whether more workers of the range would fit now."""
    max_failures: int = Field(3, ge=0)
    """Times that training starts again from its last good checkpoint after a worker failed."""
    grace_s: int = Field(25, ge=0)
    """Seconds that SIGTERM leaves the workers to save a checkpoint; less than what whoever sends it waits before SIGKILL."""
    group_timeout_s: int = Field(300, ge=10)
    """Seconds after which a worker that waits for a silent peer gives up."""
    metrics_port: int | None = Field(None, ge=1, le=65535)
    """Port on which a Ray of this machine serves numbers of the run for Prometheus, on all of its addresses; by default one that Ray finds. A cluster's nodes
    have their own (`ray start --metrics-export-port`)."""
    price_per_hour: float | None = Field(None, ge=0.0)
    """What one device costs in an hour, in your currency; a device is what a training worker computes on: its GPU, or its share of a node's CPUs.
    `ddpm plan` then says what a run costs."""
    max_hours: float | None = Field(None, gt=0.0)
    """Device-hours that the plan of a run may come to, workers times hours, all stages together; `--plan-first` refuses a run beyond. None by default."""
    cache: str | None = None
    """Folder on each node for copies of what lies on s3://; by default below the node's temporary folder."""
    cache_bytes: int = Field(20 << 30, ge=1 << 20)
    """Limit of that folder on each node; the copies used longest ago go first."""

    @property
    def min_workers(self) -> int:
        """Fewest training workers that the run goes on with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """Most training workers that the run uses."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def is_elastic(self) -> bool:
        """Whether the number of training workers may change while a run trains."""
        return self.min_workers != self.max_workers

    @field_validator("storage")
    @classmethod
    def _no_secret(cls, storage: str) -> str:
        scheme, separator, rest = storage.partition("://")
        if separator and scheme != "s3":
            raise ValueError(f"{scheme}:// is not supported as storage; use a folder or s3://BUCKET/PREFIX")
        if separator and ("@" in rest.split("/", 1)[0] or "?" in rest):
            raise ValueError("the address holds keys or options, which would be logged; put them into the AWS_* variables")
        if separator and not _S3.fullmatch(rest.rstrip("/")):
            raise ValueError("this is not a bucket with an optional prefix; use s3://BUCKET/PREFIX, of letters, digits, '.', '_' and '-'")
        return storage

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        if not 1 <= self.min_workers <= self.max_workers:
            raise ValueError(f"num_workers={self.num_workers} is not a valid number of workers; use a number from 1 on, or [MIN, MAX]")
        return self
