from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.fft import dctn
from sklearn.datasets import load_digits
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from components.errors import DataError
from components.metrics.classifier import ClassifierExtractor, train_classifier
from components.metrics.features import DctExtractor, InceptionExtractor, check_inception_weights, dct_matrix, features_in_batches
from components.metrics.frechet import FeatureStats, frechet_distance
from components.model.checkpoint import sha256_of


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


@pytest.mark.parametrize("count", [40, 500])
def test_distance_equals_torch_fidelitys(count: int):
    rng = np.random.default_rng(0)
    one, other = rng.normal(0.3, 1, (count, 64)) @ rng.normal(size=(64, 64)), rng.normal(0.5, 1.2, (count, 64)) @ rng.normal(size=(64, 64))
    expected = fid_statistics_to_metric(fid_features_to_statistics(torch.from_numpy(one)), fid_features_to_statistics(torch.from_numpy(other)), verbose=False)[
        "frechet_inception_distance"
    ]
    assert frechet_distance(stats(one), stats(other)) == pytest.approx(expected, rel=1e-4)


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
    assert DctExtractor()(pixels).shape == (5, features)


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


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path="none")
    torch.save(network.state_dict(), path)
    return path


def test_inception_features_are_torch_fidelitys_for_colour_and_grey(random_inception: Path):
    ours = InceptionExtractor(random_inception, expected_sha256=sha256_of(random_inception))
    theirs = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(random_inception))
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(ours(pixels), theirs(pixels)[0].numpy(), rtol=1e-6)
    np.testing.assert_allclose(ours(pixels[:, :1]), theirs(pixels[:, :1].repeat(1, 3, 1, 1))[0].numpy(), rtol=1e-6)


def test_other_weights_are_never_called_fid(random_inception: Path):
    with pytest.raises(DataError, match=r"only torch-fidelity's weights-inception-2015-12-05-6726825d\.pth gives an FID"):
        InceptionExtractor(random_inception)


def test_missing_inception_weights_are_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"evaluate\.inception_weights=.*absent\.pth does not exist"):
        check_inception_weights(tmp_path / "absent.pth")


def test_only_the_inception_extractor_is_called_fid(tmp_path: Path):
    names = [DctExtractor.name, InceptionExtractor.name]
    assert [name for name in names if name == "fid" or name.startswith("fid_")] == ["fid"]
