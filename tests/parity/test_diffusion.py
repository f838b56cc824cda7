"""Betas and noising equal those of diffusers' schedulers; test_samplers.py compares the samplers."""

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from components.diffusion.config import DiffusionConfig
from components.diffusion.schedule import Schedule

THEIR_BETAS = {"linear": "linear", "cosine": "squaredcos_cap_v2"}


def draws() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(4, 3, 8, 8, generator=generator) * 2 - 1, torch.randn(4, 3, 8, 8, generator=generator)


@pytest.mark.parametrize("betas", THEIR_BETAS)
def test_noising_equals_diffusers(betas: str):
    schedule = Schedule(DiffusionConfig.model_validate({"betas": betas}))
    theirs: Any = DDPMScheduler(num_train_timesteps=1000, beta_schedule=THEIR_BETAS[betas])
    x_0, eps = draws()
    t = torch.tensor([0, 10, 500, 990])
    torch.testing.assert_close(schedule.betas.float(), theirs.betas, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(schedule.add_noise(x_0, eps, t), theirs.add_noise(x_0, eps, t), rtol=1e-4, atol=1e-4)
