"""The only `ray.init`."""

import logging
import os
import secrets
import sys

from .config import ClusterConfig, ClusterError

_ENVIRONMENT = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_LOG_LEVEL": "ERROR",
    "RAY_DEDUP_LOGS": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S": "600",
}
OBJECT_STORE_BYTES = 512 << 20


def connect(config: ClusterConfig) -> None:
    """Connects this process to Ray, unless it already is: the first stage that needs Ray starts it, the others find it running.

    Raises:
        ClusterError: if `cluster.address` names a cluster that does not answer.
    """
    _prepare_environment(config)
    import ray

    if not ray.is_initialized():
        _start(config)


def disconnect() -> None:
    """Ends the connection, and with it a Ray that was started on this machine for the run."""
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


def _prepare_environment(config: ClusterConfig) -> None:
    """Sets what Ray reads when it is imported: quiet logs, fast failure detection, and a token nobody else knows."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if config.address == "local":
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _start(config: ClusterConfig) -> None:
    import ray

    if config.address == "local":
        spare = max(os.cpu_count() or 1, config.max_workers + 1)
        ray.init(
            address="local", num_cpus=spare, object_store_memory=OBJECT_STORE_BYTES, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False
        )
        return
    try:
        ray.init(address=config.address, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(f"cluster.address={config.address} does not answer ({error}); start the cluster, or use local") from error
