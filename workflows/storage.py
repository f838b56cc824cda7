"""`ddpm storage` and `ddpm prune`: what takes the room below a storage root, who needs it, and removing what nobody does."""

import json
from collections.abc import Iterable
from typing import IO, TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from workflows.options import storage_of

if TYPE_CHECKING:
    from components.storage import Location
    from pipeline.housekeeping.items import Inventory, Item
    from pipeline.tracking import Tracking

Storage = Annotated[str, typer.Option("--storage", help="Storage root: a folder, or s3://BUCKET/PREFIX.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the same as JSON, as the only thing on stdout.")]
KeepDays = Annotated[float, typer.Option("--keep-days", min=0.0, help="Keep what was written within so many days.")]
KeepVersions = Annotated[
    int | None, typer.Option("--keep-versions", min=1, help="Newest versions of every model to keep, beside those that have an alias; all by default.")
]
Everything = Annotated[bool, typer.Option("--all", help="List every item, not only the largest of each kind.")]
LINES_PER_KIND = 8
WIDTH = 140


def storage_command(
    storage: Storage = "./storage", keep_days: KeepDays = 7.0, keep_versions: KeepVersions = None, everything: Everything = False, as_json: AsJson = False
) -> None:
    """Say what takes the room below a storage root, and what of it nothing needs any more; it changes nothing."""
    from pipeline.housekeeping.items import Retention
    from pipeline.housekeeping.prune import look
    from workflows.streams import stdout_to_stderr

    root = storage_of(storage)
    with stdout_to_stderr() as stdout:
        found = look(root, registry(root), Retention(keep_days, keep_versions))
        if as_json:
            stdout.write(json.dumps(_facts(found.items, found), indent=2) + "\n")
        else:
            _print(stdout, root, found, everything)


def prune_command(
    storage: Storage = "./storage",
    keep_days: KeepDays = 7.0,
    keep_versions: KeepVersions = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove what nothing needs any more: never what an alias, a version that is kept, a run in progress or one that can go on needs."""
    from rich.filesize import decimal

    from pipeline.context import Reporter
    from pipeline.housekeeping.items import Retention, in_words
    from pipeline.housekeeping.prune import look, prune
    from workflows.streams import stdout_to_stderr

    root, retention = storage_of(storage), Retention(keep_days, keep_versions)
    with stdout_to_stderr() as stdout:
        tracking = registry(root)
        if dry_run:
            found = look(root, tracking, retention)
            _say(stdout, "would remove", found.spare, found, as_json)
            return
        done = prune(root, tracking, retention, Reporter())
        if as_json:
            stdout.write(
                json.dumps({"removed": [item.facts for item in done.removed], "left": [item.facts for item in done.left], "bytes": done.bytes}, indent=2) + "\n"
            )
            return
        for problem in done.problems:
            stdout.write(f"note: {problem}\n")
        stdout.write(f"removed {in_words(done.removed)}: {decimal(done.bytes)}\n")
        if done.left:
            stdout.write(f"left {in_words(done.left)}, which came into use\n")


def registry(root: "Location") -> "Tracking | None":
    """Returns the registry, None where there is none yet."""
    from pipeline.tracking import connect, tracking_uri

    uri = tracking_uri(root)
    if uri.startswith("sqlite:///") and not (root / "mlflow" / "mlflow.db").is_file() and uri.endswith(str(root / "mlflow" / "mlflow.db")):
        return None
    return connect(root, create=False)


def _facts(items: "Iterable[Item]", found: "Inventory") -> dict[str, object]:
    items = list(items)
    return {
        "bytes": sum(item.bytes for item in items),
        "spare_bytes": sum(item.bytes for item in items if not item.needed),
        "items": [item.facts for item in items],
        "problems": list(found.problems),
    }


def _say(stdout: IO[str], does: str, items: "tuple[Item, ...]", found: "Inventory", as_json: bool) -> None:
    from rich.filesize import decimal

    from pipeline.housekeeping.items import in_words

    if as_json:
        stdout.write(json.dumps(_facts(items, found), indent=2) + "\n")
        return
    for item in items:
        stdout.write(f"  {item.kind} {item.name}, {decimal(item.bytes)}\n")
    stdout.write(f"{does} {in_words(items)}: {decimal(sum(item.bytes for item in items))}\n")


def _print(stdout: IO[str], root: "Location", found: "Inventory", everything: bool) -> None:
    from rich.filesize import decimal

    table = Table(title=f"{root}", title_justify="left")
    for name in ("kind", "name", "bytes", "needed by"):
        table.add_column(name, justify="right" if name == "bytes" else "left")
    for kind in dict.fromkeys(item.kind for item in found.items):
        mine = sorted((item for item in found.items if item.kind == kind), key=lambda item: -item.bytes)
        shown = mine if everything else mine[:LINES_PER_KIND]
        for item in shown:
            table.add_row(kind, escape(item.name), decimal(item.bytes), escape(item.needed) or "[yellow]nothing[/]")
        if len(mine) > len(shown):
            rest = mine[len(shown) :]
            table.add_row(kind, f"{len(rest)} more", decimal(sum(item.bytes for item in rest)), f"{sum(not item.needed for item in rest)} by nothing")
    console = Console(file=stdout, width=WIDTH)
    console.print(table)
    total, spare = sum(item.bytes for item in found.items), sum(item.bytes for item in found.spare)
    console.print(f"{decimal(total)} in all; {decimal(spare)} that nothing needs, which `ddpm prune` removes", highlight=False)
    for problem in found.problems:
        console.print(f"note: {problem}", highlight=False)
