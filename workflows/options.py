"""What a person gives on the command line besides settings: names, files to write, storage roots. Checked before any work."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand

from components.names import what_is_no_folder, why_no_name, why_no_path, why_no_root
from components.storage import Location
from pipeline.errors import ConfigError

GIVEN = "COMMANDLINE"


class Command(TyperCommand):
    """A command that takes no empty value: what is left out has a default, and what is empty most often is a variable that was not set."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command.

        Raises:
            ConfigError: naming the first argument or option that is empty.
        """
        for parameter in self.params:
            value, source = ctx.params.get(parameter.name), ctx.get_parameter_source(parameter.name)
            if source is not None and source.name == GIVEN and "" in (value if isinstance(value, list | tuple) else [value]):
                right = "give a value" if parameter.required else "give a value, or leave it out"
                raise ConfigError(f"{_called(parameter)} '' is empty; {right}")
        return super().invoke(ctx)


class Commands(typer.Typer):
    """A group of such commands."""

    command = partialmethod(typer.Typer.command, cls=Command)


def _called(parameter: Any) -> str:
    return parameter.opts[0] if parameter.param_type_name == "option" else (parameter.metavar or parameter.name).strip("[].")


def run_name_of(name: str | None, preset: Path) -> str:
    """Returns the name of a run: the one given, else the preset's.

    Raises:
        ConfigError: if it is none.
    """
    run_name = preset.stem if name is None else name
    wrong = why_no_name(run_name, "run name")
    if wrong is None:
        return run_name
    if name is None:
        raise ConfigError(f"preset {preset} gives its name to the run, and {run_name!r} {wrong}; give another by --name, or rename the file")
    raise ConfigError(f"--name {name} {wrong}")


def storage_of(text: str) -> Location:
    """Returns the storage root that --storage names, which need not be there.

    Raises:
        ConfigError: if it is no folder, and cannot become one.
    """
    right = "name a folder, or s3://BUCKET/PREFIX"
    if "://" in text and not text.startswith("s3://"):
        raise ConfigError(f"--storage {text} is no storage; {right}")
    if wrong := why_no_root(text):
        raise ConfigError(f"--storage {text} {wrong}")
    root = Location.of(text)
    try:
        blocked = what_is_no_folder(root.path) if root.is_local else None
    except OSError as error:
        raise ConfigError(f"--storage {text} cannot be looked at ({error.strerror}); {right}") from error
    if blocked is not None:
        raise ConfigError(f"--storage {text} cannot be a folder, because {blocked} is not one; {right}")
    return root


def file_to_write(option: str, text: str, suffix: str = "") -> Path:
    """Returns the file that an option names, in a folder that is there and can be written to.

    Args:
        suffix: how its name must end, such as `.png`.

    Raises:
        ConfigError: if it cannot be written.
    """
    path = _local_path(option, text)
    if suffix and path.suffix.lower() != suffix:
        raise ConfigError(f"{option} {text} is no {suffix[1:].upper()} file; use a name that ends in {suffix}")
    with _permitted(option, text):
        _check_parent(option, text, path)
        if path.is_dir():
            raise ConfigError(f"{option} {text} is a folder; name a file")
        _try_to_write(path)
    return path


def address_to_write(option: str, text: str) -> Location:
    """Returns the file that an option names, on this machine or on S3.

    Raises:
        ConfigError: if no file system can hold it, or it cannot be written on this machine.
    """
    if not text.startswith("s3://"):
        return Location.of(file_to_write(option, text))
    if wrong := why_no_path(text):
        raise ConfigError(f"{option} {text} {wrong}")
    return Location.of(text)


def folder_to_write(option: str, text: str) -> Path:
    """Returns the folder that an option names, which can be written to, or can be made in one that is there.

    Raises:
        ConfigError: if it cannot.
    """
    path = _local_path(option, text)
    with _permitted(option, text):
        _check_parent(option, text, path)
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{option} {text} is a file; name a folder")
        _try_to_write(path / "file" if path.is_dir() else path)
    return path


def _local_path(option: str, text: str) -> Path:
    if "://" in text:
        raise ConfigError(f"{option} {text} is not written to from here; name a path on this machine")
    if wrong := why_no_path(text):
        raise ConfigError(f"{option} {text} {wrong}")
    return Path(text).expanduser()


def _check_parent(option: str, text: str, path: Path) -> None:
    if path.parent.is_dir():
        return
    blocked = what_is_no_folder(path.parent.absolute())
    wrong = f"there is no folder {path.parent}; make it, or" if blocked is None else f"{blocked} is no folder;"
    raise ConfigError(f"{option} {text}: {wrong} name another")


def _try_to_write(path: Path) -> None:
    """Opens a file that is there, or makes one beside it that goes at once: a mistake must not show when the work is done."""
    if path.is_file():
        path.open("ab").close()
    elif not path.exists():
        tempfile.TemporaryFile(dir=path.parent).close()


@contextmanager
def _permitted(option: str, text: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{option} {text} cannot be written ({error.strerror}); name another, or give write permission") from error


@contextmanager
def writing(option: str, named: object) -> Iterator[None]:
    """Says which file could not be written where a block that writes it fails.

    Raises:
        ConfigError: naming it.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{option} {named} cannot be written ({error.strerror}); name a file in a folder with write permission") from error
