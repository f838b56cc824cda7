"""Settings of the network; reading them loads no torch."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, JsonValue, model_validator

from ..config import DiffusersNetwork, NetworkConfig

if TYPE_CHECKING:
    import torch
    from torch import nn


_CAME_LATER: dict[str, JsonValue] = {"result": "unless default"}


class UNetConfig(NetworkConfig):
    """The denoiser's architecture; the defaults are the CIFAR-10 column of the DDPM paper (35.746 M parameters)."""

    diffusers_class: ClassVar[str] = "UNet2DModel"

    kind: Literal["unet"] = Field("unet", json_schema_extra={"result": "unless default"})
    """Which network: `unet` (DDPM) or `dit` (DiT) for images, `point_mlp` for points."""
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
    head_channels: int | None = Field(None, ge=1, json_schema_extra=_CAME_LATER)
    """Channels of one attention head, in place of `num_heads`: wider levels have more heads, as in ADM and diffusers."""
    num_groups: int = Field(32, ge=1)
    """Groups of the group normalisation; divides the channels of every level."""
    norm_eps: float = Field(1e-6, gt=0.0, json_schema_extra=_CAME_LATER)
    """What is added to the variance there; 1e-5 in diffusers' defaults."""
    time_features: Literal["sin_cos", "cos_sin"] = Field("sin_cos", json_schema_extra=_CAME_LATER)
    """Features of the time step: `sin_cos` as in DDPM's code, `cos_sin` as in diffusers' defaults."""
    downsample_padding: Literal[0, 1] = Field(0, json_schema_extra=_CAME_LATER)
    """Where images are padded before they are halved: 0 on the right and bottom alone as in DDPM's code, 1 on all sides as in diffusers' defaults."""
    scale_shift_norm: bool = Field(False, json_schema_extra=_CAME_LATER)
    """The time step scales and shifts the second norm of a residual block, instead of being added before it (Improved DDPM section 3.4, ADM)."""
    resample_blocks: bool = Field(False, json_schema_extra=_CAME_LATER)
    """Halve and double images within residual blocks of their own, instead of by single convolutions (BigGAN, ADM)."""
    dropout: float = Field(0.1, ge=0.0, lt=1.0)
    """Probability of a dropped activation in residual blocks, while training."""
    checkpointing: bool = Field(False, json_schema_extra={"result": False})
    """Compute the activations of residual blocks again in the backward pass instead of keeping them: less memory, a third more work."""

    @model_validator(mode="after")
    def _check_divisions(self) -> Self:
        if min(self.channel_mults) < 1:
            raise ValueError("channel_mults holds a multiplier below 1; every level needs channels")
        for mult in self.channel_mults:
            channels = self.base_channels * mult
            if self.head_channels is not None and channels % self.head_channels:
                raise ValueError(f"head_channels={self.head_channels} does not divide base_channels={self.base_channels} times {mult}; choose a divisor")
            if channels % self.num_groups or (self.head_channels is None and channels % self.num_heads):
                raise ValueError(
                    f"base_channels={self.base_channels} times {mult} is {channels}, which num_groups={self.num_groups} or "
                    f"num_heads={self.num_heads} does not divide; choose divisors of {channels}"
                )
        return self

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError, naming a size that would do, unless every level can halve the image (C, H, W)."""
        if len(shape) != 3:
            raise ValueError(f"model.kind=unet takes images, and a row has shape {shape}; use a source of images, or model.kind=point_mlp")
        factor, halvings = 2 ** (len(self.channel_mults) - 1), len(self.channel_mults) - 1
        _, height, width = shape
        if height % factor or width % factor:
            fitting = [max(factor, round(side / factor) * factor) for side in (height, width)]
            sizes = (height, fitting[0]) if height == width else (f"[{height},{width}]", f"[{fitting[0]},{fitting[1]}]")
            raise ValueError(
                f"data.image_size={sizes[0]} cannot be halved {halvings} times; use a multiple of {factor} such as {sizes[1]}, or fewer model.channel_mults"
            )

    def build(self, shape: tuple[int, ...], num_classes: int = 0, *, outputs: int = 1, conditions: int = 0) -> "nn.Module":
        from .network import UNet

        return UNet(self, shape=shape, num_classes=num_classes, outputs=outputs, conditions=conditions)

    def to_diffusers(self, network: "nn.Module", shape: tuple[int, ...]) -> DiffusersNetwork | str:
        from .diffusers import diffusers_config, to_diffusers
        from .network import UNet

        assert isinstance(network, UNet)
        if why_not := self._inexpressible(shape[1]):
            return why_not
        return DiffusersNetwork("UNet2DModel", diffusers_config(network, shape), to_diffusers(network))

    @classmethod
    def of_diffusers(cls, config: Mapping[str, Any], height: int) -> tuple[Self, int]:
        from .diffusers import settings_of

        classes = config.get("num_class_embeds")
        return cls.model_validate(settings_of(config, height)), int(classes) - 1 if classes else 0

    def from_diffusers(self, network: "nn.Module", weights: "dict[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
        from .diffusers import from_diffusers
        from .network import UNet

        assert isinstance(network, UNet)
        return from_diffusers(network, weights)

    def _inexpressible(self, height: int) -> str:
        """Returns why diffusers has no such network, nothing where it has one: there heads have one width, here a number."""
        levels = [level for level in range(len(self.channel_mults)) if height >> level in self.attention_resolutions]
        unlike = [level for level in levels if self.channel_mults[level] != self.channel_mults[-1]]
        if self.head_channels is not None or self.num_heads == 1 or not unlike:
            return ""
        return f"a UNet2DModel cannot have num_heads={self.num_heads} at levels of different width (channel_mults={list(self.channel_mults)})"

    def heads(self, channels: int) -> int:
        """Returns the attention heads of a level of so many channels."""
        return self.num_heads if self.head_channels is None else channels // self.head_channels

    @property
    def num_dropouts(self) -> int:
        """Layers that drop activations: one in every residual block."""
        levels = len(self.channel_mults)
        resampling = 2 * (levels - 1) if self.resample_blocks else 0
        return levels * self.num_res_blocks + 2 + levels * (self.num_res_blocks + 1) + resampling if self.dropout else 0
