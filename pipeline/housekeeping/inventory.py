"""Everything below a storage root as items, each with who needs it."""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from components.data.catalog import Dataset
from components.data.shards import MANIFEST, SHARDS
from components.errors import DataError
from components.model.retention import DAMAGED, checkpoints, snapshots_folder
from components.storage import Location
from pipeline.housekeeping.items import Inventory, Item, Kind, Retention, below, size_of
from pipeline.housekeeping.needs import Needs
from pipeline.housekeeping.records import LOCK, Records, RunRecords
from pipeline.preprocess import newest_dataset

if TYPE_CHECKING:
    from pipeline.registry.browse import VersionFacts

Tree = Literal["datasets", "latents"]
_KIND: dict[Tree, Kind] = {"datasets": "dataset", "latents": "latents"}
_OF_DATASETS = ("features", "references", "classifiers")
_WITH_ITEMS = ("mlflow", "runs", "datasets", "latents", "autoencoders", "samples", "cache", "ray-logs", "plans")


def take_inventory(
    storage: Location,
    models: "Mapping[str, Iterable[VersionFacts]]",
    retention: Retention,
    *,
    mine: frozenset[Location] = frozenset(),
    now: float | None = None,
) -> Inventory:
    """Looks through a storage root.

    Args:
        models: the registry's versions by model, newest first.
        mine: locks that this process holds.
        now: seconds since 1970; the present by default.

    Raises:
        OSError: if it cannot be looked through.
    """
    records = Records.of(storage, mine)
    return Inventory(tuple(_items(records, Needs(records, models, retention, time.time() if now is None else now))), records.problems)


def _items(records: Records, needs: Needs) -> Iterator[Item]:
    storage = records.storage
    for version, why in needs.versions:
        yield Item("version", f"{version.name}/{version.version}", (), 0, version.created_ms / 1000, why)
    yield from _folder("mlflow", storage / "mlflow", "runs and models", always=True)
    for run in records.runs:
        yield from _of_run(run, needs)
    datasets = list(_datasets(storage, "datasets", needs.of_datasets(), needs))
    latents = list(_datasets(storage, "latents", needs.of_latents(), needs))
    yield from datasets
    yield from latents
    for tree, items in (("datasets", datasets), ("latents", latents)):
        yield from _shards(storage, tree, items, needs)
    of_latents = {item.places[0].parent.name.partition("-")[0]: item.needed for item in latents if item.needed}
    yield from _of_children("autoencoder", storage / "autoencoders", needs.of_autoencoders() | of_latents, needs)
    yield from _of_children("samples", storage / "samples", needs.of_samples(), needs)
    digests = {item.places[0].name.partition("-")[0]: item.needed for item in datasets if item.needed}
    for kind in (storage / "cache").folders():
        for place in _children(storage / "cache" / kind):
            yield from _folder("cache", place, _of_cache(kind, place, digests, needs), needs)
    for folder in ("ray-logs", "plans"):  # rehearsals of plans that were killed
        yield from _of_children("logs", storage / folder, {}, needs)
    for place in _children(storage):
        if place.name not in _WITH_ITEMS:
            yield from _folder("other", place, "kept always", always=True)


def _of_children(kind: Kind, folder: Location, needed: Mapping[str, str], needs: Needs) -> Iterator[Item]:
    """Yields what lies in a folder; it is needed by its address, by its name, or where a run's settings or notes hold its name."""
    for place in _children(folder):
        yield from _folder(kind, place, needed.get(below(place)) or needed.get(place.name) or needs.of_word(place.name), needs)


def _children(folder: Location) -> list[Location]:
    return [folder / name for name in (*folder.folders(), *folder.files())]


def _folder(kind: Kind, place: Location, why: str, needs: Needs | None = None, *, always: bool = False) -> Iterator[Item]:
    size, written = size_of((place,))
    if size or not always:
        name = f"{place.parent.name}/{place.name}" if kind == "cache" else place.name
        yield Item(kind, name, (place,), size, written, why or (needs.young(written) if needs else ""))


def _of_cache(kind: str, place: Location, digests: Mapping[str, str], needs: Needs) -> str:
    if kind in _OF_DATASETS:
        return next((why for digest, why in digests.items() if place.name.startswith(digest)), "")
    return "weights from elsewhere" if kind == "inception" else needs.named(place)


def _of_run(run: RunRecords, needs: Needs) -> Iterator[Item]:
    lock, of_trainings = run.folder / LOCK, 0
    for training in run.trainings:
        damaged = [training.folder / name for name in training.folder.folders() if name.startswith(DAMAGED)]
        places = (*checkpoints(training.folder), *damaged, snapshots_folder(training.folder))
        size, _ = size_of(places)
        of_trainings += size
        if size:
            yield Item("training", f"{run.name}/{training.folder.name}", places, size, training.written, needs.trainings[training.folder], lock)
    size, written = size_of((run.folder,))
    yield Item("run", run.name, (run.folder,), size - of_trainings, written, needs.runs[run.folder], lock)


def _datasets(storage: Location, tree: Tree, needed: Mapping[str, str], needs: Needs) -> Iterator[Item]:
    for source in _sources(storage, tree):
        items = [_dataset(tree, source, source / name, needed, needs) for name in source.folders() if (source / name / MANIFEST).is_file()]
        # Tomorrow's dataset starts from the newest one; and a process that has just found it may not have said so yet.
        newest = newest_dataset(source) if needs.busy or any(item.needed for item in items) else ""
        for item in items:
            yield replace(item, needed="the newest of its source") if item.places[0].name == newest and not item.needed else item


def _dataset(tree: Tree, source: Location, folder: Location, needed: Mapping[str, str], needs: Needs) -> Item:
    name = f"{source.name}/{folder.name}" if tree == "datasets" else f"{source.parent.name}/{source.name}/{folder.name}"
    size, written = size_of((folder,))
    try:
        digest = Dataset.of(folder).manifest.digest if tree == "datasets" else ""
        why = needed.get(below(folder)) or needed.get(digest) or needs.named(folder) or needs.young(written)
    except DataError as error:
        why = f"its manifest cannot be read ({error})"
    return Item(_KIND[tree], name, (folder,), size, written, why, source / LOCK)


def _shards(storage: Location, tree: Tree, items: list[Item], needs: Needs) -> Iterator[Item]:
    """Yields the shards of every source, those that a dataset holds which stays and those that none does, and what is left of a source without datasets."""
    for source in _sources(storage, tree):
        staying = [item for item in items if item.places[0].parent == source and item.needed]
        there, wanted = (source / SHARDS).files(), _shards_of(staying)
        kept = set(there) if wanted is None else wanted & set(there)
        spare = [name for name in there if name not in kept and not (needs.busy and needs.young((source / SHARDS / name).modified()))]
        for names, why in ((sorted(kept), "datasets that stay"), (spare, "")):
            if names:
                places = tuple(source / SHARDS / name for name in names)
                yield Item("shards", f"{source.name}/shards", places, sum(there[name] for name in names), 0.0, why, source / LOCK)
        held = {SHARDS, LOCK, *(item.places[0].name for item in items if item.places[0].parent == source)}
        rest = tuple(place for place in _children(source) if place.name not in held)
        size, written = size_of(rest)
        if not staying and size and not needs.young(written):
            yield Item(_KIND[tree], f"{source.name} (what is known of its files)", rest, size, written, "", source / LOCK)


def _shards_of(items: list[Item]) -> set[str] | None:
    """Returns the names of the shards of datasets; None where one cannot be read."""
    try:
        return {shard.name for item in items for shard in Dataset.of(item.places[0]).manifest.shards}
    except DataError:
        return None


def _sources(storage: Location, tree: Tree) -> list[Location]:
    """Returns the folders that hold datasets with their shards: datasets/SOURCE, latents/SOURCE/AUTOENCODER."""
    root = storage / tree
    if tree == "datasets":
        return [root / name for name in root.folders()]
    return [root / source / name for source in root.folders() for name in (root / source).folders()]
