"""Samples as a dataset: parquet shards of the same contract as the images that a model is trained on."""

import hashlib
import json

import numpy as np
import pyarrow as pa

from components.data.shards import (
    DIGEST_LENGTH,
    QUARANTINE_SCHEMA,
    ROWS_SCHEMA,
    SHARDS,
    Manifest,
    Shard,
    shard_table,
    write_manifest,
    write_quarantine,
    write_rows,
    write_shard,
)
from components.spaces.space import Space
from components.storage import Location
from pipeline.measurement.sample_store import SEEDS_PER_PART, SampleSet, parts_of, pixels_file, read_parts

SHARD_BYTES = 16 << 20


def keep_samples(storage: Location, samples: SampleSet, pixels_folder: Location, seeds: range, space: Space, label_names: list[str]) -> Location:
    """Writes the pixels of a block of seeds as a dataset and returns its folder; the same samples give the same bytes.

    Args:
        pixels_folder: where the pixels of all parts lie.
        space: what rows are.
        label_names: of the classes, empty for a model without labels.
    """
    folder = storage / "datasets" / f"samples-{samples.folder.name}"
    parts = parts_of(seeds, SEEDS_PER_PART)
    per_shard = max(1, SHARD_BYTES // (space.row_bytes * SEEDS_PER_PART))
    shards: list[Shard] = []
    tables: list[pa.Table] = []
    for first in range(0, len(parts), per_shard):
        group = parts[first : first + per_shard]
        pixels = np.concatenate(list(read_parts(pixels_file(pixels_folder, part) for part in group)))
        table = _shard_table(samples, range(group[0].start, group[-1].stop), pixels, space, label_names)
        shards.append(write_shard(folder / SHARDS, table, space, "train"))
        tables.append(_rows(table, len(shards) - 1))
    rows = pa.concat_tables(tables)
    digest = hashlib.sha256(
        b"".join([json.dumps(space.definition()).encode(), *rows["sha256"].to_pylist(), *map(str.encode, rows["source"].to_pylist())])
    ).hexdigest()
    version = folder / digest[:DIGEST_LENGTH]
    rows_file, rows_sha256 = write_rows(version, rows)
    write_quarantine(version, QUARANTINE_SCHEMA.empty_table())
    labels = rows["label"].value_counts().to_pylist() if label_names else []
    manifest = Manifest(
        digest=digest[:DIGEST_LENGTH],
        source=str(samples.folder),
        definition=str(space.definition()[0]),
        space=space,
        num_listed=len(rows),
        num_rows=len(rows),
        num_quarantined=0,
        quarantined={},
        num_ignored=0,
        ignored={},
        splits={"train": len(rows)},
        labels={entry["values"]: entry["counts"] for entry in sorted(labels, key=lambda entry: entry["values"])},
        source_bytes=0,
        rows_file=rows_file,
        rows_sha256=rows_sha256,
        shards=tuple(shards),
    )
    write_manifest(version, manifest)
    return version


def _shard_table(samples: SampleSet, seeds: range, pixels: np.ndarray, space: Space, label_names: list[str]) -> pa.Table:
    classes = samples.labels(seeds)
    labels = [None] * len(seeds) if classes is None else [label_names[number] for number in classes]
    return shard_table(space, pixels, pa.array(labels, pa.string()), pa.array([f"seed-{seed:012d}" for seed in seeds]))


def _rows(table: pa.Table, shard: int) -> pa.Table:
    content = [hashlib.sha256(pixels).digest() for pixels in table["pixels"].to_pylist()]
    count = table.num_rows
    columns = [table["source"], table["label"], ["train"] * count, [-1] * count, content, [shard] * count, list(range(count))]
    return pa.table(columns, schema=ROWS_SCHEMA)
