"""What workers write down, and who may."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from components.storage import Location
from pipeline.training import metrics_log
from pipeline.training.metrics_log import Attempt, MetricsLine, MetricsLogReader, MetricsLogWriter, SupersededError, open_metrics, read_metrics, system_folder


def line(step: int, loss: float = 0.5) -> MetricsLine:
    return MetricsLine(step=step, timestamp_ms=1, metrics={"train/loss": loss})


def steps_of(folder: Location) -> list[int]:
    return [entry.step for entry in read_metrics(folder)]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_lines_are_read_while_they_are_written_file_after_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metrics_log, "LINES_PER_FILE", 3)
    folder = Location.of(tmp_path)
    writer, reader = MetricsLogWriter(Attempt(folder)), open_metrics(folder)
    assert reader.lines() == []
    for step in range(1, 9):
        writer.append(line(step))
        writer.flush()
        assert [entry.step for entry in reader.lines()] == list(range(1, step + 1))
    assert list((folder / "metrics").files()) == ["0001-00000.jsonl", "0001-00001.jsonl", "0001-00002.jsonl"]


def test_many_lines_at_once_fill_one_file_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metrics_log, "LINES_PER_FILE", 3)
    folder = Location.of(tmp_path)
    writer = MetricsLogWriter(Attempt(folder))
    for steps in (range(1, 3), range(3, 9)):
        for step in steps:
            writer.append(line(step))
        writer.flush()
    assert steps_of(folder) == list(range(1, 9))
    assert [len((folder / "metrics" / name).read_text().splitlines()) for name in (folder / "metrics").files()] == [3, 3, 2]


def test_a_block_writes_by_itself_and_the_rest_when_it_ends(tmp_path: Path):
    folder = Location.of(tmp_path)
    with MetricsLogWriter(Attempt(folder)) as writer:
        writer.append(line(2))
        wait_until(lambda: steps_of(folder) == [2])
        writer.append(line(4))
    assert steps_of(folder) == [2, 4]


def test_lines_are_written_when_training_fails_in_the_block(tmp_path: Path):
    folder = Location.of(tmp_path)
    writer = MetricsLogWriter(Attempt(folder))

    def fail() -> None:
        with writer:
            writer.append(line(2))
            raise FloatingPointError

    with pytest.raises(FloatingPointError):
        fail()
    assert steps_of(folder) == [2]


def test_lines_wait_for_a_storage_that_is_away(tmp_path: Path):
    folder = Location.of(tmp_path)
    writer = MetricsLogWriter(Attempt(folder))
    (tmp_path / "metrics").write_text("in the way")
    writer.append(line(2))
    with pytest.raises(OSError, match="metrics"):
        writer.flush()
    (tmp_path / "metrics").unlink()
    writer.append(line(4))
    writer.flush()
    assert steps_of(folder) == [2, 4]


def test_a_later_attempt_goes_on_after_the_last_line_and_leaves_the_earlier_ones_alone(tmp_path: Path):
    folder = Location.of(tmp_path)
    for steps, loss in (((2, 4, 6), 0.1), ((4, 6, 8), 0.2)):
        with MetricsLogWriter(Attempt(folder)) as writer:
            for step in steps:
                writer.append(line(step, loss))
    assert [(entry.step, entry.metrics["train/loss"]) for entry in read_metrics(folder)] == [(2, 0.1), (4, 0.1), (6, 0.1), (8, 0.2)]


def test_a_worker_whose_attempt_was_superseded_writes_nothing(tmp_path: Path):
    folder = Location.of(tmp_path)
    cut_off = Attempt(folder)
    writer = MetricsLogWriter(cut_off)
    writer.append(line(2))
    writer.flush()
    present = Attempt(folder)
    assert (cut_off.number, present.number) == (1, 2)
    writer.append(line(4))
    with pytest.raises(SupersededError, match=r"attempt 1 .* was superseded by attempt 2"):
        writer.flush()
    with pytest.raises(SupersededError):
        cut_off.check()
    present.check()
    assert steps_of(folder) == [2]


def test_a_block_learns_that_its_attempt_was_superseded(tmp_path: Path):
    folder = Location.of(tmp_path)
    writer = MetricsLogWriter(Attempt(folder))
    Attempt(folder)

    def is_refused() -> bool:
        try:
            writer.append(line(2))
        except SupersededError:
            return True
        return False

    with pytest.raises(SupersededError), writer:
        wait_until(is_refused)
    assert steps_of(folder) == []


def test_workers_of_one_attempt_share_its_right_and_lose_it_together(tmp_path: Path):
    folder = Location.of(tmp_path)
    first = Attempt(folder)
    second = Attempt(folder, first.ticket)
    writer = MetricsLogWriter(second, system_folder(folder, 1))
    writer.append(line(2))
    writer.flush()
    assert [entry.step for entry in MetricsLogReader(folder / "system" / "1").lines()] == [2]
    first.check()
    Attempt(folder)
    writer.append(line(4))
    with pytest.raises(SupersededError):
        writer.flush()
