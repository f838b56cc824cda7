import pytest

from pipeline.measurement.overfitting import overfitting
from pipeline.training.metrics_log import MetricsLine


def lines(held_out: list[float], trained: list[float]) -> list[MetricsLine]:
    return [
        MetricsLine(step=10 * (index + 1), timestamp_ms=0, metrics={"train/loss": ours, "validation/loss": theirs})
        for index, (theirs, ours) in enumerate(zip(held_out, trained, strict=True))
    ]


def test_a_held_out_loss_that_rises_while_the_training_loss_falls_is_said():
    said = overfitting(lines([1.0, 0.8, 0.9, 1.1], [1.0, 0.7, 0.5, 0.3]))
    assert said is not None
    assert said.startswith("overfitting: from step 20 to 40 the training loss fell from 0.7 to 0.3, and the held-out loss rose from 0.8 to 1.1")


@pytest.mark.parametrize(
    ("held_out", "trained"),
    [([1.0, 0.8, 0.7], [1.0, 0.7, 0.5]), ([1.0, 0.8, 0.81], [1.0, 0.7, 0.5]), ([1.0, 0.8, 1.2], [1.0, 0.7, 0.9]), ([1.0, 2.0], [1.0, 0.1])],
)
def test_what_is_no_overfitting_is_not_called_so(held_out: list[float], trained: list[float]):
    assert overfitting(lines(held_out, trained)) is None


def test_a_training_without_measurements_says_nothing():
    assert overfitting([MetricsLine(step=step, timestamp_ms=0, metrics={"train/loss": 1.0}) for step in range(5)]) is None
