"""Fixtures that several tests share."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from servers import Conditions, S3Server, s3_server
from support import Finished, ddpm


@pytest.fixture(autouse=True)
def no_tracking_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts every test without MLflow's settings, which MLflow itself leaves in the environment."""
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Keeps torch to one thread: small networks are slower by more."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def command() -> Callable[..., Finished]:
    return ddpm


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="module")
def s3_of_kind(tmp_path_factory: pytest.TempPathFactory, s3: S3Server) -> Iterator[Callable[[Conditions], S3Server]]:
    """Returns a function that gives a store by what it makes of conditional writes, started when it is first asked for."""
    made: dict[Conditions, S3Server] = {"honoured": s3}
    with ExitStack() as stack:

        def start(conditions: Conditions) -> S3Server:
            if conditions not in made:
                made[conditions] = stack.enter_context(s3_server(tmp_path_factory.mktemp(conditions), conditions=conditions))
            return made[conditions]

        yield start


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
