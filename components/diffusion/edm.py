"""EDM: noise of growing deviation is added to data, and the network is preconditioned so that its inputs and targets have variance 1 at every sigma.

t is sigma, the standard deviation of the noise (Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models").
"""

import math
from collections.abc import Sequence
from typing import Self

import numpy as np
import torch

from .config import DiffusionConfig
from .levels import Level, visits
from .process import per_row
from .recipe import Recipe

RHO = 7.0
"""How much denser sampling is near sigma = 0 (EDM Eq. 5)."""


class Edm:
    """x = x_0 + sigma eps; D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) (EDM Eq. 7)."""

    def __init__(self, config: DiffusionConfig) -> None:
        self.config = config
        self.start = self.level_at(config.sigma_max).sigma

    def to(self, device: torch.device | str) -> Self:
        """Returns the process, which has no tables."""
        return self

    def draw_times(self, draw: np.random.Generator, count: int) -> np.ndarray:
        """Returns sigma (count,), float32, whose logarithm is normally distributed (EDM table 1)."""
        return np.exp(self.config.time_mean + self.config.time_deviation * draw.standard_normal(count)).astype(np.float32)

    def add_noise(self, x_0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Returns x_0 + sigma eps."""
        return x_0 + per_row(t, x_0) * eps

    def preconditioning(self, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns c_skip, c_out and c_in of sigma (EDM table 1)."""
        data = self.config.data_deviation
        total = sigma**2 + data**2
        return data**2 / total, sigma * data / total.sqrt(), 1 / total.sqrt()

    def network_inputs(self, x_t: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns c_in x, and c_noise = ln(sigma) / 4."""
        _, _, c_in = self.preconditioning(per_row(t, x_t))
        return c_in * x_t, t.log() / 4

    def target(self, x_0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Returns (x_0 - c_skip x) / c_out, what F should be: lambda(sigma) c_out^2 = 1, so that its squared error is the loss (EDM Eq. 8)."""
        c_skip, c_out, _ = self.preconditioning(per_row(t, x_0))
        return (x_0 - c_skip * self.add_noise(x_0, eps, t)) / c_out

    def loss_weight(self, t: torch.Tensor) -> None:
        """Returns None: the error of F has weight 1."""
        return

    def predict_x_0(self, output: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Returns D(x; sigma)."""
        c_skip, c_out, _ = self.preconditioning(per_row(t, x_t))
        return c_skip * x_t + c_out * output

    def levels(self, recipe: Recipe) -> list[Level]:
        """Returns sigmas from sigma_max to sigma_min, evenly spaced after their 7th root is taken (EDM Eq. 5); from the last one step leads to 0."""
        recipe.check_process(self.config)
        count, stride = visits(recipe)
        return [self.level_at(sigma, index * stride) for index, sigma in enumerate(self.times(count)[::-1])]

    def times(self, count: int) -> Sequence[float]:
        """Returns sigmas from sigma_min to sigma_max (EDM Eq. 5)."""
        low, high = (sigma ** (1 / RHO) for sigma in (self.config.sigma_min, self.config.sigma_max))
        return [self.config.sigma_max] if count == 1 else [(low + place / (count - 1) * (high - low)) ** RHO for place in range(count)]

    def level_at(self, t: float, index: int = 0) -> Level:
        """Returns the level of a sigma."""
        return Level(index, t, 1 / (1 + t**2), math.sqrt(1 + t**2))
