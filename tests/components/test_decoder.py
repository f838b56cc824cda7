"""A process that decodes, and what is left when it dies. The crashes are real: the child is made to fail by a `sitecustomize` on its path."""

import hashlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from components.data.images import decode
from components.errors import DataError
from components.ingest import decoder as decoder_module
from components.ingest.decoder import Decoder, memory_limit
from components.ingest.folders import FolderSource
from components.ingest.listing import Item
from components.spaces.pixels import PixelSpace

RECIPE = PixelSpace(image_size=8, max_pixels=4_000_000)
# Looks for marks in what is decoded, and dies of them as a decoder with a fault would.
SITE = """
import ctypes, os, time
import components.data.images as images
honest = images.decode

def decode(source, recipe):
    if b"SEGFAULT" in source:
        ctypes.string_at(0)
    if b"ABORT" in source:
        os.abort()
    if b"HANG" in source:
        time.sleep(1000)
    if b"GREEDY" in source:
        return bytearray(40 << 30)
    if b"FAULT" in source:
        raise ZeroDivisionError
    if b"ONCE" in source and not os.path.exists(os.environ["ONCE"]):
        open(os.environ["ONCE"], "w").close()
        ctypes.string_at(0)
    return honest(source, recipe)

images.decode = decode
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITE)
    root = Path(decoder_module.__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), str(root)]))
    monkeypatch.setenv("ONCE", str(tmp_path / "once"))
    images = tmp_path / "images"
    images.mkdir()
    for number in range(6):
        (images / f"{number}.png").write_bytes(png(number))
    return images


@pytest.fixture
def decoding(folder: Path) -> Iterator[Decoder]:
    decoder = Decoder(FolderSource(str(folder)), RECIPE, 64)
    yield decoder
    decoder.close()


def png(number: int, mark: bytes = b"") -> bytes:
    sink = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (12, 10, 3), dtype=np.uint8)).save(sink, "PNG")
    return sink.getvalue() + mark


def items(folder: Path) -> list[Item]:
    return [Item(name, None, (folder / name).stat().st_size, "") for name in sorted(os.listdir(folder))]


def test_the_child_gives_what_decoding_here_gives(decoding: Decoder, folder: Path):
    for _ in range(2):
        outcomes, pixels = decoding.decode(items(folder), [None] * 6)
        for number in range(6):
            assert np.array_equal(pixels[number], decode(png(number), RECIPE))
            assert outcomes["sha256"][number].as_py() == hashlib.sha256(png(number)).digest()
            assert outcomes["pixels"][number].as_py() == hashlib.blake2b(pixels[number].tobytes(), digest_size=16).digest()
        assert outcomes["reason"].to_pylist() == [None] * 6


@pytest.mark.parametrize(("mark", "cause"), [(b"SEGFAULT", "SIGSEGV"), (b"ABORT", "SIGABRT")])
def test_an_image_that_kills_its_decoder_is_left_out_and_no_other(decoding: Decoder, folder: Path, mark: bytes, cause: str):
    for name in ("2b.png", "4b.png"):
        (folder / name).write_bytes(png(9, mark))
    outcomes, pixels = decoding.decode(items(folder), [None] * 8)
    assert outcomes["reason"].to_pylist() == [None, None, None, "crashed", None, None, "crashed", None]
    assert cause in str(outcomes["detail"][3].as_py())
    assert np.array_equal(pixels[7], decode(png(5), RECIPE))


def test_an_image_at_which_the_decoder_dies_once_is_tried_again(decoding: Decoder, folder: Path):
    (folder / "3b.png").write_bytes(png(9, b"ONCE"))
    outcomes, pixels = decoding.decode(items(folder), [None] * 7)
    assert outcomes["reason"].to_pylist() == [None] * 7
    assert np.array_equal(pixels[4], decode(png(9), RECIPE))


def test_a_decoder_killed_from_outside_loses_nothing(decoding: Decoder, folder: Path):
    decoding.decode(items(folder), [None] * 6)
    child = decoding._child
    assert child is not None
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    outcomes, _ = decoding.decode(items(folder), [None] * 6)
    assert outcomes["reason"].to_pylist() == [None] * 6


def test_an_image_that_takes_too_long_is_left_out(decoding: Decoder, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decoder_module, "FILE_S", 3.0)
    monkeypatch.setattr(decoder_module, "POLL_S", 0.5)
    (folder / "1b.png").write_bytes(png(9, b"HANG"))
    outcomes, _ = decoding.decode(items(folder), [None] * 7)
    assert outcomes["reason"].to_pylist() == [None, None, "crashed", None, None, None, None]
    assert outcomes["detail"][2].as_py() == "was not done after 3 seconds, 2 times"


def test_an_image_that_needs_more_memory_than_the_limit_is_too_large(decoding: Decoder, folder: Path):
    (folder / "1b.png").write_bytes(png(9, b"GREEDY"))
    outcomes, _ = decoding.decode(items(folder), [None] * 7)
    assert outcomes["reason"].to_pylist() == [None, None, "too_large", None, None, None, None]
    assert outcomes["detail"][2].as_py() == f"needs more than {memory_limit(RECIPE) >> 20} MiB of memory to decode"


def test_an_image_at_which_a_library_fails_in_its_own_way_is_left_out(decoding: Decoder, folder: Path):
    (folder / "1b.png").write_bytes(png(9, b"FAULT"))
    outcomes, _ = decoding.decode(items(folder), [None] * 7)
    assert outcomes["reason"].to_pylist() == [None, None, "corrupt", None, None, None, None]
    assert outcomes["detail"][2].as_py() == "its decoder failed: ZeroDivisionError"


def test_a_file_that_grew_beyond_the_limit_since_it_was_listed_ends_nothing(decoding: Decoder, folder: Path):
    listed = items(folder)
    os.truncate(folder / "3.png", 4 * memory_limit(RECIPE))
    outcomes, _ = decoding.decode(listed, [None] * 6)
    assert outcomes["reason"].to_pylist() == [None, None, None, "too_large", None, None]


def test_known_content_is_not_decoded(decoding: Decoder, folder: Path):
    known = hashlib.sha256(png(2)).digest()
    outcomes, _ = decoding.decode(items(folder), [known] * 6)
    assert outcomes["same"].to_pylist() == [False, False, True, False, False, False]
    assert outcomes["pixels"][2].as_py() is None


def test_a_source_that_is_not_there_is_no_fault_of_its_images(folder: Path, tmp_path: Path):
    decoder = Decoder(FolderSource(str(tmp_path / "elsewhere")), RECIPE, 64)
    with pytest.raises(DataError, match="elsewhere"):
        decoder.decode(items(folder), [None] * 6)
    decoder.close()


PARENT = """
import sys, time
from components.ingest.decoder import Decoder
from components.ingest.folders import FolderSource
from components.spaces.pixels import PixelSpace
from components.ingest.listing import Item
decoder = Decoder(FolderSource(sys.argv[1]), PixelSpace(), 8)
decoder.decode([Item("0.png", None, 1, "")], [None])
print(decoder._child.pid, flush=True)
time.sleep(100)
"""


def test_a_child_does_not_outlive_its_parent(folder: Path):
    with subprocess.Popen([sys.executable, "-c", PARENT, str(folder)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
        parent.wait()
    gone = threading.Event()
    for _ in range(100):
        if not _lives(child):
            gone.set()
            break
        time.sleep(0.1)
    assert gone.is_set()


def _lives(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def test_a_large_file_is_not_even_read(folder: Path):
    (folder / "9.png").write_bytes(b"")
    os.truncate(folder / "9.png", memory_limit(RECIPE))
    decoder = Decoder(FolderSource(str(folder)), RECIPE, 64)
    outcomes, _ = decoder.decode(items(folder), [None] * 7)
    decoder.close()
    assert outcomes["reason"][6].as_py() == "too_large"
