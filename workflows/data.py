"""`ddpm data`: which datasets there are, what one holds, and what changed from one to another."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from components.counts import counted
from workflows.options import Commands, file_to_write, storage_of, writing

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

    from components.data.catalog import Dataset
    from components.data.diff import Change, DatasetDiff
    from components.data.shards import Manifest
    from components.data.summary import Reason

MOST_LABELS, MOST_PARTS = 20, 6
WIDTH, BAR_WIDTH = 140, 40

data_app = Commands(
    name="data",
    help="Datasets: list, show, diff; models, which learned from one; forget images.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Storage = Annotated[str, typer.Option("--storage", help="Storage root below which datasets lie: a folder, or s3://BUCKET/PREFIX.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the same as JSON, as the only thing on stdout.")]
_MEANT = "A dataset's folder, or how its name or digest begins, as `ddpm data list` prints it."


@data_app.command("list")
def list_datasets(storage: Storage = "./storage", as_json: AsJson = False) -> None:
    """List the datasets below a storage root, newest last."""
    from components.data.catalog import Catalog

    catalog = Catalog.of(storage_of(storage))
    for error in catalog.unreadable.values():
        typer.echo(f"warning: {error}", err=True)
    if as_json:
        _print_json([_line(dataset) for dataset in catalog.datasets])
    elif catalog.datasets:
        _print_list(catalog.datasets)
    else:
        sys.stdout.write(f"no datasets below {catalog.storage} yet; ddpm preprocess digits makes one\n")


@data_app.command()
def show(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help=_MEANT)],
    out: Annotated[str, typer.Option(metavar="FILE", help="Contact sheet to write: PNG. Its folder must be there.")] = "contact.png",
    storage: Storage = "./storage",
    as_json: AsJson = False,
) -> None:
    """Say what a dataset holds and what was left out of it, and draw some of its images."""
    from components.data.catalog import find_dataset
    from components.data.summary import quarantine_by_reason

    file = file_to_write("--out", out, ".png")
    found = find_dataset(dataset, storage_of(storage))
    reasons = quarantine_by_reason(found.folder, found.manifest)
    _save_sheet(found, file)
    if as_json:
        _print_json(_facts(found, reasons, file))
    else:
        _print_facts(found, reasons, file)


@data_app.command()
def diff(
    before: Annotated[str, typer.Argument(metavar="BEFORE", help=_MEANT)],
    after: Annotated[str, typer.Argument(metavar="AFTER", help="Another one, named in the same way.")],
    storage: Storage = "./storage",
    as_json: AsJson = False,
) -> None:
    """Say what changed from one dataset to another: rows, labels, splits, quarantine, recipe."""
    from components.data.catalog import find_dataset
    from components.data.diff import diff_datasets

    root = storage_of(storage)
    one, other = find_dataset(before, root), find_dataset(after, root)
    found = diff_datasets(one, other)
    if as_json:
        _print_json({"before": _line(one), "after": _line(other), "equal": found.equal, "other_pixels": found.other_pixels, **asdict(found)})
    else:
        _print_changes(one, other, found)


@data_app.command()
def models(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help=_MEANT)],
    storage: Storage = "./storage",
    as_json: AsJson = False,
) -> None:
    """List the registered versions that learned from a dataset: trained on it, or started from the weights of one that did."""
    from components.data.catalog import find_dataset
    from pipeline.registry.lineage import learned_from
    from pipeline.tracking import connect

    root = storage_of(storage)
    found = find_dataset(dataset, root)
    learned = learned_from(connect(root, create=False), {found.manifest.digest: f"dataset {found.name}"})
    if as_json:
        _print_json([one.to_json() for one in learned])
        return
    table = _table("model", "version", "aliases", "how", right=(1,))
    for one in learned:
        _add(table, one.version.name, str(one.version.version), ", ".join(one.version.aliases), one.how)
    _console().print(table if learned else f"no registered version learned from {found.name}")


@data_app.command()
def forget(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="SHA-256 of the encoded image, its path as a dataset lists it, or a file here.")],
    why: Annotated[str, typer.Option("--why", metavar="REASON", help="Why, for the records.")] = "",
    retrain: Annotated[str | None, typer.Option("--retrain", metavar="PRESET", help="Retrain at once by this preset, from fresh weights.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="With --retrain: a setting that overrides the preset's.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="With --retrain: what the retraining is called.")] = None,
    storage: Storage = "./storage",
    as_json: AsJson = False,
) -> None:
    """Keep images out of every dataset from now on; says which datasets, runs and versions hold them, and tags the versions."""
    from workflows.forget import forget as forget_images
    from workflows.forget import retrain_without
    from workflows.storage import registry
    from workflows.streams import stdout_to_stderr

    root = storage_of(storage)
    with stdout_to_stderr() as stdout:
        found = forget_images(root, registry(root), images, why)
        made = None if retrain is None else retrain_without(retrain, [*(settings or []), f"cluster.storage={storage}"], name)
        if as_json:
            stdout.write(json.dumps(found.to_json() | ({} if made is None else {"retrained": made}), indent=2) + "\n")
        else:
            stdout.write("".join(f"{line}\n" for line in [*found.lines(), *([] if made is None else [made])]))


def _save_sheet(dataset: "Dataset", out: Path) -> None:
    from components.data.summary import dataset_sheet

    sheet = dataset_sheet(dataset.folder, dataset.manifest)
    with writing("--out", out):
        sheet.save(out)


def _print_json(facts: object) -> None:
    sys.stdout.write(json.dumps(facts, indent=2) + "\n")


def _line(dataset: "Dataset") -> dict[str, object]:
    manifest = dataset.manifest
    return {
        "name": dataset.name,
        "digest": manifest.digest,
        "source": manifest.source,
        "rows": manifest.num_rows,
        "splits": manifest.splits,
        "quarantined": manifest.num_quarantined,
        "space": manifest.space.model_dump(mode="json"),
        "shard_bytes": dataset.shard_bytes,
        "written": _written(dataset),
        "folder": str(dataset.folder),
    }


def _written(dataset: "Dataset") -> str:
    return datetime.fromtimestamp(dataset.written, UTC).isoformat(timespec="seconds")


def _facts(dataset: "Dataset", reasons: "Mapping[str, Reason]", out: Path) -> dict[str, object]:
    manifest = dataset.manifest
    return _line(dataset) | {
        "definition": manifest.definition,
        "listed": manifest.num_listed,
        "ignored": manifest.ignored,
        "source_bytes": manifest.source_bytes,
        "num_shards": len(manifest.shards),
        "source_splits": manifest.source_splits,
        "source_split": manifest.source_split,
        "holdout_split": manifest.holdout_split,
        "labels": manifest.labels,
        "largest_label": max(manifest.labels, key=manifest.labels.__getitem__, default=None),
        "smallest_label": min(manifest.labels, key=manifest.labels.__getitem__, default=None),
        "quarantine": {reason: asdict(found) for reason, found in reasons.items()},
        "quarantine_file": _quarantine_file(dataset),
        "contact_sheet": str(out),
    }


def _quarantine_file(dataset: "Dataset") -> str:
    from components.data.shards import QUARANTINE

    return str(dataset.folder / QUARANTINE)


def _print_list(datasets: "Sequence[Dataset]") -> None:
    from rich.filesize import decimal

    table = _table("name", "source", "train", "held out", "quarantined", "rows are", "shards", "written", right=(2, 3, 4, 6))
    for dataset in datasets:
        manifest = dataset.manifest
        held_out = manifest.num_rows - manifest.num_train
        counts = (f"{count:,}" for count in (manifest.num_train, held_out, manifest.num_quarantined))
        _add(table, dataset.name, manifest.source, *counts, _image(manifest), decimal(dataset.shard_bytes), _written(dataset)[:16].replace("T", " "))
    _console().print(table)


def _image(manifest: "Manifest") -> str:
    return manifest.space.description


def _source_splits(manifest: "Manifest") -> str:
    from components.ingest.splits import SourceSplits

    used = manifest.source_split
    return "" if used is None else SourceSplits(manifest.source_splits, used, manifest.holdout_split).in_words


def _print_facts(dataset: "Dataset", reasons: "Mapping[str, Reason]", out: Path) -> None:
    from rich.filesize import decimal

    manifest, console = dataset.manifest, _console()
    facts = {
        "source": manifest.source,
        "digest": manifest.digest,
        "folder": str(dataset.folder),
        "definition": manifest.definition,
        "space": ", ".join(f"{key}={json.dumps(value)}" for key, value in manifest.space.model_dump(mode="json").items()),
        "listed": f"{manifest.num_listed:,} = {counted(manifest.num_rows, 'row', ',')} + {manifest.num_quarantined:,} quarantined",
        "ignored": f"{manifest.num_ignored:,} that are no images by their name{_in_brackets(manifest.ignored)}",
        "splits": ", ".join(f"{name} {rows:,}" for name, rows in manifest.splits.items()),
        "source splits": _source_splits(manifest),
        "bytes": f"{decimal(manifest.source_bytes)} of source files, {decimal(dataset.shard_bytes)} in {counted(len(manifest.shards), 'shard', ',')}",
        "labels": _label_line(manifest.labels),
        "contact sheet": str(out),
    }
    table = _table(dataset.name, "")
    for name, value in facts.items():
        if value:
            _add(table, name, value)
    console.print(table)
    if manifest.labels:
        console.print(_label_table(manifest))
    if reasons:
        console.print(_quarantine_table(reasons))
        console.print(f"all of them  {_quarantine_file(dataset)}", soft_wrap=True, markup=False)


def _label_line(labels: Mapping[str, int]) -> str:
    if not labels:
        return "none"
    largest, smallest = (choose(labels, key=labels.__getitem__) for choose in (max, min))
    return f"{len(labels):,}: largest {largest} ({labels[largest]:,}), smallest {smallest} ({labels[smallest]:,})"


def _label_table(manifest: "Manifest") -> "Table":
    """Returns a bar for each label by name, or for the largest ones where there are many."""
    from rich.bar import Bar

    labels = sorted(manifest.labels.items(), key=lambda item: -item[1])
    shown, most = labels[:MOST_LABELS], labels[0][1]
    table = _table("label", "rows", "", right=(1,))
    for name, rows in shown if len(labels) > MOST_LABELS else sorted(shown):
        _add(table, name, f"{rows:,}", Bar(most, 0, rows, width=BAR_WIDTH))
    rest = labels[MOST_LABELS:]
    if rest:
        _add(table, f"and {len(rest):,} more", f"{sum(rows for _, rows in rest):,}", f"each of {rest[0][1]:,} or fewer")
    unlabelled = manifest.num_rows - sum(manifest.labels.values())
    if unlabelled:
        _add(table, "(no label)", f"{unlabelled:,}", Bar(max(most, unlabelled), 0, unlabelled, width=BAR_WIDTH))
    return table


def _quarantine_table(reasons: "Mapping[str, Reason]") -> "Table":
    table = _table("quarantined", "files", "such as", right=(1,))
    for reason, found in reasons.items():
        _add(table, reason, f"{found.count:,}", "\n".join(found.examples))
    return table


_HAPPENED = {
    "added": "rows added",
    "removed": "rows removed",
    "renamed": "rows renamed",
    "changed": "other content",
    "relabelled": "other label",
    "moved": "other split",
    "newly": "newly quarantined",
    "no_longer": "no longer quarantined",
    "other_reason": "quarantined otherwise",
}


def _print_changes(before: "Dataset", after: "Dataset", changes: "DatasetDiff") -> None:
    console = _console()
    for word, dataset in (("from", before), ("to  ", after)):
        console.print(f"{word} {dataset.name}: {dataset.manifest.source}, {counted(dataset.manifest.num_rows, 'row', ',')}", soft_wrap=True, markup=False)
    if changes.equal:
        console.print("equal: nothing differs")
        return
    if changes.settings or changes.ignored:
        console.print(_settings_table(changes))
    if changes.other_pixels:
        console.print("every row is made in another way")
    happened = {name: change for name, change in (changes.rows | changes.quarantine).items() if change.count}
    if happened:
        console.print(_happened_table(happened))
    console.print(f"{counted(changes.same_rows, 'row', ',')} with path and content as before")
    if not changes.same_digest and not changes.other_pixels and not happened:
        console.print("yet the digests differ: the same files were decoded to other pixels, or limits of the recipe changed")


def _settings_table(changes: "DatasetDiff") -> "Table":
    table = _table("setting", "before", "after")
    for name, (old, new) in changes.settings.items():
        _add(table, name, old, new)
    for suffix, (few, many) in changes.ignored.items():
        _add(table, f"ignored {suffix} files", f"{few:,}", f"{many:,}")
    return table


def _happened_table(happened: "Mapping[str, Change]") -> "Table":
    table = _table("what", "count", "of", "such as", right=(1,))
    for name, change in happened.items():
        _add(table, _HAPPENED[name], f"{change.count:,}", "\n".join(_parts(change.by)), "\n".join(change.examples))
    return table


def _parts(counts: Mapping[str, int]) -> Iterable[str]:
    lines = [f"{count:,} {name}" for name, count in list(counts.items())[:MOST_PARTS]]
    return lines + ([f"and {len(counts) - MOST_PARTS:,} more"] if len(counts) > MOST_PARTS else [])


def _in_brackets(counts: Mapping[str, int]) -> str:
    return f" ({', '.join(_parts(counts))})" if counts else ""


def _table(*columns: str, right: Sequence[int] = ()) -> "Table":
    from rich.table import Table

    table = Table()
    for number, name in enumerate(columns):
        table.add_column(name, overflow="fold", justify="right" if number in right else "left")
    return table


def _add(table: "Table", *cells: "str | RenderableType") -> None:
    """Adds a row; text is printed as it is, for names of files and labels may look like markup."""
    from rich.text import Text

    table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))


def _console() -> "Console":
    from rich.console import Console

    return Console(file=sys.stdout, highlight=False, force_terminal=sys.stdout.isatty(), width=None if sys.stdout.isatty() else WIDTH)
