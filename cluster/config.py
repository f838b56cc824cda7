"""Where a run is placed. Nothing here is part of a result, so nothing here is part of a digest."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class ClusterError(Exception):
    """Raised when a run cannot be placed. The message names the setting and says what would be right."""


class ClusterConfig(BaseModel):
    """Machines, workers and storage."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    storage: str = Field("./storage", min_length=1)
    """Folder of everything that runs make: datasets, checkpoints, samples, the MLflow store."""
    address: str = "local"
    """`local` starts Ray on this machine for the run; `auto` or HOST:PORT joins a running Ray cluster."""
    num_workers: int = Field(1, ge=1)
    """Training workers (DDP ranks); divides `train.lanes`."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """What workers compute on; `auto` takes GPUs where Ray sees enough of them."""
    cpus_per_worker: int = Field(0, ge=0)
    """CPUs of one training worker; 0 shares this machine's CPUs among the workers."""
    max_failures: int = Field(3, ge=0)
    """Times that training starts again from its last good checkpoint after a worker failed."""
    group_timeout_s: int = Field(300, ge=10)
    """Seconds after which a worker that waits for a silent peer gives up."""
