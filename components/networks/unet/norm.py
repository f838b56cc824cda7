"""Group normalisation, with input and output in the network's precision and statistics in float32.

Run as it is, it is torch's own operation. Compiled for a GPU, it is written so that Inductor makes two kernels of it in channels_last, the SiLU
and the dropout behind it included: one reads x for mean and variance of each image and channel, along contiguous channels; the other reads it
again and writes.
"""

import torch
from torch import nn
from torch.nn import functional as F

EPS = 1e-6


class Norm(nn.GroupNorm):
    """GroupNorm (Wu and He 2018) of (B, C, H, W) in the type of its input."""

    def __init__(self, num_groups: int, channels: int, eps: float = EPS) -> None:
        super().__init__(num_groups, channels, eps=eps)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.is_cuda and torch.compiler.is_compiling():
            return norm_by_channel(input, self.weight, self.bias, self.num_groups, self.eps)
        return F.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


def norm_by_channel(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, num_groups: int, eps: float = EPS) -> torch.Tensor:
    """Returns GroupNorm(x) by mean and variance of each image and channel, joined to those of groups (Chan et al. 1983), and one affine map for each.

    Args:
        weight, bias: (C,) float32.
    """
    batch, channels = x.shape[:2]
    wide = x.float()
    variances, means = torch.var_mean(wide, dim=(2, 3), correction=0)
    means, variances = means.view(batch, num_groups, -1), variances.view(batch, num_groups, -1)
    mean = means.mean(dim=2, keepdim=True)
    variance = (variances + (means - mean).square()).mean(dim=2, keepdim=True)
    scale = weight.view(1, num_groups, -1) * torch.rsqrt(variance + eps)
    shift = bias.view(1, num_groups, -1) - mean * scale
    return (wide * scale.reshape(batch, channels, 1, 1) + shift.reshape(batch, channels, 1, 1)).to(x.dtype)
