"""The Inception score: how sure a classifier is of each image, and how varied its answers are."""

from dataclasses import dataclass

import numpy as np

SEED = 2020  # of the shuffling: torch-fidelity's, so that its numbers are ours


@dataclass(frozen=True)
class InceptionScore:
    """Scores of equal parts of the images.

    Attributes:
        mean: over the parts; 1 at worst, the number of classes at best.
        standard_deviation: over the parts.
    """

    mean: float
    standard_deviation: float


def inception_score(logits: np.ndarray, splits: int = 10) -> InceptionScore:
    """Returns exp(E KL(p(y|x) || p(y))) over shuffled parts (Salimans et al. 2016, "Improved Techniques for Training GANs").

    Args:
        logits: (N, K), without the last layer's bias, as torch-fidelity and TTUR take them.

    Raises:
        ValueError: if there are fewer images than parts, or a logit is not finite.
    """
    count = len(logits)
    if count < splits:
        raise ValueError(f"splits={splits} is more than the {count} images; draw more images")
    if not np.isfinite(logits).all():
        raise ValueError("logits are not finite; the images or the extractor's weights are broken")
    log_p = logits[np.random.RandomState(SEED).permutation(count)].astype(np.float64)
    log_p -= _log_sum_exp(log_p, axis=1)
    scores = [_score(log_p[part * count // splits : (part + 1) * count // splits]) for part in range(splits)]
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))


def _score(log_p: np.ndarray) -> float:
    log_marginal = _log_sum_exp(log_p, axis=0) - np.log(len(log_p))
    return float(np.exp((np.exp(log_p) * (log_p - log_marginal)).sum(axis=1).mean()))


def _log_sum_exp(values: np.ndarray, axis: int) -> np.ndarray:
    largest = values.max(axis=axis, keepdims=True)
    return largest + np.log(np.exp(values - largest).sum(axis=axis, keepdims=True))
