"""When failures in a row become an alert."""

from collections.abc import Sequence

from pipeline.retraining.summary import Outcome

_FAILURES: tuple[Outcome, ...] = ("failed", "stopped")
_SUCCESSES: tuple[Outcome, ...] = ("promoted", "kept")


def next_failures(failures: int, outcome: Outcome) -> int:
    """Returns the failures in a row after an outcome.

    What failed, or was stopped by a guard, is a failure; a model that was measured ends the row. All others, such as a skip, tried nothing: they
    neither count nor end it, so that days without news do not hide that every day with news fails.
    """
    return 0 if outcome in _SUCCESSES else failures + (outcome in _FAILURES)


def failures_in_row(outcomes: Sequence[Outcome]) -> int:
    """Returns how many failures in a row outcomes end with, the last outcome last."""
    failures = 0
    for outcome in outcomes:
        failures = next_failures(failures, outcome)
    return failures


def raises_alert(failures: int, outcome: Outcome, alert_after: int) -> bool:
    """Tells whether an outcome raises the alert: the failure that makes `alert_after` in a row, and again every so many.

    Args:
        failures: in a row, the outcome included.
        alert_after: 1 or more.
    """
    return outcome in _FAILURES and failures % alert_after == 0
