"""The Diffusion Transformer: eps_hat = DiT(x_t, t), or DiT(x_t, t, labels) where it is told the class."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..unet.layers import timestep_embedding
from .config import DiTConfig

NORM_EPS = 1e-6
TIME_FEATURES = 256
MLP_RATIO = 4


class Attention(nn.Module):
    """Multi-head self-attention over tokens (B, N, D)."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.out = nn.Linear(hidden_size, hidden_size)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        batch, number, features = tokens.shape
        query, key, value = self.qkv(tokens).view(batch, number, 3, self.num_heads, features // self.num_heads).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(tokens.shape))


class Perceptron(nn.Module):
    """Two layers around GELU, token by token."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(hidden_size, MLP_RATIO * hidden_size), nn.Linear(MLP_RATIO * hidden_size, hidden_size)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.outer(F.gelu(self.inner(tokens), approximate="tanh"))


class Block(nn.Module):
    """Attention and perceptron, each normed, shifted, scaled and gated by what the network is told (adaLN-Zero, DiT section 3.2)."""

    def __init__(self, hidden_size: int, num_heads: int, norm_eps: float) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=NORM_EPS)
        self.attention = Attention(hidden_size, num_heads)
        self.norm_2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=norm_eps)
        self.perceptron = Perceptron(hidden_size)
        self.modulation = nn.Linear(hidden_size, 6 * hidden_size)

    def forward(self, tokens: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        """Returns tokens (B, N, D).

        Args:
            told: embedding of time and class behind SiLU, (B, D).
        """
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(told)[:, None].chunk(6, dim=-1)
        tokens = tokens + gate_1 * self.attention(self.norm_1(tokens) * (1 + scale_1) + shift_1)
        return tokens + gate_2 * self.perceptron(self.norm_2(tokens) * (1 + scale_2) + shift_2)


class DiT(nn.Module):
    """The denoiser: (x_t (B, C, H, W), t (B,), labels (B,) int64 in 0..K or None) -> estimate (B, outputs * C, H, W).

    With K classes an embedding of the label is added to that of the time step. Label K says that the class is not told, and so does None. Features of
    time are those of diffusers' DiT, whose frequencies end at 1e-4.

    Args:
        shape: (C, H, W).
        num_classes: K; 0 for a network that is told no class.
        outputs: how many times the channels of x_t it returns.
        conditions: A, numbers that it is told of each row beside; they are mapped without a bias, so that 0 says nothing.

    Raises:
        ValueError: if the patch does not divide the image, or labels are given to a network without classes.
    """

    positions: torch.Tensor

    def __init__(self, config: DiTConfig, *, shape: tuple[int, ...], num_classes: int = 0, outputs: int = 1, conditions: int = 0) -> None:
        super().__init__()
        config.check_shape(shape)
        channels, height, width = shape
        depth, hidden_size, num_heads = config.measures
        self.config, self.shape, self.outputs = config, shape, outputs
        self.grid = (height // config.patch_size, width // config.patch_size)
        self.patches = nn.Conv2d(channels, hidden_size, config.patch_size, stride=config.patch_size)
        self.register_buffer("positions", position_embedding(*self.grid, hidden_size), persistent=False)
        self.time_hidden, self.time_embedding = nn.Linear(TIME_FEATURES, hidden_size), nn.Linear(hidden_size, hidden_size)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, config.norm_eps) for _ in range(depth))
        self.norm_out = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=NORM_EPS)
        self.modulation_out = nn.Linear(hidden_size, 2 * hidden_size)
        self.out = nn.Linear(hidden_size, config.patch_size**2 * channels * outputs)
        self._init_weights()
        # Made last, so that all other weights are those that the same seed gives a network without classes.
        self.label_embedding = nn.Embedding(num_classes + 1, hidden_size) if num_classes else None
        if self.label_embedding is not None:
            nn.init.normal_(self.label_embedding.weight, std=0.02)
        self.condition_embedding = nn.Linear(conditions, hidden_size, bias=False) if conditions else None
        if self.condition_embedding is not None:
            nn.init.zeros_(self.condition_embedding.weight)

    def _init_weights(self) -> None:
        """Draws weights as DiT does: every block begins as the identity, and the estimate is 0 (section 3.2)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patches.weight.view(self.patches.out_channels, -1))
        nn.init.zeros_(self.patches.bias) if self.patches.bias is not None else None
        for layer in (self.time_hidden, self.time_embedding):
            nn.init.normal_(layer.weight, std=0.02)
        for layer in (*(block.modulation for block in self._blocks()), self.modulation_out, self.out):
            nn.init.zeros_(layer.weight)

    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]

    def _told(self, t: torch.Tensor, labels: torch.Tensor | None, conditions: torch.Tensor | None) -> torch.Tensor:
        """Returns the embedding (B, D) of all that the network is told."""
        sines, cosines = timestep_embedding(t, TIME_FEATURES).chunk(2, dim=1)
        told = self.time_embedding(F.silu(self.time_hidden(torch.cat([cosines, sines], dim=1))))
        if self.label_embedding is not None:
            labels = labels if labels is not None else torch.full((len(t),), self.label_embedding.num_embeddings - 1, device=t.device)
            told = told + self.label_embedding(labels)
        elif labels is not None:
            raise ValueError("labels are given to a network without classes; give none, or train with model.conditional=true")
        return told if self.condition_embedding is None or conditions is None else told + self.condition_embedding(conditions)

    def forward(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        labels: torch.Tensor | None = None,
        keys: torch.Tensor | None = None,
        conditions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns the estimate (B, outputs * C, H, W); there is no dropout, for which there would be keys.

        Args:
            conditions: (B, A) float32, what augmentation did to each image; None says nothing.
        """
        told = F.silu(self._told(t, labels, conditions))
        tokens = self.patches(x_t).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            again = self.config.checkpointing and torch.is_grad_enabled()
            tokens = checkpoint(block, tokens, told, use_reentrant=False, preserve_rng_state=False) if again else block(tokens, told)
        shift, scale = self.modulation_out(told)[:, None].chunk(2, dim=-1)
        return self._image(self.out(self.norm_out(tokens) * (1 + scale) + shift))

    def _image(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns the image (B, outputs * C, H, W) whose patches are tokens (B, N, patch_size^2 * outputs * C)."""
        (rows, columns), side = self.grid, self.config.patch_size
        patches = tokens.view(len(tokens), rows, columns, side, side, -1)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), -1, rows * side, columns * side)


def position_embedding(rows: int, columns: int, features: int) -> torch.Tensor:
    """Returns fixed sine and cosine features (rows * columns, features) of places in a grid: half of the column, half of the row (MAE, as DiT has it)."""
    row, column = torch.meshgrid(torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij")
    frequencies = 10_000.0 ** -(torch.arange(features // 4, dtype=torch.float64) / (features / 4))
    angles = [place.reshape(-1, 1) * frequencies for place in (column, row)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1).float()
