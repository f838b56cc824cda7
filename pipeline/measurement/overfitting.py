"""Whether a training went on after held-out images had stopped to gain by it."""

from collections.abc import Sequence
from statistics import fmean

from pipeline.training.metrics_log import MetricsLine

WORSE = 0.02
"""Share by which the held-out loss must have risen from its lowest before it is said."""


def overfitting(lines: Sequence[MetricsLine]) -> str | None:
    """Returns a sentence where the training loss fell while the held-out loss rose; None where it did not, or nothing was measured.

    Args:
        lines: of the metrics log, by step.
    """
    measured = [(line.step, line.metrics["validation/loss"]) for line in lines if "validation/loss" in line.metrics]
    if len(measured) < 3:
        return None
    best_step, best = min(measured, key=lambda each: each[1])
    last_step, last = measured[-1]
    trained = [(line.step, line.metrics["train/loss"]) for line in lines if "train/loss" in line.metrics]
    window = max(1, len(trained) // 10)
    around = fmean(loss for _, loss in sorted(trained, key=lambda each: abs(each[0] - best_step))[:window])
    ended = fmean(loss for _, loss in trained[-window:])
    if last <= best * (1 + WORSE) or ended >= around:
        return None
    return (
        f"overfitting: from step {best_step} to {last_step} the training loss fell from {around:.4g} to {ended:.4g}, and the held-out loss rose "
        f"from {best:.4g} to {last:.4g}; train for fewer steps, with train.early_stop, more dropout or augmentation, or more images"
    )
