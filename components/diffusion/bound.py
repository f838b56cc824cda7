"""The variational bound on the negative log-likelihood, with fixed or learned variances of the reverse process."""

import math
from collections.abc import Callable, Sequence

import torch

from ..streams import Purpose
from .noise import rows_of_noise
from .process import per_row
from .recipe import Variance
from .schedule import Schedule

LAST_BIN = 0.999
"""|x_0| from which on a value is the first or last of its kind, whose bin has no outer edge (DDPM Eq. 13)."""
LEAST_PROBABILITY = 1e-12


def gaussian_kl(mean_1: torch.Tensor, log_variance_1: torch.Tensor, mean_2: torch.Tensor, log_variance_2: torch.Tensor) -> torch.Tensor:
    """Returns KL(N(mean_1, variance_1) || N(mean_2, variance_2)) of each coordinate, nats."""
    return 0.5 * (-1.0 + log_variance_2 - log_variance_1 + (log_variance_1 - log_variance_2).exp() + (mean_1 - mean_2).square() * (-log_variance_2).exp())


def gaussian_nll(x_0: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """Returns -log N(x_0; mean, variance) of each coordinate, nats."""
    return 0.5 * (math.log(2 * math.pi) + log_variance + (x_0 - mean).square() * (-log_variance).exp())


def binned_nll(x_0: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor, bin_width: float) -> torch.Tensor:
    """Returns the negative logarithm of the normal probability of the bin around x_0, nats; the outer bins reach to infinity (DDPM Eq. 13).

    Args:
        bin_width: distance of two values that x_0 can have, 2/255 for bytes.
    """
    precision = (-0.5 * log_variance).exp()
    above, below = (torch.special.ndtr((x_0 - mean + side * bin_width / 2) * precision) for side in (1, -1))
    probability = torch.where(x_0 < -LAST_BIN, above, torch.where(x_0 > LAST_BIN, 1 - below, above - below))
    return -probability.clamp(min=LEAST_PROBABILITY).log()


def log_variance(schedule: Schedule, t: torch.Tensor, like: torch.Tensor, variance: Variance, fraction: torch.Tensor | None = None) -> torch.Tensor:
    """Returns the logarithm of the variance of p(x_{t-1} | x_t), float32: a bound of it, or between both as the network says (Improved DDPM Eq. 15).

    Args:
        fraction: the network's further outputs, of x_t's shape; -1 is the lower bound, 1 the upper one.
    """
    small, large = (per_row(bound.log(), like) for bound in schedule.posterior_variances(t))
    if variance == "learned" and fraction is not None:
        share = (fraction + 1) / 2
        return share * large + (1 - share) * small
    return large if variance == "large" else small


def bound_term(
    schedule: Schedule, x_0: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, estimate: torch.Tensor, model_log_variance: torch.Tensor, bin_width: float | None
) -> torch.Tensor:
    """Returns L_{t-1} of the bound, or L_0 at t = 0 (DDPM Eq. 5, Improved DDPM Eq. 5-6), bits per coordinate, (B,).

    Args:
        estimate: of x_0, at x_t.
        model_log_variance: of p(x_{t-1} | x_t).
        bin_width: distance of two values that x_0 can have; None for real numbers, whose density is taken.
    """
    of_x_0, of_x_t = schedule.posterior_mean_weights(t, x_t)
    mean, true_mean = of_x_0 * estimate + of_x_t * x_t, of_x_0 * x_0 + of_x_t * x_t
    divergence = gaussian_kl(true_mean, log_variance(schedule, t, x_t, "small"), mean, model_log_variance.expand_as(mean))
    given = model_log_variance.expand_as(mean)
    decoded = gaussian_nll(x_0, mean, given) if bin_width is None else binned_nll(x_0, mean, given, bin_width)
    bits = torch.where(per_row(t, x_t) == 0, decoded, divergence) / math.log(2)
    return bits.flatten(1).mean(dim=1)


def prior_term(schedule: Schedule, x_0: torch.Tensor) -> torch.Tensor:
    """Returns L_T, the divergence of q(x_T | x_0) from standard normal noise (DDPM Eq. 5), bits per coordinate, (B,)."""
    signal, noise = schedule.signal_and_noise(torch.full((len(x_0),), schedule.num_steps - 1, device=x_0.device), x_0)
    zero = torch.zeros_like(x_0)
    return gaussian_kl(signal * x_0, (noise.square().log()).expand_as(x_0), zero, zero).flatten(1).mean(dim=1) / math.log(2)


@torch.inference_mode()
def bits_per_dimension(
    network: Callable[..., torch.Tensor],
    schedule: Schedule,
    x_0: torch.Tensor,
    *,
    bin_width: float | None,
    variance: Variance = "small",
    rows: Sequence[int] | None = None,
    seed: int = 0,
    labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the variational bound on -log2 p(x_0) per coordinate, (B,) float64, all T terms, each at one draw of its noise (Improved DDPM section 3).

    Args:
        x_0: (B, ...) float32 on the device of network and schedule.
        bin_width: distance of two values that x_0 can have; None for real numbers, of which it is the density's.
        variance: of the reverse process; `learned` for a network that says it.
        rows: place of each row among all that are measured, which decides its noise; 0 to B-1 by default.
    """
    total = prior_term(schedule, x_0).double()
    places = list(rows) if rows is not None else list(range(len(x_0)))
    for step in range(schedule.num_steps):
        t = torch.full((len(x_0),), step, device=x_0.device)
        eps = rows_of_noise(Purpose.BOUND, seed, places, x_0.shape[1:], step).to(x_0.device)
        x_t = schedule.add_noise(x_0, eps, t)
        output = (network(x_t, t) if labels is None else network(x_t, t, labels)).float()
        output, fraction = split_output(output, schedule.config.learned_variance)
        estimate = schedule.predict_x_0(output, x_t, t)
        total += bound_term(schedule, x_0, x_t, t, estimate, log_variance(schedule, t, x_t, variance, fraction), bin_width).double()
    return total


def split_output(output: torch.Tensor, learned_variance: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns what a network predicts, and what it says of the variance; None of the latter where it says nothing."""
    if not learned_variance:
        return output, None
    prediction, fraction = output.chunk(2, dim=1)
    return prediction, fraction
