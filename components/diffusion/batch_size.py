"""How many images are drawn together where nobody says so: no part of a result, for a sample depends on its seed only."""

from collections.abc import Callable

import torch

ON_CPU, MOST_ON_GPU = 64, 256
SHARE = 0.4
"""Of the memory that is free: two processes may share a GPU, and extractors work beside the sampler."""
TRIED = 8


def choose_batch_size(network: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...], *, rows_per_image: int = 1) -> int:
    """Returns how many images to draw together: ON_CPU on a CPU, and on a GPU as many as its free memory holds, a power of two up to MOST_ON_GPU.

    Args:
        network: as it samples, without a graph.
        inputs: one row each of what it is called with, on its device.
        rows_per_image: 2 with guidance.
    """
    if inputs[0].device.type == "cpu":
        return ON_CPU
    free, _ = torch.cuda.mem_get_info(inputs[0].device)
    idle = torch.cuda.memory_reserved(inputs[0].device) - torch.cuda.memory_allocated(inputs[0].device)
    return fitting(free + idle, _bytes_per_row(network, inputs) * rows_per_image)


def fitting(free: int, per_image: int) -> int:
    """Returns how many images fit into SHARE of some free bytes, a power of two from 1 to MOST_ON_GPU."""
    most = max(1, min(MOST_ON_GPU, int(free * SHARE) // max(1, per_image)))
    return 1 << (most.bit_length() - 1)


@torch.inference_mode()
def _bytes_per_row(network: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...]) -> int:
    device = inputs[0].device
    rows = tuple(given.expand(TRIED, *given.shape[1:]).contiguous() for given in inputs)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    network(*rows)
    return (torch.cuda.max_memory_allocated(device) - before) // TRIED
