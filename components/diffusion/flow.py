"""Rectified flow: data and noise are joined by a straight line, and the network learns the velocity along it.

t runs from 0, the data, to 1, noise alone (Flow Matching with the optimal-transport path; Rectified Flow; in SD3's notation).
"""

from collections.abc import Sequence
from typing import Self

import numpy as np
import torch

from .config import DiffusionConfig
from .levels import Level, visits
from .process import per_row
from .recipe import Recipe

TOLD = 1000.0
"""What the network is told is so many times t, as that of SD3 is: its embedding is made for time steps of that size."""


class RectifiedFlow:
    """x_t = (1 - t) x_0 + t eps (Rectified Flow Eq. 1), whose velocity dx_t/dt is eps - x_0."""

    def __init__(self, config: DiffusionConfig) -> None:
        self.config, self.start = config, 1.0

    def to(self, device: torch.device | str) -> Self:
        """Returns the process, which has no tables."""
        return self

    def draw_times(self, draw: np.random.Generator, count: int) -> np.ndarray:
        """Returns t (count,), float32, whose logit is normally distributed (SD3 Eq. 19)."""
        logits = self.config.time_mean + self.config.time_deviation * draw.standard_normal(count)
        return (1 / (1 + np.exp(-logits))).astype(np.float32)

    def add_noise(self, x_0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Returns x_t = (1 - t) x_0 + t eps."""
        share = per_row(t, x_0)
        return (1 - share) * x_0 + share * eps

    def network_inputs(self, x_t: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns x_t, and 1000 t."""
        return x_t, TOLD * t

    def target(self, x_0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Returns the velocity eps - x_0 (Flow Matching Eq. 23, time reversed)."""
        return eps - x_0

    def loss_weight(self, t: torch.Tensor) -> None:
        """Returns None: what training looks at is decided by the draw of t alone."""
        return

    def predict_x_0(self, output: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Returns x_t - t output."""
        return x_t - per_row(t, x_t) * output

    def levels(self, recipe: Recipe) -> list[Level]:
        """Returns evenly spaced times from 1 down; from the last one step leads to 0."""
        recipe.check_process(self.config)
        count, stride = visits(recipe)
        return [self.level_at(1 - place / count, place * stride) for place in range(count)]

    def times(self, count: int) -> Sequence[float]:
        """Returns the middles of as many equal parts of 0..1."""
        return [(place + 0.5) / count for place in range(count)]

    def level_at(self, t: float, index: int = 0) -> Level:
        """Returns the level of a time."""
        variance = (1 - t) ** 2 + t**2
        return Level(index, t, (1 - t) ** 2 / variance, variance**0.5)
