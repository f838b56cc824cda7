"""The loss that is trained, and what it is at single noise levels."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.nn.functional import mse_loss

from ..streams import Purpose, stream
from .schedule import Schedule

# (x_t (B, C, H, W), t (B,)) -> output (B, C, H, W); one that is told the class takes labels (B,) as a third argument.
Network = Callable[..., torch.Tensor]


def simple_loss(
    network: Network, schedule: Schedule, x_0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns L_simple, the mean squared error of the network's estimate at x_t (DDPM Eq. 14), a float32 scalar.

    Args:
        network: may run under autocast.
        x_0: images in -1..1, float32.
        eps: standard normal noise of the same shape, float32.
        labels: what the network is told of the classes, (B,) int64; nothing by default.
    """
    x_t = schedule.add_noise(x_0, eps, t)
    output = network(x_t, t) if labels is None else network(x_t, t, labels)
    return mse_loss(output.float(), schedule.target(x_0, eps, t))


@torch.inference_mode()
def loss_by_timestep(
    network: Network, schedule: Schedule, x_0: torch.Tensor, timesteps: Sequence[int], *, seed: int = 0, first_row: int = 0, batch_size: int = 256
) -> list[float]:
    """Returns the mean of L_simple (DDPM Eq. 14) over given images at each of some timesteps.

    An image meets the same noise at every timestep and in every call, so that curves of two networks differ by the networks only.

    Args:
        x_0: (N, C, H, W) images in -1..1, float32, on the device of network and schedule.
        timesteps: each 0..T-1, for example of `spaced_timesteps`.
        first_row: place of the first image among all, where they are measured in parts.
        batch_size: images that the network sees together; no part of the result.

    Raises:
        ValueError: if there is no image, or a timestep is out of range.
    """
    wrong = [t for t in timesteps if not 0 <= t < schedule.num_steps]
    if wrong:
        raise ValueError(f"timesteps={wrong} are out of range; use 0 to {schedule.num_steps - 1}")
    if not len(x_0):
        raise ValueError("x_0 holds no image; use at least one")
    losses = torch.empty(len(timesteps), len(x_0), dtype=torch.float64)
    for start in range(0, len(x_0), batch_size):
        batch = x_0[start : start + batch_size]
        eps = _fixed_noise(seed, range(first_row + start, first_row + start + len(batch)), batch.shape[1:]).to(batch.device)
        for index, timestep in enumerate(timesteps):
            t = torch.full((len(batch),), timestep, device=batch.device)
            error = network(schedule.add_noise(batch, eps, t), t).double() - schedule.target(batch, eps, t).double()
            losses[index, start : start + len(batch)] = error.square().flatten(1).mean(dim=1)
    return losses.mean(dim=1).tolist()


def _fixed_noise(seed: int, rows: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """Returns standard normal float32 noise (len(rows), *shape), made on the CPU so that every device measures alike."""
    return torch.from_numpy(np.stack([stream(Purpose.TIMESTEP_LOSS, seed, row).standard_normal(tuple(shape), dtype=np.float32) for row in rows]))
