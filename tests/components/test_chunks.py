"""How the files to open are cut into chunks."""

import numpy as np
import pytest

from components.ingest.chunks import CHUNK_BYTES, CHUNK_FILES, CHUNK_ROW_BYTES, SHARES, TAPER, cut
from components.spaces.pixels import PixelSpace

SIZES = {
    "none": np.zeros(0, np.int64),
    "one huge file": np.array([CHUNK_BYTES * 5]),
    "unknown": np.full(50_000, -1),
    "small": np.random.default_rng(0).integers(500, 1500, 200_000),
    "large": np.random.default_rng(1).integers(50_000, 9_000_000, 3000),
}


@pytest.mark.parametrize("name", list(SIZES))
@pytest.mark.parametrize("image_size", [4, 64, 1024])
def test_chunks_hold_each_file_once_within_their_bounds(name: str, image_size: int):
    sizes, recipe = SIZES[name], PixelSpace(image_size=image_size)
    parts = cut(sizes, recipe)
    assert [first for first, _ in parts] + [len(sizes)] == [0] + [last for _, last in parts]
    for first, last in parts:
        assert 1 <= last - first <= CHUNK_FILES
        assert last - first == 1 or (last - first) * recipe.row_bytes <= CHUNK_ROW_BYTES
        assert last - first == 1 or np.maximum(sizes[first:last], 0).sum() <= CHUNK_BYTES


def test_the_last_chunks_are_small_and_the_first_ones_are_not():
    lengths = [last - first for first, last in cut(SIZES["small"], PixelSpace())]
    assert lengths[0] == CHUNK_FILES
    assert lengths == sorted(lengths, reverse=True)
    assert max(lengths[-SHARES // 2 :]) == CHUNK_FILES // TAPER


def test_where_few_files_are_listed_chunks_are_no_smaller_than_a_share_of_the_bound():
    assert len(cut(np.full(CHUNK_FILES // TAPER, 100), PixelSpace())) == 1
