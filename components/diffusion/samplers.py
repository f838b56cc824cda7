"""From x_T to x_0, one function per sampler.

A sampler goes down a list of noise levels, asks for one estimate of x_0 at each, and returns the last one. Its coefficients are
Python numbers of float64, known before the first step: nothing waits for the device, and no step depends on what was drawn.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from .recipe import Recipe, Variance
from .schedule import Schedule


@dataclass(frozen=True)
class Level:
    """A noise level that a sampler visits.

    Attributes:
        index: its place in the list, 0 being the noisiest.
        t: its time step, 0 to T-1.
        alpha_bar: alpha_bar_t.
    """

    index: int
    t: int
    alpha_bar: float

    @property
    def alpha(self) -> float:
        """The share of the image, sqrt(alpha_bar): alpha_t of DPM-Solver++, which is not DDPM's alpha_t."""
        return math.sqrt(self.alpha_bar)

    @property
    def sigma(self) -> float:
        """The share of the noise, sqrt(1 - alpha_bar)."""
        return math.sqrt(1 - self.alpha_bar)

    @property
    def log_snr(self) -> float:
        """lambda_t = log(alpha / sigma), half the logarithm of the signal-to-noise ratio (DPM-Solver++ section 2)."""
        return math.log(self.alpha / self.sigma)


Estimate = Callable[[torch.Tensor, Level], torch.Tensor]
Noise = Callable[[Level], torch.Tensor]
Past = Sequence[tuple[Level, torch.Tensor]]


def noise_levels(recipe: Recipe, schedule: Schedule) -> list[Level]:
    """Returns the levels of a recipe's network evaluations, noisiest first.

    Raises:
        ValueError: if the recipe does not fit the schedule.
    """
    recipe.check(schedule.num_steps)
    timesteps = spaced_timesteps(recipe, schedule.num_steps)
    return [Level(index, t, alpha_bar) for index, (t, alpha_bar) in enumerate(zip(timesteps, schedule.alpha_bar[timesteps].tolist(), strict=True))]


def spaced_timesteps(recipe: Recipe, num_steps: int) -> list[int]:
    """Returns `recipe.steps` different time steps, from T-1 downwards (DDIM appendix D.2).

    The multistep samplers stop a step above 0, from where they go to x_0 at once (`linspace` in diffusers).
    """
    last, steps = num_steps - 1, recipe.steps
    if recipe.spacing == "quadratic" and steps > 1:
        place = np.arange(steps)
        square = np.floor(last * (place / (steps - 1)) ** 2).astype(int)
        # Near 0 squares are closer than whole numbers: each is moved up until all differ.
        return (np.maximum.accumulate(square - place) + place)[::-1].tolist()
    if recipe.sampler in ("dpmpp_2m", "unipc") and steps < num_steps:
        return np.linspace(0, last, steps + 1).round().astype(int)[:0:-1].tolist()
    return np.linspace(last, 0, steps).round().astype(int).tolist()


def ddim(estimate: Estimate, x_t: torch.Tensor, levels: Sequence[Level], noise: Noise, eta: float = 0.0) -> torch.Tensor:
    """Returns x_0 by DDIM (DDIM Eq. 12, sigma of Eq. 16); eta = 0 is deterministic, and asks for no noise."""
    for now, then in pairwise(levels):
        x_0 = estimate(x_t, now)
        # CUDA multiplies by the reciprocal where a divisor is a Python number, which rounds in another way.
        eps = (x_t - now.alpha * x_0) / x_t.new_full((), now.sigma)
        variance = eta**2 * (1 - then.alpha_bar) / (1 - now.alpha_bar) * (1 - now.alpha_bar / then.alpha_bar)
        x_t = then.alpha * x_0 + math.sqrt(max(0.0, 1 - then.alpha_bar - variance)) * eps
        if eta > 0:
            x_t = x_t + math.sqrt(variance) * noise(now)
    return estimate(x_t, levels[-1])


def ancestral(estimate: Estimate, x_t: torch.Tensor, levels: Sequence[Level], noise: Noise, variance: Variance = "small") -> torch.Tensor:
    """Returns x_0 ~ p(x_0 | x_T), each step about the mean of q(x_{t-1} | x_t, x_0) (DDPM Eq. 6-7, algorithm 2; respaced: Improved DDPM section 4)."""
    for now, then in pairwise(levels):
        x_0 = estimate(x_t, now)
        alpha = now.alpha_bar / then.alpha_bar
        mean_x_0 = math.sqrt(then.alpha_bar) * (1 - alpha) / (1 - now.alpha_bar)
        mean_x_t = math.sqrt(alpha) * (1 - then.alpha_bar) / (1 - now.alpha_bar)
        spread = (1 - then.alpha_bar) / (1 - now.alpha_bar) * (1 - alpha) if variance == "small" else 1 - alpha
        x_t = mean_x_0 * x_0 + mean_x_t * x_t + math.sqrt(spread) * noise(now)
    return estimate(x_t, levels[-1])


def dpmpp_2m(estimate: Estimate, x_t: torch.Tensor, levels: Sequence[Level]) -> torch.Tensor:
    """Returns x_0 by DPM-Solver++(2M), the multistep method of second order (DPM-Solver++ algorithm 2)."""
    past: Past = []
    for now, then in pairwise(levels):
        past = [*past[-1:], (now, estimate(x_t, now))]
        x_t = _predict(x_t, past, then)
    return estimate(x_t, levels[-1])


def unipc(estimate: Estimate, x_t: torch.Tensor, levels: Sequence[Level]) -> torch.Tensor:
    """Returns x_0 by UniPC-2 with B(h) = e^h - 1 and data prediction (UniPC section 3); correcting costs no network evaluation."""
    past: Past = []
    x_before = x_t
    for now, then in pairwise(levels):
        x_0 = estimate(x_t, now)
        if past:
            x_t = _correct(x_before, past, now, x_0)
        past = [*past[-1:], (now, x_0)]
        x_before, x_t = x_t, _predict(x_t, past, then)
    return estimate(x_t, levels[-1])


def _predict(x_t: torch.Tensor, past: Past, then: Level) -> torch.Tensor:
    """Returns x at the next level from the last one or two estimates of x_0 (DPM-Solver++ algorithm 2; UniP-2 is the same)."""
    now, x_0 = past[-1]
    h = then.log_snr - now.log_snr
    if len(past) > 1:
        before, x_0_before = past[-2]
        ratio = (now.log_snr - before.log_snr) / h
        x_0 = x_0 + (x_0 - x_0_before) * (0.5 / ratio)
    return x_t * (then.sigma / now.sigma) - x_0 * (then.alpha * math.expm1(-h))


def _correct(x_before: torch.Tensor, past: Past, now: Level, x_0: torch.Tensor) -> torch.Tensor:
    """Returns x at this level once more, from the level before and the estimate that was made here (UniC, UniPC section 3)."""
    before, x_0_before = past[-1]
    h = now.log_snr - before.log_snr
    b_h = math.expm1(-h)
    change = 0.5 * (x_0 - x_0_before)
    if len(past) > 1:
        earlier, x_0_earlier = past[-2]
        ratio = (earlier.log_snr - before.log_snr) / h
        b_1 = (b_h / -h - 1) / b_h
        b_2 = 2 * ((b_h / -h - 1) / -h - 0.5) / b_h
        # The weights of both differences solve rho_1 + rho_2 = b_1 and ratio * rho_1 + rho_2 = b_2.
        rho_1 = (b_1 - b_2) / (1 - ratio)
        change = (x_0_earlier - x_0_before) * (rho_1 / ratio) + (x_0 - x_0_before) * (b_1 - rho_1)
    return x_before * (now.sigma / before.sigma) - (x_0_before + change) * (now.alpha * b_h)
