"""What nearest neighbours say of a set of images: are they real, are they all of the real ones.

Distances are taken of one block of rows against one block of columns at a time, in float64, so that memory does not grow with the sets.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

ROUNDING = 1e-12  # of squared norms: what a matrix product of thousands of terms loses, and more
BLOCK = 2048  # rows and columns: 32 MiB of distances


@dataclass(frozen=True)
class Neighbourhoods:
    """Shares of neighbourhoods that are hit.

    Attributes:
        precision: share of samples inside the manifold of the reference (Kynkaanniemi et al. 2019, k = 3).
        recall: share of the reference inside the manifold of the samples (the same, k = 3).
        density: neighbourhoods of the reference around a sample, over k; may exceed 1 (Naeem et al. 2020, k = 5).
        coverage: share of the reference's neighbourhoods with a sample inside (the same, k = 5).
    """

    precision: float
    recall: float
    density: float
    coverage: float


@dataclass(frozen=True)
class _Balls:
    """Squared radii of the balls around the features of a set, to the neighbour of Kynkaanniemi and to that of Naeem, (N,) each."""

    manifold: torch.Tensor
    density: torch.Tensor


def neighbourhoods(
    samples: np.ndarray, reference: np.ndarray, *, manifold_k: int = 3, density_k: int = 5, device: torch.device | str = "cpu", block: int = BLOCK
) -> Neighbourhoods:
    """Returns precision, recall, density and coverage of samples (N, D) against a reference (M, D).

    A feature is not its own neighbour. As their authors have it, the manifolds of precision and recall include their border, and the
    neighbourhoods of density and coverage do not; distances that differ by rounding alone are equal.

    Args:
        device: where the distances are computed; it must know float64.
        block: rows and columns of distances held at a time.

    Raises:
        ValueError: if dimensions differ, a set has no k-th neighbour, or a feature is not finite.
    """
    _check(samples, reference, max(manifold_k, density_k))
    ours, theirs = (_balls(features, manifold_k, density_k, device, block) for features in (samples, reference))
    slack = ROUNDING * (_largest_norm(samples) + _largest_norm(reference))
    precise, dense = (torch.zeros(len(samples), dtype=dtype, device=device) for dtype in (torch.bool, torch.float64))
    recalled, nearest = torch.zeros(len(reference), dtype=torch.bool, device=device), torch.full_like(theirs.density, torch.inf)
    for rows, x in _blocks(samples, device, block):
        for columns, y in _blocks(reference, device, block):
            d2 = squared_distances(x, y)
            precise[rows] |= (d2 <= theirs.manifold[columns] + slack).any(dim=1)
            recalled[columns] |= (d2 <= ours.manifold[rows, None] + slack).any(dim=0)
            dense[rows] += (d2 < theirs.density[columns] - slack).sum(dim=1)
            nearest[columns] = torch.minimum(nearest[columns], d2.amin(dim=0))
    coverage = (nearest < theirs.density - slack).double().mean()
    return Neighbourhoods(float(precise.double().mean()), float(recalled.double().mean()), float(dense.mean()) / density_k, float(coverage))


def nearest_squared_distances(queries: np.ndarray, features: np.ndarray, count: int, device: torch.device | str = "cpu", block: int = BLOCK) -> torch.Tensor:
    """Returns (N, count), float64, ascending, the squared distances of queries (N, D) to the nearest of features (M, D)."""
    parts = []
    for _, x in _blocks(queries, device, block):
        smallest = torch.full((len(x), count), torch.inf, dtype=torch.float64, device=device)
        for _, y in _blocks(features, device, block):
            smallest = torch.cat([smallest, squared_distances(x, y)], dim=1).topk(count, dim=1, largest=False).values
        parts.append(smallest)
    return torch.cat(parts)


def squared_distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Returns (n, m), not negative, of x (n, D) and y (m, D), float64, by one matrix product."""
    norms = (x * x).sum(dim=1)[:, None] + (y * y).sum(dim=1)
    return torch.addmm(norms, x, y.T, alpha=-2).clamp_min_(0)


def _balls(features: np.ndarray, manifold_k: int, density_k: int, device: torch.device | str, block: int) -> _Balls:
    nearest = nearest_squared_distances(features, features, max(manifold_k, density_k) + 1, device, block)
    return _Balls(nearest[:, manifold_k], nearest[:, density_k])  # the nearest of all, at 0, is the feature itself


def _blocks(features: np.ndarray, device: torch.device | str, block: int) -> Iterator[tuple[slice, torch.Tensor]]:
    for first in range(0, len(features), block):
        rows = slice(first, min(first + block, len(features)))
        yield rows, torch.from_numpy(np.ascontiguousarray(features[rows])).to(device).double()


def _largest_norm(features: np.ndarray) -> float:
    return float(np.einsum("nd,nd->n", features, features, dtype=np.float64).max())


def _check(samples: np.ndarray, reference: np.ndarray, k: int) -> None:
    if samples.shape[1] != reference.shape[1]:
        raise ValueError(f"features={samples.shape[1]} differs from the reference's {reference.shape[1]}; use one extractor for both")
    if min(len(samples), len(reference)) <= k:
        raise ValueError(f"k={k} is not less than the {min(len(samples), len(reference))} features of a set; use more images")
    if not all(np.isfinite(features).all() for features in (samples, reference)):
        raise ValueError("features are not finite; the images or the extractor's weights are broken")
