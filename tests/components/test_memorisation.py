"""Copies of training images among samples are counted, and honest samples raise no alarm."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.stats import binomtest
from sklearn.datasets import load_digits

from components.metrics.memorisation import Calibration, Memorisation, binomial_bounds, memorisation, nearest_training


def images(count: int, seed: int) -> np.ndarray:
    """Features on a curved surface, as those of images are, with a little of everything else."""
    rng, mixing = np.random.default_rng(seed), np.random.default_rng(0).normal(size=(6, 24))
    return (np.tanh(rng.normal(size=(count, 6)) @ mixing) + 0.05 * rng.normal(size=(count, 24))).astype(np.float32)


def chunks(features: np.ndarray, size: int = 700) -> Iterator[tuple[int, np.ndarray]]:
    return ((first, features[first : first + size]) for first in range(0, len(features), size))


TRAINING, HELD_OUT, SAMPLES = images(4000, 1), images(2000, 2), images(3000, 3)


def with_copies(count: int) -> np.ndarray:
    samples = SAMPLES.copy()
    samples[:count] = TRAINING[::-1][:count]
    return samples


def measured(samples: np.ndarray, calibration: Calibration | None = None) -> Memorisation:
    return memorisation(samples, chunks(TRAINING), calibration or Calibration(HELD_OUT))


@pytest.mark.parametrize("calibration", [Calibration(HELD_OUT), Calibration(TRAINING[::2], np.arange(4000)[::2])], ids=lambda found: found.kind)
def test_honest_samples_raise_no_alarm(calibration: Calibration):
    found = measured(SAMPLES, calibration)
    assert found.calibration == calibration.kind
    assert found.calibration_rate == pytest.approx(0.01, abs=1e-3)
    assert abs(found.z_score) < 3
    assert found.p_value > 0.01
    assert not found.is_suspicious
    assert not found.is_copying


@pytest.mark.parametrize("calibration", [Calibration(HELD_OUT), Calibration(TRAINING[::2], np.arange(4000)[::2])], ids=lambda found: found.kind)
def test_one_copy_in_a_hundred_samples_is_seen(calibration: Calibration):
    found = measured(with_copies(30), calibration)
    assert found.copy_rate - measured(SAMPLES, calibration).copy_rate == pytest.approx(0.01, abs=1e-3)
    assert found.lower > 0.01
    assert found.z_score > 3
    assert found.p_value < 1e-6
    assert {pair.distance for pair in found.pairs} == {0.0}
    assert all(pair.training_row == 3999 - pair.sample for pair in found.pairs)


def test_one_copy_in_twenty_samples_is_copying():
    found = measured(with_copies(150))
    assert found.limit == pytest.approx(0.02)
    assert found.is_copying


@cache
def digits() -> np.ndarray:
    values = np.asarray(load_digits(return_X_y=True)[0], np.float32)
    return values[np.random.default_rng(0).permutation(len(values))]


def digit_features(values: np.ndarray) -> np.ndarray:
    """Normed means of 2x2 pixels, of all four offsets: little of them changes when an image is blurred."""
    square = values.reshape(-1, 8, 8)
    pooled = np.concatenate([np.roll(square, (y, x), (1, 2)).reshape(-1, 4, 2, 4, 2).mean(axis=(2, 4)).reshape(-1, 16) for y in (0, 1) for x in (0, 1)], axis=1)
    return (pooled / np.linalg.norm(pooled, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize(("blur", "copies", "alarm"), [(0.0, 0, False), (0.4, 0, False), (0.0, 60, True), (0.4, 60, True)])
def test_copies_of_digits_are_told_from_a_blur_of_honest_ones(blur: float, copies: int, alarm: bool):
    train, held_out, samples = np.split(digits(), [600, 1200])
    samples = gaussian_filter(np.concatenate([train[:copies], samples[copies:]]).reshape(-1, 8, 8), (0, blur, blur)).reshape(-1, 64)
    found = memorisation(digit_features(samples), chunks(digit_features(train)), Calibration(digit_features(held_out)))

    assert found.is_copying == alarm


def test_pairs_name_rows_of_the_dataset_for_flipped_images_too():
    flipped = -TRAINING
    samples = np.concatenate([flipped[123:124], SAMPLES[:200]])
    rows = np.tile(np.arange(4000), 2)
    found = memorisation(samples, chunks(np.concatenate([TRAINING, flipped])), Calibration(HELD_OUT), training_rows=rows, num_pairs=1)
    (pair,) = found.pairs
    assert (pair.sample, pair.training_row, pair.distance) == (0, 123, 0.0)


def test_a_training_image_is_left_out_with_its_flipped_self():
    rows = np.tile(np.arange(50), 2)
    found = nearest_training(TRAINING[:50], np.arange(50), chunks(np.tile(TRAINING[:50], (2, 1)), 30), training_rows=rows)
    assert (found.rows != np.arange(50)).all()
    assert (found.distances > 0).all()


@pytest.mark.parametrize("size", [50, 333, 4000])
def test_neighbours_are_the_same_however_the_training_images_are_cut(size: int):
    found = nearest_training(SAMPLES[:100], np.full(100, -1), chunks(TRAINING[:2500], size))
    distances = np.linalg.norm(SAMPLES[:100, None].astype(np.float64) - TRAINING[None, :2500], axis=2)
    np.testing.assert_array_equal(found.rows, distances.argmin(axis=1))
    np.testing.assert_allclose(found.distances, distances.min(axis=1), rtol=1e-12)


def test_a_dataset_of_many_copies_of_its_own_neither_hides_nor_feigns_copying():
    doubled = np.concatenate([TRAINING, HELD_OUT[:100]])
    honest, copied = (memorisation(samples, chunks(doubled), Calibration(HELD_OUT)) for samples in (with_copies(150), with_copies(600)))
    assert honest.threshold == 0
    assert honest.calibration_rate == pytest.approx(0.05)
    assert not honest.is_copying
    assert copied.is_copying


def test_few_calibration_images_convict_nobody():
    found = measured(SAMPLES, Calibration(HELD_OUT[:20]))
    assert found.limit > 0.1
    assert not found.is_copying


@pytest.mark.parametrize(("successes", "trials"), [(0, 40), (1, 40), (20, 2000), (40, 40)])
def test_bounds_are_scipys(successes: int, trials: int):
    lower, upper = binomial_bounds(successes, trials)
    assert lower == pytest.approx(binomtest(successes, trials, alternative="greater").proportion_ci(0.99).low, rel=1e-9)
    assert upper == pytest.approx(binomtest(successes, trials, alternative="less").proportion_ci(0.99).high, rel=1e-9)


def test_nothing_to_compare_is_an_error():
    with pytest.raises(ValueError, match="samples=0, calibration=2000"):
        measured(SAMPLES[:0])
    with pytest.raises(ValueError, match="training holds no image"):
        memorisation(SAMPLES[:9], iter(()), Calibration(HELD_OUT[:9]))


@pytest.mark.parametrize("broken", ["samples", "training"])
def test_features_that_are_not_finite_are_refused(broken: str):
    features = {"samples": SAMPLES[:9].copy(), "training": TRAINING[:9].copy()}
    features[broken][4, 2] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        memorisation(features["samples"], chunks(features["training"]), Calibration(HELD_OUT[:9]))


def test_the_chance_of_so_many_nearest_samples_is_that_of_shuffles():
    found, rng = measured(SAMPLES), np.random.default_rng(0)
    few = replace(found, num_samples=6, calibration_count=4, nearer_than_all=2)
    first_two = [set(rng.permutation(10)[:2]) <= set(range(6)) for _ in range(20_000)]
    assert few.p_value == pytest.approx(6 / 10 * 5 / 9)
    assert few.p_value == pytest.approx(np.mean(first_two), abs=4 * (0.25 / 20_000) ** 0.5)
