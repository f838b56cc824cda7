"""Names and paths among the settings of a run, checked before any work."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from components.names import namesake, what_is_no_folder, why_no_path, why_no_root
from components.storage import Location
from pipeline.errors import ConfigError

LOCAL = ("data.root", "cluster.cache")
"""Settings that name a folder of a machine, never one on S3."""


def check_paths(paths: Mapping[str, str | None]) -> None:
    """Checks that settings name paths that a file system can hold; what lies there is not looked at.

    Args:
        paths: by setting; None where it names none.

    Raises:
        ValueError: naming the first setting that does not.
    """
    for setting, text in paths.items():
        if text is not None and (wrong := _why_wrong(setting, text)):
            raise ValueError(f"{setting}={text} {wrong}")


def _why_wrong(setting: str, text: str) -> str | None:
    if not text.strip():
        return "is empty; name a path, or leave the setting out"
    if setting in LOCAL and "://" in text:
        return "is not read from there; name a folder of the machine"
    return why_no_root(text) if setting == "cluster.storage" else why_no_path(text)


def check_cache(folder: str | None, *, is_used: bool) -> None:
    """Checks that this machine has or can make the folder of `cluster.cache`.

    Args:
        is_used: whether the run will write to it, so that it is made.

    Raises:
        ConfigError: if a file stands in its way, or it cannot be written.
    """
    if folder is None:
        return
    path = Path(folder).expanduser().absolute()
    try:
        blocked = what_is_no_folder(path)
        if blocked is None and is_used:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise ConfigError(f"cluster.cache={folder} cannot be written ({error.strerror}); name a folder with write permission") from error
    if blocked is not None:
        raise ConfigError(f"cluster.cache={folder} cannot be a folder, because {blocked} is not one; name another")


def check_namesake(folder: Location, name: str) -> None:
    """Checks that two names do not become one folder, as they do where a file system takes capital letters for small ones.

    Args:
        folder: where the folders of that kind of name lie.

    Raises:
        ConfigError: naming the one that is there.
    """
    if not folder.is_local:
        return
    other = namesake(name, folder.folders(), (folder / name).path.exists())
    if other is not None:
        raise ConfigError(f"--name {name} is the same as {other} to the file system of {folder}; use {other}, or a name that differs in more than case")
