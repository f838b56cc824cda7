"""Weights of the loss by noise level.

Each is known for the error of x_0; the error of another prediction is that one times a factor of the noise level, which is divided out.
"""

import torch

from .config import Prediction


def min_snr_weight(snr: torch.Tensor, gamma: float) -> torch.Tensor:
    """Returns min(SNR, gamma), the weight of the squared error of x_0 (Min-SNR section 3.4)."""
    return snr.clamp(max=gamma)


def p2_weight(snr: torch.Tensor, gamma: float, k: float = 1.0) -> torch.Tensor:
    """Returns SNR / (k + SNR)^gamma, the weight of the squared error of x_0; that of eps has 1 / (k + SNR)^gamma (P2 Eq. 8)."""
    return snr / (k + snr) ** gamma


def error_over_x_0(prediction: Prediction, snr: torch.Tensor, posterior_weight: torch.Tensor) -> torch.Tensor:
    """Returns the squared error of a prediction over that of the x_0 that follows from it.

    The errors of eps, v and x_0 are one: (x_t - sigma eps) / alpha = alpha x_t - sigma v = x_0.

    Args:
        posterior_weight: of x_0 in the mean of q(x_{t-1} | x_t, x_0) (DDPM Eq. 7).
    """
    if prediction == "eps":
        return snr
    if prediction == "v":
        return 1 + snr
    return posterior_weight**2 if prediction == "posterior_mean" else torch.ones_like(snr)
