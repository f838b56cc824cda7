"""What workers write down, and who may."""

from pathlib import Path

import pytest

from components.storage import Location
from pipeline import notebook
from pipeline.notebook import Attempt, MetricsLine, NotebookReader, NotebookWriter, SupersededError, last_logged_step, read_metrics


def line(step: int, loss: float = 0.5) -> MetricsLine:
    return MetricsLine(step=step, timestamp_ms=1, metrics={"train/loss": loss})


def test_lines_are_read_while_they_are_written_file_after_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(notebook, "LINES_PER_FILE", 3)
    folder = Location.of(tmp_path)
    writer, reader = NotebookWriter(Attempt(folder)), NotebookReader(folder)
    assert (reader.lines(), last_logged_step(folder)) == ([], -1)
    for step in range(1, 9):
        writer.append(line(step))
        assert [entry.step for entry in reader.lines()] == list(range(1, step + 1))
    assert list((folder / "metrics").files()) == ["0001-00000.jsonl", "0001-00001.jsonl", "0001-00002.jsonl"]


def test_a_later_attempt_goes_on_after_the_last_line_and_leaves_the_earlier_ones_alone(tmp_path: Path):
    folder = Location.of(tmp_path)
    first = NotebookWriter(Attempt(folder))
    for step in (2, 4, 6):
        first.append(line(step, 0.1))
    second = NotebookWriter(Attempt(folder))
    for step in (4, 6, 8):
        second.append(line(step, 0.2))
    assert [(entry.step, entry.metrics["train/loss"]) for entry in read_metrics(folder)] == [(2, 0.1), (4, 0.1), (6, 0.1), (8, 0.2)]


def test_a_worker_whose_attempt_was_superseded_writes_nothing(tmp_path: Path):
    folder = Location.of(tmp_path)
    cut_off = Attempt(folder)
    writer = NotebookWriter(cut_off)
    writer.append(line(2))
    present = Attempt(folder)
    assert (cut_off.number, present.number) == (1, 2)
    with pytest.raises(SupersededError, match=r"attempt 1 .* was superseded by attempt 2"):
        writer.append(line(4))
    with pytest.raises(SupersededError):
        cut_off.check()
    present.check()
    assert [entry.step for entry in read_metrics(folder)] == [2]
