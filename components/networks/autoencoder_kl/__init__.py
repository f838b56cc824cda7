"""The autoencoder of Latent Diffusion; diffusers' class is the network."""

from .config import AutoencoderKLConfig as Config

__all__ = ["Config"]
