"""The only `ray.init`."""

import logging
import os
import secrets
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from .background_start import BackgroundStart
from .config import ClusterConfig, ClusterError, HeadLostError
from .machine import this_machine
from .tree import stage_tree

_ENVIRONMENT = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_LOG_LEVEL": "ERROR",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a thread that asks something of a Ray that has ended starts no other
    "RAY_worker_niceness": "0",  # Ray would have them yield to everything else on the machine, as no training by itself does
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S": "600",
}
OBJECT_STORE_BYTES = 512 << 20
LONGEST_FOLDER = 107 - len("/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
_local: dict[str, Any] = {}  # options of a Ray of our own
_ahead: list[BackgroundStart] = []  # its start, where that was begun before it was needed
_IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it in the driver of a submitted job, which brings its working tree along


def start_in_background(config: ClusterConfig, modules: Sequence[str]) -> None:
    """Begins to start a Ray of our own, for a training that comes for certain; `connect` waits for it.

    Args:
        modules: third-party ones that the training workers will import, which their processes then do before they are needed. Left out on machines
            where Ray holds more processes ready than will train, and on those with GPUs, which a process is to look for when it has been given one.
    """
    if is_actor():
        return
    few = (os.cpu_count() or 1) <= config.max_workers + 1

    def start() -> None:
        logging.getLogger("ray").setLevel(logging.ERROR)  # it would warn that only a main thread can answer signals
        if few and not this_machine().gpus:
            _local["_system_config"] = {"preload_python_modules": list(modules), "num_workers_soft_limit": config.max_workers + 1}
        try:
            _connect(config)
        finally:
            _local.pop("_system_config", None)

    if config.address == "local" and not _ahead:
        _ahead.append(BackgroundStart(start))


def connect(config: ClusterConfig) -> None:
    """Connects this process to Ray, unless it already is: the first stage that needs Ray starts it, the others find it running.

    Raises:
        ClusterError: if `cluster.address` names a cluster that does not answer.
    """
    for ahead in _ahead:
        ahead.wait()
        _answer_sigterm(signal.getsignal(signal.SIGTERM))
    _connect(config)


def _connect(config: ClusterConfig) -> None:
    _prepare_environment(config)
    import ray

    if not ray.is_initialized():
        _start(config)


def is_actor() -> bool:
    """Tells whether this process is an actor of a Ray that another process is connected to, whose connection is not ours to end."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None


def disconnect() -> None:
    """Ends the connection, and with it a Ray that was started on this machine for the run."""
    for ahead in _ahead:
        ahead.settle()
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()
    while _ahead:
        _ahead.pop().end()


def abandon(code: int) -> NoReturn:
    """Ends this process and every one that it started, without asking Ray, whose head is gone: it would wait a minute for that."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            child.kill()
    os._exit(code)


@contextmanager
def disconnecting() -> Iterator[None]:
    """Disconnects after a block; not from a head that is gone, for which Ray would wait a minute and then end the process."""
    try:
        yield
    except HeadLostError:
        raise
    except BaseException:
        disconnect()
        raise
    disconnect()


@contextmanager
def session_in(folder: Path) -> Iterator[None]:
    """Has a Ray that is started on this machine during a block keep its session in a folder: sockets, logs, what does not fit into memory.

    Args:
        folder: at most `LONGEST_FOLDER` characters long, for the names of sockets have a limit.
    """
    before, _local["_temp_dir"] = _local.get("_temp_dir"), str(folder)
    try:
        yield
    finally:
        _local["_temp_dir"] = before


def quiet() -> None:
    """Sets what Ray reads when it is imported: quiet logs, no telemetry, fast failure detection."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def _prepare_environment(config: ClusterConfig) -> None:
    """Sets what Ray reads, and a token: the cluster's, or for a Ray of our own one that nobody else knows."""
    quiet()
    # A process that notices nodes which are to be taken away, so that their loss is no failure; this machine is not taken away with notice.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0" if config.address == "local" else "1")
    if config.is_elastic:
        # A shrinking group first asks for as many workers as before, and tries fewer when that has timed out.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "30")
    if config.address == "local":
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    else:
        use_token()


def use_token() -> bool:
    """Makes Ray use the token of RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token, and tells whether there is one.

    Ray looks for it by itself only in some of its processes.
    """
    there = bool(os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")) or Path("~/.ray/auth_token").expanduser().is_file()
    if there:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    return there


def _start(config: ClusterConfig) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    # A terminal that closes sends SIGHUP to all that was started from it. Ray's processes inherit that it does not reach them: the driver ends them.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])
    try:
        _init(config)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        _answer_sigterm(handler)


def _answer_sigterm(handler: Callable[[int, FrameType | None], Any] | int | None) -> None:
    """Gives SIGTERM back to whoever answered it before: Ray prints where it was, and then exits at once."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _init(config: ClusterConfig) -> None:
    import ray

    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if config.address == "local":
        spare = max(os.cpu_count() or 1, config.max_workers + 1)
        if config.metrics_port is not None:
            options["_metrics_export_port"] = config.metrics_port
        with _bare_head():
            ray.init(address="local", num_cpus=spare, object_store_memory=OBJECT_STORE_BYTES, include_dashboard=False, **options, **_local)
        return
    if _IN_JOB in os.environ:
        # Nodes that share a machine share the job's folder too, and each unpacks it anew: the driver's would be gone from under it.
        os.chdir(tempfile.gettempdir())
    try:
        with tempfile.TemporaryDirectory(prefix="ddpm-tree-") as folder:
            if _IN_JOB not in os.environ:
                stage_tree(Path(folder), {})
                options["runtime_env"] = {"working_dir": folder}
            ray.init(address=config.address, **options)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        message = " ".join(str(error).split())[:300]
        raise ClusterError(
            f"cluster.address={config.address} does not answer ({message}); start the cluster, give its token in RAY_AUTH_TOKEN_PATH, or use local"
        ) from error


@contextmanager
def _bare_head() -> Iterator[None]:
    """Keeps a head that starts during a block from starting what has nothing to do on a machine of our own, one Python process after the other.

    These are an autoscaler without machines to start, the server of a dashboard that is off, and what would send logs to a driver that wants none.
    """
    from ray._private.node import Node

    before = {name: getattr(Node, name) for name in ("start_monitor", "start_api_server", "start_log_monitor")}
    try:
        for name in before:
            setattr(Node, name, lambda self, **options: None)
        yield
    finally:
        for name, method in before.items():
            setattr(Node, name, method)
