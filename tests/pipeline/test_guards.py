"""What stops an attempt before it trains, and when failures become an alert."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.data.drift import NO_DISTANCE, Distance, Drift, Histogram, LabelCount
from pipeline.retraining.alerts import failures_in_row, next_failures, raises_alert
from pipeline.retraining.guards import Finding, check_budget, check_data, planned_hours
from pipeline.retraining.summary import Outcome

FAR, BY_CHANCE = Distance(value=0.5, p_value=0.0005), Distance(value=0.5, p_value=0.001)


def drift(
    new_images: int = 100,
    quarantined: dict[str, int] | None = None,
    labels: Distance = NO_DISTANCE,
    brightness: Distance = NO_DISTANCE,
    unseen: dict[str, int] | None = None,
) -> Drift:
    return Drift(
        num_before=1000,
        new_images=new_images,
        removed_images=0,
        quarantined=quarantined or {},
        labels=labels,
        brightness=brightness,
        contrast=NO_DISTANCE,
        num_labels=2,
        label_counts=(LabelCount(name="cat", before=1000, new=new_images),),
        num_unseen_labels=len(unseen or {}),
        unseen_labels=unseen or {},
        grey=Histogram(before=(1,), new=(1,), mean_before=0.4, mean_new=0.6),
        shown_before=(0,),
        shown_new=(0,),
    )


def check(of: Drift, least: int = 10, quarantined: float = 0.2, labels: float = 0.3, brightness: float = 0.15) -> Finding | None:
    return check_data(of, min_new_images=least, max_quarantined_fraction=quarantined, max_label_drift=labels, max_brightness_drift=brightness)


def found(of: Drift, least: int = 10) -> tuple[str, str]:
    finding = check(of, least)
    assert finding is not None
    return finding.kind, finding.reason


@pytest.mark.parametrize(
    "fine",
    [
        drift(),
        drift(10),
        drift(80, {"truncated": 20}),
        drift(100, {"duplicate": 5000}),
        drift(labels=Distance(value=0.3, p_value=0.0005), brightness=Distance(value=0.15, p_value=0.0005)),
        drift(labels=BY_CHANCE, brightness=BY_CHANCE),
    ],
)
def test_data_at_their_limits_and_distances_by_chance_are_in_order(fine: Drift):
    assert check(fine) is None


def test_too_few_new_images_skip_the_attempt():
    assert found(drift(9)) == ("skip", "retrain.min_new_images=10 new images are needed, and there are 9; wait for more, or lower it")
    assert found(drift(1))[1].endswith("and there is 1; wait for more, or lower it")
    assert found(drift(0, {"duplicate": 40}))[0] == "skip"
    assert check(drift(0), least=0) is None


def test_too_many_quarantined_files_stop_the_attempt_and_are_told_by_reason():
    assert found(drift(12, {"truncated": 38, "duplicate": 9, "empty": 2})) == (
        "stop",
        "retrain.max_quarantined_fraction=0.2 is exceeded: 40 of 52 new files (77%) are quarantined (38 truncated, 9 duplicate, 2 empty); "
        "mend or remove them (`ddpm data show` names them), or raise it",
    )
    many = found(drift(0, {f"reason {n}": 9 - n for n in range(6)}), least=0)[1]
    assert "(9 reason 0, 8 reason 1, 7 reason 2, 6 reason 3 and 2 more)" in many


def test_a_distance_beyond_its_limit_and_beyond_chance_stops_the_attempt():
    kind, reason = found(drift(labels=FAR, unseen={"horse": 40, "a\nb": 3}))
    assert kind == "stop"
    assert reason.startswith("retrain.max_label_drift=0.3 is exceeded: the distance of new images from those before is 0.5, ")
    assert "labels that no image had before: 40 horse, 3 a b; look at the picture" in reason
    kind, reason = found(drift(brightness=FAR))
    assert kind == "stop"
    assert reason.startswith("retrain.max_brightness_drift=0.15 is exceeded: ")
    assert "their mean grey value 0.60, 0.40 before" in reason
    assert check(drift(labels=FAR, brightness=FAR), labels=1, brightness=1) is None


def test_all_that_is_wrong_is_told_at_once():
    kind, reason = found(drift(5, {"truncated": 50}, FAR, FAR))
    assert kind == "stop"
    names = ["max_quarantined_fraction", "max_label_drift", "max_brightness_drift", "min_new_images"]
    places = [reason.index(f"retrain.{name}=") for name in names]
    assert places == sorted(places)
    assert "\n" not in reason


@given(
    st.integers(0, 1000),
    st.integers(0, 1000),
    st.sampled_from([NO_DISTANCE, FAR, BY_CHANCE]),
    st.sampled_from([NO_DISTANCE, FAR, BY_CHANCE]),
    st.integers(0, 1000),
    st.floats(0, 1),
)
def test_a_guard_speaks_exactly_when_a_limit_is_broken(new: int, bad: int, labels: Distance, brightness: Distance, least: int, most: float):
    of = drift(new, {"truncated": bad} if bad else {}, labels, brightness)
    stops = [bad > most * (new + bad) if new + bad else False, labels is FAR, brightness is FAR]
    finding = check(of, least, most)
    expected = "stop" if any(stops) else "skip" if new < least else None
    assert (finding.kind if finding else None) == expected
    assert (finding.reason.count("retrain.") if finding else 0) == sum(stops) + (new < least)


def budget(max_hours: float | None, speed: float | None, steps: int = 360_000, workers: int = 1, batch: int = 100) -> Finding | None:
    return check_budget(steps=steps, global_batch_size=batch, images_per_second=speed, num_workers=workers, max_hours=max_hours)


@pytest.mark.parametrize(("speed", "workers", "hours"), [(1000.0, 1, 10.0), (1000.0, 4, 40.0), (4000.0, 4, 10.0)])
def test_planned_hours_count_every_device(speed: float, workers: int, hours: float):
    assert planned_hours(steps=360_000, global_batch_size=100, images_per_second=speed, num_workers=workers) == hours
    assert budget(hours, speed, workers=workers) is None
    finding = budget(hours / 2, speed, workers=workers)
    assert finding is not None
    assert finding.kind == "stop"
    assert finding.reason.endswith("set retrain.steps to 180,000 or fewer, or raise it")
    assert budget(hours / 2, speed, steps=180_000, workers=workers) is None


def test_a_plan_over_its_budget_is_told_with_its_parts():
    assert budget(0.5, 1.0, steps=1000, workers=2, batch=1000) == Finding(
        "stop",
        "retrain.max_hours=0.5 is less than the plan of 556 device-hours: "
        "1,000 steps of 1,000 images at 1 images/s on 2 workers; not one step fits, so raise it",
    )


@pytest.mark.parametrize("speed", [None, 0.0, -1.0, math.nan, math.inf])
def test_an_unknown_speed_is_noted_and_refuses_nothing(speed: float | None):
    finding = budget(1.0, speed)
    assert finding is not None
    assert finding.kind == "note"
    assert "max_hours=1 cannot be held against a plan" in finding.reason
    assert budget(None, speed) is None


@given(st.integers(1, 10**6), st.integers(1, 4096), st.floats(0.1, 1e5), st.integers(1, 64), st.floats(0.01, 1e4))
def test_a_plan_is_refused_exactly_where_it_takes_longer_than_allowed(steps: int, batch: int, speed: float, workers: int, hours: float):
    finding = budget(hours, speed, steps, workers, batch)
    planned = planned_hours(steps=steps, global_batch_size=batch, images_per_second=speed, num_workers=workers)
    assert planned is not None
    assert (finding is not None) == (planned > hours)


@pytest.mark.parametrize(
    ("outcomes", "failures"),
    [
        ([], 0),
        (["failed"], 1),
        (["failed", "stopped", "failed"], 3),
        (["failed", "promoted"], 0),
        (["failed", "kept", "failed"], 1),
        (["failed", "skipped", "failed"], 2),
        (["failed", "skipped", "open", "abandoned"], 1),
        (["promoted", "skipped"], 0),
    ],
)
def test_failures_in_a_row_end_with_a_measured_model_and_are_not_hidden_by_days_without_news(outcomes: list[Outcome], failures: int):
    assert failures_in_row(outcomes) == failures


def test_the_alert_is_raised_at_every_so_many_failures_in_a_row():
    failures, raised = 0, []
    week: list[Outcome] = ["failed", "failed", "failed", "skipped", "stopped", "failed", "failed", "kept", "failed", "failed", "failed"]
    for day, outcome in enumerate(week):
        failures = next_failures(failures, outcome)
        if raises_alert(failures, outcome, 3):
            raised.append(day)
    assert raised == [2, 6, 10]
    assert [raises_alert(count, "failed", 1) for count in (1, 2, 3)] == [True] * 3
