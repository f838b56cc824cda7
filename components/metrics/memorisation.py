"""Whether samples are copies of training images: are more of them nearer to one than honest images come.

An honest image comes as near as the nearest 1 % of images that the model never saw: images held out, or training images with themselves
left out. The share of samples nearer than that is the copy rate; a model that copies nothing has one of 1 %.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from .neighbours import squared_distances

QUANTILE = 0.01
LIMIT = 0.02
CONFIDENCE = 0.99
MOST_Z, LEAST_P = 3.0, 1e-3
BLOCK = 2048  # queries, and training images, compared at a time: 32 MiB of distances


@dataclass(frozen=True, eq=False)
class Calibration:
    """Images that show how near to a training image an honest one comes.

    Attributes:
        features: (M, D).
        rows: (M,) the dataset rows that they are themselves, if they are training images; None if they were held out.
    """

    features: np.ndarray
    rows: np.ndarray | None = None

    @property
    def kind(self) -> Literal["held-out", "leave-one-out"]:
        """Whether they were held out of training, or are compared with all training images but themselves."""
        return "held-out" if self.rows is None else "leave-one-out"


@dataclass(frozen=True)
class Pair:
    """A sample and the training image next to it.

    Attributes:
        sample: index of the sample.
        training_row: row of the dataset.
        distance: between their features.
    """

    sample: int
    training_row: int
    distance: float


@dataclass(frozen=True)
class Memorisation:
    """How many samples are copies.

    Attributes:
        copy_rate: share of samples at most `threshold` from a training image.
        lower: lower 99 % confidence bound of the share (Clopper & Pearson 1934, one-sided).
        upper: upper 99 % confidence bound.
        threshold: the 1 % quantile of the calibration images' distances.
        calibration: what those images were.
        calibration_count: how many.
        calibration_rate: share of those images at most `threshold` away: 1 %, or more where the dataset holds many copies of its own.
        num_samples: how many samples were compared.
        nearer_than_all: samples that lie nearer to a training image than every calibration image does.
        limit: what `lower` must exceed: 2 %, or more where the calibration cannot exclude that honest images reach that.
        pairs: the closest ones, nearest first.
    """

    copy_rate: float
    lower: float
    upper: float
    threshold: float
    calibration: Literal["held-out", "leave-one-out"]
    calibration_count: int
    calibration_rate: float
    num_samples: int
    nearer_than_all: int
    limit: float
    pairs: tuple[Pair, ...]

    @property
    def z_score(self) -> float:
        """How many standard deviations the copy rate lies above that of honest images; shows copying that is too rare to stop a model for."""
        rate = self.calibration_rate
        variance = rate * (1 - rate) * (1 / self.num_samples + 1 / self.calibration_count)
        return (self.copy_rate - rate) / variance**0.5 if variance else 0.0

    @property
    def p_value(self) -> float:
        """How often honest samples would hold as many, or more, that are nearer than every calibration image.

        Of N honest samples and M calibration images in a random order of their distances, the first k are all samples with the probability
        of N (N - 1) ... (N - k + 1) over (N + M) (N + M - 1) ... (N + M - k + 1). It sees a few exact copies that the rate does not.
        """
        total = self.num_samples + self.calibration_count
        return math.prod((self.num_samples - place) / (total - place) for place in range(self.nearer_than_all))

    @property
    def is_suspicious(self) -> bool:
        """Whether more samples lie next to training images than chance explains, if only a few."""
        return self.z_score > MOST_Z or self.p_value < LEAST_P

    @property
    def is_copying(self) -> bool:
        """Whether the model is to be stopped: more of its samples are copies than chance and rounding explain."""
        return self.lower > self.limit


@dataclass(frozen=True, eq=False)
class Nearest:
    """The nearest training image of each of some images.

    Attributes:
        distances: (N,), float64; infinite where there is none.
        rows: (N,), int64, rows of the dataset; -1 where there is none.
    """

    distances: np.ndarray
    rows: np.ndarray


def memorisation(
    samples: np.ndarray,
    training: Iterable[tuple[int, np.ndarray]],
    calibration: Calibration,
    *,
    training_rows: np.ndarray | None = None,
    num_pairs: int = 16,
    device: torch.device | str = "cpu",
) -> Memorisation:
    """Returns how many of the samples (N, D) are copies of training images, by one pass over the training features.

    Args:
        training: chunks (first position, features (B, D)); flipped training images may follow as further positions.
        training_rows: (P,) dataset row of each position; a position is its own row by default.
        device: where distances are computed; it must know float64.

    Raises:
        ValueError: if there is no sample, no calibration image or no training image, or a feature is not finite.
    """
    if not len(samples) or not len(calibration.features):
        raise ValueError(f"samples={len(samples)}, calibration={len(calibration.features)}: there must be some of both")
    own = np.full(len(calibration.features), -1) if calibration.rows is None else calibration.rows
    queries = np.concatenate([samples, calibration.features]), np.concatenate([np.full(len(samples), -1), own])
    found = nearest_training(*queries, training, training_rows=training_rows, device=device)
    if not np.isfinite(found.distances).all():
        raise ValueError("training holds no image to compare with; give the features of the training images")
    ours = Nearest(found.distances[: len(samples)], found.rows[: len(samples)])
    return _judge(ours, found.distances[len(samples) :], calibration.kind, num_pairs)


def nearest_training(
    queries: np.ndarray,
    left_out: np.ndarray,
    training: Iterable[tuple[int, np.ndarray]],
    *,
    training_rows: np.ndarray | None = None,
    device: torch.device | str = "cpu",
) -> Nearest:
    """Returns the nearest training image of each of the queries (N, D), by one pass over the training features.

    The distance of each block's winner is taken of the difference itself, so that it is zero exactly for a copy.

    Args:
        left_out: (N,) the dataset row that a query must not be compared with; -1 for none.
        training: chunks (first position, features (B, D)).
        training_rows: (P,) dataset row of each position.

    Raises:
        ValueError: if a feature is not finite.
    """
    _check_finite(queries)
    best = Nearest(np.full(len(queries), np.inf), np.full(len(queries), -1, np.int64))
    for first, features in training:
        _check_finite(features)
        for chunk in _parts(len(features)):
            positions = np.arange(first + chunk.start, first + chunk.stop)
            rows = positions if training_rows is None else training_rows[positions]
            y = _on(device, features[chunk])
            for part in _parts(len(queries)):
                distances, winners = _winners(_on(device, queries[part]), y, left_out[part, None] == rows)
                nearer = distances < best.distances[part]
                best.distances[part] = np.where(nearer, distances, best.distances[part])
                best.rows[part] = np.where(nearer, rows[winners], best.rows[part])
    return best


def _winners(x: torch.Tensor, y: torch.Tensor, barred: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (n,) distances to, and (n,) indices of, the nearest of y (m, D) to each of x (n, D), but for the pairs (n, m) that are barred."""
    smallest, winners = squared_distances(x, y).masked_fill_(torch.from_numpy(barred).to(x.device), torch.inf).min(dim=1)
    distances = torch.where(smallest.isinf(), torch.inf, (x - y[winners]).norm(dim=1))
    return distances.cpu().numpy(), winners.cpu().numpy()


def binomial_bounds(successes: int, trials: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Returns the one-sided lower and upper confidence bounds of a probability (Clopper & Pearson 1934)."""
    from scipy.special import betaincinv

    lower = betaincinv(successes, trials - successes + 1, 1 - confidence) if successes else 0.0
    upper = betaincinv(successes + 1, trials - successes, confidence) if successes < trials else 1.0
    return float(lower), float(upper)


def _judge(samples: Nearest, honest: np.ndarray, kind: Literal["held-out", "leave-one-out"], num_pairs: int) -> Memorisation:
    threshold = float(np.quantile(honest, QUANTILE))
    copies, false_alarms, count = int((samples.distances <= threshold).sum()), int((honest <= threshold).sum()), len(samples.distances)
    lower, upper = binomial_bounds(copies, count)
    closest = np.argsort(samples.distances, kind="stable")[:num_pairs]
    return Memorisation(
        copy_rate=copies / count,
        lower=lower,
        upper=upper,
        threshold=threshold,
        calibration=kind,
        calibration_count=len(honest),
        calibration_rate=false_alarms / len(honest),
        num_samples=count,
        nearer_than_all=int((samples.distances < honest.min()).sum()),
        limit=max(LIMIT, binomial_bounds(false_alarms, len(honest))[1]),
        pairs=tuple(Pair(int(index), int(samples.rows[index]), float(samples.distances[index])) for index in closest),
    )


def _on(device: torch.device | str, features: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(features)).to(device).double()


def _check_finite(features: np.ndarray) -> None:
    if not np.isfinite(features).all():
        raise ValueError("features are not finite; the images or the extractor's weights are broken")


def _parts(count: int) -> Iterator[slice]:
    return (slice(first, min(first + BLOCK, count)) for first in range(0, count, BLOCK))
