"""The losses that are trained, one function each, and what the loss is at single noise levels."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch.nn.functional import mse_loss

from ..streams import Purpose
from .bound import bound_term, log_variance, split_output
from .noise import rows_of_noise
from .process import Process, per_row
from .reconstruction import Reconstruction, reconstruction_loss
from .schedule import Schedule

# (x_t (B, C, H, W), t (B,)) -> output (B, C, H, W); one that is told the class takes labels (B,) as a third argument.
Network = Callable[..., torch.Tensor]

BOUND_WEIGHT = 1e-3
"""lambda of L_hybrid (Improved DDPM Eq. 16)."""


def simple_loss(network: Network, process: Process, x_0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
    """Returns the mean squared error of the network's output at x_t, a float32 scalar: L_simple (DDPM Eq. 14), the loss of flow matching, that of EDM (Eq. 8).

    Args:
        network: may run under autocast.
        x_0: rows in the model's range, float32.
        eps: standard normal noise of the same shape, float32.
        labels: what the network is told of the classes, (B,) int64; nothing by default.
    """
    return mse_loss(_output(network, process, process.add_noise(x_0, eps, t), t, labels), process.target(x_0, eps, t))


def weighted_loss(
    network: Network, process: Process, x_0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns the mean of w(t) times the squared error, a float32 scalar; arguments like those of `simple_loss`."""
    weight, error = process.loss_weight(t), _output(network, process, process.add_noise(x_0, eps, t), t, labels) - process.target(x_0, eps, t)
    return (error.square() if weight is None else per_row(weight, error) * error.square()).mean()


def hybrid_loss(
    network: Network,
    process: Process,
    x_0: torch.Tensor,
    eps: torch.Tensor,
    t: torch.Tensor,
    labels: torch.Tensor | None = None,
    *,
    bin_width: float | None = None,
) -> torch.Tensor:
    """Returns L_hybrid = L_simple + 0.001 L_vlb, a float32 scalar; L_vlb trains the variances alone (Improved DDPM Eq. 16, in bits as in its code).

    Args:
        bin_width: distance of two values that x_0 can have; None for real numbers.
    """
    assert isinstance(process, Schedule)
    x_t, weight = process.add_noise(x_0, eps, t), process.loss_weight(t)
    output, fraction = split_output(_output(network, process, x_t, t, labels), learned_variance=True)
    error = (output - process.target(x_0, eps, t)).square()
    estimate = process.predict_x_0(output.detach(), x_t, t)
    bound = bound_term(process, x_0, x_t, t, estimate, log_variance(process, t, x_t, "learned", fraction), bin_width).mean()
    return (error if weight is None else per_row(weight, error) * error).mean() + BOUND_WEIGHT * process.num_steps * bound


def training_loss(process: Process, bin_width: float | None = None) -> Callable[..., torch.Tensor]:
    """Returns the loss that settings name: (network, process, x_0, eps, t, labels) -> a float32 scalar."""
    if isinstance(process, Reconstruction):
        return reconstruction_loss
    if process.config.learned_variance:
        return partial(hybrid_loss, bin_width=bin_width)
    return simple_loss if process.config.loss_weight == "simple" else weighted_loss


def _output(network: Network, process: Process, x_t: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    shown, time = process.network_inputs(x_t, t)
    return (network(shown, time) if labels is None else network(shown, time, labels)).float()


@torch.inference_mode()
def loss_by_timestep(
    network: Network, process: Process, x_0: torch.Tensor, times: Sequence[float], *, seed: int = 0, first_row: int = 0, batch_size: int = 256
) -> list[float]:
    """Returns the mean squared error of the network's output (L_simple, DDPM Eq. 14) over given rows at each of some times.

    A row meets the same noise at every time and in every call, so that curves of two networks differ by the networks only.

    Args:
        x_0: (N, C, H, W) images in -1..1, float32, on the device of network and process.
        times: as the process counts them, such as 0..T-1; for example its `times`.
        first_row: place of the first row among all, where they are measured in parts.
        batch_size: rows that the network sees together; no part of the result.

    Raises:
        ValueError: if there is no row, or a time step is out of range.
    """
    return losses_by_row(network, process, x_0, times, seed=seed, first_row=first_row, batch_size=batch_size).mean(dim=1).tolist()


@torch.inference_mode()
def losses_by_row(
    network: Network,
    process: Process,
    x_0: torch.Tensor,
    times: Sequence[float],
    *,
    seed: int = 0,
    first_row: int = 0,
    batch_size: int = 256,
    labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the squared errors (len(times), N), float64, on the CPU; arguments and errors like those of `loss_by_timestep`."""
    if isinstance(process, Schedule) and (wrong := [t for t in times if not 0 <= t < process.num_steps]):
        raise ValueError(f"timesteps={wrong} are out of range; use 0 to {process.num_steps - 1}")
    if not len(x_0):
        raise ValueError("x_0 holds no image; use at least one")
    losses = torch.empty(len(times), len(x_0), dtype=torch.float64)
    for start in range(0, len(x_0), batch_size):
        batch, given = x_0[start : start + batch_size], None if labels is None else labels[start : start + batch_size]
        places = range(first_row + start, first_row + start + len(batch))
        eps = rows_of_noise(Purpose.TIMESTEP_LOSS, seed, places, batch.shape[1:]).to(batch.device)
        for index, time in enumerate(times):
            t = torch.full((len(batch),), time, device=batch.device)
            output = split_output(_output(network, process, process.add_noise(batch, eps, t), t, given), process.config.learned_variance)[0]
            error = output.double() - process.target(batch, eps, t).double()
            losses[index, start : start + len(batch)] = error.square().flatten(1).mean(dim=1)
    return losses
