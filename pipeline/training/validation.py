"""What the averaged weights score on held-out rows while training goes on: the same rows, noise and seeds each time, for any number of workers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from components.data.reader import RowReader
from components.data.shards import Manifest
from components.diffusion.objective import losses_by_row
from components.metrics import energy, frechet
from components.metrics.features import DctExtractor
from components.metrics.moments import FeatureStats
from pipeline.training.config import TrainConfig

if TYPE_CHECKING:
    from pipeline.training.trainer import Trainer

LEVELS = 8
AT_ONCE = 64
"""Rows that the network sees together; parts of this size are shared out among the workers, so that no number depends on how many they are."""
FIRST_SEED = 2**61
MOST_REAL = 10_000


class Validation:
    """The held-out rows of a training, and how they are measured.

    Args:
        reader: of the held-out split.
    """

    def __init__(self, trainer: "Trainer", reader: RowReader, manifest: Manifest, rank: int, world: int) -> None:
        self._trainer, self._reader, self._rank, self._world = trainer, reader, rank, world
        self._rows = evenly_spread(len(reader), trainer.config.validate_images)
        self._times = trainer.process.times(LEVELS)
        self._num_labels = len(trainer.spec.label_names)

    def measure(self) -> dict[str, float]:
        """Returns the metrics of the present averages: the loss at every level, their mean, and the distance where samples are drawn."""
        with self._trainer.averaged():
            losses = self._losses()
            metrics = {"validation/loss": float(losses.mean())} | {
                f"validation/loss_level_{index}": float(loss) for index, loss in enumerate(losses.mean(dim=1))
            }
            if self._trainer.config.validate_samples:
                metrics["validation/distance"] = self._distance(self._samples())
        return metrics

    def _losses(self) -> torch.Tensor:
        """Returns the loss of each row at each level, (LEVELS, N) float64."""
        trainer, losses = self._trainer, torch.zeros(len(self._times), len(self._rows), dtype=torch.float64)
        for first in self._mine(len(self._rows)):
            numbers = self._rows[first : first + AT_ONCE]
            x_0 = trainer.spec.space.to_x_0(torch.from_numpy(self._reader.rows(numbers)).to(trainer.device))
            labels = self._labels(numbers)
            with torch.autocast(trainer.device.type, torch.bfloat16, enabled=trainer.arithmetic.precision == "bfloat16"):
                found = losses_by_row(trainer.network, trainer.process, x_0, self._times, seed=trainer.config.seed, first_row=first, labels=labels)
            losses[:, first : first + AT_ONCE] = found
        return self._of_all(losses)

    def _labels(self, numbers: np.ndarray) -> torch.Tensor | None:
        if not self._num_labels:
            return None
        labels = self._reader.labels(numbers)
        return torch.from_numpy(np.where(labels < 0, self._num_labels, labels).astype(np.int64)).to(self._trainer.device)

    def _samples(self) -> np.ndarray:
        """Returns the rows of all samples."""
        space, count = self._trainer.spec.space.seen, self._trainer.config.validate_samples
        drawn = np.zeros((count, *space.shape), space.dtype)
        for first in self._mine(count):
            seeds = range(FIRST_SEED + first, FIRST_SEED + min(first + AT_ONCE, count))
            drawn[first : first + AT_ONCE] = self._trainer.draw(seeds)
        return self._of_all(torch.from_numpy(drawn)).numpy()

    def _distance(self, drawn: np.ndarray) -> float:
        """Returns the Frechet distance of dct8 features of images, the energy distance of points."""
        space, real = self._trainer.spec.space.seen, self._real()
        if len(space.shape) == 1:
            return energy.compare(drawn, energy.EnergyReference.of(real)).distance
        extractor = DctExtractor()
        measured = [extractor(torch.from_numpy(np.ascontiguousarray(space.for_features(rows)))) for rows in (drawn, real)]
        shift = measured[1].mean(axis=0)
        ours, theirs = (FeatureStats.of(features, shift) for features in measured)
        return float(frechet.frechet_distance(ours, theirs))

    def _real(self) -> np.ndarray:
        """Returns held-out rows as a person sees them."""
        rows = self._reader.rows(evenly_spread(len(self._reader), MOST_REAL))
        space = self._trainer.space
        return rows if space.seen is space else space.to_rows(space.to_x_0(torch.from_numpy(rows).to(self._trainer.device))).cpu().numpy()

    def _mine(self, count: int) -> Sequence[int]:
        """Returns where this worker's parts begin."""
        return range(self._rank * AT_ONCE, count, self._world * AT_ONCE)

    def _of_all(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the workers' parts put together: each is 0 where it is not the worker's own."""
        if self._world == 1:
            return values
        together = values.to(self._trainer.device)
        torch.distributed.all_reduce(together)
        return together.cpu()


def evenly_spread(count: int, most: int) -> np.ndarray:
    """Returns at most so many row numbers below a count, evenly spread."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(np.int64)


def deciding(config: TrainConfig, metrics: dict[str, float]) -> float:
    """Returns the number by which measurements are compared; infinite where it is none."""
    value = metrics["validation/distance" if config.early_stop_on == "distance" and config.validate_samples else "validation/loss"]
    return value if np.isfinite(value) else float("inf")


def has_stopped(config: TrainConfig, validations: Sequence[tuple[int, float]]) -> bool:
    """Tells whether so many measurements in a row were without a gain that training ends."""
    best, without = float("inf"), 0
    for _, value in validations:
        without = 0 if value < best * (1 - config.early_stop_gain) else without + 1
        best = min(best, value)
        if config.early_stop and without >= config.early_stop:
            return True
    return False
