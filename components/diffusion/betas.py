"""Noise schedules of DDPM: betas (T,), float64, one function each."""

import math

import torch

FIRST, LAST = 1e-4, 0.02
"""beta_1 and beta_T at T = 1000 (DDPM section 4)."""
MOST = 0.999


def linear_betas(num_steps: int) -> torch.Tensor:
    """Returns betas (T,), float64, rising from 1e-4 to 0.02 at T=1000, scaled by 1000/T otherwise (DDPM section 4)."""
    scale = 1000.0 / num_steps
    return torch.linspace(FIRST * scale, LAST * scale, num_steps, dtype=torch.float64).clamp(max=MOST)


def quadratic_betas(num_steps: int) -> torch.Tensor:
    """Returns betas (T,), float64, whose square roots rise evenly, between the ends of `linear_betas` (`quad` in DDIM's code)."""
    scale = 1000.0 / num_steps
    return (torch.linspace(math.sqrt(FIRST * scale), math.sqrt(LAST * scale), num_steps, dtype=torch.float64) ** 2).clamp(max=MOST)


def sigmoid_betas(num_steps: int) -> torch.Tensor:
    """Returns betas (T,), float64, on a logistic curve over -6..6, between the ends of `linear_betas` (GeoDiff's code)."""
    scale = 1000.0 / num_steps
    rise = torch.sigmoid(torch.linspace(-6.0, 6.0, num_steps, dtype=torch.float64))
    return ((FIRST + (LAST - FIRST) * rise) * scale).clamp(max=MOST)


def cosine_betas(num_steps: int, offset: float = 0.008) -> torch.Tensor:
    """Returns betas (T,), float64, of the squared-cosine alpha_bar, at most 0.999 (Improved DDPM Eq. 17)."""
    edges = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    alpha_bar = torch.cos((edges + offset) / (1 + offset) * math.pi / 2) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=MOST)


def zero_terminal_snr(betas: torch.Tensor) -> torch.Tensor:
    """Returns betas (T,) whose sqrt(alpha_bar) is shifted and scaled so that it is 0 at T-1 and as it was at 0 (Lin et al. 2023, algorithm 1)."""
    signal = torch.cumprod(1 - betas, dim=0).sqrt()
    signal = (signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))
    alpha_bar = signal**2
    return 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
