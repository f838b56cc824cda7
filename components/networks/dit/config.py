"""Settings of the Transformer; reading them loads no torch."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from ..config import DiffusersNetwork, NetworkConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

Size = Literal["S", "B", "L", "XL"]


class Measures(NamedTuple):
    """What a size stands for."""

    depth: int
    hidden_size: int
    num_heads: int


SIZES: dict[Size, Measures] = {"S": Measures(12, 384, 6), "B": Measures(12, 768, 12), "L": Measures(24, 1024, 16), "XL": Measures(28, 1152, 16)}
"""DiT table 1."""


class DiTConfig(NetworkConfig):
    """A Transformer over patches of an image, told time and class by adaLN-Zero (DiT)."""

    diffusers_class: ClassVar[str] = "DiTTransformer2DModel"

    kind: Literal["dit"] = "dit"
    """Which network: `unet` (DDPM) or `dit` (DiT) for images, `point_mlp` for points."""
    size: Size = "S"
    """Depth, width and heads together: `S`, `B`, `L` or `XL` (DiT table 1); 33, 130, 458 and 675 million parameters."""
    patch_size: int = Field(2, ge=1, le=64)
    """Height and width of a patch, pixels or latent pixels; half of it makes four times the tokens, and over four times the work."""
    depth: int | None = Field(None, ge=1)
    """Transformer blocks, in place of what `size` says."""
    hidden_size: int | None = Field(None, ge=4, multiple_of=4)
    """Features of a token, in place of what `size` says."""
    num_heads: int | None = Field(None, ge=1)
    """Attention heads, in place of what `size` says; divides `hidden_size`."""
    norm_eps: float = Field(1e-6, gt=0.0)
    """What is added to the variance in the norm before the perceptron of a block; 1e-5 in diffusers' defaults."""
    checkpointing: bool = Field(False, json_schema_extra={"result": False})
    """Compute the activations of blocks again in the backward pass instead of keeping them: less memory, a third more work."""

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        _, hidden_size, num_heads = self.measures
        if hidden_size % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide hidden_size={hidden_size}; choose a divisor")
        return self

    @property
    def measures(self) -> Measures:
        """Depth, width and heads."""
        depth, hidden_size, num_heads = SIZES[self.size]
        return Measures(self.depth or depth, self.hidden_size or hidden_size, self.num_heads or num_heads)

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError, naming what would do, unless the patch divides the image (C, H, W)."""
        if len(shape) != 3:
            raise ValueError(f"model.kind=dit takes images, and a row has shape {list(shape)}; use a source of images, or model.kind=point_mlp")
        _, height, width = shape
        if height % self.patch_size or width % self.patch_size:
            divisors = [str(side) for side in range(1, min(height, width) + 1) if height % side == width % side == 0]
            raise ValueError(f"model.patch_size={self.patch_size} does not divide height {height} and width {width}; use {', '.join(divisors)}")

    def build(self, shape: tuple[int, ...], num_classes: int = 0, *, outputs: int = 1, conditions: int = 0) -> "nn.Module":
        from .network import DiT

        return DiT(self, shape=shape, num_classes=num_classes, outputs=outputs, conditions=conditions)

    def to_diffusers(self, network: "nn.Module", shape: tuple[int, ...]) -> DiffusersNetwork | str:
        from .diffusers import diffusers_config, to_diffusers
        from .network import DiT

        assert isinstance(network, DiT)
        if shape[1] != shape[2]:
            return f"a DiTTransformer2DModel draws squares alone, and this one {shape[2]}x{shape[1]}"
        return DiffusersNetwork("DiTTransformer2DModel", diffusers_config(network, shape), to_diffusers(network))

    @classmethod
    def of_diffusers(cls, config: Mapping[str, Any], height: int) -> tuple[Self, int]:
        from .diffusers import settings_of

        return cls.model_validate(settings_of(config)), int(config["num_embeds_ada_norm"])

    def from_diffusers(self, network: "nn.Module", weights: "dict[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
        from .diffusers import from_diffusers
        from .network import DiT

        assert isinstance(network, DiT)
        return from_diffusers(network, weights)
