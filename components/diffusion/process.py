"""What every diffusion process is: how data become noise, what the network is shown and asked, and the levels that samplers visit."""

from typing import TYPE_CHECKING, Protocol, Self

import numpy as np
import torch

from .config import DiffusionConfig
from .levels import Level
from .recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Sequence


class Process(Protocol):
    """A path from x_0 to noise. Times t are (B,), as the process counts them; rows (B, ...) are of any shape.

    Attributes:
        start: standard deviation of the noise from which samples start, where a level's scale is divided out.
    """

    config: DiffusionConfig
    start: float

    def to(self, device: torch.device | str) -> Self:
        """Moves its tables to a device, once, and returns the process."""
        ...

    def draw_times(self, draw: np.random.Generator, count: int) -> np.ndarray:
        """Returns the times (count,) that as many rows are trained at."""
        ...

    def add_noise(self, x_0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Returns x_t, float32."""
        ...

    def network_inputs(self, x_t: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what the network is called with: x_t as it is shown, and the time as it is told, (B,)."""
        ...

    def target(self, x_0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Returns what the network should output at x_t."""
        ...

    def loss_weight(self, t: torch.Tensor) -> torch.Tensor | None:
        """Returns the weight (B,), float32, of the squared error of the output; None where it is 1."""
        ...

    def predict_x_0(self, output: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Returns the estimate of x_0 from the network's output at x_t."""
        ...

    def levels(self, recipe: Recipe) -> list[Level]:
        """Returns the levels of a recipe's network evaluations, noisiest first; the last estimate is the sample."""
        ...

    def times(self, count: int) -> "Sequence[float]":
        """Returns at most so many different times, evenly spread from little noise to much, at which a loss is looked at."""
        ...

    def level_at(self, t: float) -> Level:
        """Returns the level of a time."""
        ...


def make_process(config: DiffusionConfig) -> Process:
    """Returns the process that settings name."""
    from .edm import Edm
    from .flow import RectifiedFlow
    from .reconstruction import Reconstruction
    from .schedule import Schedule

    return {"ddpm": Schedule, "flow": RectifiedFlow, "edm": Edm, "reconstruction": Reconstruction}[config.process](config)


def per_row(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Returns values (B,) as float32 (B, 1, ...), to be multiplied with rows."""
    return values.float().view(-1, *[1] * (like.ndim - 1))
