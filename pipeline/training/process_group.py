"""The process group of the training workers, over the network that Ray found its nodes on.

Left alone, gloo listens on whatever address the host name resolves to, which on many machines is one that no other node can reach.
"""

import ipaddress
import os
from typing import Any

import psutil
from ray.train.torch import TorchConfig

_INTERFACE = "GLOO_SOCKET_IFNAME"


class TorchConfigOnRaysNetwork(TorchConfig):
    """Ray's TorchConfig, whose workers first choose the interface that carries their node's address."""

    @property
    def backend_cls(self) -> type:
        """Returns Ray's backend with one step before its first."""
        return _Backend


class _Backend(TorchConfig().backend_cls):  # pyrefly: ignore[invalid-inheritance]
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(choose_interface)
        super().on_start(worker_group, backend_config)


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
