"""Fixtures that several tests share: real image folders, small networks, the command as a person runs it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

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


def ddpm(*arguments: str, cwd: Path, env: Mapping[str, str] | None = None, timeout: int = 300) -> Finished:
    """Runs the command in a process of its own, as a person would."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")} | dict(env or {})
    done = subprocess.run(
        [sys.executable, "-m", "workflows", *arguments],
        cwd=cwd,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


@pytest.fixture(autouse=True)
def no_tracking_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts every test without MLflow's settings, which MLflow itself leaves in the environment."""
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def command() -> Callable[..., Finished]:
    return ddpm


@pytest.fixture
def make_images() -> Callable[..., Path]:
    """Returns a function that writes JPEG and PNG files of random shapes below a folder, two labels, the same each time."""

    def make(folder: Path, count: int = 12, labels: tuple[str, ...] = ("cat", "dog")) -> Path:
        rng = np.random.default_rng(0)
        for index in range(count):
            target = folder / labels[index % len(labels)] / f"{index:04d}.{'jpg' if index % 3 else 'png'}"
            target.parent.mkdir(parents=True, exist_ok=True)
            height, width = rng.integers(20, 60, 2)
            Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(target)
        return folder

    return make
