"""Every objective on data whose answer is known: a mixture of Gaussians in the plane."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from components.diffusion.config import DiffusionConfig
from components.diffusion.edm import Edm
from components.diffusion.flow import RectifiedFlow
from components.diffusion.objective import training_loss
from components.diffusion.process import Process, make_process
from components.diffusion.recipe import Recipe
from components.diffusion.sampling import sample
from components.diffusion.schedule import Schedule
from components.model.ema import Ema, warmed_up
from components.networks.point_mlp.network import PointMLP

pytestmark = pytest.mark.usefixtures("one_thread")

MEANS = torch.tensor([[-1.2, -0.4], [0.9, 1.0], [0.6, -0.9]], dtype=torch.float64)
SHARES = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
SPREAD = 0.25
COUNT = 4000

OBJECTIVES: list[dict[str, Any]] = [
    {"prediction": "eps"},
    {"prediction": "x_0"},
    {"prediction": "v"},
    {"prediction": "posterior_mean"},
    {"prediction": "v", "zero_terminal_snr": True},
    {"prediction": "v", "loss_weight": "min_snr"},
    {"prediction": "eps", "loss_weight": "p2"},
    {"prediction": "v", "learned_variance": True},
    {"process": "flow"},
    {"process": "edm", "data_deviation": 1.0},
]
IDS = [",".join(f"{key}={value}" for key, value in objective.items()) for objective in OBJECTIVES]


def process_of(objective: dict[str, Any]) -> Process:
    return make_process(DiffusionConfig.model_validate({"num_steps": 200, "betas": "cosine", **objective}))


def truth() -> tuple[np.ndarray, np.ndarray]:
    mean = (SHARES[:, None] * MEANS).sum(0)
    between = (SHARES[:, None, None] * ((MEANS - mean)[:, :, None] * (MEANS - mean)[:, None, :])).sum(0)
    return mean.numpy(), (between + SPREAD**2 * torch.eye(2)).numpy()


def expected_x_0(x: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
    """Returns E[x_0 | x] where x = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps, of the mixture."""
    x, alpha = x.double(), alpha_bar.double().view(-1, 1).sqrt()
    variance = alpha**2 * SPREAD**2 + 1 - alpha**2
    offsets = x[:, None, :] - alpha[:, :, None] * MEANS
    chances = torch.softmax(SHARES.log() - offsets.square().sum(2) / (2 * variance), dim=1)
    centres = MEANS + (alpha * SPREAD**2 / variance)[:, :, None] * offsets
    return (chances[:, :, None] * centres).sum(1).float()


def perfect(process: Process) -> Any:
    """Returns the network that outputs what it should for the mixture."""

    def network(shown: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        if isinstance(process, RectifiedFlow):
            t, x = told / 1000, shown
            level = ((1 - t) ** 2 / ((1 - t) ** 2 + t**2), ((1 - t) ** 2 + t**2).sqrt())
        elif isinstance(process, Edm):
            t = (4 * told).exp()
            x = shown / process.preconditioning(t.view(-1, 1))[2]
            level = (1 / (1 + t**2), (1 + t**2).sqrt())
        else:
            assert isinstance(process, Schedule)
            t, x = told, shown
            level = (process.alpha_bar[t], torch.ones(len(t)))
        alpha_bar, scale = level
        plain = x / scale.view(-1, 1)
        x_0 = expected_x_0(plain, alpha_bar)
        eps = ((plain - alpha_bar.view(-1, 1).sqrt() * x_0) / (1 - alpha_bar).view(-1, 1).sqrt()).float()
        output = process.target(x_0, eps, t)
        return torch.cat([output, torch.ones_like(output)], dim=1) if process.config.learned_variance else output

    return network


def check(drawn: np.ndarray, tolerance: float = 1.0) -> None:
    mean, covariance = truth()
    error = np.sqrt(np.diag(covariance) / COUNT)
    assert (np.abs(drawn.mean(0) - mean) < 4.5 * error * tolerance).all(), (drawn.mean(0), mean)
    products = (drawn - mean)[:, :, None] * (drawn - mean)[:, None, :]
    spread = products.std(0) / np.sqrt(COUNT)
    assert (np.abs(np.cov(drawn.T) - covariance) < 4.5 * spread * tolerance).all(), (np.cov(drawn.T), covariance)
    nearest = ((drawn[:, None, :] - MEANS.numpy()) ** 2).sum(2).argmin(1)
    shares = np.bincount(nearest, minlength=3) / COUNT
    assert (np.abs(shares - SHARES.numpy()) < 4.5 * tolerance * np.sqrt(0.25 / COUNT) + 0.01).all(), shares


@pytest.mark.parametrize("objective", OBJECTIVES, ids=IDS)
@pytest.mark.parametrize("sampler", ["ddim", "ancestral", "dpmpp_2m", "unipc", "heun"])
def test_the_exact_network_of_every_objective_draws_the_mixture_by_every_sampler(objective: dict[str, Any], sampler: Any):
    process = process_of(objective)
    variance: Any = "learned" if sampler == "ancestral" and process.config.learned_variance else "small"
    steps = {"ancestral": 200, "ddim": 100}.get(sampler, 60)
    drawn = sample(perfect(process), process, range(COUNT), (2,), Recipe(sampler, steps, variance=variance, threshold="none"))
    check(drawn.numpy().astype(np.float64), tolerance=1.5)


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES, ids=IDS)
def test_a_trained_network_of_every_objective_draws_the_mixture(objective: dict[str, Any]):
    # The last step of the cosine schedule leaves a thousandth of the signal: the least error of eps there is 30 times as large in x_{T-2}.
    process = process_of({"betas": "linear", **objective} if objective.get("prediction") == "eps" else objective)
    torch.manual_seed(0)
    draw, generator = np.random.default_rng(0), torch.Generator().manual_seed(1)
    network = PointMLP(dimensions=2, width=96, depth=3, outputs=2 if process.config.learned_variance else 1)
    ema = Ema(network, lambda step: warmed_up(0.999, step))
    optimizer, loss_of, steps = torch.optim.Adam(network.parameters(), lr=2e-3), training_loss(process), 4000
    for step in range(steps):
        kinds = torch.multinomial(SHARES, 512, replacement=True, generator=generator)
        x_0 = (MEANS[kinds] + SPREAD * torch.randn(512, 2, generator=generator, dtype=torch.float64)).float()
        t = torch.from_numpy(process.draw_times(draw, 512))
        loss = loss_of(network, process, x_0, torch.randn(512, 2, generator=generator), t)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / steps)
        optimizer.step()
        ema.update(network, torch.tensor(1 - ema.decay_at(step)))
    network.load_state_dict(ema.weights)
    recipe = Recipe("ancestral", 200, variance="learned" if process.config.learned_variance else "small", threshold="none")
    drawn = sample(network.eval(), process, range(COUNT), (2,), recipe if process.config.process == "ddpm" else Recipe("heun", 79, threshold="none"))
    check(drawn.numpy().astype(np.float64), tolerance=2.0)
