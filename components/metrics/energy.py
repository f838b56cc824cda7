"""The energy distance between two sets of points: zero where both are of one distribution, and right for any distribution, with no features between.

It compares pairs, so it is for few dimensions and some ten thousand points; images are compared by the Frechet distance of features.
"""

import io
import zipfile
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.spatial.distance import cdist

from ..errors import DataError
from ..storage import Location

PAIRS_AT_ONCE = 1 << 22
MOST_POINTS = 20_000
"""Reference points that are compared with; of more, as many are taken, evenly spread."""
DRAWS = 16
"""Of real points, to know what they score."""


@dataclass(frozen=True, eq=False)
class EnergyReference:
    """Points that others are compared with.

    Attributes:
        points: (M, D), float64.
        within: mean distance |y - y'| over all pairs, each point with itself among them.
        unit: JSON that says which points these are; None where nobody said.
    """

    points: np.ndarray
    within: float
    unit: str | None = None

    @classmethod
    def of(cls, points: np.ndarray, unit: str | None = None) -> "EnergyReference":
        """Returns the reference of points (M, D).

        Raises:
            ValueError: if a coordinate is not finite, or there are fewer than two points.
        """
        chosen = points if len(points) <= MOST_POINTS else points[np.linspace(0, len(points) - 1, MOST_POINTS).round().astype(int)]
        chosen = _checked(chosen)
        return cls(chosen, float(mean_distances(chosen, chosen).mean()), unit)

    @property
    def dimensions(self) -> int:
        """D."""
        return self.points.shape[1]

    @property
    def count(self) -> int:
        """M, the number of points."""
        return len(self.points)

    def save(self, path: Location) -> None:
        """Writes an .npz file."""
        content = io.BytesIO()
        known: dict[str, Any] = {} if self.unit is None else {"unit": self.unit}
        np.savez(content, points=self.points, within=self.within, **known)
        path.write_bytes(content.getvalue())

    @classmethod
    def load(cls, path: Location) -> "EnergyReference":
        """Reads an .npz file of this class.

        Raises:
            DataError: if the file is none.
        """
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as archive:
                unit = str(archive["unit"]) if "unit" in archive else None
                return cls(_checked(archive["points"]), float(archive["within"]), unit)
        except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise DataError(f"{path} holds no reference points ({error}); delete it and run evaluate again") from error


@dataclass(frozen=True, eq=False)
class EnergyComparison:
    """Points beside a reference.

    Attributes:
        distance: the squared energy distance, 0 or more, each point's distance to itself counted (V-statistic).
        unbiased: without these (U-statistic), whose mean is 0 where both are of one distribution.
        influence: (N,) by how much each point moves the distance, per unit of its weight among the points; its mean is 0.
    """

    distance: float
    unbiased: float
    influence: np.ndarray


def compare(points: np.ndarray, reference: EnergyReference) -> EnergyComparison:
    """Returns the squared energy distance 2 E|X - Y| - E|X - X'| - E|Y - Y'| of points (N, D) and a reference (Szekely and Rizzo 2013, Eq. 3).

    Raises:
        ValueError: if a coordinate is not finite, or there are fewer than two points.
    """
    points = _checked(points)
    if points.shape[1] != reference.dimensions:
        raise ValueError(f"points have {points.shape[1]} coordinates, and the reference has {reference.dimensions}; compare like with like")
    between, within = mean_distances(points, reference.points), mean_distances(points, points)
    count, other = len(points), reference.count
    distance = max(0.0, float(2 * between.mean() - within.mean() - reference.within))
    unbiased = float(2 * between.mean() - within.mean() * count / (count - 1) - reference.within * other / (other - 1))
    psi = 2 * (between - within)
    return EnergyComparison(distance, unbiased, psi - psi.mean())


def between_real(points: np.ndarray, others: np.ndarray, count: int, draws: int = DRAWS) -> tuple[float, float]:
    """Returns mean and standard deviation of the squared energy distance of `count` real points to the rest of all, over random draws.

    No generator can be told from the data by a smaller distance of as many samples: with finitely many points the distance of two sets of one
    distribution is about (1 / count + 1 / rest) E|X - X'|, and never 0.

    Args:
        points: (N, D) and `others` (M, D), of one distribution.
    """
    pooled = np.concatenate([points, others])
    rng = np.random.Generator(np.random.Philox(0))
    found = []
    for _ in range(draws):
        order = rng.permutation(len(pooled))
        found.append(compare(pooled[order[:count]], EnergyReference.of(pooled[order[count:]])).distance)
    return float(np.mean(found)), float(np.std(found, ddof=1))


def mean_distances(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Returns (N,) the mean Euclidean distance from each of the points (N, D) to all others (M, D), in bounded memory."""
    rows = max(1, PAIRS_AT_ONCE // len(others))
    return np.concatenate([cdist(points[first : first + rows], others).mean(axis=1) for first in range(0, len(points), rows)])


def _checked(points: np.ndarray) -> np.ndarray:
    if points.ndim != 2 or len(points) < 2:
        raise ValueError(f"points have shape {points.shape}; use at least two, (N, D)")
    if not np.isfinite(points).all():
        raise ValueError("a coordinate is not finite; the model diverged, or the data are broken")
    return points.astype(np.float64)
