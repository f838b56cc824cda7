"""What the pipeline needs of a network, said once; reading it loads no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class DiffusersNetwork:
    """A network as diffusers has it.

    Attributes:
        class_name: such as `UNet2DModel`.
        config: its keyword arguments.
        weights: under diffusers' names.
    """

    class_name: str
    config: Mapping[str, object]
    weights: "Mapping[str, torch.Tensor]"


class NetworkConfig(BaseModel):
    """The settings of one kind of network. A module or folder of this package whose `Config` is such a class is a kind; nothing else lists it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    diffusers_class: ClassVar[str] = ""
    """What diffusers calls such a network; empty where it has none."""

    kind: str
    """Which network: `unet` (DDPM) or `dit` (DiT) for images, `point_mlp` for points."""
    conditional: bool = False
    """Tell the network each row's label, so that samples of a wanted class can be drawn; the dataset needs labels."""

    @property
    def num_dropouts(self) -> int:
        """Layers that drop activations, each with masks of its own."""
        return 0

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError, naming what would do, unless the network takes x_t of a shape (without the batch)."""

    def build(self, shape: tuple[int, ...], num_classes: int = 0, *, outputs: int = 1, conditions: int = 0) -> "nn.Module":
        """Returns the network with fresh weights: a `Network`.

        Args:
            shape: of x_t, without the batch.
            num_classes: K, the classes that it is told; 0 for a network that is told none.
            outputs: how many times the channels of x_t it returns: 2 where it says variances, too.
            conditions: A, numbers that it is told of what augmentation did to a row; all 0 says nothing.

        Raises:
            ValueError: like `check_shape`.
        """
        raise NotImplementedError

    def to_diffusers(self, network: "nn.Module", shape: tuple[int, ...]) -> DiffusersNetwork | str:
        """Returns a network that `build` made as diffusers has it, or a clause that says why diffusers has none such."""
        return f"diffusers has no network of kind {self.kind}"

    @classmethod
    def of_diffusers(cls, config: "Mapping[str, Any]", height: int) -> tuple[Self, int]:
        """Returns the settings that are those of a network of `diffusers_class`, and how many classes it is told.

        Args:
            config: the network's keyword arguments there.
            height: of x_t.

        Raises:
            ValueError: naming the first setting that has no counterpart.
            KeyError: if one is missing.
        """
        raise NotImplementedError

    def from_diffusers(self, network: "nn.Module", weights: "dict[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
        """Returns a state dict for a network that `build` made, from the weights of its twin in diffusers.

        Raises:
            KeyError: if a tensor is missing.
            ValueError: if one has no place here.
        """
        raise NotImplementedError


class Network(Protocol):
    """What every network is, beside an `nn.Module`."""

    def __call__(
        self,
        x_t: "torch.Tensor",
        t: "torch.Tensor",
        labels: "torch.Tensor | None" = None,
        keys: "torch.Tensor | None" = None,
        conditions: "torch.Tensor | None" = None,
    ) -> "torch.Tensor":
        """Returns an estimate of x_t's shape, or one of twice its channels where it says variances, too.

        Args:
            x_t: (B, *shape).
            t: (B,), int64 0..T-1 of DDPM, real numbers of other processes.
            labels: (B,) int64, 0..K, where K says that the class is not told, as None does for all rows.
            keys: (B, num_dropouts, 2) int32, which decide what is dropped while training: a row's masks depend on its own keys only.
            conditions: (B, A) float32, what augmentation did to each row; None says nothing.
        """
        ...
