import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from components.data.sources import DataConfig, open_source
from components.errors import DataError


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 6), (value, 0, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def test_a_folder_is_listed_in_order_with_its_first_level_as_label(tmp_path: Path, make_images: Callable[..., Path]):
    make_images(tmp_path, 6)
    (tmp_path / "dog" / "deep").mkdir()
    (tmp_path / "dog" / "deep" / "x.PNG").write_bytes(png(1))
    (tmp_path / "top.jpeg").write_bytes(png(2))
    items = open_source(DataConfig(source=str(tmp_path))).listing().items
    assert [item.path for item in items] == sorted(item.path for item in items)
    assert {item.path: item.label for item in items}["dog/deep/x.PNG"] == "dog"
    assert {item.path: item.label for item in items}["top.jpeg"] is None
    assert len(items) == 8


def test_files_that_are_no_images_by_name_are_counted(tmp_path: Path, make_images: Callable[..., Path]):
    make_images(tmp_path, 2)
    for name in ("notes.txt", "labels.csv", ".hidden.png", "README"):
        (tmp_path / name).write_text("x")
    assert dict(open_source(DataConfig(source=str(tmp_path))).listing().ignored) == {".csv": 1, ".txt": 1, "hidden file": 1, "no suffix": 1}


def test_the_listing_changes_when_a_file_does(tmp_path: Path, make_images: Callable[..., Path]):
    source = open_source(DataConfig(source=str(make_images(tmp_path, 4))))
    before = source.listing().digest()
    assert source.listing().digest() == before
    (tmp_path / "cat" / "0000.png").write_bytes(png(9))
    changed = source.listing().digest()
    (tmp_path / "cat" / "0000.png").unlink()
    assert len({before, changed, source.listing().digest()}) == 3


def test_a_folder_that_does_not_exist_is_named():
    with pytest.raises(DataError, match=r"data\.source=/no/such/folder does not exist; name a folder of images or parquet files, or one of digits"):
        open_source(DataConfig(source="/no/such/folder"))


def test_a_file_in_place_of_a_folder_is_named(tmp_path: Path):
    (tmp_path / "x.jpg").write_bytes(png(0))
    with pytest.raises(DataError, match=r"x\.jpg is not a folder"):
        open_source(DataConfig(source=str(tmp_path / "x.jpg")))


@pytest.mark.parametrize("names", [[], ["a.txt"]])
def test_a_folder_without_images_is_named(tmp_path: Path, names: list[str]):
    for name in names:
        (tmp_path / name).write_text("x")
    with pytest.raises(DataError, match=rf"data\.source={tmp_path} holds no images but"):
        open_source(DataConfig(source=str(tmp_path))).listing()


def test_names_in_any_script_are_read(tmp_path: Path):
    for name in ("図.png", "é è.png", "smile 😀.png"):
        (tmp_path / name).write_bytes(png(3))
    source = open_source(DataConfig(source=str(tmp_path)))
    assert [source.fetch(item.path) for item in source.listing().items] == [png(3)] * 3


def write_hub_export(folder: Path, column: str = "image", rows: int = 5) -> None:
    images = pa.array([{"bytes": png(row), "path": f"{row}.png"} for row in range(rows)], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    metadata = {"huggingface": json.dumps({"info": {"features": {"label": {"names": ["ant", "bee"], "_type": "ClassLabel"}}}})}
    schema = pa.schema([(column, images.type), ("label", pa.int64())], metadata=metadata)
    pq.write_table(pa.table([images, pa.array([row % 2 for row in range(rows)])], schema=schema), folder / "train-00000.parquet", row_group_size=2)


@pytest.mark.parametrize("column", ["image", "img"])
def test_a_hub_export_is_read_with_its_class_names(tmp_path: Path, column: str):
    write_hub_export(tmp_path, column)
    source = open_source(DataConfig(source=str(tmp_path)))
    items = source.listing().items
    assert [item.label for item in items] == ["ant", "bee", "ant", "bee", "ant"]
    assert [source.fetch(item.path) for item in items] == [png(row) for row in range(5)]


def test_plain_bytes_are_read_where_the_column_is_named(tmp_path: Path):
    pq.write_table(pa.table({"jpg": [png(0), png(1)], "other": [b"x", b"y"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet has 0 columns of type struct<bytes, path>.*set data\.image_column"):
        open_source(DataConfig(source=str(tmp_path))).listing()
    source = open_source(DataConfig(source=str(tmp_path), image_column="jpg"))
    assert [source.fetch(item.path) for item in source.listing().items] == [png(0), png(1)]


def test_a_parquet_file_that_is_none_is_named(tmp_path: Path):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"bad\.parquet is not a readable parquet file"):
        open_source(DataConfig(source=str(tmp_path))).listing()


def test_the_digits_are_the_1797_of_scikit_learn():
    source = open_source(DataConfig())
    items = source.listing().items
    assert len(items) == 1797
    assert {item.label for item in items} == set("0123456789")
    values = source.fetch(items[0].path)
    assert isinstance(values, np.ndarray)
    assert values.max() == 239 or values.max() == 255


def test_a_torchvision_dataset_is_read_from_a_local_root(tmp_path: Path):
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    images, labels = np.arange(3 * 28 * 28, dtype=np.uint32).reshape(3, 28, 28).astype(np.uint8), np.asarray([4, 0, 9], np.uint8)
    for part, count in (("train", 3), ("t10k", 3)):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(np.asarray([0x803, count, 28, 28], ">i4").tobytes() + images.tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(np.asarray([0x801, count], ">i4").tobytes() + labels.tobytes())
    source = open_source(DataConfig(source="mnist", root=str(tmp_path)))
    items = source.listing().items
    assert [item.label for item in items] == ["4 - four", "0 - zero", "9 - nine"]
    assert np.array_equal(source.fetch(items[1].path), images[1])


@pytest.mark.skipif(os.environ.get("DDPM_TEST_NETWORK") == "1", reason="a network would serve the download")
def test_a_torchvision_dataset_that_is_nowhere_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import urllib.error
    import urllib.request

    def refuse(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(DataError, match=rf"data\.source=cifar10 is not under data\.root={tmp_path}, and could not be downloaded .*no network"):
        open_source(DataConfig(source="cifar10", root=str(tmp_path))).listing()


def test_a_linked_folder_is_counted_and_an_empty_label_is_none(tmp_path: Path, make_images: Callable[..., Path]):
    make_images(tmp_path / "a", 2)
    (tmp_path / "a" / "linked").symlink_to(tmp_path)
    assert open_source(DataConfig(source=str(tmp_path / "a"))).listing().ignored == {"linked folder": 1}
    (tmp_path / "p").mkdir()
    pq.write_table(pa.table({"image": [{"bytes": png(0), "path": ""}] * 2, "label": ["", "x"]}), tmp_path / "p" / "a.parquet")
    assert [item.label for item in open_source(DataConfig(source=str(tmp_path / "p"))).listing().items] == [None, "x"]
