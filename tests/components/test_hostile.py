import hashlib
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hostile import CONTENTS, RECIPE, STAGE_REASONS, encode, picture, write_good, write_hostile

from components.data.images import decode
from components.errors import DataError
from components.ingest.listing import items_of
from components.ingest.sources import DataConfig, list_source
from components.spaces.pixels import PixelSpace

REASONS = {"not_an_image", "corrupt", "truncated", "too_large", "too_small", "unsupported"}
DECODE_ALL = """
import sys
from pathlib import Path
from hostile import RECIPE
from components.data import images
from components.errors import DataError
if sys.argv[2] == "prepared":
    images.prepare_process()
for path in sorted(Path(sys.argv[1]).rglob("*")):
    if path.is_file():
        try:
            print(path.name.encode("utf-8", "surrogateescape"), images.decode(path.read_bytes(), RECIPE).sum())
        except DataError as error:
            print(path.name.encode("utf-8", "surrogateescape"), error.reason, error)
"""
MEMORY = """
import resource, sys
from pathlib import Path
from hostile import RECIPE
from components.data import images
for form in images.READERS:
    images._reader(form)
before, reasons = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, set()
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        images.decode(path.read_bytes(), RECIPE)
    except images.DataError as error:
        reasons.add(error.reason)
assert reasons == {"too_large"}, reasons
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("hostile")
    return folder, write_hostile(folder)


def outcome(content: bytes, recipe: PixelSpace = RECIPE) -> tuple[str, str]:
    try:
        assert decode(content, recipe).shape == (3, 16, 16)
    except DataError as error:
        return error.reason, str(error)
    return "row", ""


def contents(hostile: tuple[Path, dict[str, str]]) -> dict[str, tuple[bytes, str]]:
    folder, outcomes = hostile
    return {path: ((folder / path).read_bytes(), expected) for path, expected in outcomes.items() if expected not in STAGE_REASONS}


def run(code: str, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parents[1])])}
    return subprocess.run([sys.executable, "-c", code, *arguments], env=environment, check=True, capture_output=True, text=True, timeout=300).stdout


def test_every_hostile_file_comes_out_as_said(hostile: tuple[Path, dict[str, str]]):
    found = {path: outcome(content) for path, (content, _) in contents(hostile).items()}
    wrong = {path: found[path] for path, (_, expected) in contents(hostile).items() if found[path][0] != expected}
    assert not wrong


def test_every_reason_and_every_format_is_among_them(hostile: tuple[Path, dict[str, str]]):
    assert set(hostile[1].values()) == REASONS | STAGE_REASONS | {"row"}
    assert len(hostile[1]) >= 60
    suffixes = {path.rsplit(".", 1)[-1] for path, expected in hostile[1].items() if expected == "truncated"}
    assert suffixes >= {"jpg", "png", "webp", "gif", "bmp", "tif", "avif", "ppm", "jp2"}


def test_no_two_hostile_files_are_alike_but_the_copies(hostile: tuple[Path, dict[str, str]]):
    digests = [hashlib.sha256(content).hexdigest() for content, _ in contents(hostile).values()]
    assert len(set(digests)) == len(digests)


def test_details_are_short_and_name_no_addresses(hostile: tuple[Path, dict[str, str]]):
    details = [outcome(content)[1] for content, expected in contents(hostile).values() if expected != "row"]
    assert all(0 < len(detail) <= 200 and "\n" not in detail and " at 0x" not in detail for detail in details)


def test_a_process_that_was_prepared_and_one_that_was_not_say_the_same_twice(hostile: tuple[Path, dict[str, str]]):
    folders = [str(hostile[0] / name) for name in ("strange", "corrupt", "truncated", "unsupported")]
    for folder in folders:
        prepared, bare = (run(DECODE_ALL, folder, how) for how in ("prepared", "bare"))
        assert prepared == bare
        assert prepared.count("\n") > 15 or "corrupt" in folder


def test_refusing_a_bomb_takes_next_to_no_memory(hostile: tuple[Path, dict[str, str]]):
    assert int(run(MEMORY, str(hostile[0] / "too_large"))) < 30  # MB; the smallest of them would be 256


def test_the_folder_is_the_same_every_time(hostile: tuple[Path, dict[str, str]], tmp_path: Path):
    assert write_hostile(tmp_path) == hostile[1]
    assert all((tmp_path / path).read_bytes() == content for path, (content, _) in contents(hostile).items())


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tif", "avif", "ppm", "jp2"])
def test_a_file_cut_anywhere_is_truncated(suffix: str, tmp_path: Path):
    write_good(tmp_path, 9)
    (content,) = [path.read_bytes() for path in tmp_path.rglob(f"*.{suffix}")]
    cuts = range(18, len(content), max(1, len(content) // 60))
    assert {outcome(content[:cut])[0] for cut in cuts} == {"truncated"}
    assert outcome(content + b"trailing bytes" * 9) == ("row", "")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"II+\0\x08\0\0\0" + b"\xff" * 8, "truncated"),
        (b"P5 " + b"1" * 5000 + b" 1 255\n\0", "corrupt"),
        (b"P2 1 1 " + b"1" * 5000 + b"\n0\n", "corrupt"),
    ],
)
def test_numbers_beyond_any_file_are_faults_of_the_file(content: bytes, reason: str):
    assert outcome(content)[0] == reason


def mutated(content: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """Returns a file that was cut, flipped, spliced with another, or had some bytes replaced by what parsers stumble over."""
    start, length = rng.randrange(len(content)), rng.randrange(40)
    way = rng.randrange(4)
    if way == 0:
        return content[:start]
    if way == 1:
        flips = {rng.randrange(min(len(content), rng.choice((64, len(content))))): rng.randrange(256) for _ in range(rng.choice((1, 4, 20)))}
        return bytes(flips.get(at, value) for at, value in enumerate(content))
    if way == 2:
        other = rng.choice(others)
        piece = rng.randrange(len(other))
        return content[:start] + other[piece : piece + 10 * length] + content[start + length :]
    start = rng.choice((start, start % 64))
    return content[:start] + rng.choice((b"\xff" * 8, bytes(8), b"\x7f\xff\xff\xff", b"9" * 5000)) + content[start + length // 4 :]


def test_nothing_but_a_data_error_comes_of_whatever_is_done_to_a_file():
    rng, recipe = random.Random(0), RECIPE.model_copy(update={"max_pixels": 1 << 20})
    files = [content for _, _, make in CONTENTS for content in make().values() if 0 < len(content) < 20_000]
    found = [outcome(mutated(files[number % len(files)], files, rng), recipe) for number in range(12_000)]
    assert {reason for reason, _ in found} == REASONS | {"row"}
    assert all(len(detail) <= 200 for _, detail in found)


def test_good_files_are_all_rows_and_all_distinct(tmp_path: Path):
    write_good(tmp_path, 90)
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len({hashlib.sha256(content).hexdigest() for content in files}) == 90
    assert {outcome(content) for content in files} == {("row", "")}


def test_an_image_of_celeba_that_is_gone_or_broken_is_a_fault_of_that_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, good = tmp_path / "celeba", encode(picture(1), "JPEG")
    (folder / "img_align_celeba").mkdir(parents=True)
    contents = {"1.jpg": good, "2.jpg": None, "3.jpg": b"no image", "4.jpg": good[: len(good) // 2], "5.jpg": b"", "6.jpg": good}
    for name, content in contents.items():
        if content is not None:
            (folder / "img_align_celeba" / name).write_bytes(content)
    for table in ("list_eval_partition", "identity_CelebA", "list_bbox_celeba", "list_landmarks_align_celeba", "list_attr_celeba"):
        head = "6\na b\n" if table.startswith("list") and "partition" not in table else ""
        (folder / f"{table}.txt").write_text(head + "".join(f"{name} 0 0\n" for name in contents))
    (folder / "list_eval_partition.txt").write_text("".join(f"{name} 0\n" for name in contents))
    monkeypatch.setattr("torchvision.datasets.CelebA._check_integrity", lambda _: True)  # these are not the files whose MD5 it knows
    source, listing = list_source(DataConfig(source="celeba", root=str(tmp_path)))
    found: list[object] = []
    for item in items_of(listing.table):
        try:
            found.append(np.asarray(source.fetch(item.path)).shape)
        except DataError as error:
            found.append((error.reason, str(error)))
    no_image = ("corrupt", "UnidentifiedImageError: the file is no image that Pillow knows")
    cut = found.pop(3)
    assert found == [(32, 40, 3), ("unreadable", "FileNotFoundError: No such file or directory"), no_image, no_image, (32, 40, 3)]
    assert cut == ("corrupt", "OSError: Truncated File Read")  # which is Pillow's word for a file that ends in its header
