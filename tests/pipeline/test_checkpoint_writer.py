"""Checkpoints written beside the training: what is in them, and what becomes of one that cannot be written."""

import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from components.diffusion.config import DiffusionConfig
from components.model import checkpoint as checkpoint_module
from components.model.checkpoint import Resumable, TrainingRecord, TrainingState, load_training_state
from components.model.retention import checkpoints
from components.model.spec import DenoiserSpec
from components.networks.unet.config import UNetConfig
from components.spaces.pixels import PixelSpace
from components.storage import Location
from pipeline.training import checkpoint_writer
from pipeline.training.checkpoint_writer import CheckpointWriter, UnwritableError
from pipeline.training.config import TrainConfig
from pipeline.training.metrics_log import Attempt, MetricsLine, MetricsLogWriter, SupersededError, read_metrics

SPEC = DenoiserSpec(model=UNetConfig(), diffusion=DiffusionConfig(), space=PixelSpace(image_size=32, mode="RGB"))
CONFIG = TrainConfig(keep_last=2)


def everything(step: int, tensor: torch.Tensor) -> Resumable:
    record = TrainingRecord(step=step, train_digest="i", precision="float32", open_losses=(0.1, float("nan")), open_norms=(1.0, 2.0))
    return Resumable({"w": tensor}, TrainingState({"w": tensor}, {"0.exp_avg": tensor}, record), {"ema-0.5": {"w": tensor}})


@pytest.fixture
def little_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_checkpoint_holds_what_was_at_its_step_whatever_training_does_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, weights, may_write = Location.of(tmp_path), torch.zeros(4, 3, 5, 5).to(memory_format=torch.channels_last), threading.Event()
    write = checkpoint_module.write_checkpoint
    monkeypatch.setattr(checkpoint_writer, "write_checkpoint", lambda *args, **kwargs: (may_write.wait(), write(*args, **kwargs)))
    attempt = Attempt(folder)
    with MetricsLogWriter(attempt) as metrics_log, CheckpointWriter(attempt, metrics_log, SPEC, CONFIG, print) as writer:
        writer.save(everything(1, weights))
        weights += 7
        may_write.set()
        writer.save(everything(2, weights))
        weights += 7
        newest = writer.finish()
    found = {path.name: load_training_state(path) for path in checkpoints(folder)}
    assert newest == checkpoints(folder)[0]
    assert [float(found[name].ema["w"].unique()) for name in sorted(found)] == [0.0, 7.0]
    first = found["step_000000001-0001"]
    assert all(
        torch.equal(tensor, torch.zeros(4, 3, 5, 5))
        for tensor in (first.state.weights["w"], first.state.optimizer["0.exp_avg"], first.more_averages["ema-0.5"]["w"])
    )
    assert first.state.record.open_norms == (1.0, 2.0)
    assert first.state.record.open_losses[0] == 0.1
    assert first.state.record.open_losses[1] != first.state.record.open_losses[1]


def test_what_a_restart_would_not_write_again_is_written_before_the_checkpoint(tmp_path: Path):
    folder = Location.of(tmp_path)
    attempt = Attempt(folder)
    metrics_log = MetricsLogWriter(attempt)  # its own thread does not run
    with CheckpointWriter(attempt, metrics_log, SPEC, CONFIG, print) as writer:
        metrics_log.append(MetricsLine(step=1, timestamp_ms=0, metrics={"train/loss": 1.0}))
        writer.save(everything(1, torch.zeros(1)))
        writer.finish()
        assert [line.step for line in read_metrics(folder)] == [1]


def test_the_driver_is_told_when_the_checkpoint_is_whole(tmp_path: Path):
    attempt, told = Attempt(Location.of(tmp_path)), []
    with CheckpointWriter(attempt, MetricsLogWriter(attempt), SPEC, CONFIG, print) as writer:
        writer.save(everything(3, torch.zeros(1)), lambda step: told.append((step, [path.name for path in checkpoints(attempt.folder)])))
        writer.finish()
    assert told == [(3, ["step_000000003-0001"])]


def test_on_a_full_disk_training_goes_on_and_the_checkpoint_is_written_when_there_is_room(little_disk: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkpoint_writer, "RETRY_S", 0.05)
    folder, full, told = Location.of(little_disk), threading.Event(), []
    attempt, tensor = Attempt(folder), torch.rand(100_000)

    def report(trouble: str) -> None:
        told.append(trouble)
        full.set()

    with CheckpointWriter(attempt, MetricsLogWriter(attempt), SPEC, CONFIG, report) as writer:
        writer.save(everything(1, tensor))
        writer.finish()
        (little_disk / "other").write_bytes(bytes(2 << 20))
        writer.save(everything(2, tensor))
        assert full.wait(60)
        writer.save(everything(3, tensor))  # does not wait for the one that cannot be written
        assert [path.name for path in checkpoints(folder)] == ["step_000000001-0001"]
        (little_disk / "other").unlink()
        newest = writer.finish()
    assert newest is not None
    assert newest.name == "step_000000003-0001"
    assert torch.equal(load_training_state(newest).ema["w"], tensor)
    assert told[0] == "No space left on device"
    assert told[-1] == ""
    assert [path.name for path in little_disk.iterdir() if path.name.endswith(".tmp")] == []


def test_a_disk_that_stays_full_is_told_at_the_end(little_disk: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkpoint_writer, "RETRY_S", 0.05)
    monkeypatch.setattr(checkpoint_writer, "LAST_WRITE_S", 0.5)
    attempt = Attempt(Location.of(little_disk))
    with CheckpointWriter(attempt, MetricsLogWriter(attempt), SPEC, CONFIG, lambda trouble: None) as writer:
        writer.save(everything(1, torch.rand(3_000_000)))
        with pytest.raises(UnwritableError, match="No space left on device"):
            writer.finish()
    assert checkpoints(attempt.folder) == []


def test_an_attempt_that_another_took_the_place_of_writes_no_checkpoint(tmp_path: Path):
    attempt = Attempt(Location.of(tmp_path))
    with CheckpointWriter(attempt, MetricsLogWriter(attempt), SPEC, CONFIG, print) as writer:
        Attempt(attempt.folder)
        writer.save(everything(1, torch.zeros(1)))
        with pytest.raises(SupersededError):
            writer.finish()
        with pytest.raises(SupersededError):
            writer.save(everything(2, torch.zeros(1)))
    assert checkpoints(attempt.folder) == []
