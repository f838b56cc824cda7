"""What a checkpoint's folder holds, by name, size and checksum; looking at it loads no torch."""

import hashlib
import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import DataError
from ..storage import Location

MANIFEST = "manifest.json"
MAIN_AVERAGE = "ema"
STAGING = ".tmp"


def sha256_of(path: Path) -> str:
    """Returns the hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def average_name(decay: float) -> str:
    """Returns what a checkpoint calls the average of a further decay, such as ema-0.999."""
    return f"{MAIN_AVERAGE}-{decay}"


_POWER = f"{MAIN_AVERAGE}-width-"


def power_average_name(width: float) -> str:
    """Returns what a checkpoint calls the power-function average of a width, such as ema-width-0.05."""
    return f"{_POWER}{width}"


def power_average_width(name: str) -> float | None:
    """Returns the width of a power-function average by its name, None of any other."""
    return float(name.removeprefix(_POWER)) if name.startswith(_POWER) else None


def manifest_of(path: Location) -> dict[str, tuple[int, str]]:
    """Returns what a checkpoint's manifest says: file name -> bytes and SHA-256.

    Raises:
        DataError: if there is none, or it is no manifest.
        OSError: if the storage cannot be reached, which says nothing about the checkpoint.
    """
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        return {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a whole checkpoint: its {MANIFEST} cannot be read ({error}); name a checkpoint folder") from error


def verify(path: Path, only: Collection[str] | None = None) -> dict[str, str]:
    """Checks the files of a checkpoint on this machine against its manifest and returns file name -> SHA-256.

    Args:
        only: the files to check; all by default.

    Raises:
        DataError: naming the first file that is missing or differs.
    """
    entries = {name: entry for name, entry in manifest_of(Location.of(path)).items() if only is None or name in only}
    for name, (size, checksum) in entries.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size or sha256_of(file) != checksum:
            raise DataError(f"{file} does not match the checksum in {MANIFEST}; restore it or use another checkpoint")
    return {name: checksum for name, (_, checksum) in entries.items()}


def is_complete(path: Location) -> bool:
    """Tells whether a checkpoint's files are all there with the sizes that its manifest says; their content is not read."""
    try:
        entries = manifest_of(path)
    except DataError:
        return False
    found = path.files()
    return all(found.get(name) == size for name, (size, _) in entries.items())


def averages_in(path: Location) -> list[str]:
    """Returns the averages that a checkpoint holds, such as ["ema", "ema-0.999"].

    Raises:
        DataError: if the folder is no whole checkpoint.
        OSError: if the storage cannot be reached.
    """
    names = [name.removesuffix(".safetensors") for name in manifest_of(path) if name.endswith(".safetensors")]
    return sorted(name for name in names if name == MAIN_AVERAGE or name.startswith(f"{MAIN_AVERAGE}-"))


@contextmanager
def copied(path: Location, only: Collection[str] | None) -> Iterator[Path]:
    """Gives a checkpoint's files, all or those named, on this machine.

    Raises:
        DataError: if one is missing.
        OSError: if the storage cannot be reached, or this machine's disk is full.
    """
    try:
        with path.local_copy(None if only is None else list(only)) as folder:
            yield folder
    except FileNotFoundError as error:
        raise DataError(f"{path} lacks a file ({error}); restore it or use another checkpoint") from error
