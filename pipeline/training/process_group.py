"""The process group of the training workers, over the network that Ray found its nodes on.

Left alone, gloo listens on whatever address the host name resolves to, which on many machines is one that no other node can reach.
Ray's own TorchConfig does the rest, in the workers: the process that starts them is spared the import of torch.
"""

import ipaddress
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import psutil
from ray import get
from ray.exceptions import GetTimeoutError
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.util import TrainingFramework

_INTERFACE = "GLOO_SOCKET_IFNAME"
_LEAVE_S = 30.0


@dataclass
class ProcessGroupConfig(BackendConfig):
    """What Ray Train starts between the workers before they train.

    Attributes:
        backend: nccl or gloo.
        timeout_s: longest time that one worker waits for the others.
    """

    backend: str
    timeout_s: int

    @property
    def backend_cls(self) -> type[Backend]:
        """Returns what starts and ends the group."""
        return _Backend

    @property
    def train_func_context(self) -> Any:
        """Returns what surrounds the training function on a worker."""
        return _on_own_device

    @property
    def framework(self) -> TrainingFramework:  # pyrefly: ignore[bad-override]
        """Returns what Ray is told the workers train with."""
        return TrainingFramework.TORCH


class _Backend(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        assert isinstance(backend_config, ProcessGroupConfig)
        worker_group.execute(choose_interface)
        address, port = worker_group.execute_single(0, get_address_and_port)
        world = len(worker_group)
        joined = [worker_group.execute_single_async(rank, join, backend_config, address, port, rank, world) for rank in range(world)]
        get(joined)

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        with suppress(GetTimeoutError):
            get(worker_group.execute_async(leave, len(worker_group)), timeout=_LEAVE_S)


def join(config: ProcessGroupConfig, address: str, port: int, rank: int, world: int) -> None:
    """Runs on a worker: joins the group, whose first worker listens on an address."""
    from ray.train.torch import config as rays

    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address, str(port)
    rays._set_torch_distributed_env_vars()
    rays._setup_torch_process_group(config.backend, rank, world, "env://", config.timeout_s)


def leave(world: int) -> None:
    """Runs on a worker: leaves the group."""
    from ray.train.torch import config as rays

    rays._shutdown_torch(destroy_process_group=world > 1)


@contextmanager
def _on_own_device() -> Iterator[None]:
    from ray.train.torch.config import TorchConfigContextManager

    with TorchConfigContextManager():
        yield


def choose_interface() -> None:
    """Runs on a worker: tells gloo which interface to use, unless its environment already says so."""
    import ray

    found = interface_of(ray.util.get_node_ip_address())
    if found is not None:
        os.environ.setdefault(_INTERFACE, found)


def interface_of(address: str) -> str | None:
    """Returns the network interface of this machine that carries an address, None where none does."""
    interfaces = {name: [entry.address for entry in entries] for name, entries in psutil.net_if_addrs().items()}
    found = next((name for name, addresses in interfaces.items() if address in addresses), None)
    if found is None and ipaddress.ip_address(address).is_loopback:
        return next((name for name, addresses in interfaces.items() if "127.0.0.1" in addresses), None)
    return found
