from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import dctn
from scipy.linalg import sqrtm
from sklearn.datasets import load_digits

from components.errors import DataError
from components.metrics.classifier import ClassifierExtractor, train_classifier
from components.metrics.features import DctExtractor, InceptionExtractor, check_inception_weights, dct_matrix, features_in_batches, full_precision
from components.metrics.frechet import (
    MIN_FID_SAMPLES,
    FeatureStats,
    Reference,
    compare,
    frechet_distance,
    influence,
    jackknifed_distance,
    paired_difference,
    small_sample_warning,
    standard_error,
)
from components.metrics.inception_score import inception_score
from components.metrics.kernel import kernel_distance
from components.metrics.neighbours import nearest_squared_distances, neighbourhoods, squared_distances
from components.model.manifest import sha256_of
from components.storage import Location


def stats(features: np.ndarray, shift: np.ndarray | None = None) -> FeatureStats:
    return FeatureStats.of(features, np.zeros(features.shape[1]) if shift is None else shift)


def digits() -> tuple[np.ndarray, np.ndarray]:
    values, targets = load_digits(return_X_y=True)
    return (np.asarray(values).reshape(-1, 1, 8, 8) * (255 / 16)).round().astype(np.uint8), np.asarray(targets)


def test_moments_equal_numpys():
    features = np.random.default_rng(0).normal(3, 2, (500, 7))
    found = stats(features, features[:20].mean(axis=0))
    np.testing.assert_allclose(found.mean, features.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(features, rowvar=False), rtol=1e-10)


def test_merged_parts_equal_the_whole():
    features = np.random.default_rng(0).normal(1000, 1, (300, 5))
    shift = features[:10].mean(axis=0)
    merged = stats(features[:100], shift).merge(stats(features[100:101], shift)).merge(stats(features[101:], shift))
    whole = stats(features, shift)
    assert merged.count == whole.count
    np.testing.assert_allclose(merged.covariance, whole.covariance, rtol=1e-10)


def test_parts_about_different_shifts_are_refused():
    features = np.ones((3, 2))
    with pytest.raises(ValueError, match="shift differs"):
        stats(features).merge(stats(features, np.ones(2)))


def test_distance_of_a_set_to_itself_is_zero():
    found = stats(np.random.default_rng(0).normal(size=(400, 12)))
    assert frechet_distance(found, found) == pytest.approx(0, abs=1e-9)


def test_distance_under_a_shift_is_its_squared_length():
    features = np.random.default_rng(0).normal(size=(400, 6))
    moved = features + np.arange(6)
    assert frechet_distance(stats(features), stats(moved)) == pytest.approx(np.sum(np.arange(6) ** 2), rel=1e-9)


def test_distance_of_commuting_covariances_is_the_difference_of_deviations():
    features = np.random.default_rng(0).normal(size=(1000, 4))
    scaled = (features - features.mean(axis=0)) * 3 + features.mean(axis=0)
    variances = np.var(features, axis=0, ddof=1)
    eigenvalues = np.linalg.eigvalsh(np.cov(features, rowvar=False))
    assert frechet_distance(stats(features), stats(scaled)) == pytest.approx(4 * eigenvalues.sum(), rel=1e-8)
    assert variances.sum() == pytest.approx(eigenvalues.sum())


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(stats(np.full((3, 2), np.nan)), stats(np.ones((3, 2))))


def test_cosine_transform_equals_scipys():
    block = np.random.default_rng(0).normal(size=(8, 8))
    matrix = dct_matrix(8).numpy()
    np.testing.assert_allclose(matrix @ block @ matrix.T, dctn(block, norm="ortho"), atol=1e-12)


@pytest.mark.parametrize(("size", "channels", "features"), [(32, 3, 384), (8, 1, 32), (30, 1, 128)])
def test_dct_features_have_one_mean_and_one_deviation_for_each_coefficient(size: int, channels: int, features: int):
    pixels = torch.randint(0, 256, (5, channels, size, size), dtype=torch.uint8)
    found = DctExtractor()(pixels)
    assert (found.shape, found.dtype) == ((5, features), np.float32)


def test_every_extractor_gives_a_worse_number_to_worse_images(tmp_path: Path):
    pixels, classes = digits()
    train_classifier(pixels, classes, tmp_path)
    classifier = ClassifierExtractor(tmp_path)
    assert classifier.accuracy > 0.9
    for extractor, noises in ((classifier, (0, 32, 64, 128)), (DctExtractor(), (0, 16, 32, 64))):
        reference = stats(features_in_batches(extractor, pixels[::2], 256))
        rng = np.random.default_rng(0)
        distances = []
        for noise in noises:
            worse = np.clip(pixels[1::2] + rng.normal(0, noise, pixels[1::2].shape), 0, 255).astype(np.uint8)
            distances.append(frechet_distance(stats(features_in_batches(extractor, worse, 256)), reference))
        assert distances == sorted(distances), extractor.name


def test_the_name_of_the_classifier_metric_carries_its_digest(tmp_path: Path):
    pixels, classes = digits()
    train_classifier(pixels[:60], classes[:60], tmp_path)
    extractor = ClassifierExtractor(tmp_path)
    assert extractor.name == f"fd_clf_{sha256_of(tmp_path / 'classifier.safetensors')[:8]}"


def test_a_folder_without_a_classifier_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="holds no classifier"):
        ClassifierExtractor(tmp_path)


def test_missing_inception_weights_are_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"evaluate\.inception_weights=.*absent\.pth does not exist"):
        check_inception_weights(tmp_path / "absent.pth")


def test_features_are_taken_without_tf32_and_the_settings_come_back():
    def current() -> tuple[bool, str]:
        return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()

    before = current()
    torch.set_float32_matmul_precision("high")
    try:
        with full_precision():
            assert current() == (False, "highest")
        assert current() == (before[0], "high")
    finally:
        torch.set_float32_matmul_precision(before[1])


def test_only_the_inception_extractor_is_called_fid(tmp_path: Path):
    names = [DctExtractor.name, InceptionExtractor.name]
    assert [name for name in names if name == "fid" or name.startswith("fid_")] == ["fid"]


def correlated(count: int, size: int, seed: int) -> np.ndarray:
    """Features whose covariance and mean differ from seed to seed."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, size)) @ rng.normal(size=(size, size)) / size**0.5 + 0.3 * rng.normal(size=size)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_statistics_merge_alike_in_any_order_and_any_cut(data: st.DataObject):
    features = correlated(40, 3, data.draw(st.integers(0, 99)))
    cuts = data.draw(st.lists(st.integers(0, 40), max_size=5))
    parts = [stats(features[first:last], features[0]) for first, last in pairwise(sorted({0, *cuts, 40}))]
    merged, *others = data.draw(st.permutations(parts))
    for other in others:
        merged = merged.merge(other)
    assert merged.count == 40
    np.testing.assert_allclose(merged.mean, features.mean(axis=0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(merged.covariance, np.cov(features, rowvar=False), rtol=1e-10, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), size=st.integers(2, 12), count=st.integers(2, 40))
def test_distance_is_zero_to_itself_and_symmetric_and_blind_to_rotation(seed: int, size: int, count: int):
    one, other = correlated(count, size, seed), correlated(40, size, seed + 1)
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]
    distance = frechet_distance(stats(one), stats(other))
    assert frechet_distance(stats(one), stats(one)) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(stats(other), stats(one)) == pytest.approx(distance, rel=1e-6, abs=1e-6)
    assert frechet_distance(stats(one @ rotation), stats(other @ rotation)) == pytest.approx(distance, rel=1e-6, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 9), st.floats(0, 9), st.floats(-5, 5)), min_size=1, max_size=8))
def test_distance_of_diagonal_covariances_has_a_closed_form(axes: list[tuple[float, float, float]]):
    ours, theirs, shift = np.array(axes).T
    reference = Reference(np.zeros(len(axes)), np.diag(theirs), np.diag(np.sqrt(theirs)))
    expected = np.sum(shift**2) + np.sum((np.sqrt(ours) - np.sqrt(theirs)) ** 2)
    assert frechet_distance((shift, np.diag(ours)), reference) == pytest.approx(expected, rel=1e-9, abs=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_distance_equals_that_of_the_matrix_square_root(seed: int):
    one, other = stats(correlated(300, 8, seed)), stats(correlated(300, 8, seed + 10))
    cross = np.trace(sqrtm(one.covariance @ other.covariance).real)
    expected = np.sum((one.mean - other.mean) ** 2) + np.trace(one.covariance) + np.trace(other.covariance) - 2 * cross
    assert frechet_distance(one, Reference.of(other)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("count", [5, 60, 128])
def test_fewer_images_than_features_still_have_an_exact_distance(count: int):
    one, other = (features - features.mean(axis=0) for features in (correlated(count, 128, 0), correlated(count, 128, 1)))
    factors = [features / (count - 1) ** 0.5 for features in (one, other)]
    expected = sum(np.sum(factor**2) for factor in factors) - 2 * np.linalg.svd(factors[0] @ factors[1].T, compute_uv=False).sum()
    assert frechet_distance(stats(one), Reference.of(stats(other))) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(stats(one), Reference.of(stats(one))) == pytest.approx(0, abs=1e-8)


def test_a_distance_below_zero_by_more_than_rounding_is_an_error():
    reference = Reference(np.zeros(3), np.eye(3), 1.01 * np.eye(3))
    with pytest.raises(ValueError, match="negative by more than rounding"):
        frechet_distance((np.zeros(3), np.eye(3)), reference)


def test_features_of_two_extractors_are_not_compared():
    with pytest.raises(ValueError, match=r"features=3 differs from the reference's 4; use one extractor"):
        frechet_distance(stats(correlated(9, 3, 0)), stats(correlated(9, 4, 0)))


@pytest.mark.parametrize(("count", "size"), [(200, 6), (12, 30)])
def test_influence_is_the_derivative_of_the_distance_by_the_weight_of_an_image(count: int, size: int):
    features = correlated(count, size, 0)
    reference = Reference.of(stats(correlated(500, size, 1)))

    def moments(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean = weights @ features
        return mean, (features - mean).T @ ((features - mean) * weights[:, None])

    uniform = np.full(count, 1 / count)
    psi = influence(features, moments(uniform), reference)
    assert psi.mean() == pytest.approx(0, abs=1e-9)
    for index in range(0, count, count // 4):
        towards = np.eye(count)[index] - uniform
        distances = [frechet_distance(moments(uniform + step * towards), reference) for step in (1e-4, -1e-4)]
        assert psi[index] == pytest.approx((distances[0] - distances[1]) / 2e-4, rel=1e-3, abs=1e-4)


def test_a_comparison_has_the_distance_and_the_influence():
    features = correlated(50, 4, 0)
    reference = Reference.of(stats(correlated(60, 4, 1)))
    found = compare(stats(features), reference)
    assert found.distance == pytest.approx(frechet_distance(stats(features), reference), rel=1e-12)
    np.testing.assert_array_equal(found.influence(features), influence(features, stats(features), reference))


def bootstrap(count: int, draws: int) -> np.ndarray:
    return np.random.default_rng(0).integers(count, size=(draws, count))


def test_standard_error_equals_the_deviation_of_a_bootstrap():
    features, reference = correlated(800, 4, 0), Reference.of(stats(correlated(800, 4, 1)))
    expected = np.std([frechet_distance(stats(features[rows]), reference) for rows in bootstrap(800, 400)])
    psi = influence(features, stats(features), reference)
    assert standard_error(psi) == pytest.approx(expected, rel=0.15)
    assert standard_error(psi, 3200) == pytest.approx(standard_error(psi) / 2)


def test_pairs_of_one_seed_are_compared_far_more_surely_than_strangers():
    champion, reference = correlated(800, 4, 0), Reference.of(stats(correlated(800, 4, 1)))
    candidate = champion * 1.02 + 0.02 * np.random.default_rng(5).normal(size=champion.shape)
    both = [(frechet_distance(stats(candidate[rows]), reference), frechet_distance(stats(champion[rows]), reference)) for rows in bootstrap(800, 400)]
    psi = [influence(features, stats(features), reference) for features in (candidate, champion)]
    difference, error = paired_difference(psi[0], psi[1], 0.25)
    assert difference == 0.25
    assert error == pytest.approx(np.std(np.diff(both)), rel=0.15)
    assert error < 0.2 * np.hypot(standard_error(psi[0]), standard_error(psi[1]))


def test_images_of_different_seeds_are_not_paired():
    with pytest.raises(ValueError, match="compare images of the same seeds"):
        paired_difference(np.ones(4), np.ones(5), 0.0)


def test_halves_take_most_of_the_bias_of_a_small_sample_away():
    reference = Reference.of(stats(correlated(20_000, 8, 0)))
    small = [correlated(20_000, 8, 0)[first : first + 200] for first in range(0, 20_000, 200)]
    raw = [frechet_distance(stats(features), reference) for features in small]
    corrected = [jackknifed_distance(stats(features[::2]), stats(features[1::2]), reference) for features in small]
    assert abs(np.mean(corrected)) < 0.1 * np.mean(raw)


@pytest.mark.parametrize(("count", "warned"), [(MIN_FID_SAMPLES - 1, True), (MIN_FID_SAMPLES, False)])
def test_an_fid_of_fewer_images_than_features_is_flagged(count: int, warned: bool):
    assert (small_sample_warning(count) is not None) == warned


def test_a_saved_reference_is_read_as_it_was(tmp_path: Path):
    path = Location.of(tmp_path / "reference.npz")
    saved = Reference.of(stats(correlated(30, 5, 0)), unit='{"extractor": "fid"}')
    saved.save(path)
    found = Reference.load(path)
    for name in ("mean", "covariance", "root"):
        np.testing.assert_array_equal(getattr(found, name), getattr(saved, name))
    assert (found.count, found.unit) == (30, '{"extractor": "fid"}')


def test_a_reference_of_another_program_is_read(tmp_path: Path):
    features = correlated(50, 5, 0)
    np.savez(tmp_path / "cifar10.npz", mu=features.mean(axis=0), sigma=np.cov(features, rowvar=False))
    found = Reference.load(Location.of(tmp_path / "cifar10.npz"))
    assert (found.count, found.unit) == (None, None)
    assert frechet_distance(stats(features), found) == pytest.approx(0, abs=1e-9)


def test_another_program_reads_our_reference(tmp_path: Path):
    features = correlated(50, 5, 0)
    Reference.of(stats(features)).save(Location.of(tmp_path / "ours.npz"))
    with np.load(tmp_path / "ours.npz") as archive:
        np.testing.assert_allclose(archive["mu"], features.mean(axis=0), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(archive["sigma"], np.cov(features, rowvar=False), rtol=1e-10, atol=1e-12)


BROKEN_REFERENCES: dict[str, Any] = {
    "lacks the array 'sigma'": {"mu": np.zeros(2)},
    "does not fit mu of length 3": {"mu": np.zeros(3), "sigma": np.eye(2)},
    "sigma is not symmetric": {"mu": np.zeros(2), "sigma": np.array([[1, 0.1], [0.2, 1]])},
    "a value is not finite": {"mu": np.array([np.nan, 0]), "sigma": np.eye(2)},
    "has the eigenvalue -1": {"mu": np.zeros(2), "sigma": np.diag([1.0, -1.0])},
    "root is not the square root of sigma": {"mu": np.zeros(2), "sigma": 4 * np.eye(2), "root": 4 * np.eye(2)},
    "of floating point": {"mu": np.zeros(2, np.int64), "sigma": np.eye(2)},
    "count=1 images have no covariance": {"mu": np.zeros(2), "sigma": np.eye(2), "count": np.asarray(1)},
    "Object arrays cannot be loaded": {"mu": np.array([{}, {}]), "sigma": np.eye(2)},
    "Expecting value": {"mu": np.zeros(2), "sigma": np.eye(2), "unit": np.asarray("no JSON")},
}


@pytest.mark.parametrize("complaint", BROKEN_REFERENCES)
def test_a_broken_reference_is_refused_by_name(tmp_path: Path, complaint: str):
    np.savez(tmp_path / "broken.npz", **BROKEN_REFERENCES[complaint])
    with pytest.raises(DataError, match=rf"(?s)broken\.npz .*{complaint}"):
        Reference.load(Location.of(tmp_path / "broken.npz"))


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x05\x06" + bytes(10)])
def test_a_file_that_is_no_archive_is_no_reference(tmp_path: Path, content: bytes):
    (tmp_path / "file.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"file\.npz is no readable \.npz file"):
        Reference.load(Location.of(tmp_path / "file.npz"))


def test_a_cut_reference_is_refused(tmp_path: Path):
    path = tmp_path / "whole.npz"
    Reference.of(stats(correlated(30, 5, 0))).save(Location.of(path))
    whole = bytearray(path.read_bytes())
    whole[200] ^= 0xFF
    path.write_bytes(whole)
    with pytest.raises(DataError, match=r"whole\.npz is no readable"):
        Reference.load(Location.of(path))


def test_a_kernel_distance_of_few_features_says_of_how_many():
    found = kernel_distance(correlated(40, 4, 0), correlated(60, 4, 1), subsets=3)
    assert (found.subset_size, found.subsets) == (40, 3)
    assert found.mean > 0


def test_a_kernel_distance_of_one_feature_is_refused():
    with pytest.raises(ValueError, match="subset_size=1 gives no unbiased estimate"):
        kernel_distance(np.ones((1, 2)), np.ones((9, 2)))


def test_inception_score_is_the_number_of_classes_that_are_surely_and_evenly_drawn():
    sure = np.tile(np.eye(5)[:4] * 2000, (2500, 1))  # of a class that is never drawn
    assert inception_score(sure).mean == pytest.approx(4, rel=1e-2)
    assert inception_score(np.ones((20, 4))).mean == pytest.approx(1)


def test_an_inception_score_of_fewer_images_than_parts_is_refused():
    with pytest.raises(ValueError, match="splits=10 is more than the 9 images"):
        inception_score(np.ones((9, 3)))


def naive_shares(samples: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Density and coverage as Naeem et al. (2020) define them, k = 5."""
    among = np.sort(np.linalg.norm(reference[:, None] - reference[None], axis=2), axis=1)[:, 5]
    inside = np.linalg.norm(reference[:, None] - samples[None], axis=2) < among[:, None]
    return inside.sum() / (5 * len(samples)), inside.any(axis=1).mean()


@pytest.mark.parametrize("block", [13, 2048])
def test_density_and_coverage_equal_their_formula(block: int):
    samples, reference = correlated(120, 3, 0), correlated(150, 3, 0)[::-1] * 1.3 + 0.2
    found = neighbourhoods(samples, reference, block=block)
    assert 0.1 < found.coverage < 1
    assert (found.density, found.coverage) == pytest.approx(naive_shares(samples, reference), rel=1e-12)


def test_the_border_belongs_to_a_manifold_however_it_is_rounded():
    centres = 1e3 * np.random.default_rng(0).normal(size=(60, 8))
    arms = np.diag([0.1, 0.2, 0.7])
    reference = np.concatenate([centres, *(centres + np.pad(arm, (0, 5)) for arm in arms)])
    samples = centres - np.pad(arms[2], (0, 5))  # as far from each of the four as the fourth one is
    assert neighbourhoods(samples, reference).precision == 1
    assert neighbourhoods(reference, samples).recall == 1


def test_the_border_belongs_to_no_neighbourhood_however_it_is_rounded():
    features = 100 + correlated(300, 8, 0)
    found = neighbourhoods(features[::-1], features, block=64)
    assert (found.density, found.coverage) == (1, 1)  # itself and its four nearest, of k = 5


def test_sets_too_small_for_a_neighbour_and_broken_features_are_refused():
    with pytest.raises(ValueError, match="k=5 is not less than the 5 features"):
        neighbourhoods(np.ones((9, 2)), np.ones((5, 2)))
    with pytest.raises(ValueError, match="not finite"):
        neighbourhoods(np.ones((9, 2)), np.full((9, 2), np.nan))


def test_neighbours_among_many_features_are_found_by_small_blocks(monkeypatch: pytest.MonkeyPatch):
    sizes = []

    def recorded(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x) * len(y))
        return squared_distances(x, y)

    monkeypatch.setattr("components.metrics.neighbours.squared_distances", recorded)
    features = np.random.default_rng(0).normal(size=(20_000, 64)).astype(np.float32)
    found = nearest_squared_distances(features[:1500], features, 6, block=1024)
    every = np.arange(0, 1500, 100)
    expected = np.sort(((features[every, None].astype(np.float64) - features) ** 2).sum(axis=2), axis=1)[:, :6]
    np.testing.assert_allclose(found[every].numpy(), expected, rtol=1e-10, atol=1e-10)
    assert sum(sizes) == 1500 * 20_000
    assert max(sizes) == 1024**2
