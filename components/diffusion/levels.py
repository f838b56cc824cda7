"""The noise levels that a sampler visits."""

import math
from dataclasses import dataclass

import numpy as np

from .recipe import Recipe


@dataclass(frozen=True)
class Level:
    """A noise level that a sampler visits: x = scale (alpha x_0 + sigma eps), where alpha^2 + sigma^2 = 1.

    So is every process once its x is divided by the scale, and samplers see it like that.

    Attributes:
        index: its place among the network's evaluations, 0 being the noisiest.
        t: its time: a time step, 0 to T-1, of DDPM; 0 to 1 of a flow; sigma of EDM.
        alpha_bar: alpha_bar_t.
        scale: what the process itself multiplies by, 1 for DDPM.
    """

    index: int
    t: float
    alpha_bar: float
    scale: float = 1.0

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
        return math.log(self.alpha / self.sigma) if self.alpha_bar > 0 else -math.inf


def visits(recipe: Recipe) -> tuple[int, int]:
    """Returns how many levels a recipe visits, and how many evaluations lie between two: `heun` looks twice at all but the last."""
    return ((recipe.steps + 1) // 2, 2) if recipe.sampler == "heun" else (recipe.steps, 1)


def spaced_timesteps(recipe: Recipe, num_steps: int) -> list[int]:
    """Returns different time steps, one for each level of a recipe, from T-1 downwards (DDIM appendix D.2).

    The multistep samplers stop a step above 0, from where they go to x_0 at once (`linspace` in diffusers).
    """
    last, steps = num_steps - 1, visits(recipe)[0]
    if recipe.spacing == "quadratic" and steps > 1:
        place = np.arange(steps)
        square = np.floor(last * (place / (steps - 1)) ** 2).astype(int)
        # Near 0 squares are closer than whole numbers: each is moved up until all differ.
        return (np.maximum.accumulate(square - place) + place)[::-1].tolist()
    if recipe.sampler in ("dpmpp_2m", "unipc") and steps < num_steps:
        return np.linspace(0, last, steps + 1).round().astype(int)[:0:-1].tolist()
    return np.linspace(last, 0, steps).round().astype(int).tolist()
