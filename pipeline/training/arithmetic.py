"""How a worker computes: number format, memory layout, compiled or not, chosen for its device and network."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

Precision = Literal["float32", "bfloat16"]
Layout = Literal["channels_last", "contiguous"]

SMALL_PARAMETERS = 1_000_000
"""Networks below train as fast in float32 on CPUs."""
FLOPS_PER_THREAD = 1.5e9
"""Of one pass of a network of the size of preset `digits`: its 32 images for each of two workers take two threads 1.45 times as fast as one."""
PAYS = 35.7e6 * 128 * 5000
"""Parameters times images from which on a compiled step is worth a minute of compilation."""


@dataclass(frozen=True)
class Arithmetic:
    """What decides the last bits of a training beside config, data and seed; a resumed training keeps that of its first start."""

    precision: Precision = "float32"
    layout: Layout = "channels_last"
    compiled: bool = False

    def __str__(self) -> str:
        return ", ".join([self.precision, self.layout, "compiled" if self.compiled else "not compiled"])

    @property
    def memory_format(self) -> torch.memory_format:
        """Of images and weights."""
        return torch.channels_last if self.layout == "channels_last" else torch.contiguous_format


def compilations() -> Path:
    """Returns where compiled steps are kept from run to run, by their code, settings and device."""
    return Path.home() / ".cache" / "ddpm-pipeline" / "compiled"


def prepare(*, deterministic: bool) -> None:
    """Sets what holds for a whole training process: where compiled steps are kept, and whether only operations are used that give the same bits each time."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compilations()))
    if not deterministic:
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Inductor would choose kernels by how long they take at the moment.
    os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", "1")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def threads_that_pay(most: int, flops: float) -> int:
    """Returns how many threads a CPU is to work with: each needs enough to do between two meetings, and many that have little slow one another down.

    Args:
        most: threads that there are cores for.
        flops: operations of one pass, forward and backward.
    """
    return max(1, min(most, int(flops // FLOPS_PER_THREAD)))


def choose(precision: str, compiled: bool | Literal["auto"], device: torch.device, parameters: int, images: int) -> Arithmetic:
    """Returns what `train.precision` and `train.compile` mean for a network on this hardware; the measurements are in benchmarks/README.md.

    Args:
        precision: auto, float32 or bfloat16.
        parameters: of the network.
        images: that the whole training works on.
    """
    if device.type == "cuda":
        compiled = compiled if compiled != "auto" else parameters * images >= PAYS
        chosen = precision if precision != "auto" else "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
        return Arithmetic(_precision(chosen), "channels_last" if compiled else "contiguous", compiled)
    amx, avx512 = torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx512_bf16_supported()
    chosen = precision if precision != "auto" else "bfloat16" if (amx or avx512) and parameters >= SMALL_PARAMETERS else "float32"
    return Arithmetic(_precision(chosen), "contiguous" if chosen == "bfloat16" and not amx else "channels_last", compiled is True)


def _precision(name: str) -> Precision:
    return "bfloat16" if name == "bfloat16" else "float32"
