"""Random numbers by address: a draw is a pure function of (purpose, seed, counters), never of what was drawn before.

The generator is Philox 4x64 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): seed and purpose are its
128-bit key, the counters its upper counter words, so that two addresses can never share a stream.
"""

from enum import IntEnum

import numpy as np

MAX_SEED = 2**63 - 1


class Purpose(IntEnum):
    """What a stream is for. Numbers are part of every result: add new ones, never renumber."""

    ROWS = 1
    TRAINING = 2
    SAMPLE = 3
    CLASSIFIER = 4
    WEIGHTS = 5
    TIMESTEP_LOSS = 6
    SAMPLE_LABEL = 7
    DROPOUT = 8
    POINTS = 9
    BOUND = 10
    AUGMENTATION = 11
    POSTERIOR = 12


def stream(purpose: Purpose, seed: int, *counters: int) -> np.random.Generator:
    """Returns the generator at an address.

    Args:
        seed: 0 to 2**63 - 1.
        counters: at most three non-negative integers, for example (step, lane).

    Raises:
        ValueError: if the seed is out of range.
    """
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed={seed} is out of range; use an integer from 0 to {MAX_SEED}")
    upper_words = list(counters) + [0] * (3 - len(counters))
    return np.random.Generator(np.random.Philox(key=[seed, int(purpose)], counter=[0, *upper_words]))
