"""Our numbers are torch-fidelity's, from the same images through the same network, and from the same features."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from torch_fidelity import calculate_metrics
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from components.errors import DataError
from components.metrics.features import InceptionExtractor
from components.metrics.frechet import frechet_distance
from components.metrics.inception_score import inception_score
from components.metrics.kernel import kernel_distance
from components.metrics.moments import FeatureStats
from components.metrics.neighbours import neighbourhoods
from components.metrics.reference import Reference
from components.model.manifest import sha256_of


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path="none")
    for module in network.modules():  # He's deviations, without which all images have the same features
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), path)
    return path


class Images(Dataset):
    """Random images with a brightness of their own, and as many colours as channels."""

    def __init__(self, count: int, seed: int, contrast: float) -> None:
        rng = np.random.default_rng(seed)
        values = rng.uniform(60, 200, (count, 3, 1, 1)) + rng.normal(0, contrast, (count, 3, 32, 32))
        self.pixels = torch.from_numpy(np.clip(values, 0, 255).astype(np.uint8))

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.pixels[index]


def gaussian(count: int, size: int, seed: int, scale: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (0.3 * scale + scale * rng.normal(size=(count, size)) @ rng.normal(size=(size, size)) / size**0.5).astype(np.float32)


def test_all_metrics_of_the_same_images_equal_torch_fidelitys(random_inception: Path):
    samples, reference = Images(10, 0, 30), Images(10, 1, 50)
    expected = calculate_metrics(
        input1=samples,
        input2=reference,
        cuda=False,
        isc=True,
        fid=True,
        kid=True,
        kid_subsets=5,
        kid_subset_size=8,
        batch_size=10,
        save_cpu_ram=True,  # and so no worker processes
        feature_extractor_weights_path=str(random_inception),
        cache=False,
        verbose=False,
    )
    extractor = InceptionExtractor(random_inception, expected_sha256=sha256_of(random_inception))
    (ours, logits), (theirs, _) = (extractor.with_logits(images.pixels) for images in (samples, reference))
    shift = theirs.mean(axis=0)
    distance = frechet_distance(FeatureStats.of(ours, shift), Reference.of(FeatureStats.of(theirs, shift)))
    kernel, score = kernel_distance(ours, theirs, subsets=5, subset_size=8), inception_score(logits)
    assert distance == pytest.approx(expected["frechet_inception_distance"], rel=1e-4)
    assert kernel.mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-4)
    assert kernel.standard_deviation == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-4)
    assert score.mean == pytest.approx(expected["inception_score_mean"], rel=1e-6)
    assert score.standard_deviation == pytest.approx(expected["inception_score_std"], rel=1e-4)


def test_inception_features_are_torch_fidelitys_for_colour_and_grey(random_inception: Path):
    ours = InceptionExtractor(random_inception, expected_sha256=sha256_of(random_inception))
    theirs = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(random_inception))
    pixels = Images(2, 0, 50).pixels
    for image, rgb in ((pixels, pixels), (pixels[:, :1], pixels[:, :1].repeat(1, 3, 1, 1))):
        features, logits = ours.with_logits(image)
        assert features.dtype == np.float32
        for found, expected in zip((features, logits), theirs(rgb), strict=True):
            np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)
        np.testing.assert_array_equal(ours(image), features)


def test_other_weights_are_never_called_fid(random_inception: Path):
    with pytest.raises(DataError, match=r"only torch-fidelity's weights-inception-2015-12-05-6726825d\.pth gives an FID"):
        InceptionExtractor(random_inception)


@pytest.mark.parametrize("count", [40, 4000])
def test_distance_equals_torch_fidelitys(count: int):
    one, other = gaussian(count, 64, 0).astype(np.float64), gaussian(count, 64, 1, 1.2).astype(np.float64)
    moments = [fid_features_to_statistics(torch.from_numpy(features)) for features in (one, other)]
    expected = fid_statistics_to_metric(*moments, verbose=False)["frechet_inception_distance"]
    reference = Reference.of(FeatureStats.of(other, other[0]))
    assert frechet_distance(FeatureStats.of(one, other[0]), reference) == pytest.approx(expected, rel=1e-6)


def test_kernel_distance_equals_torch_fidelitys():
    one, other = gaussian(300, 32, 0).astype(np.float64), gaussian(500, 32, 1).astype(np.float64)
    expected = kid_features_to_metric(torch.from_numpy(one), torch.from_numpy(other), kid_subsets=10, kid_subset_size=100, verbose=False)
    found = kernel_distance(one, other, subsets=10, subset_size=100)
    assert (found.mean, found.standard_deviation) == pytest.approx(tuple(expected.values()), rel=1e-10)


def test_inception_score_equals_torch_fidelitys():
    logits = 4 * gaussian(123, 17, 0)
    found = inception_score(logits)
    assert (found.mean, found.standard_deviation) == pytest.approx(tuple(isc_features_to_metric(torch.from_numpy(logits)).values()), rel=1e-12)


@pytest.mark.parametrize("block", [7, 64, 2048])
def test_precision_and_recall_equal_torch_fidelitys(block: int):
    samples, reference = gaussian(150, 6, 0)[:, :4], gaussian(200, 6, 0, 1.5)[:, :4]
    expected = prc_features_to_metric(torch.from_numpy(samples).double(), torch.from_numpy(reference).double(), verbose=False)
    found = neighbourhoods(samples, reference, block=block)
    assert 0.1 < found.precision < 1
    assert 0.1 < found.recall < 1
    assert (found.precision, found.recall) == pytest.approx((expected["precision"], expected["recall"]), rel=1e-6)
