"""Shows that the distances without Inception weights rise with every step of a corruption, and prints a Markdown table.

    python benchmarks/corruptions.py FOLDER [--train 10000] [--measured 2500]

FOLDER holds `train/CLASS/*` and `test/CLASS/*`, images of one size, as CIFAR-10 in files. The classifier is trained on as many training images
as a dataset without Inception weights would train it on; the reference is those images, what is measured are test images, corrupted: blurred, with
noise, with classes left out. `floor` is the distance of uncorrupted test images.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from components.metrics.classifier import ClassifierExtractor, train_classifier
from components.metrics.features import DctExtractor, Extractor, features_in_batches
from components.metrics.frechet import compare, frechet_distance, standard_error
from components.metrics.moments import FeatureStats
from components.metrics.reference import Reference

Corruption = Callable[[np.ndarray, np.ndarray], np.ndarray]
BLURS, NOISES, DROPPED = (0.4, 0.5, 0.7, 1.0), (4, 8, 16, 32), (1, 2, 4, 8)


def main() -> None:
    """Measures every corruption by both extractors and prints the table; exits with 1 where a stronger one scores lower."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=10_000)
    parser.add_argument("--measured", type=int, default=2_500)
    options = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    train, classes = read(options.folder / "train", options.train)
    test, test_classes = read(options.folder / "test", options.measured * 2)
    with tempfile.TemporaryDirectory() as folder:
        train_classifier(train, classes, Path(folder))
        classifier = ClassifierExtractor(Path(folder))
    print(f"{len(train):,} training images, classifier accuracy {classifier.accuracy:.1%}; {options.measured:,} test images for each number\n")
    print("| corruption | strength | " + " | ".join(f"fd_{name}" for name in ("clf", "dct8_v1")) + " |\n|---|---|---|---|")
    extractors: list[Extractor] = [classifier, DctExtractor()]
    references = [reference(extractor, train) for extractor in extractors]
    rises = True
    for name, strengths, corruption in corruptions():
        found = []
        for strength in (0, *strengths):
            images = corrupt(test, test_classes, options.measured, strength, corruption)
            found.append([measured(extractor, images, known) for extractor, known in zip(extractors, references, strict=True)])
            shown = " | ".join(f"{value:.4g} ± {1.96 * error:.2g}" for value, error in found[-1])
            print(f"| {name if strength else f'{name} (floor)'} | {strength} | {shown} |", flush=True)
        for which in range(len(extractors)):
            values = [line[which][0] for line in found]
            rises &= values == sorted(values)
    print(f"\n{'every number rises with the strength' if rises else 'NOT every number rises with the strength'}")
    sys.exit(0 if rises else 1)


def corruptions() -> list[tuple[str, tuple[float, ...], Callable[[float], Corruption]]]:
    """Returns names, rising strengths, and how a strength is done to images (N, C, H, W) of classes (N,)."""
    return [
        ("Gaussian blur, pixels", BLURS, lambda radius: lambda images, _: np.stack([blurred(image, radius) for image in images])),
        ("Gaussian noise, levels of 255", NOISES, lambda level: lambda images, _: noisy(images, level)),
        ("classes left out", DROPPED, lambda count: lambda images, classes: images[classes >= count]),
    ]


def corrupt(images: np.ndarray, classes: np.ndarray, count: int, strength: float, corruption: Callable[[float], Corruption]) -> np.ndarray:
    """Returns as many corrupted images, the same ones for every strength where that can be."""
    if not strength:
        return images[:count]
    if strength in DROPPED and corruption(strength)(images[:count], classes[:count]).shape[0] < count:
        left = corruption(strength)(images, classes)
        return left[np.arange(count) % len(left)] if len(left) < count else left[:count]
    return corruption(strength)(images[:count], classes[:count])


def blurred(image: np.ndarray, radius: float) -> np.ndarray:
    """Returns an image (C, H, W) blurred by a Gaussian of so many pixels."""
    return np.asarray(Image.fromarray(image.transpose(1, 2, 0)).filter(ImageFilter.GaussianBlur(radius))).transpose(2, 0, 1)


def noisy(images: np.ndarray, level: float) -> np.ndarray:
    """Returns images with Gaussian noise of so many grey levels, rounded and clipped."""
    noise = np.random.default_rng(0).normal(0, level, images.shape)
    return np.clip(images + noise, 0, 255).round().astype(np.uint8)


def reference(extractor: Extractor, images: np.ndarray) -> Reference:
    """Returns the statistics of images."""
    features = features_in_batches(extractor, images, 256)
    return Reference.of(FeatureStats.of(features, features.astype(np.float64).mean(axis=0)))


def measured(extractor: Extractor, images: np.ndarray, known: Reference) -> tuple[float, float]:
    """Returns the distance of images from a reference, and its standard error."""
    features = features_in_batches(extractor, images, 256)
    stats = FeatureStats.of(features, known.mean)
    return frechet_distance(stats, known), standard_error(compare(stats, known).influence(features))


def read(folder: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns images (N, C, H, W) of all classes by turns, and their classes (N,)."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    files = [sorted((folder / name).iterdir())[: -(-count // len(names))] for name in names]
    turns = [(path, number) for row in zip(*files, strict=True) for number, path in enumerate(row)][:count]
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1) for path, _ in turns])
    return pixels, np.asarray([number for _, number in turns], np.int64)


if __name__ == "__main__":
    main()
