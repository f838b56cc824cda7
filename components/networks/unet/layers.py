"""The parts of the DDPM U-Net. Activations are (B, C, H, W), channels_last in memory where the caller says so."""

import math
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from .dropout import dropped
from .norm import EPS, Norm

Resample = Literal["none", "down", "up"]


def init_layer(layer: nn.Linear | nn.Conv2d, scale: float = 1.0) -> None:
    """Draws weights uniformly with variance scale / fan_avg, biases 0 (the initialisation of the DDPM authors' code)."""
    nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(max(scale, 1e-10)))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def conv3x3(in_channels: int, out_channels: int, *, scale: float = 1.0, stride: int = 1, padding: int = 1) -> nn.Conv2d:
    """Returns a 3x3 convolution, initialised as DDPM does."""
    layer = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=padding)
    init_layer(layer, scale)
    return layer


def timestep_embedding(t: torch.Tensor, dim: int, *, cosine_first: bool = False) -> torch.Tensor:
    """Returns sine and cosine features (B, dim), float32, of time steps t (B,) (Transformer section 3.5, as DDPM's code has it).

    Args:
        cosine_first: cosines first, of frequencies that end before 1e-4, as in diffusers' defaults (flip_sin_to_cos, freq_shift 0).
    """
    half = dim // 2
    last = half if cosine_first else half - 1
    frequencies = torch.exp(torch.arange(half, device=t.device, dtype=torch.float32) * (-math.log(10_000.0) / last))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()] if cosine_first else [angles.sin(), angles.cos()], dim=1)


class TimeMLP(nn.Module):
    """Time steps to one bias per channel of every residual block: all blocks' projections are a single product."""

    def __init__(self, base_channels: int, block_channels: list[int], *, cosine_first: bool = False) -> None:
        super().__init__()
        self.base_channels, self.block_channels, self.cosine_first = base_channels, block_channels, cosine_first
        self.hidden = nn.Linear(base_channels, 4 * base_channels)
        self.embedding = nn.Linear(4 * base_channels, 4 * base_channels)
        self.projections = nn.Linear(4 * base_channels, sum(block_channels))
        for layer in (self.hidden, self.embedding, self.projections):
            init_layer(layer)

    @property
    def embedding_channels(self) -> int:
        """Channels of the time embedding."""
        return 4 * self.base_channels

    def forward(self, t: torch.Tensor, condition: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Returns one (B, C_i, 1, 1) tensor for each residual block, in the order the blocks run.

        Args:
            condition: what else the blocks are told, (B, embedding_channels); it is added to the time embedding.
        """
        embedding = self.embedding(F.silu(self.hidden(timestep_embedding(t, self.base_channels, cosine_first=self.cosine_first))))
        embedding = embedding if condition is None else embedding + condition
        return list(self.projections(F.silu(embedding))[:, :, None, None].split(self.block_channels, dim=1))


class ResidualBlock(nn.Module):
    """Two convolutions around a time bias, and a shortcut (DDPM appendix B).

    Args:
        scale_shift: the time scales and shifts the second norm (ADM).
        resample: what becomes of height and width behind the first norm and in the shortcut (BigGAN's blocks, ADM).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        dropout: float,
        num_groups: int,
        eps: float = EPS,
        scale_shift: bool = False,
        resample: Resample = "none",
    ) -> None:
        super().__init__()
        self.out_channels, self.scale_shift, self.resample = out_channels, scale_shift, resample
        self.norm_1 = Norm(num_groups, in_channels, eps)
        self.conv_1 = conv3x3(in_channels, out_channels)
        self.norm_2 = Norm(num_groups, out_channels, eps)
        self.dropout = dropout
        self.conv_2 = conv3x3(out_channels, out_channels, scale=0.0)
        self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
        if isinstance(self.shortcut, nn.Conv2d):
            init_layer(self.shortcut)

    def forward(self, x: torch.Tensor, time_bias: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        """Returns (B, C_out, H, W), H and W halved or doubled where it resamples.

        Args:
            time_bias: (B, C_out, 1, 1), or scales and shifts (B, 2 C_out, 1, 1).
            keys: (B, 2) int32, which decide the dropout mask; without them torch's global generator does.
        """
        hidden = self.conv_1(resampled(F.silu(self.norm_1(x)), self.resample))
        if self.scale_shift:
            scale, shift = time_bias.chunk(2, dim=1)
            hidden = F.silu(self.norm_2(hidden) * (1 + scale) + shift)
        else:
            hidden = F.silu(self.norm_2(hidden + time_bias))
        if self.training and self.dropout:
            hidden = F.dropout(hidden, self.dropout) if keys is None else dropped(hidden, keys, self.dropout)
        return self.shortcut(resampled(x, self.resample)) + self.conv_2(hidden)


class SelfAttention(nn.Module):
    """Attention over all pixels, with a shortcut (DDPM appendix B)."""

    def __init__(self, channels: int, *, num_heads: int, num_groups: int, eps: float = EPS) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = Norm(num_groups, channels, eps)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        init_layer(self.qkv)
        init_layer(self.out, scale=0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = x.shape
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        qkv = self.qkv(tokens).view(batch, height * width, 3, self.num_heads, channels // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(tokens.shape)
        return x + self.out(attended).view(batch, height, width, channels).permute(0, 3, 1, 2)


class Downsample(nn.Module):
    """Halves height and width by a strided convolution, padded on the right and bottom as in DDPM's code, or on all sides."""

    def __init__(self, channels: int, padding: int = 0) -> None:
        super().__init__()
        self.conv = conv3x3(channels, channels, stride=2, padding=padding)
        self.padding = padding

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(resampled(x, "up"))


def resampled(x: torch.Tensor, how: Resample) -> torch.Tensor:
    """Returns x with height and width halved by averages, doubled by nearest neighbours, or as they are."""
    if how == "down":
        return F.avg_pool2d(x, 2)
    if how == "none":
        return x
    return doubled(x) if torch.compiler.is_compiling() else F.interpolate(x, scale_factor=2.0, mode="nearest")


def doubled(x: torch.Tensor) -> torch.Tensor:
    """Returns x (B, C, H, W) with every pixel twice in height and width, in channels_last.

    Its gradient is a sum, where that which Inductor makes of `interpolate` scatters.
    """
    batch, channels, height, width = x.shape
    pixels = x.permute(0, 2, 3, 1)[:, :, None, :, None, :].expand(batch, height, 2, width, 2, channels)
    return pixels.reshape(batch, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)
