"""From x_T to x_0, one function per sampler.

A sampler goes down a list of noise levels, asks for one estimate of x_0 at each, and returns the last one. Its coefficients are
Python numbers of float64, known before the first step: nothing waits for the device, and no step depends on what was drawn.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import torch

from .levels import Level, spaced_timesteps
from .process import Process
from .recipe import Recipe, Variance

__all__ = ["Level", "ancestral", "ddim", "dpmpp_2m", "heun", "noise_levels", "spaced_timesteps", "unipc"]

Estimate = Callable[[torch.Tensor, Level], torch.Tensor]
Noise = Callable[[Level], torch.Tensor]
Past = Sequence[tuple[Level, torch.Tensor]]


def noise_levels(recipe: Recipe, process: Process) -> list[Level]:
    """Returns the levels of a recipe's network evaluations, noisiest first.

    Raises:
        ValueError: if the recipe does not fit the process.
    """
    return process.levels(recipe)


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


def ancestral(
    estimate: Estimate,
    x_t: torch.Tensor,
    levels: Sequence[Level],
    noise: Noise,
    variance: Variance = "small",
    fraction: Callable[[], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Returns x_0 ~ p(x_0 | x_T), each step about the mean of q(x_{t-1} | x_t, x_0) (DDPM Eq. 6-7, algorithm 2; respaced: Improved DDPM section 4).

    Args:
        fraction: what the network said last of where the variance lies between its bounds, -1..1 (Improved DDPM Eq. 15); for `learned`.
    """
    for now, then in pairwise(levels):
        x_0 = estimate(x_t, now)
        alpha = now.alpha_bar / then.alpha_bar
        mean_x_0 = math.sqrt(then.alpha_bar) * (1 - alpha) / (1 - now.alpha_bar)
        mean_x_t = math.sqrt(alpha) * (1 - then.alpha_bar) / (1 - now.alpha_bar)
        small, large = (1 - then.alpha_bar) / (1 - now.alpha_bar) * (1 - alpha), 1 - alpha
        if variance == "learned" and fraction is not None:
            share = (fraction() + 1) / 2
            deviation = (0.5 * (share * math.log(large) + (1 - share) * math.log(small))).exp()
        else:
            deviation = math.sqrt(small if variance == "small" else large)
        x_t = mean_x_0 * x_0 + mean_x_t * x_t + deviation * noise(now)
    return estimate(x_t, levels[-1])


def heun(estimate: Estimate, x_t: torch.Tensor, levels: Sequence[Level], *, straight: bool) -> torch.Tensor:
    """Returns x_0 by Heun's method on the probability-flow ODE dx/dsigma = (x - x_0) / sigma (EDM algorithm 1 without churn).

    Args:
        straight: work on x = (1 - s) x_0 + s eps, whose paths are straight where data are one point, instead of on EDM's x = x_0 + s eps; the ODE is
            the same in both.
    """

    def share(level: Level) -> float:
        """What alpha x_0 + sigma eps is divided by."""
        return level.alpha + level.sigma if straight else level.alpha

    def slope(x: torch.Tensor, level: Level, at: Level) -> torch.Tensor:
        return (x - estimate(x * share(level), at)) / x.new_full((), level.sigma / share(level))

    x = x_t / x_t.new_full((), share(levels[0]))
    for now, then in pairwise(levels):
        h = then.sigma / share(then) - now.sigma / share(now)
        first = slope(x, now, now)
        second = slope(x + h * first, then, replace(then, index=now.index + 1))
        x = x + (0.5 * h) * (first + second)
    return estimate(x * share(levels[-1]), levels[-1])


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
        if past and past[-1][0].alpha_bar > 0:  # from noise alone there is no way back that a correction could shorten
            x_t = _correct(x_before, past, now, x_0)
        past = [*past[-1:], (now, x_0)]
        x_before, x_t = x_t, _predict(x_t, past, then)
    return estimate(x_t, levels[-1])


def _predict(x_t: torch.Tensor, past: Past, then: Level) -> torch.Tensor:
    """Returns x at the next level from the last one or two estimates of x_0 (DPM-Solver++ algorithm 2; UniP-2 is the same)."""
    now, x_0 = past[-1]
    h = then.log_snr - now.log_snr
    if len(past) > 1 and past[-2][0].alpha_bar > 0:
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
    if len(past) > 1 and past[-2][0].alpha_bar > 0:
        earlier, x_0_earlier = past[-2]
        ratio = (earlier.log_snr - before.log_snr) / h
        b_1 = (b_h / -h - 1) / b_h
        b_2 = 2 * ((b_h / -h - 1) / -h - 0.5) / b_h
        # The weights of both differences solve rho_1 + rho_2 = b_1 and ratio * rho_1 + rho_2 = b_2.
        rho_1 = (b_1 - b_2) / (1 - ratio)
        change = (x_0_earlier - x_0_before) * (rho_1 / ratio) + (x_0 - x_0_before) * (b_1 - rho_1)
    return x_before * (now.sigma / before.sigma) - (x_0_before + change) * (now.alpha * b_h)
