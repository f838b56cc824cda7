"""Mergeable first and second moments of features, float64."""

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
