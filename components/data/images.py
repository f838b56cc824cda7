"""From encoded bytes to pixels, and from pixels to the range the model sees and back.

`pixels` is always uint8: (C, H, W) for one image, (B, C, H, W) for a batch.
"""

import io
import warnings
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import DataError

Mode = Literal["RGB", "L"]
CHANNELS: dict[str, int] = {"RGB": 3, "L": 1}
BACKGROUND = (255, 255, 255)


def decode(source: bytes | np.ndarray, mode: Mode) -> Image.Image:
    """Decodes one image, turned as its EXIF orientation says, composited on white where it is transparent.

    Args:
        source: an encoded file, or uint8 values (H, W) or (H, W, 3).
        mode: `RGB` or `L` (grey).

    Raises:
        DataError: if the bytes are not a whole image of a known format.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", category=UserWarning)
            image = Image.fromarray(source) if isinstance(source, np.ndarray) else Image.open(io.BytesIO(source))
            image.load()
            return _to_mode(ImageOps.exif_transpose(image), mode)
    except Exception as error:
        raise DataError(f"{type(error).__name__}: {error}"[:200], _reason(error)) from error


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not_an_image"
    if isinstance(error, Image.DecompressionBombWarning | Image.DecompressionBombError):
        return "too_large"
    return "truncated" if "truncated" in str(error).lower() or "EOF" in str(error) else "corrupt"


def _to_mode(image: Image.Image, mode: Mode) -> Image.Image:
    if image.mode[0] in "IF":
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65_535:
            raise ValueError(f"pixels of mode {image.mode} have no defined range; save as 8 or 16 bit")
        image = Image.fromarray((values / 257.0).round().astype(np.uint8))
    if image.has_transparency_data:
        foreground = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*BACKGROUND, 255)), foreground)
    return image.convert(mode)


def to_square(image: Image.Image, size: int) -> Image.Image:
    """Cuts the largest centred square and resizes it to (size, size), bicubic, antialiased when it shrinks."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square if side == size else square.resize((size, size), Image.Resampling.BICUBIC)


def to_pixels_array(image: Image.Image) -> np.ndarray:
    """Returns the image's pixels as a contiguous uint8 array (C, H, W)."""
    values = np.asarray(image, dtype=np.uint8)
    values = values[:, :, None] if values.ndim == 2 else values
    return np.ascontiguousarray(values.transpose(2, 0, 1))


def to_image(pixels: np.ndarray) -> Image.Image:
    """Returns pixels (C, H, W), C of 1 or 3, as a picture: the inverse of `to_pixels_array`."""
    values = pixels.transpose(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(values[:, :, 0] if values.shape[2] == 1 else values))


def to_model_range(pixels: torch.Tensor) -> torch.Tensor:
    """Scales uint8 pixels 0..255 to float32 -1..1 (DDPM section 3.3)."""
    return pixels.to(torch.float32) / 127.5 - 1.0


def to_pixels(x_0: torch.Tensor) -> torch.Tensor:
    """Clamps model-range values to -1..1, scales and rounds them to uint8 pixels: the inverse of `to_model_range`."""
    return ((x_0.to(torch.float32).clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)
