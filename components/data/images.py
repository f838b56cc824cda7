"""From encoded bytes to pixels. `docs/pixels.md` is the definition in words.

`pixels` is always uint8: (C, H, W) for one image, (B, C, H, W) for a batch.
"""

import importlib
import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..errors import DataError
from ..spaces.pixels import PixelSpace
from .image_headers import declared_sizes, ends_early, identify, identify_unread, num_components, png_lacks_rows

if TYPE_CHECKING:
    from PIL.ImageCms import ImageCmsTransform

Box = tuple[float, float, float, float]
DRAFT_FACTOR = 3
"""A JPEG is decoded at 1/2, 1/4 or 1/8 where at least this many of its pixels stay for one of the result, along each side."""
READERS = {
    "JPEG": ("JpegImagePlugin", "JpegImageFile"),
    "PNG": ("PngImagePlugin", "PngImageFile"),
    "WEBP": ("WebPImagePlugin", "WebPImageFile"),
    "GIF": ("GifImagePlugin", "GifImageFile"),
    "BMP": ("BmpImagePlugin", "BmpImageFile"),
    "TIFF": ("TiffImagePlugin", "TiffImageFile"),
    "AVIF": ("AvifImagePlugin", "AvifImageFile"),
    "PPM": ("PpmImagePlugin", "PpmImageFile"),
    "JPEG2000": ("Jpeg2KImagePlugin", "Jpeg2KImageFile"),
}
MARKS_OF_THE_END = {"JPEG": b"\xff\xd9", "PNG": b"\0\0\0\0IEND\xaeB`\x82"}
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations of images that lie on their side."""
COLOUR_SPACES = {"RGB": "RGB ", "L": "GRAY", "CMYK": "CMYK"}
NOT_READ = re.compile(r"cannot handle|unknown pixel mode|unsupported|not yet supported|unable to determine", re.IGNORECASE)
ABOVE_A_LIMIT = re.compile("Decompressed data too large|Too much memory used in text chunks")


def prepare_process() -> None:
    """Sets, for this whole process, what `decode` would else see to image by image; meant for a process that does nothing but decode."""
    Image.MAX_IMAGE_PIXELS = None
    warnings.filterwarnings("ignore", module=r"PIL\b")
    setattr(importlib.import_module("PIL.AvifImagePlugin"), "DEFAULT_MAX_THREADS", 1)  # noqa: B010


def decode(source: bytes | np.ndarray, recipe: PixelSpace) -> np.ndarray:
    """Returns the pixels (C, height, width) of one image, as `docs/pixels.md` defines them.

    Args:
        source: an encoded file, or uint8 values (H, W), (H, W, 3) or (H, W, 4).
        recipe: what the result depends on besides.

    Raises:
        DataError: if the image cannot be used; its `reason` is one of those listed in `docs/pixels.md`.
        MemoryError: if this machine has too little memory for an image that is within the limits.
    """
    try:
        return _decode(source, recipe)
    except (Warning, Image.DecompressionBombError):  # Pillow's own limit, or its warnings as errors: this process was not prepared
        with _pillow_without_limit():
            return _decode(source, recipe)


@contextmanager
def _pillow_without_limit() -> Iterator[None]:
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _decode(source: bytes | np.ndarray, recipe: PixelSpace) -> np.ndarray:
    if isinstance(source, np.ndarray):
        return _to_pixels(_from_array(source, recipe), recipe)
    form = identify(source)
    if form is None:
        raise _not_identified(source)
    try:
        image = _open(source, form, recipe)
        pixels = _to_pixels(image, recipe)
        if form == "PNG":
            _check_rows(image, source)
        return pixels
    except (DataError, Warning, Image.DecompressionBombError, MemoryError):
        raise
    except Exception as error:
        raise _named(error, source, form) from error


def _from_array(values: np.ndarray, recipe: PixelSpace) -> Image.Image:
    if values.dtype != np.uint8 or values.ndim not in (2, 3) or values.shape[2:] not in ((), (3,), (4,)) or 0 in values.shape:
        raise DataError(f"values of shape {values.shape} and type {values.dtype} are no image; use uint8 (H, W), (H, W, 3) or (H, W, 4)", "unsupported")
    _check_size((values.shape[1], values.shape[0]), recipe)
    return Image.fromarray(values)


def _open(content: bytes, form: str, recipe: PixelSpace) -> Image.Image:
    for size in declared_sizes(content, form):
        _check_not_large(size, recipe)
    image = _reader(form)(io.BytesIO(content))
    _check_size(image.size, recipe)
    if _lacks_its_end(content, form):
        raise DataError(f"{form}: the file ends early", "truncated")
    if form == "JPEG2000" and num_components(content) > 4:
        raise DataError(f"{form}: {num_components(content)} components are not read; save as RGB", "unsupported")
    if form == "TIFF":
        _check_tiff(image, recipe)
    _check_depth(image)
    if form == "PNG" and "transparency" in image.info:
        _widen_key(image)
    return image


@lru_cache
def _reader(form: str) -> Callable[[io.BytesIO], Any]:
    # One class, named by the magic bytes: no other format is ever tried (Image.open would run Ghostscript on PostScript).
    module, name = READERS[form]
    return getattr(importlib.import_module(f"PIL.{module}"), name)


def _lacks_its_end(content: bytes, form: str) -> bool:
    """Tells whether a file that may well decode is cut off all the same."""
    if form in MARKS_OF_THE_END:
        return not content.endswith(MARKS_OF_THE_END[form]) and ends_early(content, form)
    return form == "GIF" and ends_early(content, form)


def _check_size(size: tuple[int, int], recipe: PixelSpace) -> None:
    _check_not_large(size, recipe)
    if min(size) < recipe.min_side:
        raise DataError(f"{size[0]}x{size[1]} pixels have a side below min_side={recipe.min_side}", "too_small")


def _check_not_large(size: tuple[int, int], recipe: PixelSpace, what: str = "") -> None:
    if size[0] * size[1] > recipe.max_pixels:
        raise DataError(f"{what}{size[0]}x{size[1]} pixels are more than max_pixels={recipe.max_pixels}", "too_large")


def _check_tiff(image: Any, recipe: PixelSpace) -> None:
    tags = image.tag_v2
    if 50706 in tags or (330 in tags and tags.get(254, 0) & 1):  # DNG; or a small preview of pixels that lie elsewhere, as cameras write
        raise DataError("camera raw is not read; convert to JPEG or PNG", "unsupported")
    _check_not_large((tags.get(322, 0), tags.get(323, 0)), recipe, "tiles of ")
    if 12 in tags.get(258, ()):
        raise DataError("12-bit samples are not read; save as 8 or 16 bit", "unsupported")


def _widen_key(image: Any) -> None:
    """Scales the transparent value of a PNG as Pillow scales its pixels, which it forgets."""
    key, raw = image.info["transparency"], image.tile[0][3]
    if raw in ("L;2", "L;4"):
        image.info["transparency"] = key * (85 if raw == "L;2" else 17)
    elif raw == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in key)


def _check_depth(image: Image.Image) -> None:
    if image.mode in ("F", "LAB", "HSV") or (image.mode == "I" and image.format not in ("PPM", "PNG")):
        raise DataError(f"{image.format}: pixels of mode {image.mode} have no defined range; save as 8 or 16 bit", "unsupported")


def _check_rows(image: Image.Image, content: bytes) -> None:
    last = image.crop((0, image.height - 1, image.width, image.height))
    if not any(last.tobytes()) and png_lacks_rows(content):  # Pillow leaves rows that are missing at zero
        raise DataError("PNG: rows are missing", "corrupt")


def _not_identified(content: bytes) -> DataError:
    if not content:
        return DataError("the file is empty", "not_an_image")
    name = identify_unread(content)
    if name:
        return DataError(f"{name} is not read; convert to JPEG or PNG", "unsupported")
    return DataError(f"starts with {content[:8].hex()}, as no known image format does", "not_an_image")


def _named(error: Exception, content: bytes, form: str) -> DataError:
    text = re.sub(r"0x[0-9a-fA-F]+", "0x", " ".join(str(error).split())) or type(error).__name__  # an object's address is another one each time
    detail = f"{form}: {text}"[:200]
    if ABOVE_A_LIMIT.search(text):
        return DataError(detail, "too_large")
    if ends_early(content, form):
        return DataError(f"{form}: the file ends early", "truncated")
    return DataError(detail, "unsupported" if NOT_READ.search(text) else "corrupt")


def _to_pixels(image: Image.Image, recipe: PixelSpace) -> np.ndarray:
    box, size = _cut(*image.size, _target(image, recipe), recipe.resize)
    scale = _draft(image, box, size)
    image.load()
    if scale == 1:  # some formats say only at their end how the image is to be turned
        box, size = _cut(*image.size, _target(image, recipe), recipe.resize)
    small = _resize(_to_colours(image, recipe), (box[0] / scale, box[1] / scale, box[2] / scale, box[3] / scale), size)
    profile = image.info.get("icc_profile")
    if profile:
        small = _to_srgb(small, profile)
    if small.mode != recipe.mode:
        small = small.convert(recipe.mode)
    if small.size != _target(image, recipe):
        small = _pad(small, _target(image, recipe), recipe)
    turn = TURNS.get(_orientation(image))
    return to_pixels_array(small if turn is None else small.transpose(turn))


def _target(image: Image.Image, recipe: PixelSpace) -> tuple[int, int]:
    """Returns width and height that the stored image is brought to, before it is turned."""
    if recipe.width != recipe.height and _orientation(image) in SIDEWAYS:
        return recipe.height, recipe.width
    return recipe.width, recipe.height


def _cut(width: int, height: int, target: tuple[int, int], resize: str) -> tuple[Box, tuple[int, int]]:
    """Returns which box of the stored image becomes an image of which size."""
    wide, tall = target
    if resize == "squash":
        return (0, 0, width, height), target
    is_wider = width * tall > height * wide  # than the target, by its proportions
    if resize == "crop":
        inside = (max(1, (2 * height * wide + tall) // (2 * tall)), height) if is_wider else (width, max(1, (2 * width * tall + wide) // (2 * wide)))
        left, top = (width - inside[0]) // 2, (height - inside[1]) // 2
        return (left, top, left + inside[0], top + inside[1]), target
    if is_wider:
        return (0, 0, width, height), (wide, max(1, (2 * height * wide + width) // (2 * width)))
    return (0, 0, width, height), (max(1, (2 * width * tall + height) // (2 * height)), tall)


def _draft(image: Image.Image, box: Box, size: tuple[int, int]) -> int:
    """Has a JPEG decoded at a fraction where enough pixels stay; returns the denominator."""
    if image.format != "JPEG":
        return 1
    room = min((box[2] - box[0]) / size[0], (box[3] - box[1]) / size[1]) / DRAFT_FACTOR
    scale = next((scale for scale in (8, 4, 2) if scale <= room), 1)
    if scale > 1:
        image.draft(None, (image.width // scale, image.height // scale))
    return scale


def _to_colours(image: Image.Image, recipe: PixelSpace) -> Image.Image:
    """Returns the image as L, RGB or CMYK, 8 bits a channel, without transparency; as RGBA where that is asked for and the image has any."""
    if image.mode.startswith("I"):
        return _scale_sixteen_bits(image, recipe)
    if image.has_transparency_data:
        plain = image.convert("LA") if image.mode == "La" else image
        return plain.convert("RGBA") if recipe.mode == "RGBA" else _composite(plain, recipe.background)
    if image.mode in ("L", "RGB", "CMYK"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _composite(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    colours = image if image.mode == "RGBA" else image.convert("RGBA")
    canvas = Image.new("RGB", image.size, background)
    canvas.paste(colours, (0, 0), colours)
    return canvas


def _scale_sixteen_bits(image: Image.Image, recipe: PixelSpace) -> Image.Image:
    values, table = np.asarray(image), _eight_bits()
    grey = np.empty(values.shape, np.uint8)
    rows = max(1, (1 << 20) // values.shape[1])  # in stripes, as numpy widens indices to 8 bytes a pixel
    for row in range(0, len(values), rows):
        grey[row : row + rows] = table[values[row : row + rows]]
    transparent = image.info.get("transparency")
    if transparent is None:
        return Image.fromarray(grey)
    colours, mask = Image.fromarray(grey).convert("RGB"), Image.fromarray(np.where(values == transparent, np.uint8(0), np.uint8(255)))
    if recipe.mode == "RGBA":
        colours.putalpha(mask)
        return colours
    canvas = Image.new("RGB", image.size, recipe.background)
    canvas.paste(colours, (0, 0), mask)
    return canvas


@lru_cache
def _eight_bits() -> np.ndarray:
    """Returns v / 257, rounded, for every 16-bit v."""
    return ((np.arange(1 << 16, dtype=np.uint32) * 255 + 32_895) >> 16).astype(np.uint8)


def _resize(image: Image.Image, box: Box, size: tuple[int, int]) -> Image.Image:
    left, top, right, bottom = box
    if (right - left, bottom - top) != size:
        return image.resize(size, Image.Resampling.BICUBIC, box=box)
    return image if size == image.size else image.crop((int(left), int(top), int(right), int(bottom)))


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    if image.mode == "RGBA":
        colours = _to_srgb(image.convert("RGB"), profile)
        colours.putalpha(image.getchannel("A"))
        return colours
    transform = _transform(profile, image.mode)
    return image if transform is None else transform.apply(image)


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> "ImageCmsTransform | None":
    """Returns the way from a profile to sRGB; None where it is sRGB, does not fit the image's channels, or cannot be read."""
    from PIL import ImageCms

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source) or source.profile.xcolor_space != COLOUR_SPACES[mode]:
            return None
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None


def _pad(image: Image.Image, target: tuple[int, int], recipe: PixelSpace) -> Image.Image:
    """Returns an image in the middle of the background, which is transparent in RGBA."""
    canvas = Image.new("RGBA", target, (*recipe.background, 0)) if recipe.mode == "RGBA" else Image.new("RGB", target, recipe.background).convert(recipe.mode)
    canvas.paste(image, ((target[0] - image.width) // 2, (target[1] - image.height) // 2))
    return canvas


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation, 1..8; 1 where there is none or it cannot be read, and for TIFF, which Pillow turns itself."""
    if image.format == "TIFF" or image.info.keys().isdisjoint(("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")):
        return 1
    try:
        return image.getexif().get(0x0112, 1)
    except Warning:
        raise
    except Exception:
        return 1


def to_pixels_array(image: Image.Image) -> np.ndarray:
    """Returns the image's pixels as a contiguous uint8 array (C, H, W)."""
    values = np.asarray(image, dtype=np.uint8)
    values = values[:, :, None] if values.ndim == 2 else values
    return np.ascontiguousarray(values.transpose(2, 0, 1))


def to_image(pixels: np.ndarray) -> Image.Image:
    """Returns pixels (C, H, W), C of 1, 3 or 4, as a picture: the inverse of `to_pixels_array`."""
    values = pixels.transpose(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(values[:, :, 0] if values.shape[2] == 1 else values))
