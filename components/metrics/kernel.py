"""The kernel distance between two sets of features: KID where the features are Inception's."""

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

Values = TypeVar("Values", np.ndarray, torch.Tensor)
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


def kernel_distance(
    samples: np.ndarray, reference: np.ndarray, subsets: int = 100, subset_size: int = 1000, device: torch.device | str = "cpu"
) -> KernelDistance:
    """Returns the kernel distance of features (N, D) to features (M, D) (Binkowski et al. 2018, "Demystifying MMD GANs").

    Args:
        device: where the kernels are computed, in float64: by numpy on the CPU, by torch elsewhere.

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
        x, y = (features[rng.choice(len(features), size, replace=False)].astype(np.float64) for features in (samples, reference))
        values[index] = unbiased_mmd2(x, y) if torch.device(device).type == "cpu" else unbiased_mmd2(*(torch.from_numpy(part).to(device) for part in (x, y)))
    return KernelDistance(float(values.mean()), float(values.std()), size, subsets)


def unbiased_mmd2(x: Values, y: Values) -> float:
    """Returns the unbiased estimate of the squared discrepancy of x (n, D) and y (n, D), float64, under the polynomial kernel."""
    n = len(x)
    within = sum(float(k.sum() - k.trace()) for k in (polynomial_kernel(x, x), polynomial_kernel(y, y)))
    return within / (n * (n - 1)) - 2 * float(polynomial_kernel(x, y).mean())


def polynomial_kernel(x: Values, y: Values) -> Values:
    """Returns (n, m), (x.y / D + 1)^3 of x (n, D) and y (m, D)."""
    product: Any = x @ y.T
    return (product / x.shape[1] + 1) ** 3
