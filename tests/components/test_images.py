import io
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import encode, grey_png, interlaced_png, picture, png, tiff, turned
from PIL import Image, ImageCms, ImageOps
from pydantic import ValidationError

from components.data.images import decode, to_image, to_pixels_array
from components.errors import DataError
from components.spaces.pixels import PixelSpace, to_model_range, to_pixels

BICUBIC = Image.Resampling.BICUBIC


def chw(image: Image.Image) -> np.ndarray:
    return to_pixels_array(image)


def difference(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(np.rint(one).astype(int) - np.rint(other).astype(int)).max())


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(1e-9, np.mean((one.astype(float) - other) ** 2))))


def bicubic_weights(length: int, first: float, last: float, size: int) -> np.ndarray:
    """Returns the matrix (size, length) of the antialiased bicubic filter, a = -0.5, written from its formula."""
    scale = (last - first) / size
    window = max(1.0, scale)
    centres = first + (np.arange(size) + 0.5) * scale
    x = np.abs((np.arange(length)[None, :] + 0.5 - centres[:, None]) / window)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return weights / weights.sum(axis=1, keepdims=True)


def resized(values: np.ndarray, box: tuple[float, float, float, float], width: int, height: int) -> np.ndarray:
    """Returns values (H, W, C) resized in float64, as (C, height, width)."""
    rows = bicubic_weights(values.shape[0], box[1], box[3], height)
    columns = bicubic_weights(values.shape[1], box[0], box[2], width)
    return np.einsum("yh,hwc,xw->cyx", rows, values.astype(float), columns).clip(0, 255)


def test_all_256_grey_values_survive_the_round_trip_to_model_range():
    pixels = torch.arange(256, dtype=torch.uint8)
    x_0 = to_model_range(pixels)
    assert x_0.min() == -1
    assert x_0.max() == 1
    assert torch.equal(to_pixels(x_0), pixels)


def test_values_outside_the_model_range_are_clamped():
    assert to_pixels(torch.tensor([-3.0, 1.7])).tolist() == [0, 255]


def test_pixels_survive_the_round_trip_to_a_picture():
    for channels in (1, 3):
        pixels = np.random.default_rng(0).integers(0, 256, (channels, 5, 7), dtype=np.uint8)
        assert np.array_equal(to_pixels_array(to_image(pixels)), pixels)


def test_images_are_decoded_without_torch():
    code = "import sys; from components.data.images import PixelSpace, decode; decode(b'P5 4 4 9 ' + bytes(16), PixelSpace()); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_recipe_has_limits_and_no_unknown_keys():
    for wrong in ({"image_size": 3}, {"background": (0, 0, 256)}, {"min_side": 0}, {"resize": "stretch"}, {"size": 8}):
        with pytest.raises(ValidationError):
            PixelSpace.model_validate(wrong)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "GIF"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_lossless_formats_give_back_their_pixels(form: str, mode: str):
    image = picture(1, 16, 16)
    image = image.convert("L") if mode == "L" else image
    image = image.quantize(64) if form == "GIF" and mode == "RGB" else image
    options = {"lossless": True} if form == "WEBP" else {}
    expected = image.convert("RGB")
    assert np.array_equal(decode(encode(image, form, **options), PixelSpace(image_size=16)), chw(expected))
    assert np.array_equal(decode(encode(image, form, **options), PixelSpace(image_size=16, mode="L")), chw(expected.convert("L")))


@pytest.mark.parametrize("form", ["JPEG", "WEBP", "AVIF", "MPO"])
def test_lossy_formats_give_what_pillow_reads(form: str):
    content = encode(picture(2, 32, 32), form, quality=90)
    assert np.array_equal(decode(content, PixelSpace()), chw(Image.open(io.BytesIO(content)).convert("RGB")))


@pytest.mark.parametrize(("width", "height"), [(97, 60), (60, 97), (33, 32), (20, 9), (64, 64)])
def test_a_crop_is_the_largest_central_square(width: int, height: int):
    image, side = picture(3, width, height), min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    box = (left, top, left + side, top + side)
    pixels = decode(encode(image, "PNG"), PixelSpace())
    assert np.array_equal(pixels, chw(image.resize((32, 32), BICUBIC, box=box)))
    assert difference(pixels, resized(np.asarray(image), box, 32, 32)) <= 1


@pytest.mark.parametrize(
    ("width", "height", "inner"), [(97, 60, (32, 20)), (60, 97, (20, 32)), (10, 300, (1, 32)), (300, 2, (32, 1)), (16, 5, (32, 10)), (9, 9, (32, 32))]
)
def test_a_padded_image_is_whole_and_central_on_the_background(width: int, height: int, inner: tuple[int, int]):
    image, background = picture(4, width, height), (10, 200, 90)
    pixels = decode(encode(image, "PNG"), PixelSpace(resize="pad", background=background))
    left, top = (32 - inner[0]) // 2, (32 - inner[1]) // 2
    middle = pixels[:, top : top + inner[1], left : left + inner[0]].copy()
    assert difference(middle, resized(np.asarray(image), (0, 0, width, height), *inner)) <= 1
    pixels[:, top : top + inner[1], left : left + inner[0]] = np.asarray(background)[:, None, None]
    assert np.array_equal(pixels, np.broadcast_to(np.asarray(background)[:, None, None], (3, 32, 32)))


@pytest.mark.parametrize(("width", "height"), [(97, 60), (12, 50)])
def test_a_squashed_image_is_whole(width: int, height: int):
    image = picture(5, width, height)
    assert difference(decode(encode(image, "PNG"), PixelSpace(resize="squash")), resized(np.asarray(image), (0, 0, width, height), 32, 32)) <= 1


def test_a_grey_background_is_that_of_pillow():
    pixels = decode(encode(picture(6, 64, 32), "PNG"), PixelSpace(resize="pad", mode="L", background=(10, 200, 90)))
    assert set(pixels[0, :8].ravel().tolist()) == {Image.new("RGB", (1, 1), (10, 200, 90)).convert("L").getpixel((0, 0))}


def test_shrinking_is_antialiased():
    checker = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    assert np.all(np.abs(decode(checker, PixelSpace(image_size=8)).astype(int) - 127) < 12)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_its_exif_says(form: str, orientation: int):
    content = turned(picture(7, 32, 24), form, orientation)
    for resize in ("squash", "crop"):
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
        side = upright.width - upright.height
        box = (max(side, 0) // 2, max(-side, 0) // 2, upright.width - max(side, 0) // 2, upright.height - max(-side, 0) // 2)
        expected = upright.resize((16, 16), BICUBIC, box=box if resize == "crop" else None)
        assert difference(decode(content, PixelSpace(image_size=16, resize=resize)), chw(expected)) <= 1  # resized rows first, or columns first


def test_an_odd_remainder_is_left_at_the_right_and_bottom_as_stored():
    values = np.repeat(np.arange(33, dtype=np.uint8)[None, :, None] * 5, 32, axis=0).repeat(3, axis=2)
    upside_down = turned(Image.fromarray(values), "PNG", 3)
    assert np.array_equal(decode(encode(Image.fromarray(values), "PNG"), PixelSpace())[0, 0], values[0, :32, 0])
    assert np.array_equal(decode(upside_down, PixelSpace())[0, 0], values[0, :32, 0][::-1])


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 77, 255)])
def test_every_alpha_over_a_background_is_rounded_to_nearest(background: tuple[int, int, int]):
    alpha, colour = np.meshgrid(np.arange(256), np.arange(256), indexing="ij")
    rgba = np.stack([colour, 255 - colour, colour // 2, alpha], axis=-1)
    pixels = decode(encode(Image.fromarray(rgba.astype(np.uint8)), "PNG"), PixelSpace(image_size=256, background=background))
    exact = (rgba[..., :3] * rgba[..., 3:] + np.asarray(background) * (255 - rgba[..., 3:])) / 255
    assert np.array_equal(pixels.transpose(1, 2, 0), np.rint(exact).astype(np.uint8))


def test_all_65536_grey_values_are_divided_by_257_and_rounded():
    values = np.arange(65_536, dtype=np.uint16).reshape(256, 256)
    expected = np.rint(values / 257).astype(np.uint8)
    pgm = b"P5 256 256 65535\n" + values.astype(">u2").tobytes()
    wide_tiff = tiff(256, 256, (258, 3, 16), (273, 4, 1000), (279, 4, 131_072)).ljust(1000, b"\0") + values.astype("<u2").tobytes()
    for content in (*(encode(Image.fromarray(values), form) for form in ("PNG", "TIFF", "JPEG2000")), pgm, wide_tiff):
        assert np.array_equal(decode(content, PixelSpace(image_size=256, mode="L"))[0], expected)


def test_sixteen_bit_colour_is_its_high_byte():
    samples = np.random.default_rng(0).integers(0, 65_536, (4, 4, 3))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    assert np.array_equal(decode(png(4, 4, 16, 2, rows), PixelSpace(image_size=4)), (samples >> 8).transpose(2, 0, 1))


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_the_key_of_a_grey_png_is_transparent_at_every_depth(bits: int):
    plain = decode(grey_png(9, bits), PixelSpace(resize="squash", image_size=64))
    assert not np.array_equal(plain, 255)
    rows = {1: b"\0\xa0", 2: b"\0\x1b", 4: b"\0\x01\x23", 8: b"\0\0\1\2\3", 16: b"\0\0\0\1\1\2\2\1\2"}[bits]
    key = {1: 1, 2: 2, 4: 2, 8: 2, 16: 0x0202}[bits]
    grey = {1: [255, 0, 255, 0], 2: [0, 85, 170, 255], 4: [0, 17, 34, 51], 8: [0, 1, 2, 3], 16: [0, 1, 2, 1]}[bits]
    expected = [77 if index in ({0, 2} if bits == 1 else {2}) else value for index, value in enumerate(grey)]
    pixels = decode(png(4, 4, bits, 0, rows * 4, (b"tRNS", struct.pack(">H", key))), PixelSpace(image_size=4, background=(77, 77, 77)))
    assert pixels[:, 1].tolist() == [expected] * 3


def test_an_interlaced_png_is_the_picture_it_was_made_of():
    assert difference(decode(interlaced_png(8), PixelSpace(resize="squash")), resized(np.asarray(picture(8)), (0, 0, 40, 32), 32, 32)) <= 1


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_the_first_frame_is_taken(form: str):
    first, second = picture(10, 16, 16), picture(11, 16, 16)
    options = {"lossless": True} if form == "WEBP" else {"quality": 100, "subsampling": "4:4:4"} if form == "AVIF" else {}
    pixels = decode(encode(first, form, save_all=True, append_images=[second], **options), PixelSpace(image_size=16))
    assert psnr(pixels, chw(first)) > 25 > psnr(pixels, chw(second))


def test_a_png_whose_last_rows_are_missing_is_corrupt_and_one_whose_last_rows_are_black_is_not():
    rows = [b"\0" + bytes([255 * (row < 20)] * 40) for row in range(32)]
    assert decode(png(40, 32, 8, 0, b"".join(rows)), PixelSpace())[0, :, 0].tolist() == [255] * 20 + [0] * 12
    with pytest.raises(DataError, match="rows are missing") as caught:
        decode(png(40, 32, 8, 0, b"".join(rows[:20])), PixelSpace())
    assert caught.value.reason == "corrupt"
    assert decode(png(8, 8, 8, 0, bytes(79), interlaced=True), PixelSpace()).max() == 0


def test_cmyk_without_a_profile_is_converted_as_pillow_does():
    image = picture(12, 32, 32).convert("CMYK")
    assert np.array_equal(decode(encode(image, "TIFF"), PixelSpace()), chw(image.convert("RGB")))


def wide_profile() -> bytes:
    """Returns an RGB profile with the primaries of Display P3 and a gamma of 1.8: that of sRGB, edited."""
    content = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack_from(">I", content, 128)[0]
    tags = {bytes(content[132 + 12 * i : 136 + 12 * i]): struct.unpack_from(">2I", content, 136 + 12 * i) for i in range(count)}
    for tag, xyz in {b"rXYZ": (0.5151, 0.2412, -0.0011), b"gXYZ": (0.2920, 0.6922, 0.0419), b"bXYZ": (0.1571, 0.0666, 0.7841)}.items():
        struct.pack_into(">3i", content, tags[tag][0] + 8, *(round(value * 65_536) for value in xyz))
    at, length = tags[b"desc"]
    content[at : at + length] = bytes(content[at : at + length]).replace("sRGB".encode("utf-16-be"), "wide".encode("utf-16-be"))
    return bytes(content)


def test_a_profile_is_applied_after_the_resize_and_as_littlecms_does():
    profile, image = wide_profile(), picture(13, 90, 90)
    content = encode(image, "PNG", icc_profile=profile)
    source, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
    assert "sRGB" not in ImageCms.getProfileDescription(source)
    to_srgb = ImageCms.buildTransform(source, srgb, "RGB", "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC)
    pixels = decode(content, PixelSpace())
    assert np.array_equal(pixels, chw(to_srgb.apply(image.resize((32, 32), BICUBIC))))
    assert psnr(pixels, chw(to_srgb.apply(image).resize((32, 32), BICUBIC))) > 35
    assert difference(pixels, decode(encode(image, "PNG"), PixelSpace())) > 20


def test_a_profile_that_says_nothing_new_is_left_out():
    image = picture(14, 32, 32)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    plain = decode(encode(image, "PNG"), PixelSpace())
    for profile in (srgb, b"no profile at all" * 20, wide_profile()[:200]):
        assert np.array_equal(decode(encode(image, "PNG", icc_profile=profile), PixelSpace()), plain)
    grey = image.convert("L")
    assert np.array_equal(decode(encode(grey, "PNG", icc_profile=wide_profile()), PixelSpace()), decode(encode(grey, "PNG"), PixelSpace()))


@pytest.mark.parametrize(("size", "resize", "reduced"), [(32, "crop", 8), (60, "crop", 4), (90, "squash", 2), (100, "pad", 2), (250, "crop", 1)])
def test_a_reduced_jpeg_is_close_to_the_whole(size: int, resize: str, reduced: int):
    noisy = np.asarray(picture(15, 1001, 803)).astype(float) + np.random.default_rng(0).normal(0, 25, (803, 1001, 3))
    content = encode(Image.fromarray(noisy.clip(0, 255).astype(np.uint8)), "JPEG", quality=90)
    recipe = PixelSpace(image_size=size, resize=resize)  # pyrefly: ignore[bad-argument-type]
    whole = decode(encode(Image.open(io.BytesIO(content)), "PNG"), recipe)
    pixels = decode(content, recipe)
    assert np.array_equal(pixels, whole) == (reduced == 1)
    assert psnr(pixels, whole) > 45


def test_limits_are_exact():
    content = encode(picture(16, 20, 10), "PNG")
    assert decode(content, PixelSpace(max_pixels=200, min_side=10)).shape == (3, 32, 32)
    for recipe, reason in ((PixelSpace(max_pixels=199), "too_large"), (PixelSpace(min_side=11), "too_small")):
        for source in (content, np.zeros((10, 20, 3), np.uint8)):
            with pytest.raises(DataError) as caught:
                decode(source, recipe)
            assert caught.value.reason == reason


def test_pillows_own_limit_neither_counts_nor_changes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
    frame = encode(picture(17, 20, 20).quantize(8), "GIF")
    frame = frame[:6] + struct.pack("<2H", 10, 10) + frame[10:]
    for content in (frame, encode(picture(18, 20, 20), "WEBP"), encode(picture(19, 20, 20), "TIFF")):
        assert decode(content, PixelSpace()).shape == (3, 32, 32)
    assert Image.MAX_IMAGE_PIXELS == 30


def test_values_are_taken_like_files():
    values = np.asarray(picture(20, 40, 32))
    assert np.array_equal(decode(values, PixelSpace()), decode(encode(Image.fromarray(values), "PNG"), PixelSpace()))
    for wrong in (np.zeros((4, 4), np.float32), np.zeros((4, 4, 2), np.uint8), np.zeros(4, np.uint8), np.zeros((0, 4), np.uint8)):
        with pytest.raises(DataError, match="are no image; use uint8") as caught:
            decode(wrong, PixelSpace())
        assert caught.value.reason == "unsupported"
