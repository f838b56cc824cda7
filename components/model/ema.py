"""Running averages of the weights."""

from collections.abc import Mapping

import torch
from torch import nn


class Ema:
    """Exponential moving average of a module's parameters, kept in float32 (DDPM section 4, decay 0.9999).

    Attributes:
        weights: name -> average.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}

    def decay_at(self, step: int) -> float:
        """Returns the decay of update `step` (0, 1, ...), warmed up as min(decay, (1 + step) / (10 + step))."""
        return min(self.decay, (1 + step) / (10 + step))

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
