"""Spikes: steps whose loss or gradient norm is far above those of the steps before. Nothing in it waits for the device."""

from collections.abc import Sequence

import torch

WINDOW = 100
"""Steps that say what is usual."""


class SpikeGuard:
    """Compares loss and gradient norm of each step with the last WINDOW that were finite.

    Attributes:
        recent: (2, WINDOW) float32, losses and norms in the order of their steps modulo WINDOW.
        seen: steps noted so far, an int64 scalar.
        spikes: steps that were spikes, an int64 scalar.
    """

    def __init__(self, deviations: float, *, skips: bool, device: torch.device) -> None:
        """Prepares it.

        Args:
            deviations: standard deviations above the mean from which on a value is a spike.
            skips: whether a spike is to be left out.
        """
        self._deviations, self._skips = deviations, skips
        self.recent = torch.zeros(2, WINDOW, device=device)
        self.seen = torch.zeros((), dtype=torch.int64, device=device)
        self.spikes = torch.zeros((), dtype=torch.int64, device=device)

    def judge(self, loss: torch.Tensor, norm: torch.Tensor, ignored: torch.Tensor) -> torch.Tensor:
        """Notes a step and returns 1 where it is a spike that is to be left out, 0 elsewhere, a float32 scalar.

        Args:
            loss: of all workers.
            ignored: 1 where the step does not count whatever it is.
        """
        values = torch.stack([loss.detach(), norm.detach()])
        counts = torch.isfinite(values).all() & (ignored == 0)
        limit = self.recent.mean(dim=1) + self._deviations * self.recent.std(dim=1)
        spike = (values > limit).any() & (self.seen >= WINDOW) & counts
        place = torch.arange(WINDOW, device=values.device) == self.seen % WINDOW
        self.recent.copy_(torch.where(place & counts, values[:, None], self.recent))
        self.seen.add_(counts.to(torch.int64))
        self.spikes.add_(spike.to(torch.int64))
        return spike.float() if self._skips else torch.zeros_like(norm)

    def load(self, losses: Sequence[float], norms: Sequence[float], seen: int, spikes: int) -> None:
        """Takes over what a checkpoint held."""
        if losses:
            self.recent.copy_(torch.tensor([losses, norms]))
        self.seen.fill_(seen)
        self.spikes.fill_(spikes)
