"""What several tests share: the command as a person runs it, and settings that make every stage tiny."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from components.data.images import PixelRecipe
from components.data.shards import ROWS_SCHEMA, SHARDS, Manifest, Shard, shard_table, write_manifest, write_rows, write_shard
from components.storage import Location

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
    recipe = PixelRecipe(image_size=size, mode="RGB" if channels == 3 else "L")
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
    write_manifest(folder, manifest)
    return manifest


def a_manifest(recipe: PixelRecipe, num_rows: int, *, rows_file: str, rows_sha256: str, shards: tuple[Shard, ...]) -> Manifest:
    """Returns the manifest of a dataset of which only the shards matter."""
    return Manifest(
        digest=hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest()[:16],
        source="test",
        definition="test",
        recipe=recipe,
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
