import math

import pytest
from support import UNIT

from pipeline.artifacts import ChampionTest, Metric, MetricUnit, PairedTest
from pipeline.registry.decide import Champion, Decision, decide, unlike_parts


def metric(value: float, **changes: object) -> Metric:
    return Metric(value=value, unit=UNIT.model_copy(update=changes))


def test_the_first_version_is_champion():
    decision = decide(metric(5), None, None, 0.0)
    assert decision.promote
    assert decision.reason == "first version: fd_dct8_v1_1000 is 5, and there was no champion"


def paired(difference: float, standard_error: float = 0.1) -> PairedTest:
    return PairedTest(first_seed=0, num_samples=1000, candidate=5 + difference, champion=5, difference=difference, standard_error=standard_error)


def champion_test(first: float, second: float | None, standard_error: float = 0.1) -> ChampionTest:
    confirmation = None if second is None else paired(second, standard_error)
    return ChampionTest(champion_version=3, test=paired(first, standard_error), confirmation=confirmation)


@pytest.mark.parametrize(
    ("first", "second", "min_gain", "promote"),
    [
        (-1.0, -1.0, 0.0, True),
        (-1.0, None, 0.0, False),
        (-1.0, -0.1, 0.0, False),
        (-0.16, -1.0, 0.0, False),
        (-0.17, -0.17, 0.0, True),
        (0.0, -1.0, 0.0, False),
        (1.0, -1.0, 0.0, False),
        (-0.66, -0.66, 0.5, False),
        (-0.67, -0.67, 0.5, True),
        (-0.67, -0.66, 0.5, False),
        (math.nan, -1.0, 0.0, False),
        (-1.0, math.nan, 0.0, False),
        (-math.inf, math.nan, 0.0, False),
    ],
)
def test_the_champion_falls_only_to_a_gain_beyond_chance_on_both_blocks_of_seeds(first: float, second: float | None, min_gain: float, promote: bool):
    decision = decide(metric(4), Champion(3, metric(5)), champion_test(first, second), min_gain)
    assert decision.promote is promote
    assert decision.reason.startswith("better: " if promote else "kept: ")
    assert "champion v3 has" in decision.reason


def test_a_candidate_that_copies_training_images_is_kept_and_told_so():
    decision = decide(metric(1), Champion(3, metric(5)), champion_test(-4, -4), 0.0, copies=True)
    assert not decision.promote
    assert "copies training images" in decision.reason


def test_why_there_is_no_test_is_told():
    decision = decide(metric(1), Champion(3, metric(5)), "its checkpoint is gone", 0.0)
    assert not decision.promote
    assert decision.reason == "kept: champion v3 could not be measured beside it: its checkpoint is gone"


def test_why_there_is_no_test_is_told_of_a_champion_measured_otherwise_too():
    other = metric(5).model_copy(update={"unit": metric(5).unit.model_copy(update={"reference_digest": "another"})})
    decision = decide(metric(4), Champion(3, other), "its weights are gone", 0.0)
    assert decision == Decision(False, "kept: champion v3 could not be measured beside it: its weights are gone")


def test_a_lower_number_alone_promotes_nobody():
    decision = decide(metric(1), Champion(3, metric(5)), None, 0.0)
    assert not decision.promote
    assert "could not be measured beside it" in decision.reason


@pytest.mark.parametrize("standard_error", [math.nan, math.inf])
def test_an_unknown_error_promotes_nobody(standard_error: float):
    assert not decide(metric(1), Champion(3, metric(5)), champion_test(-4, -4, standard_error), 0.0).promote


@pytest.mark.parametrize(
    "part",
    [
        {"extractor": "fid"},
        {"extractor_digest": "x"},
        {"preprocessing": "x"},
        {"reference_digest": "x"},
        {"reference_count": 1},
        {"reference_split": "holdout"},
        {"weights": "elected"},
        {"num_samples": 9},
        {"first_seed": 9},
        {"sampler": "ancestral"},
        {"steps": 9},
        {"precision": "bfloat16"},
    ],
    ids=lambda part: next(iter(part)),
)
def test_numbers_of_unlike_units_are_never_compared_and_the_part_is_named(part: dict[str, object]):
    decision = decide(metric(0.001, **part), Champion(3, metric(5)), champion_test(-5, -5), 0.0)
    assert not decision.promote
    assert next(iter(part)) in decision.reason
    assert unlike_parts(UNIT, UNIT) == []


def test_a_champion_of_other_arithmetic_is_told_with_what_measures_alike():
    decision = decide(metric(4, precision="bfloat16"), Champion(3, metric(5)), None, 0.0)
    assert decision.reason == (
        "kept: not comparable with champion v3, whose unit differs: precision bfloat16 against float32; "
        "evaluate.precision=float32 measures as the champion was measured"
    )
    assert decide(metric(4), Champion(3, metric(5, precision="bfloat16")), None, 0.0).reason.endswith(
        "; evaluate.precision=bfloat16 measures as the champion was measured"
    )


def test_a_unit_of_float32_is_written_as_it_was_before_there_was_a_choice():
    assert "precision" not in UNIT.model_dump_json()
    assert MetricUnit.model_validate_json(UNIT.model_dump_json()).precision == "float32"
    other = UNIT.model_copy(update={"precision": "bfloat16"})
    assert MetricUnit.model_validate_json(other.model_dump_json()) == other != UNIT
    assert (UNIT.drawn_by, other.drawn_by) == ("ddim", "ddim, bfloat16")


def test_a_champion_without_a_number_is_kept():
    decision = decide(metric(1), Champion(2, None), champion_test(-5, -5), 0.0)
    assert not decision.promote
    assert "champion v2 carries no metric" in decision.reason
