"""Contact sheets: what stands in the cells, and that names stay out of them."""

import numpy as np
import pytest
from PIL import Image

from components.figures import CELL_GAP, MARGIN, Strip, contact_sheet


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
