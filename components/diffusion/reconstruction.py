"""No diffusion at all: the network is an autoencoder, and a "sample" is the reconstruction of the image that one starts from."""

from collections.abc import Sequence
from typing import Self

import numpy as np
import torch

from .config import DiffusionConfig
from .levels import Level
from .perceptual import Perceptual
from .recipe import Recipe

ONLY = Level(0, 0.0, 1.0)


class Reconstruction:
    """x_t is x_0 at every time, and the network's output its reconstruction: what looks at losses and draws samples then looks at and draws these."""

    def __init__(self, config: DiffusionConfig) -> None:
        self.config, self.start = config, 1.0
        self.perceptual: Perceptual | None = None
        self.perceptual_scale = 1.0

    def to(self, device: torch.device | str) -> Self:
        """Returns the process, which has no tables."""
        return self

    def draw_times(self, draw: np.random.Generator, count: int) -> np.ndarray:
        """Returns zeros (count,), float32."""
        return np.zeros(count, np.float32)

    def add_noise(self, x_0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Returns x_0."""
        return x_0

    def network_inputs(self, x_t: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns x_t, and times that say nothing."""
        return x_t, t

    def target(self, x_0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Returns x_0."""
        return x_0

    def loss_weight(self, t: torch.Tensor) -> None:
        """Returns None."""
        return

    def predict_x_0(self, output: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Returns the output."""
        return output

    def levels(self, recipe: Recipe) -> list[Level]:
        """Returns the only level."""
        recipe.check_process(self.config)
        return [ONLY]

    def times(self, count: int) -> Sequence[float]:
        """Returns the only time."""
        return [0.0]

    def level_at(self, t: float) -> Level:
        """Returns the only level."""
        return ONLY


def reconstruction_loss(
    network: torch.nn.Module, process: Reconstruction, x_0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns the mean absolute error of the reconstruction plus kl_weight times the divergence of the posteriors from N(0, 1), a float32 scalar.

    Where the process has a perceptual distance, that is added, times its scale.

    The divergence (VAE appendix B) is summed over the latents of an image and divided by the image's numbers, as both terms are in Latent Diffusion (Eq. 25)
    up to a common factor.

    Args:
        x_0: images in the model's range, float32.
        eps: standard normal noise of the same shape.
    """
    reconstructed, mean, logvar = network(x_0, eps)
    error = (reconstructed.float() - x_0).abs().mean()
    divergence = 0.5 * (mean.float().square() + logvar.float().exp() - 1.0 - logvar.float()).sum() / x_0.numel()
    loss = error + process.config.kl_weight * divergence
    if process.perceptual is not None:
        loss = loss + process.perceptual_scale * process.perceptual(reconstructed.float(), x_0)
    return loss
