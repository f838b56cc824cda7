"""The forward process of DDPM: betas, alpha_bar, and the conversions between eps, x_0 and v.

Tensors indexed by `t` (int64, 0..T-1, shape (B,)) broadcast over rows (B, ...) of any shape.
"""

from collections.abc import Sequence
from typing import Self

import numpy as np
import torch

from .betas import cosine_betas, linear_betas, quadratic_betas, sigmoid_betas, zero_terminal_snr
from .config import DiffusionConfig, Prediction
from .levels import Level, spaced_timesteps, visits
from .process import per_row
from .recipe import Recipe
from .weights import error_over_x_0, min_snr_weight, p2_weight

BETAS = {"linear": linear_betas, "cosine": cosine_betas, "sigmoid": sigmoid_betas, "quadratic": quadratic_betas}


class Schedule:
    """Noise levels of a diffusion process, and the identities that hold between x_t, x_0, eps and v.

    Attributes:
        betas: (T,) float64.
        alpha_bar: (T,) float64, the cumulative product of 1 - betas.
    """

    def __init__(self, config: DiffusionConfig) -> None:
        self.config, self.start = config, 1.0
        self.prediction: Prediction = config.prediction
        self.num_steps = config.num_steps
        betas = BETAS[config.betas](config.num_steps)
        self.betas = zero_terminal_snr(betas) if config.zero_terminal_snr else betas
        self.alpha_bar = torch.cumprod(1 - self.betas, dim=0)
        self._weights = self._all_weights()

    def _all_weights(self) -> torch.Tensor | None:
        """Returns the weight of the loss at every t, (T,) float64; None where it is 1."""
        if self.config.loss_weight == "simple":
            return None
        snr = self.alpha_bar / (1 - self.alpha_bar)
        gamma = self.config.min_snr_gamma if self.config.loss_weight == "min_snr" else self.config.p2_gamma
        of_x_0 = (min_snr_weight if self.config.loss_weight == "min_snr" else p2_weight)(snr, gamma)
        return of_x_0 / error_over_x_0(self.prediction, snr, self._posterior_weights(torch.arange(self.num_steps))[0])

    def to(self, device: torch.device | str) -> Self:
        """Moves the tables to a device, once, and returns the schedule."""
        self.betas, self.alpha_bar = self.betas.to(device), self.alpha_bar.to(device)
        self._weights = None if self._weights is None else self._weights.to(device)
        return self

    def draw_times(self, draw: np.random.Generator, count: int) -> np.ndarray:
        """Returns t (count,), int64, every one of 0..T-1 as likely as another (DDPM algorithm 1)."""
        return draw.integers(0, self.num_steps, count)

    def network_inputs(self, x_t: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns both as they are."""
        return x_t, t

    def loss_weight(self, t: torch.Tensor) -> torch.Tensor | None:
        """Returns the weight (B,), float32, of the squared error of what is predicted; None where it is 1."""
        return None if self._weights is None else self._weights[t].float()

    def levels(self, recipe: Recipe) -> list[Level]:
        """Returns the levels of a recipe's network evaluations, noisiest first.

        Raises:
            ValueError: if the recipe does not fit the schedule.
        """
        recipe.check_process(self.config)
        timesteps, stride = spaced_timesteps(recipe, self.num_steps), visits(recipe)[1]
        return [Level(place * stride, t, alpha_bar) for place, (t, alpha_bar) in enumerate(zip(timesteps, self.alpha_bar[timesteps].tolist(), strict=True))]

    def times(self, count: int) -> Sequence[float]:
        """Returns at most so many different time steps, evenly spread from 0 to T-1."""
        return sorted(set(np.linspace(0, self.num_steps - 1, count).round().astype(int).tolist()))

    def level_at(self, t: float) -> Level:
        """Returns the level of a time step."""
        return Level(0, t, float(self.alpha_bar[int(t)]))

    def signal_and_noise(self, t: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), float32, each (B, 1, ...), to be multiplied with rows."""
        alpha_bar = self.alpha_bar[t].view(-1, *[1] * (like.ndim - 1))
        return alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float()

    def posterior_mean_weights(self, t: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the weights of x_0 and of x_t in the mean of q(x_{t-1} | x_t, x_0) (DDPM Eq. 7), float32, each (B, 1, ...); 1 and 0 at t = 0."""
        of_x_0, of_x_t = self._posterior_weights(t)
        return per_row(of_x_0, like), per_row(of_x_t, like)

    def _posterior_weights(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the same, float64 (B,)."""
        alpha_bar, beta = self.alpha_bar[t], self.betas[t]
        before = torch.where(t > 0, self.alpha_bar[(t - 1).clamp(min=0)], 1.0)
        return before.sqrt() * beta / (1 - alpha_bar), (1 - beta).sqrt() * (1 - before) / (1 - alpha_bar)

    def posterior_variances(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the bounds of the variance of p(x_{t-1} | x_t), float64 (B,): of q(x_{t-1} | x_t, x_0) (DDPM Eq. 7), and beta_t.

        At t = 0 the former is that of t = 1, as in the code of Improved DDPM: it would be 0.
        """
        later = t.clamp(min=1)
        before, alpha_bar = self.alpha_bar[later - 1], self.alpha_bar[later]
        return (1 - before) / (1 - alpha_bar) * self.betas[later], self.betas[t]

    def add_noise(self, x_0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Returns x_t ~ q(x_t | x_0) for the noise eps (DDPM Eq. 4)."""
        signal, noise = self.signal_and_noise(t, x_0)
        return signal * x_0 + noise * eps

    def target(self, x_0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Returns what the network should output at x_t: eps, x_0, v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0, or the mean of q(x_{t-1} | x_t, x_0)."""
        if self.prediction == "eps":
            return eps
        if self.prediction == "x_0":
            return x_0
        if self.prediction == "posterior_mean":
            of_x_0, of_x_t = self.posterior_mean_weights(t, x_0)
            return of_x_0 * x_0 + of_x_t * self.add_noise(x_0, eps, t)
        signal, noise = self.signal_and_noise(t, x_0)
        return signal * eps - noise * x_0

    def predict_x_0(self, output: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Returns the network's estimate of x_0 from its output at x_t (DDPM Eq. 15; Progressive Distillation app. D)."""
        if self.prediction == "x_0":
            return output
        if self.prediction == "posterior_mean":
            of_x_0, of_x_t = self.posterior_mean_weights(t, x_t)
            return (output - of_x_t * x_t) / of_x_0
        signal, noise = self.signal_and_noise(t, x_t)
        if self.prediction == "v":
            return signal * x_t - noise * output
        return (x_t - noise * output) / signal

    def eps_from_x_0(self, x_0: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Returns the noise that leads from x_0 to x_t: `add_noise` solved for eps."""
        signal, noise = self.signal_and_noise(t, x_t)
        return (x_t - signal * x_0) / noise
