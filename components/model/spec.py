"""What a denoiser is, apart from its weights; reading it loads no torch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..diffusion.config import DiffusionConfig
from ..errors import DataError
from ..networks.kinds import AnyNetworkConfig
from ..storage import Location
from .manifest import manifest_of

if TYPE_CHECKING:
    import torch
    from torch import nn


class DenoiserSpec(BaseModel):
    """All that decides what a denoiser computes, apart from its weights."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model: AnyNetworkConfig
    diffusion: DiffusionConfig
    image_size: int = Field(ge=1)
    """Height and width, pixels."""
    channels: Literal[1, 3]
    """1 for grey, 3 for RGB."""
    label_names: tuple[str, ...] = ()
    """The classes that the network is told, in the order of their numbers; empty where it is told none."""

    @model_validator(mode="after")
    def _check_classes(self) -> Self:
        if self.model.conditional != bool(self.label_names):
            right = "name the dataset's labels" if self.model.conditional else "name none"
            raise ValueError(f"label_names={self.label_names} does not fit model.conditional={self.model.conditional}; {right}")
        return self

    def build(self) -> "nn.Module":
        """Returns the network with fresh weights."""
        return self.model.build(self.shape, len(self.label_names))

    @property
    def null_label(self) -> int | None:
        """The label that tells no class, one past the classes; None for a network that is told none."""
        return len(self.label_names) or None

    def labels_by_turns(self, seeds: Sequence[int]) -> "torch.Tensor | None":
        """Returns a class for each seed, (len(seeds),) int64: all by turns; None for a network that is told none."""
        import torch

        return torch.tensor([seed % len(self.label_names) for seed in seeds]) if self.label_names else None

    def label_number(self, label: str) -> int:
        """Returns the number of a class that is given by its name, or by its number where no class has that name.

        Raises:
            ValueError: if there is no such class.
        """
        names = self.label_names
        if not names:
            raise ValueError(f"label={label} means nothing to a model that is told no classes; leave it out, or train with model.conditional=true")
        if label in names:
            return names.index(label)
        if label.isdecimal() and int(label) < len(names):
            return int(label)
        some = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        raise ValueError(f"label={label} is unknown; use a class's name ({some}) or a number from 0 to {len(names) - 1}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return (self.channels, self.image_size, self.image_size)


def read_spec(path: Location) -> DenoiserSpec:
    """Returns what the denoiser of a checkpoint is.

    Raises:
        DataError: if the folder is no whole checkpoint.
    """
    manifest_of(path)
    try:
        return DenoiserSpec.model_validate_json((path / "denoiser.json").read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path / 'denoiser.json'} cannot be read ({error}); restore it or use another checkpoint") from error
