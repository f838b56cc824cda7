"""Where points come from: shapes, dark pixels, tables."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from components.errors import DataError
from components.ingest.points import SHAPES, PointsSource
from components.ingest.sources import DataConfig, address_of, list_source, source_from_json, source_to_json
from components.spaces.points import PointSpace


def source(address: str, **settings: object) -> PointsSource:
    found, _ = list_source(DataConfig.model_validate({"source": f"points:{address}"} | settings))
    assert isinstance(found, PointsSource)
    return found


def points(found: PointsSource) -> np.ndarray:
    return np.stack([found.fetch(path.decode()) for path in found.listing().table["path"].to_pylist()])


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_drawn_alike_for_a_seed_and_more_points_keep_the_first_ones(name: str):
    few, many = points(source(name, num_points=50)), points(source(name, num_points=80))
    assert (few.shape, few.dtype) == ((50, 2), np.float32)
    assert np.array_equal(few, many[:50])
    assert not np.array_equal(few, points(source(name, num_points=50, points_seed=1)))
    assert np.abs(many).max() < 3
    assert len(np.unique(many, axis=0)) == 80


def test_the_dark_pixels_of_a_picture_become_points_with_y_upwards(tmp_path: Path):
    values = np.full((20, 40), 255, np.uint8)
    values[2:5, 30:35] = 0  # above the middle, on the right
    values[10:12, :] = 200  # not dark
    Image.fromarray(values).save(tmp_path / "shape.png")
    found = points(source(str(tmp_path / "shape.png"), num_points=500))
    assert (found[:, 0].min() >= 0.5, found[:, 0].max() <= 0.75, found[:, 1].min() >= 0.25, found[:, 1].max() <= 0.4) == (True,) * 4
    assert len(np.unique(found, axis=0)) == 500


def test_transparency_is_white_and_darker_pixels_have_more_points(tmp_path: Path):
    values = np.zeros((10, 20, 4), np.uint8)
    values[:, :10] = (0, 0, 0, 255)
    values[:, 10:] = (120, 120, 120, 255)
    values[:5] = 0  # black, and transparent
    Image.fromarray(values).save(tmp_path / "shape.png")
    found = points(source(str(tmp_path / "shape.png"), num_points=4000))
    assert found[:, 1].max() <= 0
    assert (found[:, 0] < 0).mean() == pytest.approx(255 / (255 + 135), abs=0.03)


@pytest.mark.parametrize("header", ["x,y\n", ""])
def test_a_table_is_read_row_by_row_and_its_bad_rows_are_told(tmp_path: Path, header: str):
    (tmp_path / "points.csv").write_text(header + "1,2\n3.5,-1e3\nnan,1\n,4\n5,6\n")
    found = source(str(tmp_path / "points.csv"))
    paths = [path.decode() for path in found.listing().table["path"].to_pylist()]
    assert paths == [f"points.csv#{number:07d}" for number in range(5)]
    assert [found.fetch(paths[number]).tolist() for number in (0, 1, 4)] == [[1, 2], [3.5, -1000], [5, 6]]
    for number in (2, 3):
        with pytest.raises(DataError) as refused:
            PointSpace().decode(found.fetch(paths[number]))
        assert refused.value.reason == "not_a_point"


def test_rows_that_are_appended_leave_those_before_as_they_were(tmp_path: Path):
    file = tmp_path / "points.csv"
    file.write_text("1,2\n3,4\n")
    before = source(str(file)).listing().table.to_pylist()
    file.write_text("1,2\n3,4\n5,6\n")
    from components.ingest.points import _points

    _points.cache_clear()
    assert source(str(file)).listing().table.to_pylist()[:2] == before


def test_a_parquet_table_is_read_too(tmp_path: Path):
    pq.write_table(pa.table({"a": [1, 2], "b": [0.5, None]}), tmp_path / "points.parquet")
    found = source(str(tmp_path / "points.parquet"))
    assert found.fetch("points.parquet#0000000").tolist() == [1.0, 0.5]


def test_it_travels_and_means_the_same_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "points.csv").write_text("1,2\n3,4\n")
    monkeypatch.chdir(tmp_path)
    assert address_of("points:points.csv") == f"points:{tmp_path / 'points.csv'}"
    assert address_of("points:moons") == "points:moons"
    found = source("points.csv")
    assert source_from_json(source_to_json(found)) == found


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("circle", None, "no shape and no file of points; use points:spiral, points:moons, points:smile, points:grid, or a .png, .csv or .parquet file"),
        ("gone.csv", None, "does not exist"),
        ("three.csv", b"1,2,3\n4,5,6\n", r"has 3 columns .*use a table of two"),
        ("ragged.csv", b"1,2\n3\n", "cannot be read"),
        ("empty.csv", b"", "cannot be read"),
        ("white.png", "white", "has no dark pixel"),
        ("broken.png", b"\x89PNG\r\n", "is no picture that can be read"),
        ("broken.parquet", b"PAR1", "cannot be read"),
    ],
)
def test_what_gives_no_points_is_named_with_what_would_be_right(tmp_path: Path, name: str, content: object, named: str):
    if content == "white":
        Image.new("L", (8, 8), 255).save(tmp_path / name)
    elif isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"data\.source=points:.*{name}.*{named}"):
        source(str(tmp_path / name) if "." in name else name)


def test_points_have_no_splits():
    with pytest.raises(DataError, match=r"data\.split and data\.holdout_split mean nothing to points"):
        source("moons", split="test")
