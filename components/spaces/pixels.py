"""Images of bytes. `docs/pixels.md` defines in words what becomes of a file."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from ..errors import DataError
from .space import Limit, ScaledLimit, Space

if TYPE_CHECKING:
    import torch

Mode = Literal["RGB", "L", "RGBA"]
CHANNELS: dict[str, int] = {"L": 1, "RGB": 3, "RGBA": 4}
PIXELS_VERSION = "pixels v2"
SHORTEST, LONGEST = 4, 1024
BYTES_PER_PIXEL = 24
"""Memory that decoding takes at most, for each pixel of the file."""
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""ITU-R BT.601, as Pillow turns RGB to grey."""
Byte = Annotated[int, Field(ge=0, le=255)]


class PixelSettings(BaseModel):
    """What becomes of an image: all that its pixels depend on besides the file."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    image_size: int | tuple[int, int] = 32
    """Height and width of every image after cutting and resizing, pixels: one number for squares, else `[height, width]`."""
    mode: Mode = "RGB"
    """`RGB`, `L` (grey) or `RGBA` (with transparency as a channel of its own)."""
    resize: Literal["crop", "pad", "squash"] = "crop"
    """`crop` keeps the largest central part of the wanted shape, `pad` the whole image with `background` around it, `squash` the whole image but not its
    aspect."""
    background: tuple[Byte, Byte, Byte] = (255, 255, 255)
    """Colour behind transparent pixels and around padded images, red, green and blue, 0..255; for RGBA, where the numbers and pictures of samples need one."""
    min_side: int = Field(1, ge=1)
    """Images with a shorter side below this are quarantined as `too_small`, pixels."""
    max_pixels: int = Field(100_000_000, ge=1, le=10_000_000_000)
    """Images of more pixels, width times height, are quarantined as `too_large` before memory is taken for them."""

    normalisation: Literal["fixed", "per_channel"] = Field("fixed", exclude_if=lambda value: value == "fixed", json_schema_extra={"result": "unless default"})
    """What becomes of bytes before they are trained on: `fixed` scales 0..255 to -1..1 (DDPM), `per_channel` then takes the mean of every channel, over all
    images to train on, to 0 and its standard deviation to 1; samples are scaled back."""

    @field_validator("image_size", mode="before")
    @classmethod
    def _check_size(cls, value: Any) -> Any:
        sides = list(value) if isinstance(value, list | tuple) else [value]
        if len(sides) not in (1, 2) or any(isinstance(side, bool) or not isinstance(side, int) for side in sides):
            raise ValueError(f"{value!r} is no size; use one number such as 64 for squares, or [height, width] such as [64, 128]")
        if wrong := [side for side in sides if not SHORTEST <= side <= LONGEST]:
            raise ValueError(f"{wrong[0]} is out of range; use {SHORTEST} to {LONGEST} pixels a side")
        return sides[0] if len(set(sides)) == 1 else tuple(sides)

    @property
    def height(self) -> int:
        """Of every image, pixels."""
        return self.image_size if isinstance(self.image_size, int) else self.image_size[0]

    @property
    def width(self) -> int:
        """Of every image, pixels."""
        return self.image_size if isinstance(self.image_size, int) else self.image_size[1]

    @property
    def channels(self) -> int:
        """1 for grey, 3 for RGB, 4 for RGBA."""
        return CHANNELS[self.mode]


class PixelSpace(PixelSettings, Space):
    """Images (C, H, W) of bytes, x_0 in -1..1 (DDPM section 3.3)."""

    column: ClassVar[str] = "pixels"
    dtype: ClassVar[np.dtype] = np.dtype(np.uint8)
    noun: ClassVar[str] = "image"
    bin_width: ClassVar[float | None] = 2 / 255
    rows_in_a_picture: ClassVar[int] = 60
    can_mirror: ClassVar[bool] = True

    kind: Literal["pixels"] = "pixels"
    """Which space."""
    mean: tuple[float, ...] = Field((), exclude_if=lambda value: not value)
    """Of every channel of the rows to train on, scaled to -1..1; empty with `normalisation=fixed`."""
    deviation: tuple[float, ...] = Field((), exclude_if=lambda value: not value)
    """Standard deviation of every channel, likewise."""

    @classmethod
    def of(cls, settings: PixelSettings) -> "PixelSpace":
        """Returns the space that settings describe, whatever else they hold."""
        return cls.model_validate(settings.model_dump(include=set(PixelSettings.model_fields)))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.channels, self.height, self.width

    @property
    def decoding_bytes(self) -> int:
        return BYTES_PER_PIXEL * self.max_pixels

    @property
    def description(self) -> str:
        return f"{self.width}x{self.height} {'grey' if self.mode == 'L' else self.mode}"

    def definition(self) -> list[object]:
        return [PIXELS_VERSION, self.settings()]

    def settings(self) -> dict[str, object]:
        return self.model_dump(mode="json", exclude={"kind", "mean", "deviation"})

    @property
    def limit(self) -> Limit:
        return ScaledLimit(self.mean, self.deviation) if self.mean else 1.0

    def fitted(self, batches: Callable[[], Iterator[np.ndarray]]) -> Self:
        if self.normalisation == "fixed":
            return self
        count, first, second = 0, np.zeros(self.channels), np.zeros(self.channels)
        for rows in batches():
            scaled = rows.astype(np.float64) / 127.5 - 1.0
            count, first, second = count + scaled.size // self.channels, first + scaled.sum((0, 2, 3)), second + (scaled**2).sum((0, 2, 3))
        mean = first / count
        deviation = np.sqrt(np.maximum(second / count - mean**2, 0.0))
        if not deviation.all():
            raise DataError("data.normalisation=per_channel needs channels that vary, and one has a single value in all images; use data.normalisation=fixed")
        return self.model_copy(update={"mean": tuple(mean.tolist()), "deviation": tuple(deviation.tolist())})

    def prepare_process(self) -> None:
        from ..data.images import prepare_process

        prepare_process()

    def decode(self, source: bytes | np.ndarray) -> np.ndarray:
        from ..data.images import decode

        return decode(source, self)

    def to_x_0(self, rows: "torch.Tensor") -> "torch.Tensor":
        return scaled(to_model_range(rows), self.mean, self.deviation)

    def to_rows(self, x_0: "torch.Tensor") -> "torch.Tensor":
        return to_pixels(unscaled(x_0, self.mean, self.deviation))

    def mirrored(self, rows: np.ndarray) -> np.ndarray:
        return rows[:, :, :, ::-1]

    def for_features(self, rows: np.ndarray) -> np.ndarray:
        return composited(rows, self.background) if self.mode == "RGBA" else rows

    def tiles(self, rows: np.ndarray) -> np.ndarray:
        return self.for_features(rows)

    def measure(self, rows: np.ndarray) -> np.ndarray:
        """Returns mean and standard deviation of each image's grey values."""
        seen = self.for_features(rows)
        grey = seen[:, 0].astype(np.float32) if seen.shape[1] == 1 else np.einsum("c,bchw->bhw", LUMA, seen, dtype=np.float32)
        return np.stack([grey.mean((1, 2)) / 255, grey.std((1, 2)) / 255], axis=1)


def to_model_range(pixels: "torch.Tensor") -> "torch.Tensor":
    """Scales uint8 pixels 0..255 to float32 -1..1 (DDPM section 3.3)."""
    import torch

    return pixels.to(torch.float32) / 127.5 - 1.0


def to_pixels(x_0: "torch.Tensor") -> "torch.Tensor":
    """Clamps model-range values to -1..1, scales and rounds them to uint8 pixels: the inverse of `to_model_range`."""
    import torch

    return ((x_0.to(torch.float32).clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)


def scaled(x: "torch.Tensor", mean: Sequence[float], deviation: Sequence[float]) -> "torch.Tensor":
    """Returns (x - mean) / deviation of every channel of x (B, C, H, W); x itself where there is no mean."""
    import torch

    # Numbers, and no tensor of them: within a CUDA graph nothing may be copied from the host.
    return torch.stack([(x[:, c] - mean[c]) / deviation[c] for c in range(len(mean))], dim=1) if mean else x


def unscaled(x: "torch.Tensor", mean: Sequence[float], deviation: Sequence[float]) -> "torch.Tensor":
    """Returns the inverse of `scaled`."""
    import torch

    return torch.stack([x[:, c] * deviation[c] + mean[c] for c in range(len(mean))], dim=1) if mean else x


def composited(pixels: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    """Returns RGBA pixels (B, 4, H, W) over a colour, (B, 3, H, W), rounded as Pillow does."""
    alpha = pixels[:, 3:].astype(np.uint32)
    mixed = pixels[:, :3] * alpha + np.array(background, np.uint32)[None, :, None, None] * (255 - alpha) + 128
    return ((mixed + (mixed >> 8)) >> 8).astype(np.uint8)
