"""Running averages of the weights."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import nn


class Decay(Protocol):
    """How much of an average a step keeps."""

    def __call__(self, step: int) -> float:
        """Returns the decay of update `step` (0, 1, ...)."""
        ...


def warmed_up(decay: float, step: int) -> float:
    """Returns the decay of update `step` (0, 1, ...), warmed up as min(decay, (1 + step) / (10 + step))."""
    return min(decay, (1 + step) / (10 + step))


def half_life(images: int, batch_size: int, ramp_up: float | None, step: int) -> float:
    """Returns the decay of update `step` (0, 1, ...) by which an image counts half after a number of images, fewer at the start (EDM's training loop).

    Args:
        images: half-life.
        batch_size: images of a step.
        ramp_up: longest half-life as a share of the images before this step; None for no ramp-up.
    """
    life = float(images) if ramp_up is None else min(float(images), step * batch_size * ramp_up)
    return 0.5 ** (batch_size / max(life, 1e-8))


def power_decay(exponent: float, step: int) -> float:
    """Returns the decay of update `step` (0, 1, ...) by which a step counts as a power of its number (EDM2 Eq. 127): (1 - 1/t)^(exponent + 1), t = step + 1."""
    return (1 - 1 / (step + 1)) ** (exponent + 1)


class Ema:
    """Exponential moving average of a module's parameters, kept in float32 (DDPM section 4, decay 0.9999).

    Attributes:
        weights: name -> average.
    """

    def __init__(self, module: nn.Module, decay: Decay) -> None:
        """Starts at the module's weights."""
        self.decay_at = decay
        self.weights = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, weight: torch.Tensor) -> None:
        """Moves every average towards the module's present weights.

        Args:
            weight: how far, 1 - decay, a float32 scalar on their device; 0 leaves them where they are.
        """
        averages, present = list(self.weights.values()), [parameter.detach() for parameter in module.parameters()]
        if weight.is_cuda:  # where torch has no fused kernel for a weight that is not known on the host
            differences = torch._foreach_sub(present, averages)
            torch._foreach_mul_(differences, weight)
            torch._foreach_add_(averages, differences)
        else:
            torch._foreach_lerp_(averages, present, [weight] * len(averages))

    @torch.no_grad()
    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Replaces every average, in place.

        Raises:
            KeyError: if one is missing.
        """
        for name, average in self.weights.items():
            average.copy_(weights[name])
