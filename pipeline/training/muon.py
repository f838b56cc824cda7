"""Muon for matrices and convolutions, AdamW for everything else, in one optimiser that skips a step on the device as the fused kernels do.

torch's own takes matrices alone, and knows no step that is to be left out.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

MOMENTUM = 0.95
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic Newton-Schulz iteration (Jordan et al. 2024)."""
ROOT_MEAN_SQUARE = 0.2
"""Of an update of AdamW, to which that of a matrix is scaled, so that both take the same learning rate (Liu et al. 2025 Eq. 4)."""


class Muon(torch.optim.AdamW):
    """Steps along the orthogonalised momentum of each matrix (Jordan et al. 2024); a convolution is the matrix of its kernels."""

    def __init__(self, groups: Sequence[dict[str, Any]], *, lr: float | torch.Tensor, betas: tuple[float, float], capturable: bool) -> None:
        """Prepares it.

        Args:
            groups: those whose parameters are matrices say `matrices`: True.
        """
        super().__init__(list(groups), lr=lr, betas=betas, fused=True, capturable=capturable)
        for parameter in self._matrices():
            # AdamW looks for a step in every state that it reads.
            self.state[parameter] = {"step": torch.zeros(()), "momentum_buffer": torch.zeros_like(parameter)}

    def _matrices(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups if group["matrices"] for parameter in group["params"]]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Takes a step, unless `found_inf` is 1."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["matrices"]]
        try:
            if self.param_groups:
                super().step()
        finally:
            self.param_groups = groups
        skipped = getattr(self, "found_inf", None)
        for group in groups:
            for parameter in group["params"] if group["matrices"] else ():
                if parameter.grad is not None:
                    self._step_matrix(parameter, parameter.grad, group, skipped)

    def _step_matrix(self, parameter: nn.Parameter, gradient: torch.Tensor, group: dict[str, Any], skipped: torch.Tensor | None) -> None:
        momentum = self.state[parameter]["momentum_buffer"]
        following = MOMENTUM * momentum + gradient
        direction = orthogonalised((gradient + MOMENTUM * following).flatten(1))
        scale = ROOT_MEAN_SQUARE * max(direction.shape) ** 0.5
        updated = parameter * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * scale * direction.view(parameter.shape)
        if skipped is not None:
            updated, following = torch.where(skipped > 0, parameter, updated), torch.where(skipped > 0, momentum, following)
        parameter.copy_(updated)
        momentum.copy_(following)


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """Returns the matrix with its singular values near 1, as far as five Newton-Schulz iterations take them."""
    a, b, c = COEFFICIENTS
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


def split_matrices(groups: Sequence[dict[str, Any]], embeddings: set[torch.Tensor]) -> list[dict[str, Any]]:
    """Returns groups of parameters cut into those of matrices and those of the rest, of which embeddings are part."""
    parts: list[dict[str, Any]] = []
    for group in groups:
        for matrices in (True, False):
            mine = [parameter for parameter in group["params"] if (parameter.ndim > 1 and parameter not in embeddings) == matrices]
            parts += [{**group, "params": mine, "matrices": matrices}] if mine else []
    return parts
