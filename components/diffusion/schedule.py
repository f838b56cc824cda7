"""The forward process: betas, alpha_bar, and the conversions between eps, x_0 and v.

Tensors indexed by `t` (int64, 0..T-1, shape (B,)) broadcast over rows (B, ...) of any shape.
"""

import math

import torch

from .config import DiffusionConfig, Prediction


def linear_betas(num_steps: int) -> torch.Tensor:
    """Returns betas (T,), float64, rising from 1e-4 to 0.02 at T=1000, scaled by 1000/T otherwise (DDPM section 4)."""
    scale = 1000.0 / num_steps
    return torch.linspace(1e-4 * scale, 0.02 * scale, num_steps, dtype=torch.float64).clamp(max=0.999)


def cosine_betas(num_steps: int, offset: float = 0.008) -> torch.Tensor:
    """Returns betas (T,), float64, of the squared-cosine alpha_bar, at most 0.999 (Improved DDPM Eq. 17)."""
    edges = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    alpha_bar = torch.cos((edges + offset) / (1 + offset) * math.pi / 2) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


class Schedule:
    """Noise levels of a diffusion process, and the identities that hold between x_t, x_0, eps and v.

    Attributes:
        betas: (T,) float64.
        alpha_bar: (T,) float64, the cumulative product of 1 - betas.
    """

    def __init__(self, config: DiffusionConfig) -> None:
        make_betas = {"linear": linear_betas, "cosine": cosine_betas}[config.betas]
        self.prediction: Prediction = config.prediction
        self.num_steps = config.num_steps
        self.betas = make_betas(config.num_steps)
        self.alpha_bar = torch.cumprod(1 - self.betas, dim=0)

    def to(self, device: torch.device | str) -> "Schedule":
        """Moves the tables to a device, once, and returns the schedule."""
        self.betas, self.alpha_bar = self.betas.to(device), self.alpha_bar.to(device)
        return self

    def signal_and_noise(self, t: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), float32, each (B, 1, ...), to be multiplied with rows."""
        alpha_bar = self.alpha_bar[t].view(-1, *[1] * (like.ndim - 1))
        return alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float()

    def posterior_mean_weights(self, t: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the weights of x_0 and of x_t in the mean of q(x_{t-1} | x_t, x_0) (DDPM Eq. 7), float32, each (B, 1, ...); 1 and 0 at t = 0."""
        alpha_bar, beta = self.alpha_bar[t], self.betas[t]
        before = torch.where(t > 0, self.alpha_bar[(t - 1).clamp(min=0)], 1.0)
        weights = before.sqrt() * beta / (1 - alpha_bar), (1 - beta).sqrt() * (1 - before) / (1 - alpha_bar)
        of_x_0, of_x_t = (weight.float().view(-1, *[1] * (like.ndim - 1)) for weight in weights)
        return of_x_0, of_x_t

    def add_noise(self, x_0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Returns x_t ~ q(x_t | x_0) for the noise eps (DDPM Eq. 4)."""
        signal, noise = self.signal_and_noise(t, x_0)
        return signal * x_0 + noise * eps

    def target(self, x_0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Returns what the network should output at x_t: eps, x_0, v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0, or the mean of q(x_{t-1} | x_t, x_0)."""
        if self.prediction == "eps":
            return eps
        if self.prediction == "x_0":
            return x_0
        if self.prediction == "posterior_mean":
            of_x_0, of_x_t = self.posterior_mean_weights(t, x_0)
            return of_x_0 * x_0 + of_x_t * self.add_noise(x_0, eps, t)
        signal, noise = self.signal_and_noise(t, x_0)
        return signal * eps - noise * x_0

    def predict_x_0(self, output: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Returns the network's estimate of x_0 from its output at x_t (DDPM Eq. 15; Progressive Distillation app. D)."""
        if self.prediction == "x_0":
            return output
        if self.prediction == "posterior_mean":
            of_x_0, of_x_t = self.posterior_mean_weights(t, x_t)
            return (output - of_x_t * x_t) / of_x_0
        signal, noise = self.signal_and_noise(t, x_t)
        if self.prediction == "v":
            return signal * x_t - noise * output
        return (x_t - noise * output) / signal

    def eps_from_x_0(self, x_0: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Returns the noise that leads from x_0 to x_t: `add_noise` solved for eps."""
        signal, noise = self.signal_and_noise(t, x_t)
        return (x_t - signal * x_0) / noise
