"""The arithmetic of a network while it samples, and the network made ready for it."""

import copy
from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

from .graphs import GraphedNetwork
from .recipe import Precision

PAYS, ROWS_COMPILED = 35.7e6 * 600_000, 256
"""Parameters times evaluations from which on a compiled network is worth most of a minute of compilation; rows of the one batch it is compiled for."""
CAST = (nn.Conv2d, nn.Linear)
"""Layers whose weights autocast casts to bfloat16 whenever they are called."""


def resolve_precision(wanted: Literal["auto", "float32", "bfloat16"], device: torch.device | str) -> Precision:
    """Returns the arithmetic that is meant on a device: `auto` is bfloat16 on a GPU that has it, and float32 elsewhere."""
    if wanted != "auto":
        return wanted
    has_bfloat16 = torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if has_bfloat16 else "float32"


def prepared(network: nn.Module, precision: Precision, device: torch.device | str, evaluations: int = 0) -> Callable[..., torch.Tensor]:
    """Returns a network as it is called while sampling: its weights cast once, and on a GPU as CUDA graphs. The network itself stays as it is.

    Args:
        network: in evaluation mode, on the device.
        evaluations: of the network for one image that are ahead; where they are many, a GPU has it compiled, for batches of one size.
    """
    ready = _with_cast_weights(network) if precision == "bfloat16" else network
    if torch.device(device).type != "cuda":
        return ready
    if evaluations * sum(parameter.numel() for parameter in network.parameters()) >= PAYS:
        return GraphedNetwork(torch.compile(ready, fullgraph=True, dynamic=False), round_to=ROWS_COMPILED)
    # In bfloat16 torch's own norms of NHWC cost more than its convolutions gain by it.
    return GraphedNetwork(ready.to(memory_format=torch.contiguous_format) if precision == "bfloat16" else ready)


def _with_cast_weights(network: nn.Module) -> nn.Module:
    """Returns a copy whose weights are in bfloat16 where autocast would cast them at every call; the rest, such as norms, stays float32."""
    cast = copy.deepcopy(network)
    for module in cast.modules():
        if isinstance(module, CAST):
            module.to(torch.bfloat16)
    return cast
