"""What the machine is on which a process runs, and what it is doing just now."""

import os
import platform
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from pydantic import BaseModel, ConfigDict


class Gpu(BaseModel):
    """A GPU of a machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    memory_bytes: int


class Machine(BaseModel):
    """What a machine is, without its name, its users and its paths.

    Attributes:
        kind: what the process sees of it.
        driver, cuda: versions of NVIDIA's driver and of the CUDA that it brings, where there are GPUs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    platform: str
    kind: str
    cpu: str
    cpus: int
    memory_bytes: int
    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    cuda: str | None = None


def this_machine() -> Machine:
    """Returns what this machine is."""
    machine = Machine(
        platform=platform.platform(),
        kind=_kind(),
        cpu=cpu_model(),
        cpus=os.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
    )
    nvml = _nvml()
    if nvml is None:
        return machine
    # Anything that the driver does not tell is left out: what a machine is must never stop a run.
    with suppress(Exception):
        gpus = tuple(Gpu(name=_text(nvml.nvmlDeviceGetName(gpu)), memory_bytes=nvml.nvmlDeviceGetMemoryInfo(gpu).total) for gpu in _gpus(nvml))
        cuda = nvml.nvmlSystemGetCudaDriverVersion()
        return machine.model_copy(update={"gpus": gpus, "driver": _text(nvml.nvmlSystemGetDriverVersion()), "cuda": f"{cuda // 1000}.{cuda % 1000 // 10}"})
    return machine


def _kind() -> str:
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        return "pod"
    return "container" if Path("/.dockerenv").exists() or Path("/run/.containerenv").exists() else "machine"


def cpu_model() -> str:
    """Returns what this machine's processors are called."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peak_memory() -> int:
    """Returns the most memory that this process held at once, bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class SystemMetrics:
    """Reads what this machine does: CPU, memory, disk, network since it was made, and every GPU.

    The names are those that MLflow's page of system metrics groups and labels. What cannot be read is left out.
    """

    def __init__(self) -> None:
        self._nvml = _nvml()
        self._received, self._sent, self._busy, self._total = 0.0, 0.0, 0.0, 0.0
        first = self.read()
        self._received, self._sent = first.get("network_receive_megabytes", 0.0), first.get("network_transmit_megabytes", 0.0)

    def read(self) -> dict[str, float]:
        """Returns the values by name; CPU use is that since the last call."""
        values: dict[str, float] = {}
        sources: list[Callable[[], dict[str, float]]] = [self._cpu_use, _memory_use, _disk_use, self._network_use]
        if self._nvml is not None:
            with suppress(Exception):
                sources += list(_gpu_sources(self._nvml))
        for source in sources:
            with suppress(Exception):  # of many kinds: psutil's, NVML's, the operating system's
                values |= source()
        return {name: round(float(value), 1) for name, value in values.items()}

    def _cpu_use(self) -> dict[str, float]:
        # psutil.cpu_percent remembers its last call by thread, and a reader may be another thread each time.
        times = psutil.cpu_times()
        total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)  # which user time holds already
        busy = total - times.idle - getattr(times, "iowait", 0.0)
        share = (busy - self._busy) / max(total - self._total, 1e-9)
        self._busy, self._total = busy, total
        return {"cpu_utilization_percentage": min(100.0, max(0.0, share * 100))}

    def _network_use(self) -> dict[str, float]:
        traffic = psutil.net_io_counters()
        return {
            "network_receive_megabytes": max(0.0, traffic.bytes_recv / 1e6 - self._received),
            "network_transmit_megabytes": max(0.0, traffic.bytes_sent / 1e6 - self._sent),
        }


def _memory_use() -> dict[str, float]:
    memory = psutil.virtual_memory()
    return {"system_memory_usage_megabytes": memory.used / 1e6, "system_memory_usage_percentage": memory.used / memory.total * 100}


def _disk_use() -> dict[str, float]:
    disk = psutil.disk_usage(os.sep)
    return {"disk_usage_percentage": disk.percent, "disk_usage_megabytes": disk.used / 1e6, "disk_available_megabytes": disk.free / 1e6}


def _gpu_sources(nvml: Any) -> Iterator[Callable[[], dict[str, float]]]:
    """Yields what reads one thing of one GPU each, so that what a GPU does not tell costs nothing else."""

    def memory(name: str, gpu: Any) -> dict[str, float]:
        found = nvml.nvmlDeviceGetMemoryInfo(gpu)
        return {f"{name}_memory_usage_percentage": found.used / found.total * 100, f"{name}_memory_usage_megabytes": found.used / 1e6}

    def load(name: str, gpu: Any) -> dict[str, float]:
        return {f"{name}_utilization_percentage": nvml.nvmlDeviceGetUtilizationRates(gpu).gpu}

    def power(name: str, gpu: Any) -> dict[str, float]:
        watts = nvml.nvmlDeviceGetPowerUsage(gpu) / 1000
        return {f"{name}_power_usage_watts": watts, f"{name}_power_usage_percentage": watts / nvml.nvmlDeviceGetEnforcedPowerLimit(gpu) * 1e5}

    for index, gpu in enumerate(_gpus(nvml)):
        for read in (memory, load, power):
            yield lambda read=read, name=f"gpu_{index}", gpu=gpu: read(name, gpu)


def _gpus(nvml: Any) -> list[Any]:
    return [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]


def _nvml() -> Any | None:
    """Returns NVIDIA's management library, ready; None where nvidia-ml-py or a GPU is missing."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # its own errors cannot be named where it is not installed
        return None
    return pynvml


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
