"""`ddpm models`: which there are, which is best and why, and moving the champion."""

import contextlib
import json
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from workflows.options import Commands, storage_of

if TYPE_CHECKING:
    from pipeline.registry.move import Move
    from pipeline.tracking import Tracking


class _NameOrCommand(TyperGroup):
    """Takes what is no command for what `list` is asked: `ddpm models NAME` is `ddpm models list NAME`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        is_command = bool(args) and (args[0] in self.commands or args[0] in ("-h", "--help"))
        return super().parse_args(ctx, args if is_command else ["list", *args])


models_app = Commands(
    name="models",
    help="Registered models: list, show, compare, log, data; promote, rollback, delete.\n\nAlone it lists all of them.",
    cls=_NameOrCommand,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Storage = Annotated[str, typer.Option("--storage", help="Storage root whose MLflow store is used, unless MLFLOW_TRACKING_URI is set.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the same as JSON, as the only thing on stdout.")]
ModelName = Annotated[str, typer.Argument(metavar="NAME", help="A registered model.")]
Why = Annotated[str, typer.Option("--why", metavar="REASON", help="Why, for the log.")]


@models_app.command("list")
def list_(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One registered model; all by default.")] = None,
    as_json: AsJson = False,
    storage: Storage = "./storage",
) -> None:
    """List registered models: versions, metrics with their errors, aliases, decisions."""
    with _registry(storage) as (tracking, stdout):
        from pipeline.registry.browse import list_models, to_json
        from workflows.tables import print_models

        found = list_models(tracking, name)
        stdout.write(to_json(found) + "\n") if as_json else print_models(stdout, found)


@models_app.command()
def show(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="NAME (its champion), NAME/VERSION or NAME@ALIAS.")],
    as_json: AsJson = False,
    storage: Storage = "./storage",
) -> None:
    """Say all that is known of a version: number and unit, decision, data, recipe, where its pictures are."""
    with _registry(storage) as (tracking, stdout):
        from pipeline.registry.browse import facts_of, log_of
        from pipeline.registry.versions import CHAMPION, resolve
        from workflows.tables import print_version

        facts = facts_of(tracking, resolve(tracking, model, CHAMPION))
        moves = [move for move in log_of(tracking, facts.name) if facts.version in (move.version, move.champion)]
        if as_json:
            known = {"name": facts.name} | facts.to_json() | {"tags": facts.tags, "settings": facts.settings}
            stdout.write(json.dumps(known | {"log": [move.to_json() for move in moves]}, indent=2) + "\n")
        else:
            print_version(stdout, facts, moves, tracking.uri)


@models_app.command()
def compare(
    name: ModelName,
    versions: Annotated[
        list[str] | None, typer.Argument(metavar="[VERSION]...", help="Versions or aliases; by default champion, previous and candidate.")
    ] = None,
    as_json: AsJson = False,
    storage: Storage = "./storage",
) -> None:
    """Put versions side by side: numbers, and in what unit, data and settings differ. `ddpm compare` draws and measures anew."""
    with _registry(storage) as (tracking, stdout):
        from pipeline.registry.browse import contrast, facts_of
        from workflows.tables import print_contrast

        found = contrast([facts_of(tracking, version) for version in _meant(tracking, name, versions or [])])
        if as_json:
            rows = [version.to_json() | {"unlike": unlike} for version, unlike in zip(found.versions, found.unlike, strict=True)]
            stdout.write(json.dumps({"name": name, "versions": rows, "settings": found.settings}, indent=2) + "\n")
        else:
            print_contrast(stdout, name, found)


@models_app.command()
def log(name: ModelName, as_json: AsJson = False, storage: Storage = "./storage") -> None:
    """Print every decision and every move of the champion: who, when, why."""
    with _registry(storage) as (tracking, stdout):
        from pipeline.registry.browse import log_of
        from workflows.tables import print_moves

        moves = log_of(tracking, name)
        stdout.write(json.dumps([move.to_json() for move in moves], indent=2) + "\n") if as_json else print_moves(stdout, name, moves)


@models_app.command()
def data(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="NAME (its champion), NAME/VERSION or NAME@ALIAS.")],
    as_json: AsJson = False,
    storage: Storage = "./storage",
) -> None:
    """List the datasets that a version learned from: its own, and those of the versions whose weights it started from."""
    with _registry(storage) as (tracking, stdout):
        from pipeline.registry.lineage import ancestors
        from pipeline.registry.versions import CHAMPION, resolve
        from workflows.tables import print_data

        found = [(one, _dataset(one.tags.get("dataset.digest", ""), storage)) for one in ancestors(tracking, resolve(tracking, model, CHAMPION))]
        if as_json:
            keys = ("digest", "source", "rows")
            rows = [
                {"model": one.name, "version": one.version, "folder": place} | {key: one.tags.get(f"dataset.{key}") for key in keys} for one, place in found
            ]
            stdout.write(json.dumps(rows, indent=2) + "\n")
        else:
            print_data(stdout, found)


def _dataset(digest: str, storage: str) -> str | None:
    """Returns where a dataset lies, None where it no longer does."""
    from components.data.catalog import Catalog

    return next((str(dataset.folder) for dataset in Catalog.of(storage_of(storage)).datasets if dataset.manifest.digest == digest), None)


@models_app.command()
def promote(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="NAME (its newest version), NAME/VERSION or NAME@ALIAS.")],
    force: Annotated[bool, typer.Option("--force", help="Without the gate: the version need not be better, nor measured alike. Needs --why.")] = False,
    why: Why = "",
    as_json: AsJson = False,
    storage: Storage = "./storage",
) -> None:
    """Make a version champion, if it is better than the present one on the same seeds; the gate measures where nothing is kept."""
    from pipeline.errors import ConfigError

    if force and not why:
        raise ConfigError("--force needs --why REASON, which the log keeps")
    with _registry(storage) as (tracking, stdout):
        from pipeline.context import Reporter
        from pipeline.registry.gate import promote as promote_version
        from pipeline.registry.ledger import Ledger
        from pipeline.registry.versions import CANDIDATE, resolve
        from workflows.promote import judge_of

        version = resolve(tracking, model, CANDIDATE)
        judge = None if force else judge_of(version, tracking, storage_of(storage), Reporter())
        _say(stdout, promote_version(Ledger.of(tracking, version.name), int(version.version), judge, why), version.name, as_json)


@models_app.command()
def rollback(
    name: ModelName,
    to: Annotated[int | None, typer.Option("--to", metavar="VERSION", help="An earlier champion; the one before this by default.")] = None,
    why: Why = "",
    as_json: AsJson = False,
    storage: Storage = "./storage",
) -> None:
    """Make the champion before this one champion again."""
    with _registry(storage) as (tracking, stdout):
        from pipeline.registry.browse import list_models
        from pipeline.registry.gate import roll_back
        from pipeline.registry.ledger import Ledger

        list_models(tracking, name)
        _say(stdout, roll_back(Ledger.of(tracking, name), to, why), name, as_json)


@models_app.command()
def delete(model: Annotated[str, typer.Argument(metavar="NAME/VERSION", help="The version.")], storage: Storage = "./storage") -> None:
    """Delete a version from the registry; never the champion, nor the one that a rollback goes back to."""
    with _registry(storage) as (tracking, stdout):
        from pipeline.errors import ConfigError
        from pipeline.registry.gate import delete_version
        from pipeline.registry.ledger import Ledger
        from pipeline.registry.versions import CHAMPION, resolve

        if not model.rstrip("/").rpartition("/")[2].isdigit():
            raise ConfigError(f"{model} names no single version; write NAME/VERSION")
        version = resolve(tracking, model, CHAMPION)
        delete_version(Ledger.of(tracking, version.name), int(version.version))
        stdout.write(f"{version.name} version {version.version} is deleted\n")


def _meant(tracking: "Tracking", name: str, versions: list[str]) -> list:
    """Returns the versions that were named, or those that the three aliases point to, each once."""
    from pipeline.errors import RegistryError
    from pipeline.registry.browse import list_models
    from pipeline.registry.versions import CANDIDATE, CHAMPION, PREVIOUS, alias_of, find_model

    if versions:
        return [find_model(tracking, f"models:/{name}/{version}" if version.isdigit() else f"models:/{name}@{version}") for version in versions]
    list_models(tracking, name)
    numbers = [number for number in dict.fromkeys(alias_of(tracking, name, alias) for alias in (CHAMPION, PREVIOUS, CANDIDATE)) if number is not None]
    if not numbers:
        raise RegistryError(f"{name} has no champion, previous or candidate to compare; name versions, which `ddpm models {name}` lists")
    return [find_model(tracking, f"models:/{name}/{number}") for number in numbers]


def _say(stdout: IO[str], move: "Move", name: str, as_json: bool) -> None:
    stdout.write(json.dumps(move.to_json(), indent=2) + "\n" if as_json else f"champion of {name} is version {move.champion}: {move.why}\n")


@contextlib.contextmanager
def _registry(storage: str) -> "Iterator[tuple[Tracking, IO[str]]]":
    """Gives a block the registry, and the real stdout for what was asked for."""
    from pipeline.tracking import connect, translated
    from workflows.streams import stdout_to_stderr

    with stdout_to_stderr() as stdout:
        tracking = connect(storage_of(storage), create=False)
        with translated(tracking.uri):
            yield tracking, stdout
