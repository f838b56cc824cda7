"""The energy distance against scipy's in one dimension, and against what must hold in any."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import energy_distance

from components.errors import DataError
from components.metrics import energy
from components.metrics.energy import EnergyReference, between_real, compare
from components.metrics.frechet import paired_difference, standard_error
from components.storage import Location

RNG = np.random.default_rng(0)
X, Y = RNG.normal(0, 1, (300, 2)), RNG.normal(0.3, 1.2, (400, 2))


def test_in_one_dimension_it_is_the_square_of_scipys():
    for x, y in pairwise([RNG.normal(size=50), RNG.gamma(2, size=70), RNG.uniform(-1, 3, size=90)]):
        assert compare(x[:, None], EnergyReference.of(y[:, None])).distance == pytest.approx(energy_distance(x, y) ** 2, rel=1e-9)


def test_moving_and_turning_both_changes_nothing_and_scaling_scales():
    angle = 0.7
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    found = compare(X, EnergyReference.of(Y)).distance
    assert compare(X @ turn + 5, EnergyReference.of(Y @ turn + 5)).distance == pytest.approx(found, rel=1e-9)
    assert compare(3 * X, EnergyReference.of(3 * Y)).distance == pytest.approx(3 * found, rel=1e-9)


def test_a_set_is_at_distance_0_from_itself_and_equal_distributions_are_on_average_without_bias():
    assert compare(X, EnergyReference.of(X)).distance == pytest.approx(0, abs=1e-12)
    draws = [compare(RNG.normal(size=(60, 2)), EnergyReference.of(RNG.normal(size=(80, 2)))).unbiased for _ in range(300)]
    assert abs(np.mean(draws)) < 4 * np.std(draws) / len(draws) ** 0.5


def test_the_influence_is_the_derivative_by_a_points_weight():
    def weighted(weights: np.ndarray) -> float:
        weights = weights / weights.sum()
        between = np.linalg.norm(X[:, None] - Y[None], axis=2).mean(axis=1)
        within = np.linalg.norm(X[:, None] - X[None], axis=2)
        return float(2 * weights @ between - weights @ within @ weights)

    found, step = compare(X, EnergyReference.of(Y)).influence, 1e-5
    assert found.mean() == pytest.approx(0, abs=1e-12)
    for index in (0, 17, 250):
        more = np.ones(len(X))
        more[index] += step
        assert (weighted(more) - weighted(np.ones(len(X)))) / step * len(X) == pytest.approx(found[index], rel=1e-3, abs=1e-4)


def test_its_standard_error_is_the_spread_over_draws_of_points_and_a_pair_shares_what_it_has_in_common():
    reference = EnergyReference.of(RNG.normal(1, 1, (2000, 2)))
    draws = [compare(RNG.normal(0, 1, (200, 2)), reference) for _ in range(120)]
    spread = np.std([draw.distance for draw in draws], ddof=1)
    assert np.mean([standard_error(draw.influence) for draw in draws]) == pytest.approx(spread, rel=0.25)
    shared = RNG.normal(0, 1, (200, 2))
    one, other = compare(shared, reference), compare(shared + 0.02, reference)
    _, paired = paired_difference(one.influence, other.influence, one.distance - other.distance)
    assert paired < standard_error(one.influence) / 5


def test_how_many_pairs_are_held_at_once_is_no_part_of_the_result(monkeypatch: pytest.MonkeyPatch):
    found = compare(X, EnergyReference.of(Y))
    monkeypatch.setattr(energy, "PAIRS_AT_ONCE", 1000)
    again = compare(X, EnergyReference.of(Y))
    assert again.distance == pytest.approx(found.distance, rel=1e-12)
    np.testing.assert_allclose(again.influence, found.influence, rtol=1e-9, atol=1e-12)


def test_real_points_score_what_finite_numbers_of_them_must():
    mean, spread = between_real(RNG.normal(size=(200, 2)), RNG.normal(size=(800, 2)), 200)
    assert mean == pytest.approx((1 / 200 + 1 / 800) * np.sqrt(np.pi), rel=0.35)  # E|X - X'| of two standard normal points in the plane
    assert 0 < spread < mean


def test_a_reference_survives_its_file_and_a_broken_one_is_refused(tmp_path: Path):
    file = Location.of(tmp_path / "points.npz")
    EnergyReference.of(Y, '{"split": "train"}').save(file)
    again = EnergyReference.load(file)
    assert (again.unit, again.within, again.count, again.dimensions) == ('{"split": "train"}', EnergyReference.of(Y).within, 400, 2)
    assert np.array_equal(again.points, Y)
    for content in (b"", b"PK\x03\x04", file.read_bytes()[:200]):
        file.write_bytes(content)
        with pytest.raises(DataError, match="holds no reference points"):
            EnergyReference.load(file)


@pytest.mark.parametrize(("points", "named"), [(np.zeros((1, 2)), "use at least two"), (np.full((3, 2), np.nan), "not finite"), (np.zeros((3, 3)), "2")])
def test_what_cannot_be_compared_is_refused(points: np.ndarray, named: str):
    with pytest.raises(ValueError, match=named):
        compare(points, EnergyReference.of(Y))
