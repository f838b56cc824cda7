"""What several tests share: the command as a person runs it, and settings that make every stage tiny."""

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from sklearn.datasets import load_digits

from components.data.catalog import Dataset
from components.data.shards import (
    QUARANTINE_SCHEMA,
    ROWS_SCHEMA,
    SHARDS,
    Manifest,
    Shard,
    Split,
    column_rows,
    read_checked_shard,
    shard_location,
    shard_table,
    write_manifest,
    write_quarantine,
    write_rows,
    write_shard,
)
from components.spaces.pixels import PixelSpace
from components.spaces.space import Space
from components.storage import Location
from pipeline.artifacts import MetricUnit

ROOT = Path(__file__).resolve().parent.parent
TINY = [
    "train.steps=12",
    "train.global_batch_size=32",
    "train.log_every=2",
    "train.checkpoint_every=4",
    "train.sample_every=100",
    "train.warmup_steps=2",
    "model.base_channels=8",
    "model.num_groups=4",
    "evaluate.num_samples=64",
    "evaluate.steps=4",
    "evaluate.batch_size=16",
    "evaluate.extractor=dct8",
]

UNIT = MetricUnit(
    extractor="fd_dct8_v1",
    extractor_digest="e",
    preprocessing="p",
    reference_digest="r",
    reference_count=100,
    num_samples=1000,
    first_seed=0,
    sampler="ddim",
    steps=50,
)
"""What numbers are measured in, where nothing is measured."""


@dataclass(frozen=True)
class Finished:
    """What a command left behind."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


def ddpm_command(*arguments: str) -> list[str]:
    """Returns the command as its own process runs it, this checkout first on the path."""
    return ["env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "workflows", *arguments]


def ddpm(*arguments: str, cwd: Path, env: Mapping[str, str] | None = None, timeout: int = 300) -> Finished:
    """Runs the command in a process of its own, as a person would."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")} | dict(env or {})
    done = subprocess.run(
        ddpm_command(*arguments),
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def write_dataset(folder: Location, pieces: Sequence[np.ndarray], labels: Sequence[str | None]) -> Manifest:
    """Writes pixels (N, C, H, W) as a dataset, one shard and one label for each piece, and returns its manifest."""
    channels, size = pieces[0].shape[1:3]
    recipe = PixelSpace(image_size=size, mode="RGB" if channels == 3 else "L")
    shards, rows = [], []
    for number, (piece, label) in enumerate(zip(pieces, labels, strict=True)):
        names = [f"{number}/{row}" for row in range(len(piece))]
        table = shard_table(recipe, piece, pa.array([label] * len(piece), pa.string()), pa.array(names))
        shards.append(write_shard(folder.parent / SHARDS, table, recipe, "train"))
        content = [hashlib.sha256(row.tobytes()).digest() for row in piece]
        rows.append(pa.table([names, [label] * len(piece), ["train"] * len(piece), [-1] * len(piece), content, [number] * len(piece), range(len(piece))],
                             schema=ROWS_SCHEMA))  # fmt: skip
    rows_file, rows_sha256 = write_rows(folder, pa.concat_tables(rows))
    manifest = a_manifest(recipe, sum(map(len, pieces)), rows_file=rows_file, rows_sha256=rows_sha256, shards=tuple(shards))
    counts = {label: sum(len(piece) for piece, other in zip(pieces, labels, strict=True) if other == label) for label in labels if label is not None}
    manifest = manifest.model_copy(update={"labels": counts})
    write_manifest(folder, manifest)
    return manifest


@dataclass(frozen=True)
class ListedFile:
    """A file of a source, by what it becomes: a row, or with a reason a line of the quarantine list."""

    path: str
    content: str = ""
    label: str | None = None
    split: Split = "train"
    reason: str = ""

    @property
    def sha256(self) -> bytes:
        return hashlib.sha256((self.content or self.path).encode()).digest()

    def pixels(self, recipe: PixelSpace) -> np.ndarray:
        """Returns (C, H, W) values that depend on the content alone."""
        return np.random.default_rng(list(self.sha256)).integers(0, 256, recipe.shape, dtype=np.uint8)


def write_listed(folder: Location, files: Sequence[ListedFile], recipe: PixelSpace | None = None, **fields: Any) -> Manifest:
    """Writes a dataset of files, whose images are noise, and returns its manifest.

    Args:
        fields: of the manifest, such as `source`.
    """
    recipe = recipe or PixelSpace(image_size=8, mode="L")
    rows, bad = [file for file in files if not file.reason], [file for file in files if file.reason]
    splits: tuple[Split, ...] = ("train", "holdout")
    parts = [(split, [file for file in rows if file.split == split]) for split in splits]
    shards = [write_shard(folder.parent / SHARDS, _shard_table(part, recipe), recipe, split) for split, part in parts if part]
    places = {id(file): (number, row) for number, part in enumerate([part for _, part in parts if part]) for row, file in enumerate(part)}
    lines = [(file.path, file.label, file.split, 100, file.sha256, *places[id(file)]) for file in rows]
    rows_file, rows_sha256 = write_rows(folder, pa.table(list(zip(*lines, strict=True)), schema=ROWS_SCHEMA))
    write_quarantine(folder, pa.Table.from_pylist([{"path": file.path, "reason": file.reason, "detail": "", "bytes": 1} for file in bad], QUARANTINE_SCHEMA))
    base = a_manifest(recipe, len(rows), rows_file=rows_file, rows_sha256=rows_sha256, shards=tuple(shards))
    counts = {
        "num_listed": len(files),
        "num_quarantined": len(bad),
        "quarantined": Counter(file.reason for file in bad),
        "splits": {split: len(part) for split, part in parts},
        "labels": Counter(file.label for file in rows if file.label is not None),
        "digest": hashlib.sha256(repr((recipe, [line[:5] for line in lines])).encode()).hexdigest()[:16],
    }
    manifest = Manifest.model_validate(base.model_dump() | counts | fields)
    write_manifest(folder, manifest)
    return manifest


def _shard_table(files: Sequence[ListedFile], recipe: PixelSpace) -> pa.Table:
    labels, paths = pa.array([file.label for file in files], pa.string()), pa.array([file.path for file in files])
    return shard_table(recipe, np.stack([file.pixels(recipe) for file in files]), labels, paths)


def a_manifest(recipe: Space, num_rows: int, *, rows_file: str, rows_sha256: str, shards: tuple[Shard, ...]) -> Manifest:
    """Returns the manifest of a dataset of which only the shards matter."""
    return Manifest(
        digest=hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest()[:16],
        source="test",
        definition="test",
        space=recipe,
        num_listed=num_rows,
        num_rows=num_rows,
        num_quarantined=0,
        quarantined={},
        num_ignored=0,
        ignored={},
        splits={"train": num_rows},
        labels={},
        source_bytes=0,
        rows_file=rows_file,
        rows_sha256=rows_sha256,
        shards=shards,
    )


def write_digits(source: Path, first: int, last: int) -> None:
    """Writes some of the 1,797 digits as PNG files, a folder for each label."""
    pixels, labels = load_digits(return_X_y=True)
    for index in range(first, last):
        file = source / str(labels[index]) / f"{index:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels[index].reshape(8, 8) * 15.9).astype(np.uint8)).save(file)


def shard_pixels(dataset: Dataset) -> set[bytes]:
    """Returns the pixels of every row of every shard of a dataset, whether its list of rows names it or not."""
    space, found = dataset.manifest.space, set()
    for shard in dataset.manifest.shards:
        table = read_checked_shard(shard_location(dataset.folder, shard.name))
        found |= {row.tobytes() for row in column_rows(table.column(space.column), space)}
    return found
