"""The loss that is trained."""

from collections.abc import Callable

import torch
from torch.nn.functional import mse_loss

from .schedule import Schedule

Network = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def simple_loss(network: Network, schedule: Schedule, x_0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Returns L_simple, the mean squared error of the network's estimate at x_t (DDPM Eq. 14), a float32 scalar.

    Args:
        network: (x_t (B, C, H, W), t (B,)) -> output (B, C, H, W); may run under autocast.
        x_0: images in -1..1, float32.
        eps: standard normal noise of the same shape, float32.
    """
    output = network(schedule.add_noise(x_0, eps, t), t)
    return mse_loss(output.float(), schedule.target(x_0, eps, t))
