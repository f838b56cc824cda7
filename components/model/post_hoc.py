"""Averages of any width, made after the training from power-function averages that were kept at some steps (EDM2 section 3, appendix C).

Step s of a training of t steps counts (exponent + 1) s^exponent / t^(exponent + 1) in a power-function average. Its width is the standard deviation of
that distribution of s, as a share of t.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

WIDEST = 12**-0.5
"""Standard deviation of an average to which all steps count alike."""


def width_of(exponent: float) -> float:
    """Returns the width of an exponent (EDM2 Eq. 123)."""
    return float(np.sqrt(exponent + 1) / (exponent + 2) / np.sqrt(exponent + 3))


def exponent_of(width: float) -> float:
    """Returns the exponent whose average has a width: the largest root of (g + 2)^2 (g + 3) width^2 = g + 1.

    Raises:
        ValueError: if no average is so wide.
    """
    if not 0 < width < WIDEST:
        raise ValueError(f"width={width:g} is out of range; use more than 0 and less than {WIDEST:.4g}")
    inverse = width**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def inner_product(step_1: float, exponent_1: float, step_2: float, exponent_2: float) -> float:
    """Returns the integral of the product of two averages' weights over all steps (EDM2 Eq. 151)."""
    first, last = min(step_1, step_2), exponent_1 + exponent_2 + 1
    powers = last * np.log(first) - (exponent_1 + 1) * np.log(step_1) - (exponent_2 + 1) * np.log(step_2)
    return float((exponent_1 + 1) * (exponent_2 + 1) / last * np.exp(powers))


def coefficients(kept: Sequence[tuple[float, float]], step: float, width: float) -> np.ndarray:
    """Returns the weights (len(kept),) by which kept averages sum up to the one of a width, as nearly as they can (EDM2 algorithm 3).

    Args:
        kept: (step, width) of each; none after the wanted step.
        step: at which the wanted average stands.
    """
    exponents = [(at, exponent_of(each)) for at, each in kept]
    wanted = exponent_of(width)
    products = np.array([[inner_product(*one, *other) for other in exponents] for one in exponents])
    target = np.array([inner_product(*one, step, wanted) for one in exponents])
    return np.linalg.lstsq(products, target, rcond=1e-13)[0]


def combined(kept: Sequence[Mapping[str, torch.Tensor]], shares: Sequence[float]) -> dict[str, torch.Tensor]:
    """Returns the sum of weights by name, each with its share, added up in float64."""
    return {name: sum(share * each[name].double() for share, each in zip(shares, kept, strict=True)).float() for name in kept[0]}  # type: ignore[union-attr]
