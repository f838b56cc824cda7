import pytest

from pipeline.artifacts import Metric, MetricUnit
from pipeline.register import Champion, decide, unlike_parts

UNIT = MetricUnit(
    extractor="fd_dct8_v1",
    extractor_digest="e",
    preprocessing="p",
    reference_digest="r",
    reference_count=100,
    num_samples=1000,
    first_seed=0,
    sampler="ddim",
    steps=50,
)


def metric(value: float, **changes: object) -> Metric:
    return Metric(value=value, unit=UNIT.model_copy(update=changes))


def test_the_first_version_is_champion():
    decision = decide(metric(5), None, 0.0)
    assert decision.promote
    assert decision.reason == "first version: fd_dct8_v1_1000 is 5, and there was no champion"


@pytest.mark.parametrize(
    ("candidate", "champion", "min_gain", "promote"),
    [(4.0, 5.0, 0.0, True), (5.0, 5.0, 0.0, False), (6.0, 5.0, 0.0, False), (4.5, 5.0, 0.5, True), (4.6, 5.0, 0.5, False), (float("nan"), 5.0, 0.0, False)],
)
def test_the_champion_falls_only_to_a_number_lower_by_the_gain(candidate: float, champion: float, min_gain: float, promote: bool):
    decision = decide(metric(candidate), Champion(3, metric(champion)), min_gain)
    assert decision.promote is promote
    assert "champion v3 has" in decision.reason


@pytest.mark.parametrize(
    "part",
    [
        {"extractor": "fid"},
        {"extractor_digest": "x"},
        {"preprocessing": "x"},
        {"reference_digest": "x"},
        {"reference_count": 1},
        {"num_samples": 9},
        {"first_seed": 9},
        {"sampler": "ancestral"},
        {"steps": 9},
    ],
    ids=lambda part: next(iter(part)),
)
def test_numbers_of_unlike_units_are_never_compared_and_the_part_is_named(part: dict[str, object]):
    decision = decide(metric(0.001, **part), Champion(3, metric(5)), 0.0)
    assert not decision.promote
    assert next(iter(part)) in decision.reason
    assert unlike_parts(UNIT, UNIT) == []


def test_a_champion_without_a_number_is_kept():
    decision = decide(metric(1), Champion(2, None), 0.0)
    assert not decision.promote
    assert "champion v2 carries no metric" in decision.reason
