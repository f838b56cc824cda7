"""What several tests share: the command as a person runs it, and settings that make every stage tiny."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from components.data.shards import Manifest, dataset_digest, write_manifest, write_shard
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
    shards = [
        write_shard(folder / f"shard-{number:05d}.parquet", piece, [label] * len(piece), [f"{number}/{row}" for row in range(len(piece))], "plan")
        for number, (piece, label) in enumerate(zip(pieces, labels, strict=True))
    ]
    rows, (channels, size) = sum(map(len, pieces)), pieces[0].shape[1:3]
    manifest = Manifest(
        digest=dataset_digest(size, channels, shards),
        plan="plan",
        source="test",
        image_size=size,
        channels=channels,
        num_rows=rows,
        num_listed=rows,
        num_quarantined=0,
        num_ignored=0,
        ignored={},
        quarantined={},
        labels={},
        shards=tuple(shards),
    )
    write_manifest(folder, manifest)
    return manifest
