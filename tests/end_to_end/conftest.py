"""One small run of the whole pipeline on this machine, which several files of tests look at."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import TINY, Finished


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def first(home: Path, command: Callable[..., Finished]) -> dict[str, Any]:
    done = command("run", "digits", *TINY, "--json", cwd=home)
    assert done.code == 0, done.stderr
    return done.json
