"""Every step of every sampler equals that of diffusers' scheduler of the same name.

A recording network stands in for the denoiser: what it is called with is the sampler's every x_t. Their scheduler is then led along
that path, and from our x_t and the same output must take the very next step. Both take alpha_bar from one table of float64.
"""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

from components.diffusion.config import DiffusionConfig
from components.diffusion.noise import initial_noise
from components.diffusion.recipe import Recipe, Spacing, Threshold, Variance
from components.diffusion.samplers import Level, noise_levels
from components.diffusion.sampling import sample
from components.diffusion.schedule import Schedule

THEIR_BETAS = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
THEIR_PREDICTION = {"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}
MODELS = list(product(THEIR_BETAS, THEIR_PREDICTION))
LENGTHS: list[tuple[int, Threshold]] = [(10, "none"), (10, "dynamic"), *((steps, "clip") for steps in (1, 2, 3, 10, 20, 50))]
SEEDS, SHAPE = (3, 8), (3, 8, 8)

Step = Callable[[torch.Tensor, Level, Level | None, torch.Tensor], torch.Tensor]


def make_schedule(betas: str, prediction: str) -> Schedule:
    return Schedule(DiffusionConfig.model_validate({"betas": betas, "prediction": prediction}))


def their_settings(betas: str, prediction: str, threshold: Threshold) -> dict[str, Any]:
    """Returns settings that all their schedulers share: dynamic thresholding with a ceiling of 1 is clipping, with none it is Imagen's."""
    ceiling = 1.0 if threshold == "clip" else 1e9
    settings = {"num_train_timesteps": 1000, "beta_schedule": THEIR_BETAS[betas], "prediction_type": THEIR_PREDICTION[prediction]}
    return {**settings, "thresholding": threshold != "none", "sample_max_value": ceiling}


class RecordingNetwork:
    """A network that is neither linear nor perfect, and all that it was asked and answered."""

    def __init__(self) -> None:
        self.calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        output = torch.tanh(x_t.roll(1, -1) * 0.9 + t.view(-1, 1, 1, 1) / 1000) + 0.3 * x_t
        self.calls.append((x_t.clone(), output.clone()))
        return output


def assert_every_step_equals(schedule: Schedule, recipe: Recipe, step: Step) -> None:
    """Asserts that from each of our x_t `step(output, now, then, x_t)` leads to our next one, and at last to our x_0."""
    network = RecordingNetwork()
    x_0 = sample(network, schedule, SEEDS, SHAPE, recipe)
    levels = noise_levels(recipe, schedule)
    path = [*(x_t for x_t, _ in network.calls), x_0]
    assert len(network.calls) == recipe.steps
    assert torch.equal(path[0], initial_noise(SEEDS, SHAPE))
    for index, (x_t, output) in enumerate(network.calls):
        now, then = levels[index], levels[index + 1] if index + 1 < len(levels) else None
        expected = step(output.double(), now, then, x_t.double()).double()
        # float32 rounds where an estimate of eps is divided by alpha, and a multistep method still uses the estimates of two levels before.
        amplified = (then.alpha if then else 1) / levels[max(0, index - 2)].alpha if schedule.prediction == "eps" else 1
        scale = max(1.0, float(expected.abs().max()), float(x_t.abs().max()), amplified)
        torch.testing.assert_close(path[index + 1].double(), expected, rtol=0, atol=1e-6 * scale)


@pytest.fixture
def ddpm_noise(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Gives DDPMScheduler, which draws its own noise, the noise that is in this list."""
    noise: list[torch.Tensor] = []
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: noise[-1])
    return noise


def noise_of(level: Level, then: Level | None) -> torch.Tensor:
    """Returns a step's fresh noise; the last step has none (DDPM algorithm 2), not even where it starts at t > 0."""
    noise = initial_noise(SEEDS, SHAPE, level.index + 1).double()
    return noise if then is not None else torch.zeros_like(noise)


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize(("betas", "prediction"), MODELS)
def test_every_ancestral_step_equals_diffusers(betas: str, prediction: str, variance: Variance, ddpm_noise: list[torch.Tensor]):
    schedule = make_schedule(betas, prediction)
    for steps, threshold in LENGTHS:
        recipe = Recipe("ancestral", steps, variance=variance, threshold=threshold)
        theirs: Any = DDPMScheduler(**their_settings(betas, prediction, threshold), variance_type=f"fixed_{variance}", clip_sample=False)
        theirs.alphas_cumprod = schedule.alpha_bar
        theirs.set_timesteps(timesteps=[level.t for level in noise_levels(recipe, schedule)])

        def step(output: torch.Tensor, now: Level, then: Level | None, x_t: torch.Tensor, theirs: Any = theirs) -> torch.Tensor:
            ddpm_noise.append(noise_of(now, then))
            return theirs.step(output, now.t, x_t).prev_sample

        assert_every_step_equals(schedule, recipe, step)


@pytest.mark.parametrize("spacing", ["uniform", "quadratic"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("betas", "prediction"), MODELS)
def test_every_ddim_step_equals_diffusers(betas: str, prediction: str, eta: float, spacing: Spacing):
    schedule = make_schedule(betas, prediction)
    for steps, threshold in LENGTHS if spacing == "uniform" else [(10, "clip")]:
        theirs: Any = DDIMScheduler(**their_settings(betas, prediction, threshold), clip_sample=False)
        theirs.alphas_cumprod = schedule.alpha_bar

        def step(output: torch.Tensor, now: Level, then: Level | None, x_t: torch.Tensor, theirs: Any = theirs) -> torch.Tensor:
            # diffusers strides by num_train_timesteps // num_inference_steps; ask it for exactly our pair of time steps.
            theirs.register_to_config(num_train_timesteps=now.t - (then.t if then else -1))
            theirs.num_inference_steps = 1
            return theirs.step(output, now.t, x_t, eta=eta, use_clipped_model_output=True, variance_noise=noise_of(now, then)).prev_sample

        assert_every_step_equals(schedule, Recipe("ddim", steps, spacing, eta, threshold=threshold), step)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers")
@pytest.mark.parametrize(
    ("recipe", "scheduler", "options"),
    [
        (
            Recipe("dpmpp_2m"),
            DPMSolverMultistepScheduler,
            {"algorithm_type": "dpmsolver++", "solver_type": "midpoint", "lower_order_final": True},
        ),
        (Recipe("unipc"), UniPCMultistepScheduler, {"solver_type": "bh2", "predict_x0": True}),
    ],
    ids=["dpmpp_2m", "unipc"],
)
@pytest.mark.parametrize(("betas", "prediction"), MODELS)
def test_every_multistep_step_equals_diffusers(betas: str, prediction: str, recipe: Recipe, scheduler: Any, options: dict[str, Any]):
    schedule = make_schedule(betas, prediction)
    for steps, threshold in LENGTHS:
        wanted = Recipe(recipe.sampler, steps, threshold=threshold)
        levels = noise_levels(wanted, schedule)
        theirs: Any = scheduler(
            **their_settings(betas, prediction, threshold), **options, solver_order=2, final_sigmas_type="zero", timestep_spacing="linspace"
        )
        theirs.set_timesteps(steps)
        assert theirs.timesteps.tolist() == [level.t for level in levels]
        ratios = torch.tensor([*(level.sigma / level.alpha for level in levels), 0.0], dtype=torch.float64)
        torch.testing.assert_close(theirs.sigmas.double(), ratios, rtol=3e-3, atol=0)
        theirs.sigmas = ratios

        def step(output: torch.Tensor, now: Level, then: Level | None, x_t: torch.Tensor, theirs: Any = theirs) -> torch.Tensor:
            return theirs.step(output, now.t, x_t).prev_sample

        assert_every_step_equals(schedule, wanted, step)
