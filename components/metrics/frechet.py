"""Mergeable feature statistics and the Frechet distance between two of them."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class FeatureStats:
    """First and second moments of features about a fixed shift, float64; sums of disjoint parts are the sums of the whole.

    Attributes:
        shift: (D,), near the mean, so that nothing cancels.
        count: number of feature vectors.
        first: (D,), sum of (x - shift).
        second: (D, D), sum of (x - shift)(x - shift)^T.
    """

    shift: np.ndarray
    count: int
    first: np.ndarray
    second: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray, shift: np.ndarray) -> "FeatureStats":
        """Returns the statistics of features (N, D) about a shift (D,)."""
        centred = features.astype(np.float64) - shift
        return cls(shift.astype(np.float64), len(features), centred.sum(axis=0), centred.T @ centred)

    def merge(self, other: "FeatureStats") -> "FeatureStats":
        """Returns the statistics of both parts together.

        Raises:
            ValueError: if the parts were taken about different shifts.
        """
        if not np.array_equal(self.shift, other.shift):
            raise ValueError("shift differs between the parts; take both about the same one")
        return FeatureStats(self.shift, self.count + other.count, self.first + other.first, self.second + other.second)

    @property
    def mean(self) -> np.ndarray:
        """(D,)."""
        return self.shift + self.first / self.count

    @property
    def covariance(self) -> np.ndarray:
        """(D, D), with N - 1 in the denominator.

        Raises:
            ValueError: if there are fewer than two features.
        """
        if self.count < 2:
            raise ValueError(f"count={self.count} features have no covariance; use at least 2")
        return (self.second - np.outer(self.first, self.first) / self.count) / (self.count - 1)


def frechet_distance(one: FeatureStats, other: FeatureStats) -> float:
    """Returns the squared Frechet distance of the Gaussians with these moments (Dowson & Landau 1982; TTUR Eq. 6).

    tr (S1 S2)^(1/2) is the sum of the square roots of the eigenvalues of the symmetric S1^(1/2) S2 S1^(1/2), in float64.

    Raises:
        ValueError: if a statistic is not finite, or dimensions differ.
    """
    difference = one.mean - other.mean
    covariances = one.covariance, other.covariance
    if not all(np.isfinite(part).all() for part in (difference, *covariances)):
        raise ValueError("features are not finite; the images or the extractor's weights are broken")
    values, vectors = np.linalg.eigh(covariances[0])
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    eigenvalues = np.linalg.eigvalsh(root @ covariances[1] @ root)
    cross = np.sqrt(np.clip(eigenvalues, 0, None)).sum()
    distance = difference @ difference + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * cross
    return max(0.0, float(distance))
