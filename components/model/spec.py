"""What a denoiser is, apart from its weights; reading it loads no torch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..diffusion.config import DiffusionConfig
from ..errors import DataError
from ..networks.kinds import AnyNetworkConfig
from ..spaces.kinds import AnySpace
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
    space: AnySpace
    """What rows are."""
    label_names: tuple[str, ...] = ()
    """The classes that the network is told, in the order of their numbers; empty where it is told none."""

    num_conditions: int = Field(0, exclude_if=lambda number: number == 0)
    """Numbers that the network is told of what augmentation did to a row; 0 where it is told nothing of it."""

    @model_validator(mode="before")
    @classmethod
    def _read_older(cls, values: object) -> object:
        """Takes what was written when all rows were square images."""
        if not isinstance(values, dict) or "image_size" not in values:
            return values
        kept = {name: value for name, value in values.items() if name not in ("image_size", "channels")}
        return kept | {"space": {"kind": "pixels", "image_size": values["image_size"], "mode": "L" if values.get("channels") == 1 else "RGB"}}

    @model_validator(mode="after")
    def _check_classes(self) -> Self:
        if self.model.conditional != bool(self.label_names):
            right = "name the dataset's labels" if self.model.conditional else "name none"
            raise ValueError(f"label_names={self.label_names} does not fit model.conditional={self.model.conditional}; {right}")
        return self

    def build(self) -> "nn.Module":
        """Returns the network with fresh weights."""
        more = {"outputs": 2} if self.diffusion.learned_variance else {}
        return self.model.build(self.shape, len(self.label_names), **more, **({"conditions": self.num_conditions} if self.num_conditions else {}))

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
            raise ValueError(f"label={label} has no effect on a model without classes; leave it out, or train with model.conditional=true")
        if label in names:
            return names.index(label)
        if label.isdecimal() and int(label) < len(names):
            return int(label)
        some = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        raise ValueError(f"label={label} is unknown; use a class's name ({some}) or a number from 0 to {len(names) - 1}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of x_t, without the batch: (C, H, W) of images."""
        return self.space.shape


def is_autoencoder(path: Location) -> bool:
    """Tells whether a checkpoint holds an autoencoder. Raises DataError like `read_spec`."""
    return read_spec(path).diffusion.process == "reconstruction"


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
