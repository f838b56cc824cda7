"""Betas, noising and sampler steps equal those of diffusers' schedulers."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from components.diffusion.samplers import ancestral_step, ddim_step, spaced_timesteps
from components.diffusion.schedule import DiffusionConfig, Prediction, Schedule

THEIR_BETAS = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
THEIR_PREDICTION = {"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}


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


@pytest.mark.parametrize("prediction", THEIR_PREDICTION)
@pytest.mark.parametrize("betas", THEIR_BETAS)
@pytest.mark.parametrize("steps", [10, 50, 1000])
def test_every_ddim_step_equals_diffusers(prediction: Prediction, betas: str, steps: int):
    schedule = Schedule(DiffusionConfig.model_validate({"betas": betas, "prediction": prediction}))
    theirs: Any = DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule=THEIR_BETAS[betas],
        prediction_type=THEIR_PREDICTION[prediction],
        clip_sample=True,
        set_alpha_to_one=True,
        timestep_spacing="linspace",
    )
    theirs.set_timesteps(steps)
    timesteps = spaced_timesteps(1000, steps)
    x_t, output = draws()
    if steps == 1000:
        assert timesteps == theirs.timesteps.tolist()
    for t, t_next in list(pairwise([*timesteps, -1]))[:: max(1, steps // 10)]:
        x_0 = schedule.predict_x_0(output, x_t, torch.full((1,), t)).clamp(-1, 1)
        # diffusers takes num_train_timesteps // num_inference_steps as its stride; ask it for exactly our pair of time steps.
        theirs.register_to_config(num_train_timesteps=t - t_next)
        theirs.num_inference_steps = 1
        expected = theirs.step(output, t, x_t, use_clipped_model_output=True).prev_sample
        torch.testing.assert_close(ddim_step(schedule, x_0, x_t, t, t_next), expected, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("prediction", THEIR_PREDICTION)
def test_every_ancestral_step_equals_diffusers(prediction: Prediction):
    schedule = Schedule(DiffusionConfig(prediction=prediction))
    theirs: Any = DDPMScheduler(num_train_timesteps=1000, prediction_type=THEIR_PREDICTION[prediction], clip_sample=True, variance_type="fixed_small")
    x_t, output = draws()
    for t in (999, 700, 300, 20, 1):
        x_0 = schedule.predict_x_0(output, x_t, torch.full((1,), t)).clamp(-1, 1)
        noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(t))
        expected = theirs.step(output, t, x_t, generator=torch.Generator().manual_seed(t)).prev_sample
        torch.testing.assert_close(ancestral_step(schedule, x_0, x_t, t, t - 1, noise), expected, rtol=1e-3, atol=1e-4)
