"""Names and paths that a file system can hold: checked when a person gives them, for an operating system says so only when the work has begun.

A name is held by all file systems that storage may lie on or move to: eCryptfs holds 143 bytes, Windows and its shares no device's name and no dot at
the end, and some take `Digits` and `digits` for one name.
"""

import os
import re
from collections.abc import Collection
from pathlib import Path

MAX_NAME, MAX_MODEL_NAME = 100, 128
"""Characters. What is made of them is longer: a run's job and its log file, a model's experiment `NAME champion log`."""
MAX_PART, MAX_PATH, MAX_ROOT = 255, 3500, 500
"""Bytes of one folder or file, of a path, and of a storage root, which leaves room for what lies below, for an S3 key and for MLflow's 2,048 characters."""
MAX_BUCKET, MAX_KEY = 63, 900
RIGHT = "letters, digits, '.', '_' and '-', a letter or digit first"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_MODEL_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._ -]*")
_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def why_no_name(name: str, what: str = "name") -> str | None:
    """Returns what is wrong with the name of a run and what would be right, to follow the name; None where nothing is.

    Args:
        what: what it should be the name of, such as `run name`.
    """
    if not _NAME.fullmatch(name):
        return f"is no {what}; use {RIGHT}"
    return _why_not_held(name, MAX_NAME)


def why_no_model_name(name: str) -> str | None:
    """Returns what is wrong with the name of a registered model and what would be right; None where nothing is."""
    if not _MODEL_NAME.fullmatch(name) or name.endswith(" "):
        return f"is not a valid model name; use {RIGHT}, spaces only between them"
    return _why_not_held(name, MAX_MODEL_NAME)


def _why_not_held(name: str, most: int) -> str | None:
    if len(name) > most:
        return f"has {len(name)} characters; use up to {most}"
    if name.endswith("."):
        return "ends in a dot, which some file systems drop; leave it out"
    if _DEVICE.fullmatch(name):
        return "is the name of a device on some systems; use another"
    return None


def why_no_path(text: str, most: int = MAX_PATH) -> str | None:
    """Returns why neither a file system nor S3 can hold a path, and what would be right; None where it can. Nothing is looked up but a home folder.

    Args:
        text: a path, or s3://BUCKET/KEY.
        most: bytes of the whole, written out.
    """
    if _CONTROL.search(text):
        return "holds a line break or another control character; leave it out"
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return "holds a character that no path can hold; leave it out"
    return _why_no_key(text, most) if text.startswith("s3://") else _why_no_local_path(text, most)


def why_no_root(text: str) -> str | None:
    """Returns why a path can be no storage root, and what would be right; None where it can."""
    if (wrong := why_no_path(text, MAX_ROOT)) or text.startswith("s3://"):
        return wrong
    written_out = str(Path(text).expanduser().absolute())
    if "?" in written_out:
        return "has a '?' in its path, at which the address of MLflow's database would end; use another folder"
    if not is_plain(written_out):
        return "has bytes in its path that are no UTF-8, which MLflow would write otherwise; use another folder"
    return None


def is_plain(text: str) -> bool:
    """Tells whether text is Unicode of one line, without control characters: bytes that are none become lone surrogates on a command line."""
    return not _CONTROL.search(text) and not any("\ud800" <= letter <= "\udfff" for letter in text)


def _why_no_key(text: str, most: int) -> str | None:
    bucket, _, key = text.removeprefix("s3://").partition("/")
    for what, part, limit in (("bucket", bucket, MAX_BUCKET), ("key", key, min(most, MAX_KEY))):
        if len(os.fsencode(part)) > limit:
            return f"has a {what} of {len(os.fsencode(part))} bytes; use up to {limit}"
    return None


def _why_no_local_path(text: str, most: int) -> str | None:
    try:
        path = Path(text).expanduser().absolute()
    except RuntimeError:
        return "begins with the home folder of a user who is not known here; write the path out"
    size, longest = len(os.fsencode(path)), max(len(os.fsencode(part)) for part in path.parts)
    if longest > MAX_PART:
        return f"has a name of {longest} bytes in it, and file systems hold {MAX_PART}; use a shorter one"
    return f"is a path of {size} bytes; use one of up to {most}" if size > most else None


def what_is_no_folder(path: Path) -> Path | None:
    """Returns what stands in the way of a folder: the path itself or what it lies in, where that is no folder; None where one is there or can be made.

    Raises:
        OSError: if that cannot be looked up.
    """
    there = next(place for place in (path, *path.parents) if place.exists())
    return None if there.is_dir() else there


def namesake(name: str, there: Collection[str], is_there: bool) -> str | None:
    """Returns the name in a folder that its file system takes for another, because it does not tell capital letters from small ones.

    Args:
        there: the names in the folder, as it lists them.
        is_there: whether the file system finds the name in the folder.
    """
    if name in there or not is_there:
        return None
    return next((other for other in there if other.casefold() == name.casefold()), None)
