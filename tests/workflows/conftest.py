"""The command, called in the test's own process."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from workflows.cli import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Returns a function that calls the command in this process: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ddpm", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capfd.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return call
