"""Settings of the perceptron; reading them loads no torch."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ..config import NetworkConfig

if TYPE_CHECKING:
    from torch import nn


class PointMLPConfig(NetworkConfig):
    """A residual multilayer perceptron that is told the time step."""

    kind: Literal["point_mlp"] = "point_mlp"
    """Which network: `unet` (DDPM) or `dit` (DiT) for images, `point_mlp` for points."""
    width: int = Field(128, ge=4, multiple_of=2)
    """Features of every hidden layer."""
    depth: int = Field(4, ge=1)
    """Residual blocks."""

    def check_shape(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 1:
            raise ValueError(f"model.kind=point_mlp takes points, and a row has shape {list(shape)}; use data.source=points:NAME, or model.kind=unet")

    def build(self, shape: tuple[int, ...], num_classes: int = 0, *, outputs: int = 1, conditions: int = 0) -> "nn.Module":
        from .network import PointMLP

        self.check_shape(shape)
        return PointMLP(dimensions=shape[0], width=self.width, depth=self.depth, num_classes=num_classes, outputs=outputs, conditions=conditions)
