"""A residual multilayer perceptron: an estimate of x_t's shape from x_t and t."""

import torch
from torch import nn
from torch.nn import functional as F

from ..unet.layers import timestep_embedding

ROWS = 64


class Block(nn.Module):
    """Two layers around a bias by time step, and a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner, self.outer = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        nn.init.zeros_(self.outer.weight)

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return x + self.outer(F.silu(self.inner(self.norm(x) + bias)))


class PointMLP(nn.Module):
    """The denoiser: (x_t (B, D), t (B,), labels (B,) int64 in 0..K or None) -> estimate (B, D).

    With K classes an embedding of the label is added to that of the time step. Label K says that the class is not told, and so does None.

    Args:
        dimensions: D.
        width: features of every hidden layer.
        depth: residual blocks.
        num_classes: K; 0 for a network that is told no class.
        outputs: how many times the coordinates of x_t it returns.
        conditions: A, numbers that it is told of each row beside; they are mapped without a bias, so that 0 says nothing.

    Raises:
        ValueError: if labels are given to a network without classes.
    """

    def __init__(self, *, dimensions: int, width: int, depth: int, num_classes: int = 0, outputs: int = 1, conditions: int = 0) -> None:
        super().__init__()
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.biases = nn.Linear(width, depth * width)
        self.project_in, self.project_out = nn.Linear(dimensions, width), nn.Linear(width, outputs * dimensions)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm_out = nn.LayerNorm(width)
        nn.init.zeros_(self.project_out.weight)
        nn.init.zeros_(self.project_out.bias)
        self.label_embedding = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.condition_embedding = nn.Linear(conditions, width, bias=False) if conditions else None

    def forward(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        labels: torch.Tensor | None = None,
        keys: torch.Tensor | None = None,
        conditions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns the estimate (B, outputs * D); there is no dropout, for which there would be keys.

        While it samples on a CPU it works on ROWS rows at a time, however many there are: the last bits of a matrix product depend on its size,
        and a sample depends on its own seed only.
        """
        if self.training or x_t.is_cuda:
            return self._estimate(x_t, t, labels, conditions)
        missing = -len(x_t) % ROWS
        given = [None if each is None else F.pad(each, (0, 0) * (each.ndim - 1) + (0, missing)).split(ROWS) for each in (x_t, t, labels, conditions)]
        parts = zip(*(each or [None] * len(given[0] or ()) for each in given), strict=True)
        return torch.cat([self._estimate(*part) for part in parts])[: len(x_t)]

    def _estimate(self, x_t: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None, conditions: torch.Tensor | None) -> torch.Tensor:
        embedding = self.time(timestep_embedding(t, self.width))
        if self.condition_embedding is not None and conditions is not None:
            embedding = embedding + self.condition_embedding(conditions)
        if self.label_embedding is not None:
            labels_shown = labels if labels is not None else torch.full((len(x_t),), self.label_embedding.num_embeddings - 1, device=x_t.device)
            embedding = embedding + self.label_embedding(labels_shown)
        elif labels is not None:
            raise ValueError("labels are given to a network without classes; give none, or train with model.conditional=true")
        x = self.project_in(x_t)
        for block, bias in zip(self.blocks, self.biases(embedding).chunk(len(self.blocks), dim=1), strict=True):
            x = block(x, bias)
        return self.project_out(F.silu(self.norm_out(x)))
