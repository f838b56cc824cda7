"""Points in the plane: the smallest data that a diffusion model can learn."""

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from ..errors import DataError
from .space import Space

if TYPE_CHECKING:
    import torch

SHOWN = 2.4
"""Standard deviations from the mean to the edges of a picture."""


class PointSpace(Space):
    """Points (2,), x and y, in their own coordinates; x_0 has mean 0 and, over both coordinates, variance 1."""

    column: ClassVar[str] = "points"
    dtype: ClassVar[np.dtype] = np.dtype(np.float32)
    noun: ClassVar[str] = "point"
    rows_in_a_picture: ClassVar[int] = 2000
    one_tile_per_row: ClassVar[bool] = False

    kind: Literal["points"] = "points"
    """Which space."""
    mean: tuple[float, float] = (0.0, 0.0)
    """Of the rows to train on."""
    scale: float = Field(1.0, gt=0.0)
    """Square root of their mean variance, one number for both coordinates, so that shapes keep their proportions."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (2,)

    @property
    def description(self) -> str:
        return "2 coordinates"

    def settings(self) -> dict[str, object]:
        return {}

    def definition(self) -> list[object]:
        return ["points v1"]

    def decode(self, source: bytes | np.ndarray) -> np.ndarray:
        if isinstance(source, bytes) or source.shape != self.shape or not np.issubdtype(source.dtype, np.floating):
            raise DataError("this is no point of two numbers", "not_a_point")
        with np.errstate(over="ignore"):
            point = source.astype(np.float32)
        if not np.isfinite(point).all():
            raise DataError("a coordinate is not finite", "not_a_point")
        return point

    def fitted(self, batches: Callable[[], Iterator[np.ndarray]]) -> Self:
        count, mean = 0, np.zeros(2)
        for rows in batches():
            count, mean = count + len(rows), mean + rows.astype(np.float64).sum(axis=0)
        mean /= count
        variance = sum(float(((rows - mean) ** 2).sum()) for rows in batches()) / (2 * count)
        if not variance:
            raise DataError("all points to train on are one and the same; name a source whose points differ")
        return self.model_copy(update={"mean": (float(mean[0]), float(mean[1])), "scale": math.sqrt(variance)})

    def to_x_0(self, rows: "torch.Tensor") -> "torch.Tensor":
        import torch

        # Numbers, and no tensor of them: within a CUDA graph nothing may be copied from the host.
        return torch.stack([(rows[..., axis] - self.mean[axis]) / self.scale for axis in (0, 1)], dim=-1)

    def to_rows(self, x_0: "torch.Tensor") -> "torch.Tensor":
        import torch

        return torch.stack([x_0[..., axis] * self.scale + self.mean[axis] for axis in (0, 1)], dim=-1)

    def tiles(self, rows: np.ndarray) -> np.ndarray:
        from .scatter import scatter_tile

        return scatter_tile(rows, self.limits())[None]

    def limits(self) -> tuple[float, float, float, float]:
        """Returns what of the plane pictures show: left, right, bottom, top."""
        (x, y), reach = self.mean, SHOWN * self.scale
        return x - reach, x + reach, y - reach, y + reach

    def measure(self, rows: np.ndarray) -> np.ndarray:
        """Returns both coordinates, squeezed into 0..1 about their mean."""
        return 1 / (1 + np.exp(-1.7 * (rows.astype(np.float64) - np.array(self.mean)) / self.scale))
