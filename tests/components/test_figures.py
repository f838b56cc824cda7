"""Sheets of images: what stands in the cells, and that names stay out of them."""

import numpy as np
import pytest
from PIL import Image

from components.figures import ALARM, CELL_GAP, MARGIN, MOST_PAIRS, PAIR_COLUMNS, TEXT_SIZE, Strip, closest_pairs, contact_sheet, interpolation_sheet


def noise(count: int, channels: int, size: int) -> np.ndarray:
    return np.random.default_rng(size).integers(0, 256, (count, channels, size, size), dtype=np.uint8)


def cells(sheet: Image.Image, cell: int, columns: int, rows: int) -> np.ndarray:
    """Returns the cells of a sheet, counted from its lower right corner, (rows, columns, cell, cell, 3)."""
    pitch, values = cell + CELL_GAP, np.asarray(sheet)
    left, top = (length - MARGIN - number * pitch + CELL_GAP for length, number in ((sheet.width, columns), (sheet.height, rows)))
    return np.asarray(
        [[values[top + r * pitch : top + r * pitch + cell, left + c * pitch : left + c * pitch + cell] for c in range(columns)] for r in range(rows)]
    )


@pytest.mark.parametrize(("size", "channels", "cell"), [(8, 1, 64), (28, 1, 112), (32, 3, 96), (64, 3, 64)])
def test_small_images_are_enlarged_by_a_whole_factor_pixel_by_pixel(size: int, channels: int, cell: int):
    strips = [Strip(name, "", noise(10, channels, size) + number) for number, name in enumerate(("cat", "dog"))]
    found = cells(contact_sheet(strips, "title", "caption"), cell, 10, 2)
    middle = cell // size // 2
    for row, strip in enumerate(strips):
        shown = found[row][:, middle :: cell // size, middle :: cell // size]
        assert np.array_equal(shown, np.broadcast_to(strip.pixels.transpose(0, 2, 3, 1), shown.shape))
        assert np.array_equal(np.unique(found[row]), np.unique(strip.pixels))


def test_large_images_are_scaled_down_and_not_cut():
    pixels = np.zeros((10, 3, 256, 256), np.uint8)
    pixels[..., 128:] = 255
    found = cells(contact_sheet([Strip("", "", pixels)], "", ""), 112, 10, 1)[0]
    assert found[:, :, :50].max() == 0
    assert found[:, :, 62:].min() == 255
    np.testing.assert_allclose(found.mean(axis=(1, 2, 3)), 127.5, atol=1)


def test_neither_a_long_name_nor_a_long_title_covers_an_image():
    pixels = noise(10, 1, 8)
    sheets = [contact_sheet([Strip("x" * length, "y" * length, pixels)], "t" * length, "c" * length) for length in (30, 3000)]
    assert sheets[0].size == sheets[1].size
    shown = [cells(sheet, 64, 10, 1) for sheet in sheets]
    assert np.array_equal(shown[0], shown[1])
    right = [np.asarray(sheet)[:, -MARGIN + 1 :] for sheet in sheets]
    assert min(part.min() for part in right) == 255


def test_without_names_the_images_begin_at_the_margin():
    named, unnamed = (contact_sheet([Strip(name, "", noise(10, 1, 8))], "", "") for name in ("cat", ""))
    assert unnamed.width == 2 * MARGIN + 10 * (64 + CELL_GAP) - CELL_GAP < named.width


def test_headings_stand_above_the_columns_and_move_the_images_down_only():
    strips = [Strip("cat", "", noise(10, 1, 8)), Strip("dog", "", noise(10, 1, 8))]
    bare, headed, long = (contact_sheet(strips, "t", "c", headings) for headings in ([], [""] * 10, ["x" * 300] * 10))
    assert headed.size == long.size
    assert headed.width == bare.width
    assert headed.height > bare.height
    for sheet in (headed, long):
        assert np.array_equal(cells(sheet, 64, 10, 2), cells(bare, 64, 10, 2))
    strip = slice(headed.height - MARGIN - 2 * 64 - CELL_GAP - 30, headed.height - MARGIN - 2 * 64 - CELL_GAP - 2)
    assert np.asarray(headed)[strip].min() == 255
    written = np.flatnonzero(np.asarray(long)[strip].min(axis=(0, 2)) < 255)
    first, pitch = headed.width - MARGIN - 10 * (64 + CELL_GAP) + CELL_GAP, 64 + CELL_GAP
    assert set((written - first) // pitch) == set(range(10))
    assert ((written - first) % pitch).max() < 64


def test_an_interpolation_is_a_line_for_each_pair_of_seeds():
    pixels = noise(3 * 5, 3, 32).reshape(3, 5, 3, 32, 32)
    sheet = interpolation_sheet(pixels, [(0, 1), (2, 3), (4, 5)])
    assert np.array_equal(cells(sheet, 96, 5, 3)[:, :, 1::3, 1::3], pixels.transpose(0, 1, 3, 4, 2))


def pair_places(sheet: Image.Image, cell: int, count: int) -> list[tuple[int, int]]:
    """Returns the upper left corners (y, x) of the pairs on a sheet, counted from its lower right corner."""
    pitch_x, pitch_y = cell + 2 * CELL_GAP, 2 * cell + TEXT_SIZE + 4 * CELL_GAP
    columns, lines = min(count, PAIR_COLUMNS), -(-count // PAIR_COLUMNS)
    left, top = sheet.width - MARGIN + CELL_GAP - columns * pitch_x, sheet.height - MARGIN + 2 * CELL_GAP - lines * pitch_y
    return [(top + index // PAIR_COLUMNS * pitch_y, left + index % PAIR_COLUMNS * pitch_x) for index in range(count)]


@pytest.mark.parametrize(("count", "shown"), [(8, 8), (11, 11), (16, 16), (40, 16)])
def test_each_sample_stands_above_its_training_image_and_copies_are_framed_in_red(count: int, shown: int):
    samples, nearest = noise(count, 3, 32), 255 - noise(count, 3, 32)
    distances = np.linspace(0.1, 0.5, count)
    threshold = float(distances[2])  # the third is just not below it
    sheet = closest_pairs(samples, nearest, distances.tolist(), threshold)
    values = np.asarray(sheet)
    for index, (y, x) in enumerate(pair_places(sheet, 96, shown)):
        assert np.array_equal(values[y + 1 : y + 96 : 3, x + 1 : x + 96 : 3], samples[index].transpose(1, 2, 0))
        assert np.array_equal(values[y + 97 : y + 192 : 3, x + 1 : x + 96 : 3], nearest[index].transpose(1, 2, 0))
        frame = np.concatenate([values[y - 2, x : x + 96], values[y + 193, x : x + 96], values[y : y + 192, x - 2], values[y : y + 192, x + 97]])
        assert (frame == ALARM).all() == (index < 2)
        assert (frame == 255).all() == (index >= 2)


def test_more_pairs_than_fit_are_left_out():
    sizes = [closest_pairs(noise(count, 1, 8), noise(count, 1, 8), [1.0] * count, 0.5).size for count in (MOST_PAIRS, 5 * MOST_PAIRS)]
    assert sizes[0] == sizes[1]
