"""Where samples start: standard normal noise by seed, and the ways between two seeds."""

from collections.abc import Sequence

import numpy as np
import torch

from ..streams import Purpose, stream


def initial_noise(seeds: Sequence[int], shape: tuple[int, ...], draw: int = 0) -> torch.Tensor:
    """Returns standard normal float32 noise (len(seeds), *shape), made on the CPU so that every device starts alike.

    Args:
        seeds: one per image.
        draw: which noise of that seed: 0 is x_T, 1 and on are the fresh noise of stochastic steps.

    Raises:
        ValueError: if a seed is out of range.
    """
    rows = [stream(Purpose.SAMPLE, seed, draw).standard_normal(shape, dtype=np.float32) for seed in seeds]
    return torch.from_numpy(np.stack(rows))


def rows_of_noise(purpose: Purpose, seed: int, rows: Sequence[int], shape: Sequence[int], *more: int) -> torch.Tensor:
    """Returns standard normal float32 noise (len(rows), *shape), a row's by its number, made on the CPU so that every device measures alike.

    Args:
        more: what else tells one draw from another, such as a step.
    """
    return torch.from_numpy(np.stack([stream(purpose, seed, row, *more).standard_normal(tuple(shape), dtype=np.float32) for row in rows]))


def interpolated_noise(first_seed: int, second_seed: int, fractions: Sequence[float], shape: tuple[int, ...]) -> torch.Tensor:
    """Returns x_T (len(fractions), *shape), float32, on the great circle between the noises of two seeds (DDIM Eq. 67).

    A straight line would leave the shell on which nearly all standard normal noise lies.

    Args:
        fractions: 0 is exactly the first seed's noise, 1 exactly the second's.

    Raises:
        ValueError: if a fraction or a seed is out of range.
    """
    if outside := [fraction for fraction in fractions if not 0 <= fraction <= 1]:
        raise ValueError(f"fraction={outside[0]} is out of range; use 0 (the first seed) to 1 (the second)")
    first, second = initial_noise([first_seed, second_seed], shape).double()
    if first_seed == second_seed:
        return first.float().expand(len(fractions), *shape).clone()
    angle = torch.arccos((first * second).sum() / (first.norm() * second.norm()))
    share = torch.tensor(fractions, dtype=torch.float64).view(-1, *[1] * len(shape))
    return ((torch.sin((1 - share) * angle) * first + torch.sin(share * angle) * second) / torch.sin(angle)).float()
