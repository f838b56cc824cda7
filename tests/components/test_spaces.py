"""Spaces: rows to x_0 and back, shapes other than squares, transparency, and what was written before there were spaces."""

import io
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from support import write_dataset

from components.data.shards import column_rows, read_manifest, shard_table
from components.diffusion.config import DiffusionConfig
from components.diffusion.sampling import thresholded
from components.errors import DataError
from components.model.spec import DenoiserSpec
from components.networks.unet.config import UNetConfig
from components.spaces.kinds import AnySpace
from components.spaces.pixels import PixelSpace, composited, unscaled
from components.spaces.points import PointSpace
from components.spaces.space import Space
from components.storage import Location

SPACES: TypeAdapter[Space] = TypeAdapter(AnySpace)
POINTS = np.random.default_rng(0).normal((3, -2), 0.5, (500, 2)).astype(np.float32)


def png(values: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG", **options)
    return file.getvalue()


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize("space", [PixelSpace(image_size=(8, 16), mode="RGBA"), PointSpace(mean=(3.0, -2.0), scale=0.5)])
def test_rows_survive_the_way_to_x_0_and_back_and_into_a_shard(space: Space):
    rows = noise(40 * 8, 16, 4).reshape(40, 4, 8, 16) if isinstance(space, PixelSpace) else POINTS
    again = space.to_rows(space.to_x_0(torch.from_numpy(rows))).numpy()
    assert (again.shape, again.dtype) == (rows.shape, rows.dtype)
    np.testing.assert_allclose(again, rows, atol=0 if isinstance(space, PixelSpace) else 1e-6)
    table = shard_table(space, rows, pa.array(["a"] * len(rows)), pa.array([str(number) for number in range(len(rows))]))
    assert np.array_equal(column_rows(table[space.column], space), rows)
    assert SPACES.validate_python(space.model_dump(mode="json")) == space


def test_points_have_mean_0_and_variance_1_over_both_coordinates_in_their_own_proportions():
    wide = POINTS * np.array([4, 1], np.float32)
    space = PointSpace().fitted(lambda: iter([wide[:100], wide[100:]]))
    x_0 = space.to_x_0(torch.from_numpy(wide)).double()
    assert torch.allclose(x_0.mean(0), torch.zeros(2, dtype=torch.float64), atol=1e-5)
    assert float(x_0.square().mean()) == pytest.approx(1.0, rel=1e-5)
    assert float(x_0[:, 0].std() / x_0[:, 1].std()) == pytest.approx(float(wide[:, 0].std() / wide[:, 1].std()), rel=1e-4)


def test_points_that_are_all_the_same_are_refused():
    with pytest.raises(DataError, match="all points to train on are one and the same"):
        PointSpace().fitted(lambda: iter([np.ones((5, 2), np.float32)]))


@pytest.mark.parametrize("source", [b"bytes", np.zeros(3), np.array([1.0, np.nan]), np.array([1e300, 0.0]), np.array([1, 2])])
def test_what_is_no_point_is_refused_with_the_reason(source: Any):
    with pytest.raises(DataError) as refused:
        PointSpace().decode(source)
    assert refused.value.reason == "not_a_point"


@pytest.mark.parametrize(("size", "image"), list(product([(16, 32), (32, 16), (20, 20)], [(48, 48), (30, 90), (90, 30)])))
def test_crop_keeps_the_largest_central_part_of_the_wanted_proportions(size: tuple[int, int], image: tuple[int, int]):
    (tall, wide), (height, width) = size, image
    values = noise(height, width)
    inside = (height * wide / tall, height) if width * tall > height * wide else (width, width * tall / wide)
    wanted = tuple(max(1, int(side + 0.5)) for side in inside)
    left, top = (width - wanted[0]) // 2, (height - wanted[1]) // 2
    expected = Image.fromarray(values).resize((wide, tall), Image.Resampling.BICUBIC, box=(left, top, left + wanted[0], top + wanted[1]))
    assert np.array_equal(PixelSpace(image_size=size).decode(png(values)), np.asarray(expected).transpose(2, 0, 1))


@pytest.mark.parametrize("image", [(30, 90), (90, 30), (40, 80)])
def test_pad_shows_the_whole_image_on_the_background(image: tuple[int, int]):
    space = PixelSpace(image_size=(32, 64), resize="pad", background=(1, 2, 3))
    pixels = space.decode(png(np.full((*image, 3), 200, np.uint8)))
    whole = (pixels == 200).all(axis=0)
    rows, columns = np.flatnonzero(whole.any(axis=1)), np.flatnonzero(whole.any(axis=0))
    assert max(len(rows) / 32, len(columns) / 64) == 1
    assert abs(len(rows) * image[1] / image[0] - len(columns)) <= 2
    assert np.array_equal(pixels[:, ~whole], np.broadcast_to([[1], [2], [3]], (3, int((~whole).sum()))))


@pytest.mark.parametrize(("form", "orientation"), list(product(["JPEG", "PNG"], range(1, 9))))
def test_an_image_stored_on_its_side_fills_a_shape_as_if_it_stood_upright(form: str, orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    yy, xx = np.mgrid[:60, :40]
    stored = Image.fromarray(np.stack([4 * yy, 6 * xx, 2 * (xx + yy)], axis=2).clip(0, 255).astype(np.uint8))
    file, upright = io.BytesIO(), io.BytesIO()
    stored.save(file, form, exif=exif, **({"quality": 95} if form == "JPEG" else {}))
    from PIL import ImageOps

    ImageOps.exif_transpose(Image.open(io.BytesIO(file.getvalue()))).save(upright, "PNG")
    for resize in ("crop", "pad", "squash"):
        space = PixelSpace(image_size=(12, 20), resize=resize)  # pyrefly: ignore[bad-argument-type]
        turned, straight = space.decode(file.getvalue()).astype(int), space.decode(upright.getvalue()).astype(int)
        assert np.abs(turned - straight).max() <= 3, (resize, orientation)


def test_rgba_keeps_transparency_and_gives_opaque_images_full_alpha():
    values = noise(8, 8, 4)
    space = PixelSpace(image_size=8, mode="RGBA", background=(10, 200, 90))
    assert np.array_equal(space.decode(png(values)), values.transpose(2, 0, 1))
    assert np.array_equal(space.decode(values), values.transpose(2, 0, 1))
    assert (space.decode(png(values[..., :3]))[3] == 255).all()
    keyed = space.decode(png(np.full((8, 8), 7, np.uint8), transparency=7))
    assert (keyed[3] == 0).all()
    sixteen = Image.fromarray(np.full((8, 8), 7, np.uint16))
    file = io.BytesIO()
    sixteen.save(file, "PNG", transparency=7)
    assert (space.decode(file.getvalue())[3] == 0).all()
    padded = PixelSpace(image_size=(8, 16), mode="RGBA", resize="pad").decode(png(values))
    assert (padded[3, :, :4] == 0).all()
    assert np.array_equal(padded[:, :, 4:12], values.transpose(2, 0, 1))


def test_rgba_over_a_background_is_what_pillow_makes_of_it():
    values = noise(64, 64, 4)
    canvas = Image.new("RGB", (64, 64), (10, 200, 90))
    canvas.paste(Image.fromarray(values), (0, 0), Image.fromarray(values))
    assert np.array_equal(composited(values.transpose(2, 0, 1)[None], (10, 200, 90))[0], np.asarray(canvas).transpose(2, 0, 1))


@pytest.mark.parametrize("wrong", [3, 2000, [8], "8x8", [8, 16, 3], [8, 2], True, [8.5, 8]])
def test_a_size_that_is_none_is_refused_with_what_would_be_right(wrong: Any):
    if wrong == [8]:
        assert PixelSpace(image_size=wrong).image_size == 8
        return
    with pytest.raises(ValidationError, match=r"no size; use one number such as 64|out of range; use 4 to 1024"):
        PixelSpace(image_size=wrong)


def test_a_square_given_by_both_sides_is_the_square_of_one():
    assert PixelSpace(image_size=(32, 32)).definition() == PixelSpace().definition()
    assert (PixelSpace(image_size=(8, 16)).height, PixelSpace(image_size=(8, 16)).width) == (8, 16)


def test_a_network_that_cannot_halve_a_shape_says_which_would_do():
    with pytest.raises(ValueError, match=r"data\.image_size=\[20,36\] cannot be halved 3 times; use a multiple of 8 such as \[16,32\]"):
        UNetConfig().check_shape((3, 20, 36))
    with pytest.raises(ValueError, match=r"model\.kind=unet takes images"):
        UNetConfig().check_shape((2,))


def test_manifests_and_denoisers_from_before_there_were_spaces_are_read(tmp_path: Path):
    manifest = write_dataset(Location.of(tmp_path), [noise(4 * 8, 8, 3).reshape(4, 3, 8, 8)], ["a"])
    file = tmp_path / "manifest.json"
    written = manifest.model_dump(mode="json")
    space = written.pop("space")
    import json

    file.write_text(json.dumps(written | {"recipe": {name: value for name, value in space.items() if name != "kind"}}))
    assert read_manifest(Location.of(tmp_path)).space == manifest.space
    old = {"model": UNetConfig().model_dump(exclude={"kind"}), "diffusion": DiffusionConfig().model_dump(), "image_size": 32, "channels": 1}
    assert DenoiserSpec.model_validate(old) == DenoiserSpec(model=UNetConfig(), diffusion=DiffusionConfig(), space=PixelSpace(mode="L"))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_images_scaled_by_their_channels_have_mean_0_and_variance_1_and_come_back_exactly(mode: str):
    space = PixelSpace.model_validate({"image_size": 16, "mode": mode, "normalisation": "per_channel"})
    rows = np.stack([np.arange(256, dtype=np.uint8).reshape(16, 16)] * space.channels)[None] // np.arange(1, space.channels + 1, dtype=np.uint8)[:, None, None]
    fitted = space.fitted(lambda: iter([rows, rows]))
    x_0 = fitted.to_x_0(torch.from_numpy(rows))
    torch.testing.assert_close(x_0.mean((0, 2, 3)), torch.zeros(space.channels), rtol=0, atol=1e-5)
    torch.testing.assert_close(x_0.std((0, 2, 3), correction=0), torch.ones(space.channels), rtol=1e-4, atol=0)
    every = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16).repeat(space.channels, axis=1)
    assert np.array_equal(fitted.to_rows(fitted.to_x_0(torch.from_numpy(every))).numpy(), every)
    assert SPACES.validate_json(fitted.model_dump_json()) == fitted
    assert fitted.definition() != PixelSpace.model_validate({"image_size": 16, "mode": mode}).definition()
    far = torch.full((1, *fitted.shape), 50.0)
    for threshold in ("clip", "dynamic"):
        kept = unscaled(thresholded(far, threshold, fitted.limit), fitted.mean, fitted.deviation)
        assert kept.abs().max() <= 1 + 1e-4
        assert threshold == "dynamic" or kept.min() >= 1 - 1e-4


def test_what_is_not_scaled_by_channel_is_written_as_before():
    assert set(PixelSpace().model_dump(mode="json")) == {"image_size", "mode", "resize", "background", "min_side", "max_pixels", "kind"}
    with pytest.raises(DataError, match="needs channels that vary"):
        PixelSpace(normalisation="per_channel", mode="L", image_size=8).fitted(lambda: iter([np.zeros((2, 1, 8, 8), np.uint8)]))
