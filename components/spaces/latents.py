"""Latents of images: what an autoencoder makes of them, and what samples are before it decodes them (Latent Diffusion)."""

import hashlib
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

    A row holds mean and standard deviation of the posterior, (2C, h, w), behind them those of `copies` shifted images, and with `mirrors` all of these once
    more of mirrored images: `versions` pairs.
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
    copies: int = Field(0, ge=0)
    """Shifted images that rows hold the posteriors of beside the image's own."""
    jitter: int = Field(0, ge=0)
    """Whole pixels by which these are shifted at most, each way."""
    scale: float = Field(1.0, gt=0.0)
    """What latents are multiplied with to be x_0: one over their standard deviation over the rows to train on."""

    _codec: "Codec | None" = PrivateAttr(None)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.latent

    @property
    def row_shape(self) -> tuple[int, ...]:
        channels, height, width = self.latent
        return 2 * self.versions * channels, height, width

    @property
    def versions(self) -> int:
        """Images whose posteriors a row holds."""
        return (1 + self.copies) * (2 if self.mirrors else 1)

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
        return self.model_dump(mode="json", exclude={"kind", "scale", *(() if self.copies else ("copies", "jitter"))})

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
        """Yields mean and standard deviation, float64, of rows, and of the shifted and mirrored images that they hold."""
        parts = np.split(rows.astype(np.float64), 2 * self.versions, axis=1)
        yield from zip(parts[::2], parts[1::2], strict=True)

    def mirrored(self, rows: np.ndarray) -> np.ndarray:
        if not self.mirrors:
            raise ValueError("rows hold no mirrored images; encode them with train.flip=true")
        return np.roll(rows, rows.shape[1] // 2, axis=1)

    def encoded(self, images: np.ndarray, encode: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Returns rows (N, *row_shape) of images.

        Args:
            images: (N, *pixels.row_shape).
            encode: images to mean and standard deviation, (N, 2C, h, w).
        """
        versions = [images, *(_shifted(images, number, self.jitter) for number in range(self.copies))]
        if self.mirrors:
            versions += [self.pixels.mirrored(version) for version in versions]
        return np.concatenate([encode(version) for version in versions], axis=1)

    def drawn(self, rows: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        channels, (height, width) = self.latent[0], self.latent[1:]
        # A mirrored row has its own half in front, so the versions to choose from are always the first.
        pairs = rows.reshape(len(rows), self.versions, 2, channels, height, width)
        chosen = draw.integers(1 + self.copies, size=len(rows)) if self.copies else 0
        mean, deviation = pairs[np.arange(len(rows)), chosen].astype(np.float32).swapaxes(0, 1)
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


def _shifted(images: np.ndarray, number: int, most: int) -> np.ndarray:
    """Returns images shifted by whole pixels, reflections where nothing was; how far depends on an image's own pixels and the number alone."""
    height, width = images.shape[2:]
    around = np.pad(images, ((0, 0), (0, 0), (most, most), (most, most)), mode="symmetric")
    found = np.empty_like(images)
    for index, image in enumerate(images):
        key = hashlib.sha256(number.to_bytes(4, "little") + image.tobytes()).digest()[:8]
        down, right = np.random.default_rng(int.from_bytes(key, "little")).integers(0, 2 * most, 2, endpoint=True)
        found[index] = around[index, :, down : down + height, right : right + width]
    return found
