"""Mergeable feature statistics, the Frechet distance of a set of images to a reference, and how sure that number is.

Everything is float64: eigenvalues of a float32 covariance of 2,048 features move the distance by a tenth.
"""

from dataclasses import dataclass

import numpy as np

from .moments import FeatureStats
from .reference import ROUNDING, Reference

MIN_FID_SAMPLES = 2048


Moments = FeatureStats | tuple[np.ndarray, np.ndarray]
"""Statistics of images, or their mean (D,) and covariance (D, D)."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """The moments of some images beside a reference.

    Attributes:
        distance: the squared Frechet distance.
        mean: (D,), of the images.
        difference: (D,), from the reference's mean to theirs.
        transport: (D, D), T = S_r^(1/2) (S_r^(1/2) S S_r^(1/2))^(-1/2) S_r^(1/2): moves the images' Gaussian onto the reference's.
        constant: the mean of (x - mean)^T (I - T) (x - mean) over the images.
    """

    distance: float
    mean: np.ndarray
    difference: np.ndarray
    transport: np.ndarray
    constant: float

    def influence(self, features: np.ndarray) -> np.ndarray:
        """Returns (N,) by how much each of the features (N, D) moves the distance, per unit of its weight among the images.

        psi(x) = 2 d.(x - mu) + (x - mu)^T (I - T) (x - mu) - const, with mean zero over the images.
        """
        centred = features.astype(np.float64) - self.mean
        return 2 * centred @ self.difference + ((centred - centred @ self.transport) * centred).sum(axis=1) - self.constant


def frechet_distance(moments: Moments, reference: Reference | FeatureStats) -> float:
    """Returns the squared Frechet distance of the Gaussians with these moments (Dowson & Landau 1982; TTUR Eq. 6).

    tr (S S_r)^(1/2) is the sum of the square roots of the eigenvalues of the symmetric S_r^(1/2) S S_r^(1/2).

    Raises:
        ValueError: if a statistic is not finite, dimensions differ, or a covariance has large negative eigenvalues.
    """
    reference = reference if isinstance(reference, Reference) else Reference.of(reference)
    mean, covariance, rank = _moments(moments, reference)
    eigenvalues = np.linalg.eigvalsh(reference.root @ covariance @ reference.root)[-rank:]
    return _distance(mean, covariance, reference, eigenvalues)


def compare(moments: Moments, reference: Reference) -> Comparison:
    """Returns the distance and all that the influence of single images on it takes, by one decomposition.

    Where covariances are rank-deficient, T has the pseudo-inverse: it is right for images that the moments were taken of.

    Raises:
        ValueError: like `frechet_distance`.
    """
    mean, covariance, rank = _moments(moments, reference)
    eigenvalues, vectors = np.linalg.eigh(reference.root @ covariance @ reference.root)
    eigenvalues, vectors = eigenvalues[-rank:], vectors[:, -rank:]
    kept = eigenvalues > len(mean) * np.finfo(np.float64).eps * max(eigenvalues[-1], 0.0)
    half = reference.root @ vectors[:, kept] / eigenvalues[kept] ** 0.25
    constant = np.trace(covariance) - np.sqrt(eigenvalues[kept]).sum()
    return Comparison(_distance(mean, covariance, reference, eigenvalues), mean, mean - reference.mean, half @ half.T, float(constant))


def influence(features: np.ndarray, moments: Moments, reference: Reference) -> np.ndarray:
    """Returns (N,) the influence of each of the features (N, D) on the distance; see `Comparison.influence`."""
    return compare(moments, reference).influence(features)


def standard_error(psi: np.ndarray, count: int | None = None) -> float:
    """Returns the standard error of a distance from the influences (N,) of its images, or of the first N of `count` images.

    Raises:
        ValueError: if there are fewer than two influences.
    """
    if len(psi) < 2:
        raise ValueError(f"len(psi)={len(psi)} gives no standard error; use at least 2 images")
    return float(psi.std(ddof=1) / (count or len(psi)) ** 0.5)


def paired_difference(psi_candidate: np.ndarray, psi_champion: np.ndarray, difference: float) -> tuple[float, float]:
    """Returns a difference of two distances, and its standard error, where image i of both models was drawn from the same seed.

    Args:
        psi_candidate: (N,), influences of the candidate's images.
        psi_champion: (N,), those of the champion's images, in the same order of seeds.
        difference: the candidate's distance less the champion's.

    Raises:
        ValueError: if the numbers of images differ.
    """
    if psi_candidate.shape != psi_champion.shape:
        raise ValueError(f"psi has shapes {psi_candidate.shape} and {psi_champion.shape}; compare images of the same seeds")
    return difference, standard_error(psi_candidate - psi_champion)


def jackknifed_distance(even: FeatureStats, odd: FeatureStats, reference: Reference) -> float:
    """Returns the distance without its bias of order 1/N: twice that of all images less the mean of those of the two halves.

    Args:
        even: statistics of the images with even index.
        odd: those of the rest.

    Raises:
        ValueError: like `frechet_distance`.
    """
    halves = frechet_distance(even, reference), frechet_distance(odd, reference)
    return 2 * frechet_distance(even.merge(odd), reference) - sum(halves) / 2


def small_sample_warning(count: int) -> str | None:
    """Returns a sentence that says so where an FID is taken of too few images to be quoted; None for enough of them."""
    if count >= MIN_FID_SAMPLES:
        return None
    return f"num_samples={count} is under {MIN_FID_SAMPLES:,}, the number of Inception features: this FID is far too high; compare it with no other"


def _largest_rank(dimensions: int, *counts: int | None) -> int:
    """Returns the largest rank that covariances of so many vectors can have: eigenvalues beyond it are rounding."""
    return max(1, min([dimensions, *(count - 1 for count in counts if count is not None)]))


def _moments(moments: Moments, reference: Reference) -> tuple[np.ndarray, np.ndarray, int]:
    mean, covariance = moments if isinstance(moments, tuple) else (moments.mean, moments.covariance)
    if mean.shape != reference.mean.shape or covariance.shape != reference.covariance.shape:
        raise ValueError(f"features={mean.shape[0]} differs from the reference's {reference.mean.shape[0]}; use one extractor for both")
    if not all(np.isfinite(part).all() for part in (mean, covariance)):
        raise ValueError("features are not finite; the images or the extractor's weights are broken")
    count = None if isinstance(moments, tuple) else moments.count
    return mean.astype(np.float64), covariance.astype(np.float64), _largest_rank(len(mean), count, reference.count)


def _distance(mean: np.ndarray, covariance: np.ndarray, reference: Reference, eigenvalues: np.ndarray) -> float:
    difference = mean - reference.mean
    traces = np.trace(covariance) + np.trace(reference.covariance)
    distance = float(difference @ difference + traces - 2 * np.sqrt(np.clip(eigenvalues, 0, None)).sum())
    if distance < -ROUNDING * traces:
        raise ValueError(f"distance={distance:.6g} is negative by more than rounding; a covariance or the reference's root is wrong")
    return max(0.0, distance)
