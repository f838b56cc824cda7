import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from components.data.images import decode, to_image, to_model_range, to_pixels, to_pixels_array, to_square
from components.errors import DataError


def encode(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=form, **options)
    return buffer.getvalue()


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


def test_exif_orientation_is_applied():
    image = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encode(image, "PNG", exif=exif), "L").size == (2, 3)


def test_transparent_pixels_lie_on_white():
    image = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    assert np.array_equal(np.asarray(decode(encode(image), "RGB")), np.full((2, 2, 3), 255))


def test_sixteen_bit_grey_is_scaled_not_cut_off():
    image = Image.fromarray(np.asarray([[0, 257 * 100, 65535]], dtype=np.uint16))
    assert np.asarray(decode(encode(image), "L")).tolist() == [[0, 100, 255]]


def test_cmyk_and_palette_and_grey_become_rgb():
    for mode in ("CMYK", "L", "P", "1"):
        form = "JPEG" if mode == "CMYK" else "PNG"
        assert decode(encode(Image.new(mode, (4, 4)), form), "RGB").mode == "RGB"


def test_the_centre_is_kept_when_a_wide_image_is_cut():
    values = np.zeros((10, 30), np.uint8)
    values[:, 10:20] = 200
    assert np.all(np.asarray(to_square(Image.fromarray(values), 5)) == 200)


def test_shrinking_is_antialiased():
    checker = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    small = np.asarray(to_square(Image.fromarray(checker), 8)).astype(int)
    assert np.all(np.abs(small - 127) < 12)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "not_an_image"), (b"not a picture at all", "not_an_image"), (encode(Image.new("RGB", (64, 64)))[:60], "truncated")],
    ids=["empty", "text", "cut off"],
)
def test_a_bad_file_is_named_by_its_reason(content: bytes, reason: str):
    with pytest.raises(DataError) as caught:
        decode(content, "RGB")
    assert caught.value.reason == reason


def test_a_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError) as caught:
        decode(encode(Image.new("L", (12, 12))), "L")
    assert caught.value.reason == "too_large"


def test_sixteen_bit_pgm_is_scaled_and_depths_without_a_range_are_refused():
    pgm = b"P5 3 1 65535\n" + np.asarray([0, 257 * 100, 65535], ">u2").tobytes()
    assert np.asarray(decode(pgm, "L")).tolist() == [[0, 100, 255]]
    with pytest.raises(DataError, match="no defined range"):
        decode(encode(Image.fromarray(np.asarray([[0.5]], np.float32)), "TIFF"), "L")
