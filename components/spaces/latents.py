"""Latents of images: what an autoencoder makes of them, and what samples are before it decodes them (Latent Diffusion)."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, PrivateAttr

from ..errors import DataError
from .pixels import PixelSpace
from .space import Space

if TYPE_CHECKING:
    import torch

    from ..autoencoder.codec import Codec
    from ..storage import Location


class LatentSpace(Space):
    """Latents (C, h, w) of images; x_0 is a draw of the autoencoder's posterior, scaled to variance 1 (Latent Diffusion appendix G).

    A row holds mean and standard deviation of the posterior, (2C, h, w); with `mirrors` also those of the mirrored image, (4C, h, w).
    """

    column: ClassVar[str] = "latents"
    dtype: ClassVar[np.dtype] = np.dtype(np.float16)
    noun: ClassVar[str] = "image"
    rows_in_a_picture: ClassVar[int] = PixelSpace.rows_in_a_picture
    is_drawn: ClassVar[bool] = True

    kind: Literal["latents"] = "latents"
    """Which space."""
    pixels: PixelSpace
    """The images that are encoded, and that samples are decoded to."""
    autoencoder: str
    """Digest of the autoencoder's settings and weights."""
    latent: tuple[int, int, int]
    """(C, h, w)."""
    mirrors: bool = False
    """Whether rows hold the mirrored image's posterior, too."""
    scale: float = Field(1.0, gt=0.0)
    """What latents are multiplied with to be x_0: one over their standard deviation over the rows to train on."""

    _codec: "Codec | None" = PrivateAttr(None)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.latent

    @property
    def row_shape(self) -> tuple[int, ...]:
        channels, height, width = self.latent
        return (4 if self.mirrors else 2) * channels, height, width

    @property
    def seen(self) -> Space:
        return self.pixels

    @property
    def description(self) -> str:
        channels, height, width = self.latent
        return f"{width}x{height}x{channels} latents of {self.pixels.description}"

    def definition(self) -> list[object]:
        return ["latents v1", self.settings()]

    def settings(self) -> dict[str, object]:
        return self.model_dump(mode="json", exclude={"kind", "scale"})

    def fitted(self, batches: Callable[[], Iterator[np.ndarray]]) -> Self:
        """Returns the space with the scale that takes draws of the posteriors to variance 1."""
        count, first, second = 0, 0.0, 0.0
        for rows in batches():
            for mean, deviation in self._posteriors(rows):
                count, first = count + mean.size, first + float(mean.sum())
                second += float((mean**2).sum() + (deviation**2).sum())
        variance = second / count - (first / count) ** 2
        if not np.isfinite(variance) or variance <= 0:
            raise DataError(f"latents of the images have variance {variance}; use an autoencoder whose latents are finite and vary")
        return self.model_copy(update={"scale": float(1 / np.sqrt(variance))})

    def _posteriors(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields mean and standard deviation, float64, of rows, and of their mirror images where they hold them."""
        parts = np.split(rows.astype(np.float64), 4 if self.mirrors else 2, axis=1)
        yield from zip(parts[::2], parts[1::2], strict=True)

    def mirrored(self, rows: np.ndarray) -> np.ndarray:
        if not self.mirrors:
            raise ValueError("rows hold no mirrored images; encode them with train.flip=true")
        return np.roll(rows, rows.shape[1] // 2, axis=1)

    def drawn(self, rows: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        channels = self.latent[0]
        mean, deviation = (rows[:, first : first + channels].astype(np.float32) for first in (0, channels))
        return mean + deviation * draw.standard_normal(mean.shape, dtype=np.float32)

    def to_x_0(self, rows: "torch.Tensor") -> "torch.Tensor":
        """Returns x_0 of what was drawn, or of the means of rows."""
        return rows[:, : self.latent[0]].float() * self.scale

    def opened(self, near: "Location", device: "torch.device | str" = "cpu") -> Self:
        from ..autoencoder.codec import load_codec
        from ..autoencoder.store import find_autoencoder

        space = self.model_copy()
        space._codec = load_codec(find_autoencoder(self.autoencoder, near), device)
        return space

    def to_rows(self, x_0: "torch.Tensor") -> "torch.Tensor":
        """Returns the images (B, C, H, W), uint8, that latents are decoded to."""
        assert self._codec is not None, "the space is not opened"
        return self.pixels.to_rows(self._codec.decode(x_0.float() / self.scale))

    def for_features(self, rows: np.ndarray) -> np.ndarray:
        return self.pixels.for_features(rows)

    def tiles(self, rows: np.ndarray) -> np.ndarray:
        return self.pixels.tiles(rows)

    def measure(self, rows: np.ndarray) -> np.ndarray:
        return self.pixels.measure(rows)
