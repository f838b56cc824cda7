"""What is computed on a GPU is what is computed on the CPU, and how much of its memory a batch may take."""

from pathlib import Path

import numpy as np
import pytest
import torch

from components.diffusion.batch_size import MOST_ON_GPU, ON_CPU, SHARE, choose_batch_size, fitting
from components.metrics import classifier
from components.metrics.classifier import ClassifierExtractor, train_classifier
from components.metrics.features import DctExtractor
from components.metrics.kernel import kernel_distance, unbiased_mmd2
from components.metrics.memorisation import Calibration, memorisation
from components.metrics.neighbours import neighbourhoods

RNG = np.random.default_rng(0)
SAMPLES, REFERENCE, HELD_OUT = (RNG.standard_normal((count, 24)).astype(np.float32) for count in (700, 900, 300))
PIXELS = RNG.integers(0, 256, (300, 3, 16, 16), dtype=np.uint8)
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_a_batch_on_a_cpu_has_the_same_size_whatever_the_network():
    def never(*inputs: torch.Tensor) -> torch.Tensor:
        raise AssertionError("nothing is tried out on a CPU")

    assert choose_batch_size(never, (torch.zeros(1, 3, 8, 8), torch.zeros(1)), rows_per_image=2) == ON_CPU


def test_a_batch_fits_into_its_share_of_the_memory():
    for free in (1 << 20, 1 << 30, 3 << 30, 80 << 30):
        for per_image in (1 << 10, 1 << 20, 7 << 20, 1 << 30):
            size = fitting(free, per_image)
            assert size == 1 or size * per_image <= SHARE * free
            assert size == MOST_ON_GPU or 2 * size * per_image > SHARE * free
            assert size & (size - 1) == 0


def test_the_kernel_distance_of_tensors_is_that_of_arrays():
    x, y = SAMPLES[:500].astype(np.float64), REFERENCE[:500].astype(np.float64)
    assert unbiased_mmd2(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(unbiased_mmd2(x, y), rel=1e-9)


@on_gpu
def test_pairs_of_features_are_compared_alike():
    here, there = (kernel_distance(SAMPLES, REFERENCE, 20, 400, device=device) for device in ("cpu", "cuda"))
    assert there.mean == pytest.approx(here.mean, rel=1e-9)
    assert neighbourhoods(SAMPLES, REFERENCE, device="cuda") == neighbourhoods(SAMPLES, REFERENCE)
    found = [memorisation(SAMPLES, [(0, REFERENCE)], Calibration(HELD_OUT), device=device) for device in ("cpu", "cuda")]
    assert found[0].copy_rate == found[1].copy_rate
    assert found[0].threshold == pytest.approx(found[1].threshold, rel=1e-12)
    assert [(pair.sample, pair.training_row) for pair in found[0].pairs] == [(pair.sample, pair.training_row) for pair in found[1].pairs]


@on_gpu
def test_block_transforms_give_the_same_features():
    pixels = torch.from_numpy(PIXELS)
    np.testing.assert_allclose(DctExtractor("cuda")(pixels), DctExtractor()(pixels), rtol=1e-6, atol=1e-7)


@on_gpu
def test_a_classifier_that_was_trained_on_a_gpu_measures_alike_on_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(classifier, "IMAGES_SEEN", 3000)
    classes = (PIXELS.mean(axis=(1, 2, 3)) > np.median(PIXELS.mean(axis=(1, 2, 3)))).astype(np.int64)
    train_classifier(PIXELS, classes, tmp_path, device="cuda")
    here, there = (ClassifierExtractor(tmp_path, device)(torch.from_numpy(PIXELS)) for device in ("cpu", "cuda"))
    np.testing.assert_allclose(here, there, rtol=0, atol=1e-3)


@on_gpu
def test_a_batch_of_the_chosen_size_fits():
    network = torch.nn.Conv2d(3, 64, 3, padding=1, device="cuda").eval().requires_grad_(False)
    size = choose_batch_size(lambda x_t, t: network(x_t), (torch.zeros(1, 3, 64, 64, device="cuda"), torch.zeros(1, device="cuda")))
    assert 1 <= size <= MOST_ON_GPU
