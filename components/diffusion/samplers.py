"""From seeds to images. A sample depends on its own seed only: not on its batch, its worker, or its place in line."""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch

from ..streams import Purpose, stream
from .objective import Network
from .schedule import Schedule

SamplerName = Literal["ddim", "ancestral"]
OnStep = Callable[[int, torch.Tensor], None]


def initial_noise(seeds: Sequence[int], shape: tuple[int, ...], draw: int = 0) -> torch.Tensor:
    """Returns standard normal float32 noise (len(seeds), *shape), made on the CPU so that every device starts alike.

    Args:
        seeds: one per image.
        draw: which noise of that seed: 0 is x_T, 1 and on are the fresh noise of ancestral steps.
    """
    rows = [stream(Purpose.SAMPLE, seed, draw).standard_normal(shape, dtype=np.float32) for seed in seeds]
    return torch.from_numpy(np.stack(rows))


def spaced_timesteps(num_steps: int, steps: int) -> list[int]:
    """Returns `steps` time steps from T-1 down to 0, evenly spaced (DDIM appendix D.2, linear).

    Raises:
        ValueError: if steps is not between 1 and T.
    """
    if not 1 <= steps <= num_steps:
        raise ValueError(f"steps={steps} is out of range; use 1 to {num_steps}, the model's number of noise levels")
    return np.linspace(num_steps - 1, 0, steps).round().astype(int).tolist()


def ddim_step(schedule: Schedule, x_0: torch.Tensor, x_t: torch.Tensor, t: int, t_next: int) -> torch.Tensor:
    """Returns x at t_next from the estimate x_0 at t, without fresh noise (DDIM Eq. 12, sigma = 0); t_next = -1 gives x_0."""
    if t_next < 0:
        return x_0
    batch = torch.full((len(x_t),), t, device=x_t.device)
    return schedule.add_noise(x_0, schedule.eps_from_x_0(x_0, x_t, batch), torch.full_like(batch, t_next))


def ancestral_step(schedule: Schedule, x_0: torch.Tensor, x_t: torch.Tensor, t: int, t_next: int, noise: torch.Tensor) -> torch.Tensor:
    """Returns x ~ q(x_{t_next} | x_t, x_0) (DDPM Eq. 6-7, on respaced steps Improved DDPM section 4); t_next = -1 gives x_0."""
    if t_next < 0:
        return x_0
    alpha_bar, alpha_bar_next = schedule.alpha_bar[t], schedule.alpha_bar[t_next]
    alpha = alpha_bar / alpha_bar_next
    mean_x_0 = alpha_bar_next.sqrt() * (1 - alpha) / (1 - alpha_bar)
    mean_x_t = alpha.sqrt() * (1 - alpha_bar_next) / (1 - alpha_bar)
    variance = (1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha)
    return mean_x_0.float() * x_0 + mean_x_t.float() * x_t + variance.sqrt().float() * noise


@torch.inference_mode()
def sample(
    network: Network,
    schedule: Schedule,
    seeds: Sequence[int],
    shape: tuple[int, ...],
    *,
    sampler: SamplerName = "ddim",
    steps: int = 50,
    device: torch.device | str = "cpu",
    on_step: OnStep | None = None,
) -> torch.Tensor:
    """Draws one image per seed and returns x_0 (len(seeds), *shape), float32 in -1..1.

    Args:
        shape: (C, H, W).
        sampler: `ddim` is deterministic given x_T; `ancestral` adds fresh noise of the same seed at every step.
        steps: network evaluations, 1 to T.
        on_step: called with (step index, current estimate of x_0) after every evaluation.

    Raises:
        ValueError: if steps is out of range.
    """
    x_t = initial_noise(seeds, shape).to(device)
    timesteps = spaced_timesteps(schedule.num_steps, steps)
    for index, (t, t_next) in enumerate(zip(timesteps, [*timesteps[1:], -1], strict=True)):
        output = network(x_t, torch.full((len(x_t),), t, device=x_t.device)).float()
        x_0 = schedule.predict_x_0(output, x_t, torch.full((1,), t, device=x_t.device)).clamp(-1.0, 1.0)
        if sampler == "ddim":
            x_t = ddim_step(schedule, x_0, x_t, t, t_next)
        else:
            x_t = ancestral_step(schedule, x_0, x_t, t, t_next, initial_noise(seeds, shape, index + 1).to(device))
        if on_step is not None:
            on_step(index, x_0)
    return x_t
