"""Settings of the network; reading them loads no torch."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class UNetConfig(BaseModel):
    """The denoiser's architecture; the defaults are the CIFAR-10 column of the DDPM paper (35.746 M parameters)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    base_channels: int = Field(128, ge=4, multiple_of=2)
    """Channels at full resolution."""
    channel_mults: tuple[int, ...] = Field((1, 2, 2, 2), min_length=1)
    """Channels of each level in units of `base_channels`; each level after the first halves height and width."""
    num_res_blocks: int = Field(2, ge=1)
    """Residual blocks per level on the way down; one more on the way up."""
    attention_resolutions: tuple[int, ...] = (16,)
    """Heights (pixels) at which every residual block is followed by self-attention; the lowest level always has one."""
    num_heads: int = Field(1, ge=1)
    """Attention heads."""
    num_groups: int = Field(32, ge=1)
    """Groups of the group normalisation; divides the channels of every level."""
    dropout: float = Field(0.1, ge=0.0, lt=1.0)
    """Probability of a dropped activation in residual blocks, while training."""
    conditional: bool = False
    """Tell the network each image's label, so that samples of a wanted class can be drawn; the dataset needs labels."""
    checkpointing: bool = Field(False, json_schema_extra={"result": False})
    """Compute the activations of residual blocks again in the backward pass instead of keeping them: less memory, a third more work."""

    @model_validator(mode="after")
    def _check_divisions(self) -> Self:
        if min(self.channel_mults) < 1:
            raise ValueError("channel_mults holds a multiplier below 1; every level needs channels")
        for mult in self.channel_mults:
            channels = self.base_channels * mult
            if channels % self.num_groups or channels % self.num_heads:
                raise ValueError(
                    f"base_channels={self.base_channels} times {mult} is {channels}, which num_groups={self.num_groups} or "
                    f"num_heads={self.num_heads} does not divide; choose divisors of {channels}"
                )
        return self

    def check_image_size(self, image_size: int) -> None:
        """Raises ValueError, naming a size that would do, unless every level can halve the image."""
        factor = 2 ** (len(self.channel_mults) - 1)
        if image_size % factor or image_size < factor:
            nearest = max(factor, round(image_size / factor) * factor)
            raise ValueError(
                f"image_size={image_size} cannot be halved {len(self.channel_mults) - 1} times; "
                f"use a multiple of {factor} such as {nearest}, or fewer model.channel_mults"
            )

    @property
    def num_dropouts(self) -> int:
        """Layers that drop activations: one in every residual block."""
        levels = len(self.channel_mults)
        return levels * self.num_res_blocks + 2 + levels * (self.num_res_blocks + 1) if self.dropout else 0
