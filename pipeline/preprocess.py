"""Images in, parquet shards out: Ray Data maps over a plan with one row per output shard."""

import hashlib
import json
import re
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cluster.connect import connect
from components.data.images import CHANNELS, decode, to_pixels_array, to_square
from components.data.shards import (
    BadFile,
    Manifest,
    Shard,
    check_whole,
    dataset_digest,
    describe_shard,
    read_manifest,
    read_quarantine,
    read_shard,
    write_manifest,
    write_quarantine,
    write_shard,
)
from components.data.sources import DataConfig, Item, Listing, Source, open_source, printable
from components.errors import DataError
from components.storage import Location
from pipeline.artifacts import ShardSet
from pipeline.context import StageContext

MIN_ROWS = 2
VERSION = "pixels v1: EXIF turned, on white, centre crop, bicubic antialiased"


@dataclass(frozen=True)
class ShardTask:
    """All that one task needs to make one shard; it travels to the worker."""

    source: Source
    config: DataConfig
    folder: str
    plan: str
    anew: bool = False


def plan_digest(config: DataConfig, listing: Listing) -> str:
    """Returns the digest of all that decides a dataset's rows: the files, and what becomes of their pixels."""
    decisive = [VERSION, listing.digest(), config.image_size, config.mode, config.shard_bytes]
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:16]


def list_source(config: DataConfig, storage: Location) -> tuple[Source, Listing, str]:
    """Returns the source, its listing, and the digest of the plan made of both.

    Raises:
        DataError: if the source cannot be read or is empty.
    """
    if storage.is_local and Path(config.source).is_dir() and storage.path.is_relative_to(Path(config.source).absolute().resolve()):
        raise DataError(f"data.source={config.source} holds the storage root {storage}, whose pictures are no data; set cluster.storage to a folder outside it")
    source = open_source(config, str(storage / "downloads") if storage.is_local else str(Path(tempfile.gettempdir()) / "ddpm-downloads"))
    listing = source.listing()
    return source, listing, plan_digest(config, listing)


def preprocess(config: DataConfig, listed: tuple[Source, Listing, str], *, context: StageContext, anew: bool = False) -> ShardSet:
    """Turns a source into a dataset below `datasets/` and returns its receipt.

    Args:
        anew: make every shard again, each replaced in one move, so that whoever reads the dataset goes on undisturbed.

    Raises:
        DataError: if more than `data.max_bad_fraction` of the images are bad.
    """
    source, listing, plan = listed
    folder = dataset_folder(context.storage, plan)
    manifest = None if anew else _finished(folder)
    if manifest is None:
        manifest = _build(ShardTask(source, config, str(folder), plan, anew), listing, context)
    elif manifest.num_quarantined > config.max_bad_fraction * manifest.num_listed:
        raise DataError(_too_many_bad(config, read_quarantine(folder), manifest.num_listed, folder))
    return _receipt(folder, manifest, context.inputs)


def _finished(folder: Location) -> Manifest | None:
    try:
        manifest = read_manifest(folder)
        check_whole(folder, manifest)
    except DataError:
        return None
    return manifest


def _build(task: ShardTask, listing: Listing, context: StageContext) -> Manifest:
    config, folder, plan = task.config, Location.of(task.folder), task.plan
    shards, bad = _run_tasks(task, _cut(listing.items, config), context)
    write_quarantine(folder, bad)
    if len(bad) > config.max_bad_fraction * len(listing.items) or not shards:
        raise DataError(_too_many_bad(config, bad, len(listing.items), folder))
    manifest = _describe(config, listing, plan, shards, bad)
    if manifest.num_rows < MIN_ROWS:
        raise DataError(f"data.source={config.source} gives {manifest.num_rows} usable image; name a source of at least {MIN_ROWS}")
    write_manifest(folder, manifest)
    return manifest


def _cut(items: list[Item], config: DataConfig) -> list[list[Item]]:
    rows = max(1, config.shard_bytes // (CHANNELS[config.mode] * config.image_size**2))
    return [items[first : first + rows] for first in range(0, len(items), rows)]


def _run_tasks(task: ShardTask, pieces: list[list[Item]], context: StageContext) -> tuple[list[Shard], list[BadFile]]:
    connect(context.cluster)
    import ray.data

    results: dict[int, str] = {}
    with context.reporter.progress("preprocess", sum(map(len, pieces)), "images") as advance:
        plan = [{"shard": number, "items": json.dumps(items)} for number, items in enumerate(pieces)]
        options: dict[str, Any] = {"label_selector": context.cluster.preprocess_labels} if context.cluster.preprocess_labels else {}
        made = ray.data.from_items(plan, override_num_blocks=len(plan)).map(partial(make_shard, task=task), num_cpus=1, **options)
        try:
            for row in made.iter_rows():
                results[row["shard"]] = row["result"]
                advance(len(pieces[row["shard"]]))
        except ray.exceptions.RayTaskError as error:
            raise _data_error(error) or error from error
    outcomes = [json.loads(results[number]) for number in range(len(pieces))]
    shards = [Shard.model_validate(outcome["shard"]) for outcome in outcomes if outcome["shard"]]
    return shards, [BadFile.model_validate(line) for outcome in outcomes for line in outcome["bad"]]


def _data_error(error: BaseException | None) -> DataError | None:
    """Returns what the source of a task said, if that is why it failed."""
    found = re.findall(r"DataError: (.*)", str(error))
    return DataError(found[-1]) if found else None


def make_shard(row: dict[str, Any], task: ShardTask) -> dict[str, Any]:
    """Makes one shard, or finds it made by an earlier run of the same plan; returns its entry and its bad files as JSON."""
    path = Location.of(task.folder) / f"shard-{row['shard']:05d}.parquet"
    items = [Item(*values) for values in json.loads(row["items"])]
    shard, bad = (None if task.anew else _reuse(path, items, task)) or _make(path, items, task)
    outcome = {"shard": shard.model_dump() if shard else None, "bad": [line.model_dump() for line in bad]}
    return {"shard": row["shard"], "result": json.dumps(outcome)}


def _reuse(path: Location, items: list[Item], task: ShardTask) -> tuple[Shard, list[BadFile]] | None:
    """Returns a shard that is already there whole, if none of its files was bad (else the bad ones must be named again)."""
    if not path.is_file():
        return None
    try:
        pixels, labels, sources, plan = read_shard(path)
    except DataError:
        return None
    if plan != task.plan or sources != [printable(item.path) for item in items]:
        return None
    return describe_shard(path, pixels, labels, sources), []


def _make(path: Location, items: list[Item], task: ShardTask) -> tuple[Shard | None, list[BadFile]]:
    size, mode = task.config.image_size, task.config.mode
    task.source.open()
    pixels = np.empty((len(items), CHANNELS[mode], size, size), np.uint8)
    kept: list[Item] = []
    bad: list[BadFile] = []
    for item in items:
        try:
            pixels[len(kept)] = to_pixels_array(to_square(decode(task.source.fetch(item.path), mode), size))
            kept.append(item)
        except DataError as error:
            bad.append(BadFile(path=printable(item.path), reason=error.reason, detail=str(error), bytes=item.size))
    if not kept:
        return None, bad
    labels = [None if item.label is None else printable(item.label) for item in kept]
    return write_shard(path, pixels[: len(kept)], labels, [printable(item.path) for item in kept], task.plan), bad


def _too_many_bad(config: DataConfig, bad: list[BadFile], listed: int, folder: Location) -> str:
    first = bad[0]
    return (
        f"data.max_bad_fraction={config.max_bad_fraction} is exceeded: {len(bad)} of {listed} images are bad, the first {first.path} "
        f"({first.reason}: {first.detail}); all are listed in {folder / 'quarantine.parquet'}; mend the images or allow more"
    )


def _describe(config: DataConfig, listing: Listing, plan: str, shards: list[Shard], bad: list[BadFile]) -> Manifest:
    labels: Counter[str] = Counter()
    for shard in shards:
        labels.update({name: count for name, count in shard.labels.items() if name})
    channels = CHANNELS[config.mode]
    return Manifest(
        digest=dataset_digest(config.image_size, channels, shards),
        plan=plan,
        source=config.source,
        image_size=config.image_size,
        channels=channels,
        num_rows=sum(shard.rows for shard in shards),
        num_listed=len(listing.items),
        num_quarantined=len(bad),
        num_ignored=sum(listing.ignored.values()),
        ignored=dict(listing.ignored),
        quarantined=dict(sorted(Counter(line.reason for line in bad).items())),
        labels=dict(sorted(labels.items())),
        shards=tuple(shards),
    )


def _receipt(folder: Location, manifest: Manifest, inputs: str) -> ShardSet:
    return ShardSet(
        inputs=inputs,
        path=str(folder),
        digest=manifest.digest,
        source=manifest.source,
        num_rows=manifest.num_rows,
        num_listed=manifest.num_listed,
        num_quarantined=manifest.num_quarantined,
        num_ignored=manifest.num_ignored,
        quarantined=manifest.quarantined,
        num_labels=len(manifest.labels),
        num_shards=len(manifest.shards),
        image_size=manifest.image_size,
        channels=manifest.channels,
    )


def is_intact(receipt: ShardSet) -> bool:
    """Tells whether the dataset that a receipt describes is still there, whole and unchanged in digest."""
    manifest = _finished(Location.of(receipt.path))
    return manifest is not None and manifest.digest == receipt.digest


def dataset_folder(storage: Location, plan: str) -> Location:
    """Returns where the dataset of a plan lies."""
    return storage / "datasets" / plan
