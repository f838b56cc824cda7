from itertools import product
from typing import get_args

import numpy as np
import pytest
import torch

from components.diffusion.config import DiffusionConfig, Prediction
from components.diffusion.objective import loss_by_timestep, simple_loss
from components.diffusion.schedule import Schedule
from components.streams import Purpose, stream

PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)


def draws() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.rand(6, 1, 4, 4, generator=generator) * 2 - 1
    return x_0, torch.randn(x_0.shape, generator=generator), torch.tensor([0, 1, 250, 500, 900, 998])


@pytest.mark.parametrize(("betas", "prediction"), list(product(["linear", "cosine"], PREDICTIONS)))
def test_a_perfect_network_has_no_loss_and_gives_back_the_image(betas: str, prediction: Prediction):
    schedule = Schedule(DiffusionConfig.model_validate({"betas": betas, "prediction": prediction}))
    x_0, eps, t = draws()
    target = schedule.target(x_0, eps, t)
    assert simple_loss(lambda x_t, t: target, schedule, x_0, eps, t) == 0
    recovered = schedule.predict_x_0(target, schedule.add_noise(x_0, eps, t), t)
    torch.testing.assert_close(recovered, x_0, rtol=2e-3, atol=2e-3)


def test_the_posterior_mean_is_the_product_of_both_gaussians_that_it_is_made_of():
    """q(x_{t-1} | x_t, x_0) is q(x_{t-1} | x_0) times the likelihood of x_t, normalised: its mean weighs both by their precision (DDPM Eq. 6-7)."""
    schedule = Schedule(DiffusionConfig(prediction="posterior_mean"))
    x_0, eps, t = (values[1:] for values in draws())
    x_t = schedule.add_noise(x_0, eps, t)
    beta, before = (table.view(-1, 1, 1, 1) for table in (schedule.betas[t], schedule.alpha_bar[t - 1]))
    forward, prior = (1 - beta) / beta, 1 / (1 - before)
    mean = (prior * before.sqrt() * x_0 + forward * x_t / (1 - beta).sqrt()) / (prior + forward)
    torch.testing.assert_close(schedule.target(x_0, eps, t).double(), mean, rtol=1e-5, atol=1e-6)
    first = torch.zeros(5, dtype=torch.int64)
    torch.testing.assert_close(schedule.target(x_0, eps, first), x_0)


def test_eps_is_what_add_noise_added():
    schedule = Schedule(DiffusionConfig())
    x_0, eps, t = draws()
    torch.testing.assert_close(schedule.eps_from_x_0(x_0, schedule.add_noise(x_0, eps, t), t), eps, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("betas", ["linear", "cosine"])
@pytest.mark.parametrize("num_steps", [50, 1000])
def test_almost_nothing_of_the_image_is_left_at_the_end(betas: str, num_steps: int):
    schedule = Schedule(DiffusionConfig.model_validate({"betas": betas, "num_steps": num_steps}))
    assert schedule.alpha_bar[-1] < 1e-3
    assert torch.all(schedule.alpha_bar.diff() < 0)


def toy_network(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x_t * 1.3 + t.view(-1, 1, 1, 1) / 1000)


def perfect_network(schedule: Schedule, x_0: torch.Tensor):
    """Returns a network that knows its one image, (1, C, H, W), and so the target at every x_t."""

    def network(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return schedule.target(x_0, schedule.eps_from_x_0(x_0, x_t, t), t)

    return network


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_network_has_no_loss_at_any_timestep(prediction: Prediction):
    schedule = Schedule(DiffusionConfig(prediction=prediction))
    x_0 = draws()[0][:1].expand(5, -1, -1, -1)
    losses = loss_by_timestep(perfect_network(schedule, x_0[:1]), schedule, x_0, [0, 10, 500, 999])
    assert max(losses) < 1e-9


def test_a_network_that_says_nothing_loses_the_mean_square_of_the_noise_alike_at_every_timestep():
    x_0 = torch.zeros(64, 1, 16, 16)
    losses = loss_by_timestep(lambda x_t, t: torch.zeros_like(x_t), Schedule(DiffusionConfig()), x_0, [0, 500, 999])
    assert losses[0] == losses[1] == losses[2] == pytest.approx(1, abs=5 * np.sqrt(2 / x_0.numel()))


def test_a_network_that_says_nothing_loses_the_mean_square_of_the_image():
    x_0 = draws()[0]
    [loss] = loss_by_timestep(lambda x_t, t: torch.zeros_like(x_t), Schedule(DiffusionConfig(prediction="x_0")), x_0, [700])
    assert loss == pytest.approx(float(x_0.double().square().mean()), rel=1e-12)


def test_the_loss_of_a_timestep_is_no_matter_of_batches_parts_or_other_timesteps():
    schedule, x_0, timesteps = Schedule(DiffusionConfig()), torch.rand(10, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1, [0, 37, 999]
    whole = loss_by_timestep(toy_network, schedule, x_0, timesteps)
    assert len(set(whole)) == 3
    for batch_size in (1, 3, 10):
        assert loss_by_timestep(toy_network, schedule, x_0, timesteps, batch_size=batch_size) == whole
    assert [loss_by_timestep(toy_network, schedule, x_0, [t])[0] for t in timesteps] == whole
    parts = [loss_by_timestep(toy_network, schedule, x_0[first : first + 5], timesteps, first_row=first) for first in (0, 5)]
    np.testing.assert_allclose(np.mean(parts, axis=0), whole, rtol=1e-12)
    assert loss_by_timestep(toy_network, schedule, x_0, timesteps, seed=1) != whole


def test_the_loss_of_a_timestep_is_the_trained_loss_there():
    schedule, x_0 = Schedule(DiffusionConfig(prediction="v")), draws()[0]
    eps = torch.from_numpy(np.stack([stream(Purpose.TIMESTEP_LOSS, 3, row).standard_normal((1, 4, 4), dtype=np.float32) for row in range(6)]))
    for t, loss in zip((5, 800), loss_by_timestep(toy_network, schedule, x_0, [5, 800], seed=3), strict=True):
        assert loss == pytest.approx(float(simple_loss(toy_network, schedule, x_0, eps, torch.full((6,), t))), rel=1e-6)


@pytest.mark.parametrize(
    ("count", "timesteps", "message"), [(2, [0, 1000, -1], r"timesteps=\[1000, -1\] are out of range; use 0 to 999"), (0, [0], "no image")]
)
def test_a_loss_of_nothing_is_refused(count: int, timesteps: list[int], message: str):
    with pytest.raises(ValueError, match=message):
        loss_by_timestep(toy_network, Schedule(DiffusionConfig()), torch.zeros(count, 1, 4, 4), timesteps)
