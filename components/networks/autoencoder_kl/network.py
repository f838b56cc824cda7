"""diffusers' `AutoencoderKL` as this project trains it."""

from typing import Any

import torch
from torch import nn

from .config import AutoencoderKLConfig


def diffusers_config(config: AutoencoderKLConfig, shape: tuple[int, ...]) -> dict[str, object]:
    """Returns the keyword arguments of the `diffusers.AutoencoderKL` of images (C, H, W)."""
    levels = len(config.channel_mults)
    return {
        "in_channels": shape[0],
        "out_channels": shape[0],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": [config.base_channels * mult for mult in config.channel_mults],
        "layers_per_block": config.num_res_blocks,
        "act_fn": "silu",
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.num_groups,
        "sample_size": shape[1],
        "scaling_factor": 1.0,
        "mid_block_add_attention": config.attention,
    }


class Autoencoder(nn.Module):
    """Images (B, C, H, W) to their reconstruction, by way of latents (B, C', h, w).

    Args:
        shape: (C, H, W).
    """

    def __init__(self, config: AutoencoderKLConfig, *, shape: tuple[int, ...]) -> None:
        super().__init__()
        from diffusers import AutoencoderKL

        self.latent_shape = config.latent_shape(shape)
        self.inner: Any = AutoencoderKL(**diffusers_config(config, shape))  # pyrefly: ignore[bad-argument-type]

    def forward(
        self,
        x: torch.Tensor,
        noise: torch.Tensor,
        labels: torch.Tensor | None = None,
        keys: torch.Tensor | None = None,
        conditions: torch.Tensor | None = None,
    ) -> Any:
        """Returns the reconstruction of x; with noise also mean and logarithm of the variance of the posterior, (B, C', h, w) each.

        Args:
            noise: (B, C, H, W), standard normal, the first numbers of which say where in its posterior each latent lies; times (B,), as a process hands
                them to a network, say nothing, and the latents are the means.
        """
        posterior = self.inner.encode(x).latent_dist
        if noise.ndim == 1:
            return self.inner.decode(posterior.mean).sample
        eps = noise.flatten(1)[:, : posterior.mean[0].numel()].view(posterior.mean.shape)
        return self.inner.decode(posterior.mean + posterior.std * eps).sample, posterior.mean, posterior.logvar

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Returns images (B, C, H, W) of latents (B, C', h, w)."""
        return self.inner.decode(latents).sample
