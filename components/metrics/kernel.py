"""The kernel distance between two sets of features: KID where the features are Inception's."""

from dataclasses import dataclass

import numpy as np

SEED = 2020  # of the subsets: torch-fidelity's, so that its numbers are ours


@dataclass(frozen=True)
class KernelDistance:
    """Squared maximum mean discrepancies of random subsets.

    Attributes:
        mean: over the subsets; unbiased, so that it may be slightly negative.
        standard_deviation: over the subsets.
        subset_size: features of each set in a subset; less than was asked for where a set is smaller.
        subsets: their number.
    """

    mean: float
    standard_deviation: float
    subset_size: int
    subsets: int


def kernel_distance(samples: np.ndarray, reference: np.ndarray, subsets: int = 100, subset_size: int = 1000) -> KernelDistance:
    """Returns the kernel distance of features (N, D) to features (M, D) (Binkowski et al. 2018, "Demystifying MMD GANs").

    Raises:
        ValueError: if dimensions differ, or a set has fewer than two features.
    """
    if samples.shape[1] != reference.shape[1]:
        raise ValueError(f"features={samples.shape[1]} differs from the reference's {reference.shape[1]}; use one extractor for both")
    size = min(subset_size, len(samples), len(reference))
    if size < 2:
        raise ValueError(f"subset_size={size} gives no unbiased estimate; use at least 2 features of each set")
    rng = np.random.RandomState(SEED)
    values = np.zeros(subsets)
    for index in range(subsets):
        x = samples[rng.choice(len(samples), size, replace=False)].astype(np.float64)
        y = reference[rng.choice(len(reference), size, replace=False)].astype(np.float64)
        values[index] = unbiased_mmd2(x, y)
    return KernelDistance(float(values.mean()), float(values.std()), size, subsets)


def unbiased_mmd2(x: np.ndarray, y: np.ndarray) -> float:
    """Returns the unbiased estimate of the squared discrepancy of x (n, D) and y (n, D), float64, under the polynomial kernel."""
    n = len(x)
    within = sum(float(k.sum() - np.trace(k)) for k in (polynomial_kernel(x, x), polynomial_kernel(y, y)))
    return within / (n * (n - 1)) - 2 * float(polynomial_kernel(x, y).mean())


def polynomial_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns (n, m), (x.y / D + 1)^3 of x (n, D) and y (m, D)."""
    return (x @ y.T / x.shape[1] + 1) ** 3
