"""What every space says: what a row is, how it becomes x_0, and how x_0 becomes what a person looks at. Reading it loads no torch."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Self

import numpy as np
from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import torch

    from ..storage import Location


class ScaledLimit(NamedTuple):
    """Bounds of x_0 whose channels were scaled: deviation * x_0 + mean is within -1..1, channel by channel."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]


Limit = float | ScaledLimit | None


class Space(BaseModel):
    """One kind of data, with its settings. Rows are what shards hold, one array for each; x_0 is what the diffusion process works on."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    column: ClassVar[str]
    """Column of a shard that holds the rows."""
    dtype: ClassVar[np.dtype]
    """Of the values of a row."""
    noun: ClassVar[str]
    """What one row is called in messages."""
    bin_width: ClassVar[float | None] = None
    """Distance of two values that x_0 can have; None where it has any value, so that a likelihood is a density."""
    rows_in_a_picture: ClassVar[int]
    """Rows that one picture of samples shows."""
    one_tile_per_row: ClassVar[bool] = True
    """Whether each row is a picture by itself."""
    can_mirror: ClassVar[bool] = False
    """Whether a row mirrored left to right is as good an example, and one that is turned, shifted or enlarged an image, too."""
    is_drawn: ClassVar[bool] = False
    """Whether a row is a distribution, of which `drawn` makes what is trained on."""

    kind: str
    """Which space."""

    @property
    def limit(self) -> Limit:
        """Largest absolute value of x_0; None where there is none, so that samplers clip nothing."""
        return None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of x_0."""
        raise NotImplementedError

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of a row in a shard."""
        return self.shape

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in a shard."""
        return int(np.prod(self.row_shape)) * self.dtype.itemsize

    @property
    def seen(self) -> "Space":
        """The space of what a person sees, which samples are measured in: the space itself, or what its rows are decoded to."""
        return self

    @property
    def decoding_bytes(self) -> int:
        """Memory that decoding one row may take."""
        return 0

    @property
    def description(self) -> str:
        """The space in a word or two, such as `32x32 RGB`."""
        raise NotImplementedError

    def definition(self) -> list[object]:
        """Returns all that rows depend on besides their files, for digests."""
        raise NotImplementedError

    def settings(self) -> dict[str, object]:
        """Returns what was chosen for it, as JSON has it; what was measured is no part of that."""
        return self.model_dump(mode="json", exclude={"kind"})

    def prepare_process(self) -> None:
        """Sets what holds for a process that does nothing but decode."""

    def decode(self, source: bytes | np.ndarray) -> np.ndarray:
        """Returns the row that a file, or an array of a source, becomes.

        Raises:
            DataError: if it becomes none; its `reason` is what the quarantine says.
        """
        raise NotImplementedError

    def fitted(self, batches: Callable[[], Iterator[np.ndarray]]) -> Self:
        """Returns the space with what is measured over all rows to train on; most measure nothing.

        Args:
            batches: gives the rows, part by part.
        """
        return self

    def opened(self, near: "Location", device: "torch.device | str" = "cpu") -> Self:
        """Returns the space ready to decode; most need nothing for that.

        Args:
            near: a checkpoint or a dataset, from which what decodes is found.
            device: where it works.

        Raises:
            DataError: if it is not there, or not what it was.
        """
        return self

    def drawn(self, rows: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        """Returns what is trained on (B, *shape) of rows that are distributions."""
        raise NotImplementedError

    def to_x_0(self, rows: "torch.Tensor") -> "torch.Tensor":
        """Returns x_0 (B, *shape), float32, of rows (B, *row_shape), or of what `drawn` made of them."""
        raise NotImplementedError

    def to_rows(self, x_0: "torch.Tensor") -> "torch.Tensor":
        """Returns rows of the space that is `seen`: the inverse of `to_x_0`, as far as rows can hold it."""
        raise NotImplementedError

    def mirrored(self, rows: np.ndarray) -> np.ndarray:
        """Returns rows (B, *shape) mirrored left to right."""
        raise NotImplementedError

    def for_features(self, rows: np.ndarray) -> np.ndarray:
        """Returns what extractors of features take of rows (B, *shape)."""
        return rows

    def tiles(self, rows: np.ndarray) -> np.ndarray:
        """Returns pictures (N, C, H, W) uint8, C of 1 or 3, of rows (B, *shape): one for each row, or one of all of them."""
        raise NotImplementedError

    def measure(self, rows: np.ndarray) -> np.ndarray:
        """Returns two numbers (B, 2) from 0 to 1 of each row, by which new data are compared with old."""
        raise NotImplementedError
