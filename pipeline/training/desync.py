"""Workers must hold the same weights, bit for bit: a broken link, memory or kernel on one of them would otherwise spoil a run unseen."""

from collections import Counter

import torch
from torch import nn

PRIME = 65_521


class DesyncError(Exception):
    """Raised when workers' weights are not the same."""


@torch.no_grad()
def checksum(module: nn.Module) -> torch.Tensor:
    """Returns a number, int64, of all parameters' bits and their places; it changes with any of them."""
    device = next(module.parameters()).device
    total = torch.zeros((), dtype=torch.int64, device=device)
    for parameter in module.parameters():
        bits = parameter.detach().contiguous().view(torch.int32).flatten().to(torch.int64)
        places = torch.arange(1, len(bits) + 1, device=device) % PRIME
        total = total * 1_000_003 + (bits * places).sum() + bits.sum()
    return total


def compare_ranks(module: nn.Module, step: int) -> None:
    """Compares the parameters of all workers.

    Raises:
        DesyncError: naming the workers that differ from most of the others; raised in every worker.
    """
    world = torch.distributed.get_world_size()
    mine = checksum(module)
    found = [torch.zeros_like(mine) for _ in range(world)]
    torch.distributed.all_gather(found, mine)
    sums = [int(each) for each in found]
    usual = Counter(sums).most_common(1)[0][0]
    if unlike := [rank for rank, each in enumerate(sums) if each != usual]:
        raise DesyncError(
            f"the weights of worker{'s' if len(unlike) > 1 else ''} {', '.join(map(str, unlike))} are not those of the others at step {step}: "
            "a machine or link is faulty; run the same command again to go on from the last checkpoint, and look at that worker's machine"
        )
