"""The likelihood of held-out rows under a model: its variational bound, shared out among the actors."""

import numpy as np

from components.data.shards import Split
from pipeline.measurement.evaluator import Evaluator
from pipeline.measurement.sample_store import RealSet, SampleSet

ROWS_AT_ONCE = 16


def bits_per_dimension(evaluator: Evaluator, samples: SampleSet) -> float:
    """Returns the mean bound over held-out rows, or rows to train on where none are held out, bits per dimension; how many actors work is no part of it."""
    split: Split = "holdout" if evaluator.manifest.splits.get("holdout", 0) else "train"
    count = evaluator.manifest.splits[split]
    rows = np.linspace(0, count - 1, min(evaluator.config.nll_images, count)).round().astype(int).tolist()
    real = RealSet(evaluator.context.storage, evaluator.trained_on.path, split)
    pieces = [(rows[first : first + ROWS_AT_ONCE], first) for first in range(0, len(rows), ROWS_AT_ONCE)]
    total = 0.0
    with evaluator.context.reporter.progress("bounding the likelihood", len(rows), f"{evaluator.manifest.space.noun}s") as advance:
        for (part, _), bits in zip(pieces, evaluator.actor_pool.map("bits_of", ((samples, real, part, first) for part, first in pieces)), strict=True):
            total += bits
            advance(len(part))
    return total / len(rows)
