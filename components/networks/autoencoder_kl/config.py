"""Settings of the autoencoder; reading them loads neither torch nor diffusers."""

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ..config import DiffusersNetwork, NetworkConfig

if TYPE_CHECKING:
    from torch import nn


class AutoencoderKLConfig(NetworkConfig):
    """An autoencoder of images whose latents are kept near a normal distribution (Latent Diffusion section 3.1); trained with `kind: autoencoder`."""

    diffusers_class: ClassVar[str] = ""  # a network that denoises is looked for by this name, and it is none

    kind: Literal["autoencoder_kl"] = "autoencoder_kl"
    """Which network: `unet` (DDPM) or `dit` (DiT) for images, `point_mlp` for points; `autoencoder_kl` denoises nothing."""
    latent_channels: int = Field(4, ge=1)
    """Channels of the latents."""
    base_channels: int = Field(32, ge=4)
    """Channels at full resolution."""
    channel_mults: tuple[int, ...] = Field((1, 2), min_length=1)
    """Channels of each level in units of `base_channels`; each level after the first halves height and width: two make four pixels one (f2), four 64 (f8)."""
    num_res_blocks: int = Field(1, ge=1)
    """Residual blocks per level of the encoder; the decoder has one more."""
    num_groups: int = Field(8, ge=1)
    """Groups of the group normalisation; divides the channels of every level."""
    attention: bool = False
    """Self-attention between the residual blocks of the lowest level."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.conditional:
            raise ValueError("conditional=true means nothing to an autoencoder, which is told no class; leave it out")
        if min(self.channel_mults) < 1:
            raise ValueError("channel_mults holds a multiplier below 1; every level needs channels")
        if wrong := [self.base_channels * mult for mult in self.channel_mults if self.base_channels * mult % self.num_groups]:
            raise ValueError(f"num_groups={self.num_groups} does not divide {wrong[0]} channels; choose a divisor")
        return self

    @property
    def factor(self) -> int:
        """Pixels for each latent pixel, in height and in width."""
        return 2 ** (len(self.channel_mults) - 1)

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Returns (C, h, w) of the latents of images (C, H, W)."""
        _, height, width = shape
        return self.latent_channels, height // self.factor, width // self.factor

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError, naming what would do, unless every level can halve the image (C, H, W) and the latents are no larger than it."""
        if len(shape) != 3:
            raise ValueError(f"model.kind=autoencoder_kl takes images, and a row has shape {list(shape)}; use a source of images")
        channels, height, width = shape
        if height % self.factor or width % self.factor:
            raise ValueError(f"data.image_size={width}x{height} cannot be halved {len(self.channel_mults) - 1} times; use a multiple of {self.factor}")
        if self.latent_channels > (most := channels * self.factor**2):
            raise ValueError(f"model.latent_channels={self.latent_channels} makes latents larger than the image; use up to {most}, or more channel_mults")

    def build(self, shape: tuple[int, ...], num_classes: int = 0, *, outputs: int = 1, conditions: int = 0) -> "nn.Module":
        from .network import Autoencoder

        self.check_shape(shape)
        return Autoencoder(self, shape=shape)

    def to_diffusers(self, network: "nn.Module", shape: tuple[int, ...]) -> DiffusersNetwork | str:
        from .network import Autoencoder, diffusers_config

        assert isinstance(network, Autoencoder)
        return DiffusersNetwork("AutoencoderKL", diffusers_config(self, shape), network.inner.state_dict())
