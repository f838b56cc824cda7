"""Dropout whose mask is a pure integer hash, the same on every device, for any cut of the batch and in any order of the kernels."""

import torch

IN_CACHE = 1 << 16
"""Elements that a CPU hashes at a time, so that they stay in its cache."""
STEP, MIX_1, MIX_2 = 0x3C6EF35F, 0x21F0AAAD, 0x735A2D97
"""An odd step between elements, and the multipliers of the 32-bit hash `lowbias32` (Wellons 2018, hash-prospector), here keyed in the middle, too."""


def keep_mask(keys: torch.Tensor, p: float, elements: int) -> torch.Tensor:
    """Returns where nothing is dropped, (B, elements) bool; each is True with probability 1 - p.

    Args:
        keys: (B, 2) int32, uniformly random: one pair for each image.
        p: probability that an element is dropped.
        elements: of one image, numbered in the order of channels_last whatever the layout in memory.
    """
    place = torch.arange(elements, dtype=torch.int32, device=keys.device) * STEP
    if keys.is_cuda or torch.compiler.is_compiling():
        return _hashed(place, keys) >= threshold(p)
    kept, images = torch.empty((len(keys), elements), dtype=torch.bool), max(1, IN_CACHE // elements)
    for first in range(0, len(keys), images):
        torch.ge(_hashed(place, keys[first : first + images]), threshold(p), out=kept[first : first + images])
    return kept


def _hashed(place: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Returns the hash (B, elements), int32, of which the high bits count."""
    hashed = place + keys[:, :1]
    hashed = hashed.bitwise_xor_(_shifted(hashed, 16)).mul_(MIX_1)
    return hashed.bitwise_xor_(_shifted(hashed, 15)).bitwise_xor_(keys[:, 1:]).mul_(MIX_2)


def _shifted(hashed: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns hashed >>> bits, of int32 whose own shift repeats the sign."""
    return (hashed >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def threshold(p: float) -> int:
    """Returns the smallest 32-bit signed hash that is kept."""
    return min(round(p * 2**32), 2**32 - 1) - 2**31


def dropped(x: torch.Tensor, keys: torch.Tensor, p: float) -> torch.Tensor:
    """Returns x (B, C, H, W), 0 where it is dropped and scaled by 1 / (1 - p) elsewhere, rounded once."""
    batch, channels, height, width = x.shape
    kept = keep_mask(keys, p, channels * height * width).view(batch, height, width, channels).permute(0, 3, 1, 2)
    return torch.where(kept, x, 0.0) * (1.0 / (1.0 - p))
